"""Whether a model's layers see the rows of several clients side by side, tried out when it is loaded.

A lane-wise layer takes equal pieces of its input's first axis for lanes. Most architectures hand it (rows, tokens, d)
or (rows, d). Some do not: DeBERTa sends one table of positions for all rows through its projections, Longformer puts
tokens first, a mixture of experts gathers tokens from all rows. There, clients would get each other's adapters,
silently. So two lanes are run against one, and a model for which they differ runs its lanes one by one, which is exact
for any of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain

import torch
from torch import Tensor
from torch.nn import functional as F

from fedtailor.core.errors import ModelError
from fedtailor.core.seeding import torch_rng
from fedtailor.lanes.batches import LaneBatch
from fedtailor.lanes.net import LaneNet

_LANES, _ROWS, _TOKENS = 2, 2, 7
"""The rows of all lanes and their tokens differ, so that an input's shape tells which is which."""

ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-8}
"""Largest difference that rounding explains, as a share of the adapters' effect. Narrower types round more than a
mix-up of positions may change: there the tiny batch is computed in float32."""

LARGEST_WIDENED = 2**28
"""Weights up to which they are widened for that; of larger models in a narrow type shapes decide alone."""

_UNSEEN = 1e-2
"""Largest change of scores by what a model must not see that rounding explains, as a share of their size."""

Shape = tuple[int, ...]


def probe(net: LaneNet, pad_id: int, numbers: bool = True) -> None:
    """Sets ``net.state.fused``, ``net.one_by_one``, ``net.tokens_first`` and ``net.idle``.

    Args:
        net: just loaded, without bound adapters.
        pad_id: padding token of the tokenizer.
        numbers: compare numbers too, which takes three more passes over a few tokens; False: shapes alone.

    Raises:
        ModelError: the model does not run on a tiny batch when its layers carry adapters, a text's scores depend on
            the padding beside it, or a token's scores on those that follow it.
    """
    name = type(net.model).__name__
    seen: list[list[Shape]] = [[] for _ in net.layers]
    handles = [layer.register_forward_pre_hook(_watch(own)) for layer, own in zip(net.layers, seen, strict=True)]
    net.train_mode(False)
    net.state.fused = True
    held, net.compute_type = net.compute_type, None
    try:
        with torch.no_grad(), _wide_weights(net, numbers) as numbers:
            bind_strong(net)
            batch = tiny_batch(net, pad_id)
            try:
                together = net.logits(batch)
            finally:
                for handle in handles:
                    handle.remove()
            alone = torch.stack([net.lane_logits(batch, lane)[0] for lane in range(_LANES)]) if numbers else together
            longer = net.lane_logits(_longer(batch, pad_id, len(alone[0])), 0)[0] if numbers else alone[0]
    except Exception as error:  # any model's code may fail here in its own way
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ModelError(f"{name} does not run with adapters: {type(error).__name__}: {reason}") from error
    finally:
        net.compute_type = held
        net.unbind()
    _check_unseen(name, alone[0], longer, batch.attention_mask[0].flatten().bool())
    net.idle = tuple(layer.name for layer, own in zip(net.layers, seen, strict=True) if not own)
    net.tokens_first = frozenset(i for i, own in enumerate(seen) if any(map(_tokens_first, own)))
    odd = [layer.name for layer, own in zip(net.layers, seen, strict=True) if not all(map(_by_rows, own))]
    if odd:
        net.one_by_one = f"{name}: {odd[0]} does not get its input by rows ({len(odd)} such layers)"
    elif numbers and not _same(together, alone):
        net.one_by_one = f"{name}: two clients in one forward pass change each other's scores"
    net.state.fused = not net.one_by_one


def _watch(seen: list[Shape]) -> Callable[..., None]:
    return lambda _module, inputs: seen.append(tuple(inputs[0].shape[:-1]))


def _by_rows(shape: Shape) -> bool:
    rows = _LANES * _ROWS
    return shape[0] == rows or shape == (rows * _TOKENS,)


def _tokens_first(shape: Shape) -> bool:
    return len(shape) == 2 and shape[0] != shape[1] == _LANES * _ROWS


