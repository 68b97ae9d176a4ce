"""Spans: the loss, the answers that a model's scores stand for, and their exact match and F1, per lane.

A span's score is that of its first token as a start plus that of its last as an end (Devlin et al., 2019). All spans of
all windows of a question compete, of tokens of the context and at most `LONGEST` of them: a search over `N_BEST` starts
and ends, as in transformers' examples, finds the same where it does not lose the best. That there is no answer scores
what the token that begins a text does, at its least over the windows, and wins where that is above the best span's; of
data in which every question has an answer it does not take part. The answer is cut out of the context by characters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fedtailor.lanes.batches import Examples, LaneBatch, scoring_batches
from fedtailor.tasks.windows import Question

Floats = npt.NDArray[np.float32]

N_BEST: Final = 20
"""Spans of a question that are looked at, best first, for one that is more than blanks."""

LONGEST: Final = 30
"""Most tokens of an answer."""


@dataclass(frozen=True)
class Marked:
    """A lane's test questions.

    Args:
        measures: ``exact_match`` and ``f1``, each in [0, 1], means over questions; of data with questions that have no
            answer also ``no_answer``, which is both of them for answering none at all.
        loss: mean cross-entropy in nats, over the first and last tokens of all windows.
        windows: how many there are.
        answers: of each question, empty where there should be none.
    """

    measures: dict[str, float]
    loss: float
    windows: int
    answers: tuple[str, ...]


@torch.no_grad()
def score(
    logits: Callable[[LaneBatch], Tensor],
    tests: Sequence[Examples],
    asked: Sequence[Sequence[Question]],
    pad_id: int,
    token_budget: int,
    device: torch.device | str = "cpu",
    unanswerable: bool = False,
) -> list[Marked]:
    """Scores every lane on its own test questions.

    Args:
        logits: (k, 2 b, T) of a batch over the lanes.
        tests: windows of each lane.
        asked: questions of each lane, by its windows.
        pad_id: padding token.
        token_budget: tokens of one step over all lanes.
        device: where batches go.
        unanswerable: some questions of the data have no answer.
    """
    losses, found = np.zeros(len(tests)), [[np.empty((2, 0), np.float32)] * len(t) for t in tests]
    for batch, indices in scoring_batches(tests, pad_id, token_budget, device):
        scores = logits(batch)
        each = functional.cross_entropy(scores.flatten(0, 1), batch.labels.flatten(), reduction="none")
        each = each.view(batch.labels.shape).double().cpu()
        pairs = scores.reshape(len(scores), -1, 2, scores.shape[-1]).float().cpu().numpy()
        for lane, index in enumerate(indices):
            losses[lane] += float(each[lane, : 2 * len(index)].sum())
            for at, row in enumerate(index.tolist()):
                found[lane][row] = pairs[lane, at]
    marked = []
    for lane, questions in enumerate(asked):
        answers = tuple(answer(q, [found[lane][row] for row in q.rows], unanswerable) for q in questions)
        values = measures(answers, [q.answers for q in questions])
        if unanswerable:
            values["no_answer"] = float(np.mean([not q.answers for q in questions]))
        marked.append(Marked(values, losses[lane] / (2 * len(tests[lane])), len(tests[lane]), answers))
    return marked


def measures(answers: Sequence[str], references: Sequence[Sequence[str]]) -> dict[str, float]:
    """``exact_match`` and ``f1`` as SQuAD's evaluation has them, by torchmetrics; each a mean in [0, 1].

    Case, punctuation, articles and blanks do not count, and of several references the best one does.

    Args:
        answers: empty: no answer.
        references: of each question; none: it has no answer.

    >>> round(measures(["the Rhine", "in 1066", ""], [["Rhine", "Rhine river"], ["1066"], []])["exact_match"], 3)
    0.667
    """
    from torchmetrics.functional.text.squad import squad  # its package takes seconds, and no other task needs it

    found = squad(
        [{"prediction_text": text, "id": str(i)} for i, text in enumerate(answers)],
        [{"answers": {"text": list(own) or [""]}, "id": str(i)} for i, own in enumerate(references)],
    )
    return {name: min(1.0, float(found[name].double()) / 100) for name in ("exact_match", "f1")}


def answer(question: Question, scores: Sequence[Floats], unanswerable: bool) -> str:
    """What a model answers.

    Args:
        question: with its windows.
        scores: of each window, (2, T), of each token as first and as last.
        unanswerable: that there is no answer takes part.

    Returns:
        A piece of the context, or nothing.
    """
    best: list[tuple[float, str]] = []
    for own, first, characters in zip(scores, question.starts, question.characters, strict=True):
        here = own[:, first : first + len(characters)]
        best += [
            (value, question.context[characters[i, 0] : characters[j, 1]].strip())
            for value, i, j in best_spans(here[0], here[1])
        ]
    best.sort(key=lambda pair: -pair[0])  # stable: of equals the first window's
    value, text = next((pair for pair in best[:N_BEST] if pair[1]), (-np.inf, ""))
    null = min(float(own[0, 0]) + float(own[1, 0]) for own in scores)
    return "" if unanswerable and null > value else text


def best_spans(start: Floats, end: Floats) -> list[tuple[float, int, int]]:
    """The `N_BEST` best spans of at most `LONGEST` tokens, best first: score, first and last token.

    Args:
        start: (n,) of each token as the first.
        end: (n,) as the last.
    """
    n = len(start)
    sums = np.full((min(LONGEST, n), n), -np.inf)
    for longer in range(len(sums)):
        sums[longer, : n - longer] = start[: n - longer].astype(np.float64) + end[longer:]
    order = np.argsort(-sums, axis=None, kind="stable")[:N_BEST]
    found = ((int(at) // n, int(at) % n) for at in order)
    return [(float(sums[longer, i]), i, i + longer) for longer, i in found if np.isfinite(sums[longer, i])]
