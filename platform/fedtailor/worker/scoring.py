"""What a personalised model is worth: rows of metrics per lane, of texts that are classified, answered or fitted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from fedtailor.adapters.spectrum import entropy_rank, rank90
from fedtailor.evaluation.classification import Score, evaluate, matthews
from fedtailor.evaluation.decoding import Decoding
from fedtailor.evaluation.regression import Value, fits
from fedtailor.federated.method import Personalised
from fedtailor.models.families import positions_of
from fedtailor.tasks.source import Split
from fedtailor.worker.open_stage import OpenStage

if TYPE_CHECKING:
    from fedtailor.evaluation.text_metrics import Tally


SCORES: Final = (
    "accuracy", "mcc", "rouge1", "rouge2", "rougeL", "meteor", "exact_match", "label_accuracy", "f1", "bleu", "nist",
    "ter", "cider", "loss", "distance", "rank90",
)  # fmt: skip
"""Metrics of test examples that a client's model may be scored by."""

RANK_RULES: Final = {"rank90": rank90, "entropy_rank": entropy_rank}
"""Metric per module to what it is of the singular values there."""


@dataclass(frozen=True)
class LaneScore:
    """A lane's measured numbers.

    Args:
        rows: ``metric``, ``value`` and ``weight`` (examples behind it) of each, and ``language`` where the number is of
            a group of the client's examples.
        loss: by which a model that diverged is known: NaN or Inf.
        answers: with prompt and reference, one mapping per test example; see `predictions`.
    """

    rows: tuple[Mapping[str, Any], ...]
    loss: float
    answers: tuple[Mapping[str, Any], ...] = ()


def scores_on_test(stage: OpenStage, made: Personalised) -> list[LaneScore]:
    """Scores every lane on its client's test examples. The net is in evaluation mode, with the lanes bound."""
    if stage.data.kind == "generation":
        return _answered(stage, made)
    if stage.data.kind == "extraction":
        return _marked(stage, made)
    if stage.data.kind == "regression":
        return [LaneScore(_valued(found), found["loss"].value) for found in _fitted(stage, made, "test")]
    return _classified(stage, made, "test", ("accuracy", "loss"))


def scores_on_train(stage: OpenStage, made: Personalised) -> list[tuple[Mapping[str, Any], ...]]:
    """Rows of each lane about the texts that it was trained on; of a generation task the loss alone."""
    data = stage.data
    if data.kind == "regression":
        return [_valued({"train_loss_after": found["loss"]}) for found in _fitted(stage, made, "train")]
    if data.kind != "generation":
        rows = [score.rows for score in _classified(stage, made, "train", ("train_accuracy", "train_loss_after"))]
        # The share of first and last tokens that are right is no measure of spans.
        return rows if data.kind == "classification" else [own[1:] for own in rows]
    from fedtailor.evaluation.generation import loss_tallies

    texts, budget = [data.examples(lane.client.id, "train") for lane in made.lanes], stage.spec.engine.token_budget
    tallies = loss_tallies(stage.net, texts, data.labels, data.pad_id, budget)
    return [_rows(tally, {"loss": "train_loss_after"}) for tally in tallies]


def _fitted(stage: OpenStage, made: Personalised, split: Split) -> list[dict[str, Value]]:
    ids = [lane.client.id for lane in made.lanes]
    texts, truth = [stage.data.examples(client, split) for client in ids], stage.data.manifest["truth"]
    return fits(stage.net, made.logits, texts, stage.data.pad_id, [truth[client] for client in ids])


def _valued(found: Mapping[str, Value]) -> tuple[Mapping[str, Any], ...]:
    return tuple({"metric": name, "value": v.value, "weight": v.weight} for name, v in found.items())


def rank_rows(stage: OpenStage, made: Personalised, k: int) -> Iterator[Mapping[str, Any]]:
    """A lane's rows per module: ranks that the method kept, and what the spectra of its update say of its rank."""
    lane = made.lanes[k]
    weight = float(lane.size)
    if made.ranks is not None and made.selects_ranks:
        ranks = made.ranks[k].tolist()
        assert sum(ranks) == (lane.budget or 0) * len(ranks), f"{lane.client.id}: {sum(ranks)} ranks kept"
        for name, rank in zip(stage.net.modules, ranks, strict=True):
            yield {"metric": "kept_rank", "module": name, "value": float(rank), "weight": weight}
    for name, values in made.spectra.items():
        for metric, rank_of in RANK_RULES.items():
            yield {"metric": metric, "module": name, "value": float(rank_of(values[k])), "weight": weight}