def _same(together: Tensor, alone: Tensor) -> bool:
    effect = (alone[0] - alone[1]).abs().max()
    return bool((together - alone).abs().max() <= ROUNDING[together.dtype] * effect)


def _check_unseen(name: str, own: Tensor, longer: Tensor, real: Tensor) -> None:
    """Scores of one lane by itself and beside tokens that must not change them: padding, or what follows."""
    by_token = len(own) == _ROWS * _TOKENS
    if by_token:
        longer = longer.view(_ROWS, -1, own.shape[-1])[:, :_TOKENS].flatten(0, 1)[: len(own)][real]
        own = own[real]
    elif own.shape != longer.shape:  # each token of a row is scored as the first and as the last of a span
        real = real.view(_ROWS, _TOKENS).repeat_interleave(2, 0)
        own, longer = own[real], longer[:, :_TOKENS][real]
    if (own - longer).abs().max() > _UNSEEN * own.abs().max():
        raise ModelError(
            f"{name}: a token's scores depend on the tokens that follow it, so that it would learn from the answers "
            f"themselves; not supported"
            if by_token
            else f"{name}: the padding beside a text changes its scores, as if padding were read; not supported"
        )


@contextmanager
def _wide_weights(net: LaneNet, numbers: bool) -> Iterator[bool]:
    """Weights and buffers of narrow types as float32 while it lasts; yields whether numbers can be compared."""
    tensors = list(chain(net.model.parameters(), net.model.buffers()))
    narrow = [t for t in tensors if t.is_floating_point() and t.dtype not in ROUNDING]
    packed = any(not t.is_floating_point() for t in net.model.parameters())
    if not numbers or packed or sum(t.numel() for t in narrow) > LARGEST_WIDENED:
        yield False
        return
    held = [t.data for t in narrow]
    for tensor in narrow:
        tensor.data = tensor.data.float()
    try:
        yield True
    finally:
        for tensor, data in zip(narrow, held, strict=True):
            tensor.data = data


def bind_strong(net: LaneNet) -> None:
    """Every layer gets an adapter of rank 1 per lane, about as strong as the layer itself."""
    rng = torch_rng("probe")
    for layer, adapted in zip(net.layers, net.adapted, strict=True):
        a = torch.randn(_LANES, 1, adapted.d_in, generator=rng) / adapted.d_in**0.5
        b = torch.randn(_LANES, adapted.d_out, 1, generator=rng) / adapted.d_out**0.5
        layer.bind(a.to(net.device, net.param_dtype), b.to(net.device, net.param_dtype), None, 1.0)


def tiny_batch(net: LaneNet, pad_id: int) -> LaneBatch:
    """The same texts for both lanes, one row of each shorter, all of them ended where the model asks for it."""
    config = net.config
    size = int(getattr(config, "vocab_size", None) or config.get_text_config().vocab_size)
    ids = torch.randint(size // 2, size, (1, _ROWS, _TOKENS), generator=torch_rng("probe", "tokens"))
    mask = torch.ones_like(ids)
    mask[:, 1, _TOKENS - 2 :] = 0
    ids[mask == 0] = pad_id
    end = getattr(config, "eos_token_id", None)
    if isinstance(end, int):
        ids[:, 0, -1], ids[:, 1, -3] = end, end
    ids, mask = (t.repeat(_LANES, 1, 1).to(net.device) for t in (ids, mask))
    labels, valid = (torch.zeros(_LANES, _ROWS, dtype=t, device=net.device) for t in (torch.int64, torch.bool))
    return LaneBatch(ids, mask, labels, valid, ((_ROWS, _TOKENS),) * _LANES)


def _longer(batch: LaneBatch, pad_id: int, scored: int) -> LaneBatch:
    """The batch with more padding, or with more tokens where each token is scored, as of a language model."""
    follows = int(scored == _ROWS * _TOKENS)
    ids = F.pad(batch.input_ids, (0, 4), value=int(batch.input_ids[0, 0, 0]) if follows else pad_id)
    return replace(batch, input_ids=ids, attention_mask=F.pad(batch.attention_mask, (0, 4), value=follows))
