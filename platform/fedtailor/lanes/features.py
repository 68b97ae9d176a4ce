"""Client meta-data for the strategy generator: mean and SD of every adapted layer's input (FedP2EFT Eq. 6).

Of instructions the prompts are read, without their responses, as in the public code; the output embedding's input is
one more pair at the end, which Eq. 6 does not count and the public code does (`ClientContext.client_features`).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtailor.core.seeding import seed_for
from fedtailor.lanes.batches import Examples, IntArray, LaneBatch, make_batch
from fedtailor.lanes.net import LaneNet

FEATURE_BATCH = 16
"""Rows of one forward pass; part of the numbers, so no setting."""

FEATURE_TOKENS = 4096
"""Tokens of one forward pass over prompts, which may be long; at least one row."""


class _Moments:
    """Streaming count, sum and sum of squares in float64."""

    def __init__(self) -> None:
        self.count, self.total, self.square = 0, 0.0, 0.0

    def add(self, x: Tensor) -> None:
        wide = x.double()
        self.count += x.numel()
        self.total += float(wide.sum())
        self.square += float(wide.square().sum())

    def mean_and_sd(self) -> tuple[float, float]:
        if not self.count:  # a layer that is never called
            return 0.0, 0.0
        mean = self.total / self.count
        variance = max(0.0, self.square - self.count * mean * mean) / max(1, self.count - 1)
        return mean, variance**0.5


def prompts_of(examples: Examples, prompt: IntArray, pad_id: int) -> Examples:
    """Instructions without their responses, as plain texts."""
    width = int(prompt.max())
    own = np.arange(width) < prompt[:, None]
    return Examples(np.where(own, examples.input_ids[:, :width], pad_id), prompt, examples.labels)


def counts_output(net: LaneNet) -> bool:
    """Whether there is an output embedding beside the adapted layers, whose input makes one more pair of features."""
    return net.model.get_output_embeddings() is not None  # type: ignore[operator]


def feature_size(net: LaneNet) -> int:
    """Numbers per client: 2L of a classifier, 2(L + 1) of a language model."""
    return 2 * (len(net.adapted) + counts_output(net))


@torch.no_grad()
def client_features(net: LaneNet, examples: Examples, pad_id: int, pad_to: int | None = None) -> Tensor:
    """E(h_0), SD(h_0), E(h_1), ... over all training texts (or prompts) of one client, `feature_size` float32.

    One client is computed alone and in fixed batches, so that no grouping can change its features.

    Args:
        net: base model; bound adapters are bypassed.
        examples: the client's training texts, or its instructions, of which the prompts count.
        pad_id: padding token.
        pad_to: None (default): real tokens only. A length: the reference's behaviour, which pads every text
            to the task's fixed length and counts the padding.
    """
    output = counts_output(net)
    moments = [_Moments() for _ in range(len(net.adapted) + output)]
    rows_each = FEATURE_BATCH
    if examples.prompt_length is not None:
        examples = prompts_of(examples, examples.prompt_length, pad_id)
        rows_each = max(1, FEATURE_TOKENS // max(int(examples.lengths.max()), pad_to or 0))
    batch: LaneBatch
    mask: Tensor

    def count(number: int, x: Tensor) -> None:
        # What is not of one row and token each (position tables, halved sequences) counts as it is.
        if pad_to is None and number in net.tokens_first:
            x = x.transpose(0, 1)
        tokens = pad_to is None and x.shape[:-1] == mask.shape
        moments[number].add(x[mask] if tokens else x)

    def hook(number: int) -> Any:
        return lambda _module, inputs: count(number, inputs[0])

    handles = [layer.register_forward_pre_hook(hook(i)) for i, layer in enumerate(net.layers)]
    net.train_mode(False)
    net.state.bypass = True
    try:
        for start in range(0, len(examples.labels), rows_each):
            rows = np.arange(start, min(start + rows_each, len(examples.labels)))
            batch = make_batch([examples], [rows], pad_id, net.device)
            if pad_to is not None:
                batch = _widen(batch, pad_to, pad_id)
            mask = batch.attention_mask.flatten(0, 1).bool()
            if output:
                count(len(net.adapted), net.hidden(batch))
            else:
                net.logits(batch)
    finally:
        net.state.bypass = False
        for handle in handles:
            handle.remove()
    return torch.tensor([value for m in moments for value in m.mean_and_sd()], dtype=torch.float32)


def _widen(batch: LaneBatch, width: int, pad_id: int) -> LaneBatch:
    extra = max(0, width - batch.input_ids.shape[2])
    ids = torch.nn.functional.pad(batch.input_ids, (0, extra), value=pad_id)
    mask = torch.nn.functional.pad(batch.attention_mask, (0, extra), value=0)
    types = batch.token_type_ids
    if types is not None:
        types = torch.nn.functional.pad(types, (0, extra), value=0)
    return LaneBatch(ids, mask, batch.labels, batch.valid, batch.shapes, types)


def _all_see(path: Path, net: LaneNet) -> bool:
    """The file is there; for all ranks of a group or for none, since they compute together or not at all."""
    if net.ranks is None:
        return path.exists()
    seen = torch.tensor(float(path.exists()), device=net.device)
    net.ranks.sum_(seen)
    return int(seen) == net.ranks.size


class FeatureCache:
    """Features of each client, computed once per base model; shared by workers through files.

    Args:
        folder: belongs to one base model and one data set; None keeps features in memory only.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder) if folder else None
        self._known: dict[str, Tensor] = {}

    def get(self, net: LaneNet, client: str, examples: Examples, pad_id: int, pad_to: int | None) -> Tensor:
        """The client's features, `feature_size` float32 on the CPU."""
        key = f"{seed_for(client, pad_to or 0):016x}"
        if key not in self._known:
            path = self._folder / f"{key}.safetensors" if self._folder else None
            self._known[key] = (
                self._load(path, feature_size(net))
                if path and _all_see(path, net)
                else (self._store(path, client_features(net, examples, pad_id, pad_to)))
            )
        return self._known[key]

    @staticmethod
    def _load(path: Path, size: int) -> Tensor:
        features: Tensor = load_file(path)["features"]
        if features.shape != (size,):
            raise ValueError(f"{path}: features of shape {tuple(features.shape)}, expected ({size},)")
        return features

    @staticmethod
    def _store(path: Path | None, features: Tensor) -> Tensor:
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            # Workers may compute the same client at once: equal bytes, last rename wins.
            temporary = path.with_suffix(f".{os.getpid()}.tmp")
            save_file({"features": features}, temporary)
            temporary.replace(path)
        return features