def _classified(stage: OpenStage, made: Personalised, split: Split, names: tuple[str, str]) -> list[LaneScore]:
    """Accuracy and loss under these names; of test texts also what the task is scored by."""
    data, budget, device = stage.data, stage.spec.engine.token_budget, stage.net.device
    texts, counted = (
        [data.examples(lane.client.id, split) for lane in made.lanes],
        split == "test" and data.score == "mcc",
    )
    scores = evaluate(made.logits, texts, data.pad_id, budget, device, counted)
    return [LaneScore(tuple(_class_rows(score, names, data.labels)), score.loss_sum) for score in scores]


def _class_rows(score: Score, names: tuple[str, str], labels: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    """A client's rows; of a confusion matrix one per cell, so that clients can be pooled."""
    values = {names[0]: score.correct / score.count, names[1]: score.loss_sum / score.count}
    if score.confusion is not None:
        values["mcc"] = matthews(score.confusion)
    for metric, value in values.items():
        yield {"metric": metric, "value": value, "weight": float(score.count)}
    if score.confusion is not None:
        for (true, answered), number in np.ndenumerate(score.confusion):
            cell = {"metric": "confusion", "module": f"{labels[true]}/{labels[answered]}", "value": float(number)}
            yield cell | {"weight": float(score.count)}


def _answered(stage: OpenStage, made: Personalised) -> list[LaneScore]:
    # Imported here: the measures' libraries take seconds, which classification need not wait for.
    from fedtailor.evaluation.generation import Asked, score

    data, spec = stage.data, stage.spec
    cfg = spec.decoding
    asked = []
    for lane in made.lanes:
        examples = data.examples(lane.client.id, "test").rows(slice(cfg.max_test))
        references = data.references(lane.client.id, "test")[: len(examples.labels)]
        asked.append(Asked(examples, references, data.several, data.label_answers))
    # An answer ends where trained responses end, or at the end of text.
    stops, closing = (tuple(map(int, data.manifest[name])) for name in ("stop_ids", "closing"))
    how = Decoding(cfg, stops, data.pad_id, positions_of(stage.net.config), closing)
    found = score(stage.net, made.logits, asked, data.labels, stage.tokenizer, how, spec.engine.token_budget)
    return [
        LaneScore(
            _rows(one.tally),
            float(np.sum([metrics["loss"].total for metrics in one.tally.values()])),
            _kept(stage, made, k, asked[k], one.answers) if spec.personalise.save_predictions else (),
        )
        for k, one in enumerate(found)
    ]


def _marked(stage: OpenStage, made: Personalised) -> list[LaneScore]:
    from fedtailor.evaluation.spans import score

    data, clients = stage.data, [lane.client.id for lane in made.lanes]
    asked, tests = [data.asked(client) for client in clients], [data.examples(client, "test") for client in clients]
    budget, unanswerable = stage.spec.engine.token_budget, bool(data.manifest["unanswerable"])
    found = score(made.logits, tests, asked, data.pad_id, budget, stage.net.device, unanswerable)
    scores = []
    for k, (one, questions) in enumerate(zip(found, asked, strict=True)):
        values = [(name, value, len(questions)) for name, value in one.measures.items()]
        rows = [{"metric": m, "value": v, "weight": float(n)} for m, v, n in (*values, ("loss", one.loss, one.windows))]
        kept = [
            {"row": row, "prompt": q.text, "reference": next(iter(q.answers), ""), "prediction": answer}
            for row, (q, answer) in enumerate(zip(questions, one.answers, strict=True))
        ]
        whose = _whose(stage, made, k, made.lanes[k].client.language)
        kept = [whose | row for row in kept] if stage.spec.personalise.save_predictions else []
        scores.append(LaneScore(tuple(rows), one.loss, tuple(kept)))
    return scores


def _whose(stage: OpenStage, made: Personalised, k: int, group: str) -> dict[str, Any]:
    """What an answer's row begins with."""
    lane = made.lanes[k]
    budget = -1 if lane.budget is None else lane.budget
    return {"client": lane.client.id, "language": group, "budget": budget, "method": stage.spec.method}


def _rows(tally: Tally, names: Mapping[str, str] | None = None) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {"language": group, "metric": (names or {}).get(metric, metric), "value": m.value, "weight": float(m.count)}
        for group, metrics in tally.items()
        for metric, m in metrics.items()
    )


def _kept(stage: OpenStage, made: Personalised, k: int, asked: Any, answers: tuple[str, ...]) -> tuple[Any, ...]:
    """One mapping per answer; ``row`` is the example's number among the client's test examples."""
    lane = made.lanes[k]
    questions = stage.data.questions(lane.client.id, "test")
    return tuple(
        {
            **_whose(stage, made, k, stage.data.labels[int(asked.examples.labels[row])]),
            "row": row,
            "prompt": questions[row],
            "reference": asked.references[row][0],
            "prediction": answer,
            **({"others": list(asked.references[row][1:])} if stage.data.several else {}),
        }
        for row, answer in enumerate(answers)
    )
