"""The resident frozen model seen through lanes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedtailor.core.scope import Ranks
from fedtailor.lanes.batches import LaneBatch, prompt_lengths
from fedtailor.lanes.checkpointing import replaying
from fedtailor.lanes.layers import AdaptedLayer, LaneEmbedding, LaneLinear, LaneState, Linear, attach, keep_narrow

_signature = cache(signature)


class LaneNet:
    """A frozen model whose linear layers can carry one adapter per lane.

    Args:
        model: transformers sequence classifier, span extractor or causal language model, in float32 (float64 in
            identity tests), or in bfloat16 or quantised where ``dtype`` is bfloat16: what is trained stays float32.
        linears: the L layers to adapt, in module order.
        dtype: compute type; bfloat16 turns autocast on.
        base_dropout: dropout probability of the frozen base while adapters train.
        checkpointing: activations of every block are computed again in the backward pass instead of being kept.
        ranks: the processes that hold this model together; None: this one alone.
        verify: raises where the base is no longer what it was; by default nothing can happen to it.
        shares_optimizer: each of the ranks keeps a part of the optimizer's state only.
    """

    one_by_one = ""
    """Why lanes do not share a forward pass; empty: they do. `lanes.probe` sets it, and the next two."""
    tokens_first: frozenset[int] = frozenset()
    """Adapted layers whose input is (T, rows, d)."""
    idle: tuple[str, ...] = ()
    """Adapted layers that the model does not call, so that their adapters change nothing."""
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None
    """Weights (k, b) of rows, see `LaneState.blend`, by tokens (k, b, T) and the length of each row's prompt (k, b).
    None: rows have none."""

    def __init__(
        self,
        model: nn.Module,
        linears: Sequence[tuple[str, Linear]],
        dtype: str = "float32",
        base_dropout: float = 0.0,
        checkpointing: bool = False,
        ranks: Ranks | None = None,
        verify: Callable[[], None] = lambda: None,
        shares_optimizer: bool = False,
    ) -> None:
        self.model, self.checkpointing, self.ranks, self.verify = model, checkpointing, ranks, verify
        self.shares_optimizer = shares_optimizer
        self.adapted = tuple(AdaptedLayer.of(name, linear) for name, linear in linears)
        self.state = LaneState()
        if checkpointing:
            how = {"use_reentrant": False, "context_fn": replaying(self.state)}
            model.gradient_checkpointing_enable(how)  # type: ignore[operator]
        if dtype == "bfloat16" and ranks is None:  # the weights that ranks gather come and go
            keep_narrow(model)
        self.layers = attach(model, linears, self.state)
        self.base_dropout = base_dropout
        self.overlay_index: dict[str, int] = {}
        self.compute_type = torch.bfloat16 if dtype == "bfloat16" else None
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self._dropouts = [m for m in model.modules() if isinstance(m, nn.Dropout)]
        self.own_dropout = [m.p for m in self._dropouts]
        model.eval()

    @property
    def device(self) -> torch.device:
        """Where the base weights are."""
        return next(self.model.parameters()).device

    @property
    def param_dtype(self) -> torch.dtype:
        """Type of what is trained: that of the base weights, or float32 where these are narrower."""
        base = next(self.model.parameters()).dtype
        return base if base in (torch.float32, torch.float64) else torch.float32

    @property
    def wanted(self) -> nn.Embedding | None:
        """Of a regression, the numbers that are wanted of a text by its token; None of classes and responses."""
        return getattr(self.model, "wanted", None)

    @property
    def config(self) -> PretrainedConfig:
        """Of the model."""
        return self.model.config  # type: ignore[return-value]

    @property
    def modules(self) -> tuple[str, ...]:
        """Module paths of the L adapted layers."""
        return tuple(adapted.name for adapted in self.adapted)

    @property
    def heads(self) -> tuple[str, ...]:
        """Adapted layers of the classification head, outside the pretrained body."""
        body = f"{self.model.base_model_prefix}."
        return tuple(adapted.name for adapted in self.adapted if not adapted.name.startswith(body))

    def clear_overlay(self) -> None:
        """Back to the base that all clients share."""
        for module in self.model.modules():
            if isinstance(module, LaneLinear):
                module.overlay = None
            elif isinstance(module, LaneEmbedding):
                module.tables = None
        self.overlay_index, self.state.overlay_rows = {}, None

    @torch.no_grad()
    def fingerprint(self) -> dict[str, int]:
        """A number per weight of the frozen base that changes with its bits; reads every weight once, copies none.

        Of a weight that is spread over ranks (ZeRO-3) it is this rank's own part, which stays while the whole comes and
        goes.
        """
        weights = {name: getattr(weight, "ds_tensor", weight) for name, weight in self.model.named_parameters()}
        return dict(zip(weights, torch.stack([_bit_sum(w.detach()) for w in weights.values()]).tolist(), strict=True))

    def place(self, clients: Sequence[str]) -> None:
        """Says whose overlay each lane of the next batches has, in lane order; no-op without an overlay."""
        if self.overlay_index:
            rows = [self.overlay_index[client] for client in clients]
            self.state.overlay_rows = torch.tensor(rows, device=self.device)

    def unbind(self) -> None:
        """Removes all adapters: the model is the base again, with the clients' overlay where there is one."""
        for layer in self.layers:
            layer.unbind()
        self.state.generators, self.state.dropout, self.state.training = [], 0.0, False
        self.state.bypass, self.state.blend, self.weigh = False, None, None

    def train_mode(self, on: bool, own_dropout: bool = False) -> None:
        """Switches adapter dropout and the base's dropout.

        Args:
            on: training or evaluating.
            own_dropout: use the model's configured probabilities (full fine-tuning) instead of ``base_dropout``.
        """
        self.state.training = on
        for module, own in zip(self._dropouts, self.own_dropout, strict=True):
            module.p = own if own_dropout else self.base_dropout
        # Attention reads its dropout module's p but its own training flag, so the whole model is switched; seldom,
        # since a walk over all modules costs as much as a training step of a small model.
        if self.model.training != (active := on and (own_dropout or self.base_dropout > 0 or self.checkpointing)):
            self.model.train(active)
        self.state.bypass = False

    def logits(self, batch: LaneBatch) -> Tensor:
        """Class scores (k, m, C) of the batch's targets, float32 or the base's type if wider."""
        if batch.lanes > 1 and not self.state.fused:
            return torch.cat([self.lane_logits(batch, lane) for lane in range(batch.lanes)])
        return self._pooled(batch) if batch.positions is None else self.scores(self.at_targets(batch))

    @contextmanager
    def alone(self, lane: int) -> Iterator[None]:
        """What runs inside is one lane, with the adapter of this one of those that are bound."""
        self.state.first = lane
        try:
            yield
        finally:
            self.state.first = 0

    def hidden(self, batch: LaneBatch) -> Tensor:
        """What a language model's output embedding reads, (k b, T, d); no token is scored."""
        if self.weigh is not None and batch.positions is not None:
            self.state.blend = self.weigh(batch.input_ids, prompt_lengths(batch))
        self.state.shapes, self.state.rows = batch.shapes, batch.input_ids.shape[1]
        return self._body(batch.input_ids, batch.attention_mask)

    def last_states(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """`hidden` of the last of each row's first tokens, (k, b, d) float32 or wider.

        Args:
            ids: tokens, (k, b, T) int64.
            lengths: how many of each row are read, (k, b) int64, at least 1.
        """
        (k, b, _), width = ids.shape, int(lengths.max())
        self.state.shapes, self.state.rows = ((b, width),) * k, b
        mask = (torch.arange(width, device=ids.device) < lengths.unsqueeze(-1)).long()
        found = torch.unflatten(self._body(ids[..., :width], mask), 0, (k, b))
        return _wide(found.gather(2, (lengths - 1)[..., None, None].expand(k, b, 1, found.shape[-1])).squeeze(2))

    def _body(self, ids: Tensor, mask: Tensor) -> Tensor:
        inputs = {"input_ids": ids.flatten(0, 1), "attention_mask": mask.flatten(0, 1)}
        with self.autocast():
            return self.model.base_model(**inputs, use_cache=False)[0]  # type: ignore[operator,no-any-return]

    def at_targets(self, batch: LaneBatch) -> Tensor:
        """Of `hidden` what the batch's targets are predicted from, (k, m, d): the vocabulary is too wide for more."""
        assert batch.positions is not None
        hidden = torch.unflatten(self.hidden(batch), 0, (batch.lanes, -1)).flatten(1, 2)
        return hidden.gather(1, batch.positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1]))

    def scores(self, hidden: Tensor) -> Tensor:
        """A language model's `logits` (k, n, C) of any n of what `at_targets` found, (k, n, d)."""
        with self.autocast():
            return _wide(self.model.get_output_embeddings()(hidden))  # type: ignore[operator]

    def lane_logits(self, batch: LaneBatch, lane: int) -> Tensor:
        """`logits` of one lane of the batch, (1, m, C), computed without the others."""
        with self.alone(lane):
            return self.logits(batch.lane(lane))

    def autocast(self) -> AbstractContextManager[object]:
        """The compute type, for a forward pass."""
        return torch.autocast(self.device.type, dtype=self.compute_type) if self.compute_type else nullcontext()

    def _pooled(self, batch: LaneBatch) -> Tensor:
        """Predictions of the model's own head, (k, b, C), of spans (k, 2 b, T)."""
        self.state.shapes, self.state.rows = batch.shapes, batch.input_ids.shape[1]
        inputs = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None and _takes_segments(self.model):
            inputs["token_type_ids"] = batch.token_type_ids
        with self.autocast():
            found = self.model(**{name: value.flatten(0, 1) for name, value in inputs.items()})
        scores = scores_of(found, inputs["attention_mask"].flatten(0, 1))
        return scores.view(batch.lanes, -1, scores.shape[-1])


