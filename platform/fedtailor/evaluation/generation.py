"""Instructions: loss of the reference response and measures of the model's own answer, per lane and per group.

Every test example counts once and for its own group (the language it is written in), whatever the rest of its client
writes, as in FedP2EFT. All measures are means over examples: also the loss, the mean over a response's tokens first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import CapabilityError
from fedtailor.evaluation.decoding import Decoding, answer_all
from fedtailor.evaluation.text_metrics import (
    NAMES,
    Mean,
    Tally,
    Tokenizer,
    add,
    exact_match,
    init,
    label_match,
    merge,
    meteor,
    rouge,
)
from fedtailor.lanes.batches import Examples, IntArray, LaneBatch, scoring_batches
from fedtailor.lanes.loss import target_losses
from fedtailor.lanes.net import LaneNet

METRICS = (*NAMES, "meteor", "exact_match")
"""Measures of an answer, each in [0, 1]."""


@dataclass(frozen=True)
class Answered:
    """A lane's test examples.

    Args:
        tally: group -> metric (METRICS and ``loss``) -> sum and count; groups in the order of the task's.
        answers: of each example, in order.
    """

    tally: Tally
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Asked:
    """What one lane is asked.

    Args:
        examples: with ``prompt``; ``labels`` are indices into the task's groups.
        references: the right responses of each as plain text, at least one, in order.
        corpus: measure the answers of each group as a corpus, too.
        labelled: groups whose responses are labels: ``label_accuracy`` is measured, too.
    """

    examples: Examples
    references: Sequence[Sequence[str]]
    corpus: bool = False
    labelled: Collection[str] = ()


def measures(answer: str, references: Sequence[str], tokenizer: Tokenizer = "unicode") -> dict[str, float]:
    """METRICS of one answer, each by the reference that it is best for.

    Args:
        answer: may be empty, which scores 0.
        references: the responses that were wanted, at least one.
        tokenizer: of ROUGE's words.
    """
    each = [
        rouge(answer, reference, tokenizer)
        | {"meteor": meteor(answer, reference), "exact_match": exact_match(answer, reference)}
        for reference in references
    ]
    return {name: max(values[name] for values in each) for name in each[0]}


def score(
    net: LaneNet,
    logits: Callable[[LaneBatch], Tensor],
    asked: Sequence[Asked],
    groups: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    how: Decoding,
    token_budget: int,
) -> list[Answered]:
    """Scores every lane on its own test examples.

    Args:
        net: the model with the lanes' adapters bound, in evaluation mode.
        logits: of the personalised models; must be ``net.logits``, since answers come from ``net``.
        asked: of each lane.
        groups: names by index.
        tokenizer: turns tokens into text, special tokens left out.
        how: decoding.
        token_budget: tokens of one step over all lanes.

    Raises:
        CapabilityError: the lanes answer without the model.
    """
    if logits != net.logits:
        raise CapabilityError("a method that answers without the language model cannot be asked for text")
    losses = response_losses(net, [a.examples for a in asked], how.pad_id, token_budget)
    prompts = [[row[:n] for row, n in zip(a.examples.input_ids, _prompt(a.examples), strict=True)] for a in asked]
    tokens = answer_all(net, prompts, how, token_budget)
    found = []
    for one, loss, mine in zip(asked, losses, tokens, strict=True):
        texts = [str(tokenizer.decode(ids, skip_special_tokens=True)).strip() for ids in mine]
        tally = init()
        for i in np.argsort(one.examples.labels, kind="stable").tolist():
            group, right = groups[int(one.examples.labels[i])], one.references[i]
            values = measures(texts[i], right, how.cfg.tokenizer) | {"loss": float(loss[i])}
            if group in one.labelled:
                values["label_accuracy"] = max(label_match(texts[i], label) for label in right)
            tally = add(tally, group, values)
        found.append(Answered(merge(tally, _of_corpora(one, texts, groups)) if one.corpus else tally, tuple(texts)))
    return found


def _of_corpora(asked: Asked, answers: Sequence[str], groups: Sequence[str]) -> Tally:
    """Measures of each group's answers as a corpus, with its examples as weight."""
    from fedtailor.evaluation.corpus_metrics import corpus_measures  # libraries that few tasks need

    tally = init()
    for group in sorted(set(asked.examples.labels.tolist())):
        own = np.flatnonzero(asked.examples.labels == group).tolist()
        values = corpus_measures([answers[i] for i in own], [asked.references[i] for i in own])
        tally = merge(tally, {groups[group]: {name: Mean(v * len(own), len(own)) for name, v in values.items()}})
    return tally


def loss_tallies(
    net: LaneNet, texts: Sequence[Examples], groups: Sequence[str], pad_id: int, token_budget: int
) -> list[Tally]:
    """The loss alone, group -> ``loss``, of each lane; see `response_losses`."""
    found = []
    for examples, losses in zip(texts, response_losses(net, texts, pad_id, token_budget), strict=True):
        tally = init()
        for i in np.argsort(examples.labels, kind="stable").tolist():
            tally = add(tally, groups[int(examples.labels[i])], {"loss": float(losses[i])})
        found.append(tally)
    return found


@torch.no_grad()
def response_losses(
    net: LaneNet, texts: Sequence[Examples], pad_id: int, token_budget: int
) -> list[np.ndarray[tuple[int], np.dtype[np.float64]]]:
    """Mean negative log-likelihood of each response's tokens given what precedes them, (n,) float64 per lane.

    Args:
        net: the model with the lanes' adapters bound, in evaluation mode.
        texts: one set of examples per lane.
        pad_id: padding token.
        token_budget: tokens of one step over all lanes.
    """
    found = [np.zeros(len(t), np.float64) for t in texts]
    for batch, indices in scoring_batches(texts, pad_id, token_budget, net.device):
        means = _row_means(target_losses(net, batch), batch).cpu().numpy()
        for lane, index in enumerate(indices):
            found[lane][index] = means[lane, : len(index)]
    return found


def _row_means(each: Tensor, batch: LaneBatch) -> Tensor:
    """Means over the targets of each row, (k, b) float64, of what each of them has, (k, m)."""
    assert batch.target_row is not None
    sums = torch.zeros(batch.input_ids.shape[:2], dtype=torch.float64, device=each.device)
    counts, own = torch.zeros_like(sums), batch.valid.double()
    # A masked target may be infinite, and 0 x inf is not 0.
    each = torch.where(batch.valid, each.double(), 0.0)
    sums.scatter_add_(1, batch.target_row, each)
    counts.scatter_add_(1, batch.target_row, own)
    return sums / counts.clamp_min(1)


def _prompt(examples: Examples) -> IntArray:
    assert examples.prompt_length is not None
    return examples.prompt_length
