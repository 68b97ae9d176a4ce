"""Greedy decoding of K lanes' rows: what transformers' ``generate`` prepares, with a loop that wastes less.

Prompts are read in parts of about equal length. The cache of keys and values has its room from the start, so that a new
token does not copy what is there, and keeps them in the type that attention computes in. Rows that have ended leave as
soon as no lane needs their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.parts import cheapest_ends, part_tokens

if TYPE_CHECKING:
    pass


class RoomyLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of a layer (rows, heads, tokens, d), in buffers that are as long as they will be.

    Args:
        rows: of all parts together.
        prompt: tokens of the longest prompt, where all of them end.
        tokens: most that it will hold.
        dtype: what they are kept in; None: as they come.
        is_sliding: a layer that sees a window only, which is wider than ``tokens``.
    """

    def __init__(self, rows: int, prompt: int, tokens: int, dtype: torch.dtype | None, is_sliding: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rows, self.prompt, self.tokens, self.kept_as, self.is_sliding = rows, prompt, tokens, dtype, is_sliding
        self.rooms: list[Tensor] = []
        self.part: Tensor | None = None
        """Rows whose prompts are being read; None: all have been."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Adds tokens, (rows, heads, new, d), and returns all that these rows have."""
        new, n = (key_states, value_states), key_states.shape[-2]
        if not self.rooms:  # zeros: what is masked must be finite all the same
            self.rooms = [
                x.new_zeros((self.rows, x.shape[1], self.tokens, x.shape[-1]), dtype=self.kept_as) for x in new
            ]
        if self.part is not None:
            for room, x in zip(self.rooms, new, strict=True):
                room[self.part, :, self.prompt - n : self.prompt] = x.to(room.dtype)
            return new
        start = self.get_seq_length()
        for room, x in zip(self.rooms, new, strict=True):
            room[:, :, start : start + n] = x
        return self.show(start + n)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows, in ascending order."""
        tokens = self.get_seq_length()
        for room in self.rooms:
            room[: len(indices), :, :tokens] = room[indices, :, :tokens]
        self.rooms = [room[: len(indices)] for room in self.rooms]
        self.show(tokens)

    def show(self, tokens: int) -> tuple[Tensor, Tensor]:
        """So many tokens are there."""
        self.part, self.is_initialized = None, True
        self.keys, self.values = (room[:, :, :tokens] for room in self.rooms)
        return self.keys, self.values


def make_room(cache: Any, rows: int, prompt: int, tokens: int, dtype: torch.dtype | None) -> bool:
    """Makes an empty cache's layers `RoomyLayer`; False, and nothing done, if one is no plain attention layer."""
    layers = getattr(cache, "layers", [])
    plain = all(
        type(layer) is DynamicLayer or (type(layer) is DynamicSlidingWindowLayer and layer.sliding_window > tokens)
        for layer in layers
    )
    if not isinstance(cache, Cache) or not layers or not plain:
        return False
    cache.layers = [RoomyLayer(rows, prompt, tokens, dtype, layer.is_sliding) for layer in layers]
    return True


class OnOwnTokens(LogitsProcessor):
    """Applies rules row by row to the row's tokens without its padding.

    Args:
        rules: none: scores stay as they are.
        begin: where each row's prompt begins, (n,) int64; of beams there are several rows per prompt, neighbours.
    """

    def __init__(self, rules: Sequence[LogitsProcessor], begin: Tensor) -> None:
        self.rules, self.begin = rules, begin

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Scores (n, V) after tokens (n, T), by the rules."""
        if not self.rules:
            return scores
        each, done = len(input_ids) // len(self.begin), []
        for row, (ids, own) in enumerate(zip(input_ids, scores, strict=True)):
            ids, own = ids[self.begin[row // each] :].unsqueeze(0), own.unsqueeze(0)
            for rule in self.rules:
                own = rule(ids, own)
            done.append(own)
        return torch.cat(done)


@dataclass
class Greedy:
    """A decoding loop for ``generate(custom_generate=...)``.

    Args:
        net: the lanes' model.
        limits: most new tokens of each row, (lanes x rows,) int64.
        begin: where each row's prompt begins, likewise.
        rules: against repetition.
    """

    net: LaneNet
    limits: Tensor
    begin: Tensor
    rules: OnOwnTokens

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **inputs: Any,
    ) -> Tensor:
        """Prompts (lanes x rows, T) to prompts and answers, filled up with padding where a row has ended."""
        (rows, width), new, lanes = input_ids.shape, int(self.limits.max()), len(self.net.state.shapes)
        roomy = _by_rows(inputs, rows) and make_room(
            inputs.get("past_key_values"), rows, width, width + new, self.net.compute_type
        )
        stops = torch.tensor(generation_config.eos_token_id or [], device=input_ids.device)
        out = input_ids.new_full((rows, width + new), int(generation_config.pad_token_id))
        out[:, :width] = input_ids
        places = torch.arange(rows, device=input_ids.device)
        going = torch.ones_like(places, dtype=torch.bool)
        if roomy:
            scores = self._read(model, input_ids, inputs)
            inputs = model._update_model_kwargs_for_generation({}, inputs)
        else:
            scores, inputs = _next(model, input_ids, None, inputs)
        with model._optimize_model_for_decode():
            for step in range(new):
                if step:
                    scores, inputs = _next(model, input_ids, 1, inputs)
                tokens = self.rules(input_ids, scores).argmax(-1)
                out[places[going], width + step] = tokens[going]
                input_ids = torch.cat([input_ids, tokens.unsqueeze(1)], dim=1)
                going &= ~torch.isin(tokens, stops) & (step + 1 < self.limits[places])
                per_lane = going.view(lanes, -1)
                needed = int(per_lane.sum(1).max())
                if not needed:
                    break
                if roomy and needed < per_lane.shape[1]:
                    index = _first(per_lane, needed)
                    inputs["past_key_values"].batch_select_indices(index)
                    inputs = _picked(inputs, index)
                    input_ids, going, places = input_ids[index], going[index], places[index]
                    self.rules.begin = self.rules.begin[index]
                    self._runs(needed, width, _of_rows(self.net.state.blend, index, lanes))
        return out

    def _read(self, model: Any, ids: Tensor, inputs: dict[str, Any]) -> Tensor:
        """Scores after every prompt, (lanes x rows, V), the prompts read part by part."""
        found, layers, lanes = [], inputs["past_key_values"].layers, len(self.net.state.shapes)
        parts, blend = self._parts(ids.shape[1]), self.net.state.blend
        for index, tokens in parts:
            for layer in layers:
                layer.part = index
            self._runs(len(index) // lanes, tokens, _of_rows(blend, index, lanes))
            found.append(_next(model, ids[index, -tokens:], None, _picked(inputs, index, tokens))[0])
        for layer in layers:
            layer.show(ids.shape[1])
        self._runs(len(ids) // lanes, ids.shape[1], blend)
        return torch.cat(found)[torch.cat([index for index, _ in parts]).argsort()]

    def _runs(self, rows: int, tokens: int, blend: Tensor | None) -> None:
        """What every lane's layers see from now on."""
        state = self.net.state
        state.shapes, state.rows, state.blend = ((rows, tokens),) * len(state.shapes), rows, blend

    def _parts(self, width: int) -> list[tuple[Tensor, int]]:
        """Rows that are read together, as indices, and their tokens: prompts of about equal length."""
        lanes, device = len(self.net.state.shapes), self.begin.device
        widths = (width - self.begin.view(lanes, -1)).amax(0).tolist()
        ends = cheapest_ends(widths, lanes, part_tokens(self.net))
        first = torch.arange(lanes, device=device).unsqueeze(1) * len(widths)
        return [
            ((first + torch.arange(start, end, device=device)).flatten(), max(widths[start:end]))
            for start, end in zip([0, *ends[:-1]], ends, strict=True)
        ]


def _next(model: Any, ids: Tensor, new: int | None, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Scores of what follows, (rows, V) float32, and what is put in with the token after it."""
    asked = model.prepare_inputs_for_generation(ids, next_sequence_length=new, is_first_iteration=new is None, **inputs)
    said = model(**asked, return_dict=True)
    # A copy: a model may compute the logits of all tokens, and they should go.
    return said.logits[:, -1].to(torch.float32, copy=True), model._update_model_kwargs_for_generation(said, inputs)


def _picked(inputs: Mapping[str, Any], index: Tensor, tokens: int = 0) -> dict[str, Any]:
    """A model's inputs of some rows, and of their last tokens only if so many are named."""
    return {
        name: (x if len(x) == 1 else x[index])[:, -tokens:] if isinstance(x, Tensor) else x
        for name, x in inputs.items()
    }


def _of_rows(blend: Tensor | None, index: Tensor, lanes: int) -> Tensor | None:
    """Weights of rows (lanes, rows) of some of them, as indices of all lanes' rows."""
    return None if blend is None else blend.flatten()[index].view(lanes, -1)


def _by_rows(inputs: Mapping[str, Any], rows: int) -> bool:
    """All tensors among a model's inputs are (rows, T), or (1, T) for all rows."""
    return all(x.dim() == 2 and len(x) in (1, rows) for x in inputs.values() if isinstance(x, Tensor))


def _first(going: Tensor, count: int) -> Tensor:
    """Of rows (lanes, rows) so many of each lane, those that go on among them, as ascending indices of all rows."""
    own = (~going).long().argsort(dim=1, stable=True)[:, :count].sort(dim=1).values
    return (own + going.shape[1] * torch.arange(len(going), device=going.device).unsqueeze(1)).flatten()
