"""Spans: decoding over windows is a search over all spans, measures are SQuAD's, the loss is transformers' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from squad_case import write_squad
from toy import as_spans, toy_examples, toy_extractor

from fedtailor.core.seeding import numpy_rng
from fedtailor.evaluation.spans import LONGEST, N_BEST, answer, best_spans, measures, score
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.loss import lane_losses, whole_losses
from fedtailor.models.embedded import build_wordpiece
from fedtailor.tasks.task import prepare, task_config
from fedtailor.tasks.tokens import tokenise
from fedtailor.tasks.windows import Question


def windows_of(question: Question, rng: np.random.Generator) -> tuple[Question, list[np.ndarray]]:
    """A document of 200 words in windows of 60 with 20 shared, behind 5 tokens of the question; random scores."""
    place = np.cumsum([0] + [len(word) + 1 for word in question.context.split(" ")])
    characters = np.stack([place[:-1], place[1:] - 1], 1)
    for at in range(0, len(characters) - 20, 40):
        question.rows.append(len(question.rows))
        question.starts.append(5)
        question.characters.append(characters[at : at + 60])
    scores = [rng.normal(size=(2, 5 + len(own) + 3)).astype(np.float32) for own in question.characters]
    return question, scores


def brute(question: Question, scores: list[np.ndarray], unanswerable: bool) -> str:
    best, text = -np.inf, ""
    for own, first, characters in zip(scores, question.starts, question.characters, strict=True):
        for i in range(len(characters)):
            for j in range(i, min(i + 30, len(characters))):
                if (value := float(own[0, first + i]) + float(own[1, first + j])) > best:
                    best, text = value, question.context[characters[i, 0] : characters[j, 1]]
    null = min(float(own[0, 0]) + float(own[1, 0]) for own in scores)
    return "" if unanswerable and null > best else text


def test_decoding_is_a_search_over_all_spans_of_long_documents() -> None:
    rng = numpy_rng("spans")
    found = []
    for number in range(50):
        words = [f"w{number}x{k}" for k in range(200)]
        question, scores = windows_of(Question("q", " ".join(words), ()), rng)
        assert len(question.rows) == 5
        if number % 2:
            for own in scores:
                own[:, 0] += 4  # many of the nulls win
        found.append([answer(question, scores, flag) for flag in (False, True)])
        assert found[-1] == [brute(question, scores, flag) for flag in (False, True)]
        assert 1 <= len(found[-1][0].split()) <= LONGEST
    assert 0 < sum(not text for _, text in found) < 40


def test_the_best_spans_are_in_order_and_legal() -> None:
    start, end = numpy_rng("best").normal(size=(2, 50)).astype(np.float32)
    found = best_spans(start, end)
    assert len(found) == N_BEST
    assert [value for value, *_ in found] == sorted((value for value, *_ in found), reverse=True)
    assert all(0 <= j - i < LONGEST and value == pytest.approx(start[i] + end[j], abs=1e-6) for value, i, j in found)
    assert [(i, j) for _, i, j in best_spans(start[:1], end[:1])] == [(0, 0)]
    assert best_spans(start[:0], end[:0]) == []


def test_blanks_are_no_answer_but_the_next_best_is() -> None:
    question = Question("q", "a  b", (), [0], [1], [np.array([[0, 1], [1, 3], [3, 4]])])
    scores = np.array([[0, 1, 9, 0], [0, 1, 9, 0]], np.float32)
    assert answer(question, [scores], True) == "a"  # tokens 0 and 1 together: 10
    assert answer(Question("q", "", (), [0], [1], [np.empty((0, 2), np.int64)]), [scores], False) == ""


REFERENCES = [["Rhine", "the Rhine river"], ["10th century"], [], [], ["a b c"]]
CASES = [
    (["The rhine!", "century", "", "x", "b c d"], [1, 0, 1, 0, 0], [1, 2 / 3, 1, 0, 4 / 5]),
    (["river", "in the 10th century", "the", "", ""], [0, 0, 1, 1, 0], [2 / 3, 4 / 5, 1, 1, 0]),
]
"""Answers, and exact match and F1 by hand; articles do not count: "the" is nothing, "a b c" is two words."""


@pytest.mark.parametrize(("answers", "exact", "f1"), CASES, ids=["mixed", "others"])
def test_measures_are_squads_and_pool_over_clients(answers: list[str], exact: list[int], f1: list[float]) -> None:
    for k, text in enumerate(answers):
        own = measures([text], REFERENCES[k : k + 1])
        assert own["exact_match"] == exact[k]
        assert own["f1"] == pytest.approx(f1[k], abs=1e-6)
    whole, parts = measures(answers, REFERENCES), [measures(answers[s], REFERENCES[s]) for s in (slice(2), slice(2, 5))]
    for name, value in whole.items():
        assert value == pytest.approx((2 * parts[0][name] + 3 * parts[1][name]) / 5, abs=1e-6)


def test_measures_of_500_answers_are_torchmetrics(tmp_path: Path) -> None:
    from torchmetrics.text import SQuAD

    rng = numpy_rng("answers")
    words = ["the", "Rhine", "in", "1066", "a", "king", "Essen,", "west"]
    references = [[" ".join(rng.choice(words, 3)) for _ in range(rng.integers(1, 4))] for _ in range(500)]
    answers = [" ".join(rng.choice(words, rng.integers(0, 4))) if rng.random() < 0.7 else own[0] for own in references]
    metric = SQuAD()
    for k, (text, own) in enumerate(zip(answers, references, strict=True)):
        target = {"answers": {"text": own, "answer_start": [0] * len(own)}, "id": str(k)}
        metric.update([{"prediction_text": text, "id": str(k)}], [target])
    for name, value in metric.compute().items():
        assert 0.3 < measures(answers, references)[name] < 0.9
        assert measures(answers, references)[name] == pytest.approx(float(value) / 100, abs=1e-6)


def test_the_loss_is_transformers_own_and_no_matter_of_padding() -> None:
    net = toy_extractor()
    own = as_spans(toy_examples("a", 6), "a")
    short = np.flatnonzero(own.lengths == own.lengths.min())[:1]
    for rows in (short, np.arange(6)):
        batch = make_batch([own], [rows], 0)
        alone = []
        for row in rows:
            ids = torch.from_numpy(own.input_ids[row : row + 1, : own.lengths[row]])
            start, end = torch.from_numpy(own.spans[row : row + 1]).T
            net.unbind()
            alone.append(net.model(input_ids=ids, start_positions=start, end_positions=end).loss)
        wanted = torch.stack(alone).mean()
        torch.testing.assert_close(lane_losses(net, batch)[0], wanted)
        torch.testing.assert_close(whole_losses(net, batch)[0], wanted)
    assert batch.labels.shape == (1, 12)
    assert batch.target_row[0].tolist() == [row for row in range(6) for _ in range(2)]


def test_a_models_scores_end_in_measures_of_its_questions(tmp_path: Path) -> None:
    """A model that was told the spans answers every question rightly."""
    cfg = task_config("squad", path=str(write_squad(tmp_path / "train-v2.0.json")), subset="v2")
    data = prepare(cfg, 42, tmp_path / "data")
    tokens = tokenise(data, build_wordpiece(data.train_texts(), 300, 32), 32, tmp_path / "tokens", stride=8)
    clients = [client.id for client in tokens.clients]
    tests, asked = [tokens.examples(c, "test") for c in clients], [tokens.asked(c) for c in clients]

    def told(batch):
        return torch.nn.functional.one_hot(batch.labels, batch.input_ids.shape[2]).float() * 20

    for one, questions in zip(score(told, tests, asked, 0, 256, unanswerable=True), asked, strict=True):
        share = np.mean([not q.answers for q in questions])
        assert one.measures == {"exact_match": 1.0, "f1": 1.0, "no_answer": share}
        assert one.answers == tuple(next(iter(q.answers), "") for q in questions)
        assert 0 <= one.loss < 1e-6
    forced = score(told, tests, asked, 0, 256, unanswerable=False)
    assert all("no_answer" not in one.measures and one.windows == len(t) for one, t in zip(forced, tests, strict=True))
    assert min(one.measures["f1"] for one in forced) < 1, "a question without an answer gets one"
