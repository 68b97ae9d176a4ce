"""Client meta-data for the strategy generator: mean and SD of every adapted layer's input (FedP2EFT Eq. 6)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fedtailor.core.batches import Examples, LaneBatch, make_batch
from fedtailor.core.net import LaneNet
from fedtailor.core.seeding import seed_for

FEATURE_BATCH = 16
"""Rows of one forward pass; part of the numbers, so no setting."""


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
        mean = self.total / self.count
        variance = max(0.0, self.square - self.count * mean * mean) / max(1, self.count - 1)
        return mean, variance**0.5


@torch.no_grad()
def client_features(net: LaneNet, examples: Examples, pad_id: int, pad_to: int | None = None) -> Tensor:
    """E(h_0), SD(h_0), E(h_1), ... over all training texts of one client, (2L,) float32.

    One client is computed alone and in fixed batches, so that no grouping can change its features.

    Args:
        net: base model; bound adapters are bypassed.
        examples: the client's training texts.
        pad_id: padding token.
        pad_to: None (default): real tokens only. A length: the reference's behaviour, which pads every text
            to the task's fixed length and counts the padding.
    """
    moments = [_Moments() for _ in net.sites]
    batch: LaneBatch
    mask: Tensor

    def hook(number: int) -> Any:
        def read(_module: torch.nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            moments[number].add(x if x.dim() == 2 or pad_to is not None else x[mask])

        return read

    handles = [layer.register_forward_pre_hook(hook(i)) for i, layer in enumerate(net.layers)]
    net.train_mode(False)
    net.state.bypass = True
    try:
        for start in range(0, len(examples.labels), FEATURE_BATCH):
            rows = np.arange(start, min(start + FEATURE_BATCH, len(examples.labels)))
            batch = make_batch([examples], [rows], pad_id, net.device)
            if pad_to is not None:
                batch = _widen(batch, pad_to, pad_id)
            mask = batch.attention_mask.flatten(0, 1).bool()
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
    return LaneBatch(ids, mask, batch.labels, batch.rows, batch.shapes, types)


class FeatureCache:
    """Features of each client, computed once per base model; shared by workers through files.

    Args:
        folder: belongs to one base model and one data set; None keeps features in memory only.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = Path(folder) if folder else None
        self._known: dict[str, Tensor] = {}

    def get(self, net: LaneNet, client: str, examples: Examples, pad_id: int, pad_to: int | None) -> Tensor:
        """The client's features (2L,) float32 on the CPU."""
        key = f"{seed_for(client, pad_to or 0):016x}"
        if key not in self._known:
            path = self._folder / f"{key}.safetensors" if self._folder else None
            self._known[key] = (
                self._load(path, 2 * len(net.sites))
                if path and path.exists()
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