def scores_of(found: Any, mask: Tensor) -> Tensor:
    """A model's scores, (n, C); of one that marks spans (2 n, T), as first and as last token of each row's.

    Args:
        found: its output.
        mask: (n, T); what is no token of a row is none of its span, however long other rows are.
    """
    if (start := getattr(found, "start_logits", None)) is None:
        return _wide(found.logits)
    scores = _wide(torch.stack([start, found.end_logits], 1))
    return scores.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(scores.dtype).min).flatten(0, 1)


def _wide(scores: Tensor) -> Tensor:
    return scores.float() if scores.itemsize < 4 else scores


def _bit_sum(weight: Tensor) -> Tensor:
    """Sum of a tensor's bits, read as integers of 8 bytes where they fit, else of 1."""
    flat = weight.reshape(-1)
    whole = (flat.numel() * flat.itemsize) % 8 == 0 and (flat.storage_offset() * flat.itemsize) % 8 == 0
    return flat.view(torch.int64 if whole else torch.uint8).sum(dtype=torch.int64)


def _takes_segments(model: nn.Module) -> bool:
    """The model has embeddings for two segments."""
    types = getattr(getattr(model, "config", None), "type_vocab_size", 0)
    return isinstance(types, int) and types > 1 and "token_type_ids" in _signature(type(model).forward).parameters
