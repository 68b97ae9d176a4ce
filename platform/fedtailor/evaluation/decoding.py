"""Answers of K clients' models at once: transformers' own greedy and beam search over lanes.

Rows are the lanes' prompts, lanes outermost, padded on the left to the longest; beams multiply the rows inside their
lane, so that a layer still finds lane k's rows together. There is one cache of keys and values per call.

What a prompt is answered with does not depend on what is decoded beside it, up to the rounding of a product: padding is
masked, positions count from a row's own first token, a row ends at its own stop token or length, and rules about
repetition see the row's own tokens only (transformers' would count padding).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
)

from fedtailor.core.settings import DecodingConfig
from fedtailor.evaluation.greedy import Greedy, OnOwnTokens
from fedtailor.lanes.batches import IntArray
from fedtailor.lanes.layers import narrowed

if TYPE_CHECKING:
    from fedtailor.lanes.net import LaneNet


@dataclass(frozen=True)
class Decoding:
    """How answers are made.

    Args:
        cfg: section ``decoding``.
        stop_ids: tokens that end an answer: end of text, and the template's end of turn. Empty: length alone does.
        pad_id: fills rows.
        positions: most tokens that the model can position, prompt included; None: no limit.
        closing: tokens that trained responses end in, the last of them a stop token; no part of an answer.
    """

    cfg: DecodingConfig
    stop_ids: tuple[int, ...]
    pad_id: int
    positions: int | None = None
    closing: tuple[int, ...] = ()

    def bare(self, tokens: list[int]) -> list[int]:
        """What comes before the first stop token, and before the rest of the closing ahead of it."""
        stop = next((i for i, token in enumerate(tokens) if token in self.stop_ids), None)
        if stop is None:
            return tokens
        ahead = self.closing[:-1]
        ends = tokens[stop] in self.closing[-1:] and tuple(tokens[max(0, stop - len(ahead)) : stop]) == ahead
        return tokens[: stop - len(ahead) if ends else stop]

    def limit(self, prompt: int) -> int:
        """Most new tokens after a prompt of so many; at least 1."""
        room = math.inf if self.positions is None else self.positions - prompt
        return int(max(1, min(self.cfg.max_new_tokens, room)))


def answer_all(
    net: LaneNet, prompts: Sequence[Sequence[IntArray]], how: Decoding, token_budget: int
) -> list[list[list[int]]]:
    """Answers any number of prompts per lane, longest first, in calls of at most ``token_budget`` tokens.

    Args:
        net: the model, with the adapters of K lanes bound.
        prompts: of each lane; each (tokens,) int64, not empty.
        how: see `Decoding`.
        token_budget: lanes x rows x (prompt + new tokens) x beams of a call; a row per lane is always decoded.

    Returns:
        New tokens of each prompt, in the order given, without the stop token.
    """
    order = [sorted(range(len(lane)), key=lambda i, lane=lane: (-len(lane[i]), i)) for lane in prompts]  # type: ignore[misc]
    answers: list[list[list[int]]] = [[[] for _ in lane] for lane in prompts]
    start = 0
    while any(start < len(own) for own in order):
        longest = max(len(prompts[k][own[start]]) for k, own in enumerate(order) if start < len(own))
        row = len(prompts) * (longest + how.limit(longest)) * how.cfg.beams
        stop = start + max(1, token_budget // row)
        picked = [own[start:stop] for own in order]
        found = answer(net, [[prompts[k][i] for i in own] for k, own in enumerate(picked)], how)
        for k, own in enumerate(picked):
            for i, tokens in zip(own, found[k], strict=True):
                answers[k][i] = tokens
        start = stop
    return answers


@torch.no_grad()
def answer(net: LaneNet, prompts: Sequence[Sequence[IntArray]], how: Decoding) -> list[list[list[int]]]:
    """Answers the prompts of K lanes in one call; see `answer_all`. A lane may have fewer prompts than others."""
    if len(prompts) > 1 and not net.state.fused:
        return [_alone(net, k, own, how) for k, own in enumerate(prompts)]
    lanes, rows = len(prompts), max(len(lane) for lane in prompts)
    width = max(len(prompt) for lane in prompts for prompt in lane)
    ids = np.full((lanes, rows, width), how.pad_id, dtype=np.int64)
    starts = np.full((lanes, rows), width - 1, dtype=np.int64)
    # Rows that only fill a lane up end after one token.
    limits = np.ones((lanes, rows), dtype=np.int64)
    for k, lane in enumerate(prompts):
        for i, prompt in enumerate(lane):
            starts[k, i] = width - len(prompt)
            ids[k, i, starts[k, i] :] = prompt
            limits[k, i] = how.limit(len(prompt))
    begin = torch.from_numpy(starts.reshape(-1)).to(net.device)
    inputs = torch.from_numpy(ids.reshape(-1, width)).to(net.device)
    mask = (torch.arange(width, device=net.device) >= begin.unsqueeze(1)).long()
    if net.weigh is not None:
        net.state.blend = net.weigh(*_from_the_left(inputs, begin, lanes)).repeat_interleave(how.cfg.beams, 1)
    net.state.shapes, net.state.rows = ((rows, width),) * lanes, rows * how.cfg.beams
    own, rules = torch.from_numpy(limits.reshape(-1)).to(net.device), _rules(how.cfg, begin)
    greedy = Greedy(net, own, begin, rules) if how.cfg.beams == 1 else None
    with net.autocast(), narrowed(net.layers, net.compute_type), _no_defaults(net.model):
        out: Tensor = net.model.generate(  # type: ignore[operator]
            inputs,
            attention_mask=mask,
            generation_config=_generation(how, int(limits.max())),
            logits_processor=LogitsProcessorList([rules]),
            stopping_criteria=StoppingCriteriaList([_OwnLength(width, own)]),
            # Ranks that hold the model together get the same rows and end at the same step.
            synced_gpus=False,
            custom_generate=greedy,
        )
    new = out[:, width:].view(lanes, rows, -1).tolist()
    return [[how.bare(new[k][i][: limits[k, i]]) for i in range(len(lane))] for k, lane in enumerate(prompts)]


def _from_the_left(inputs: Tensor, begin: Tensor, lanes: int) -> tuple[Tensor, Tensor]:
    """Prompts (lanes, rows, T) with their padding behind them, and their lengths (lanes, rows)."""
    width = inputs.shape[1]
    at = (begin.unsqueeze(1) + torch.arange(width, device=inputs.device)).clamp_max(width - 1)
    return inputs.gather(1, at).view(lanes, -1, width), (width - begin).view(lanes, -1)


def _alone(net: LaneNet, lane: int, prompts: Sequence[IntArray], how: Decoding) -> list[list[int]]:
    if not prompts:
        return []
    with net.alone(lane):
        return answer(net, [prompts], how)[0]


def _generation(how: Decoding, new_tokens: int) -> GenerationConfig:
    return GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False,
        num_beams=how.cfg.beams,
        length_penalty=how.cfg.length_penalty,
        max_new_tokens=new_tokens,
        eos_token_id=list(how.stop_ids) or None,
        pad_token_id=how.pad_id,
        use_cache=True,
    )


@contextmanager
def _no_defaults(model: Any) -> Iterator[None]:
    """Hides the folder's generation_config.json, by which transformers fills in whatever is not given: only the
    settings count."""
    own = model.generation_config
    model.generation_config = GenerationConfig()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        model.generation_config = own


class _OwnLength(StoppingCriteria):
    """Ends every row after its own number of new tokens."""

    def __init__(self, width: int, limits: Tensor) -> None:
        self.width, self.limits = width, limits

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        # Of beams there are several rows per prompt, neighbours.
        limits = self.limits.repeat_interleave(len(input_ids) // len(self.limits))
        return input_ids.shape[1] - self.width >= limits


def _rules(cfg: DecodingConfig, begin: Tensor) -> OnOwnTokens:
    rules: list[LogitsProcessor] = []
    if cfg.repetition_penalty != 1:
        rules.append(RepetitionPenaltyLogitsProcessor(cfg.repetition_penalty))
    if cfg.no_repeat_ngram:
        rules.append(NoRepeatNGramLogitsProcessor(cfg.no_repeat_ngram))
    return OnOwnTokens(rules, begin)
