"""The job without any platform: needs torch, transformers and NumPy only, since every peer's environment imports it."""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

RANK, SCALE, LEARNING_RATE = 8, 2.0, 2e-3


class LoraLinear(nn.Module):
    """W x + c + s B (A x) with a frozen W: the plain way to write it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.a = nn.Parameter(torch.zeros(RANK, base.in_features))
        self.b = nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + SCALE * functional.linear(functional.linear(x, self.a), self.b)


@dataclass
class Job:
    """A job folder as tensors."""

    folder: Path
    regime: dict[str, Any]
    clients: dict[str, np.ndarray]
    rounds: dict[str, np.ndarray]

    @classmethod
    def open(cls, folder: str | Path) -> Job:
        folder = Path(folder)
        regime = json.loads((folder / "regime.json").read_text())
        return cls(folder, regime, dict(np.load(folder / "clients.npz")), dict(np.load(folder / "rounds.npz")))

    def cohort(self, round: int) -> list[int]:
        return self.rounds["cohorts"][round].tolist()

    def texts(self, round: int, position: int) -> tuple[Tensor, Tensor]:
        """Rows of the cohort's client number ``position`` in the order of this round: (n, T) and (n,) int64."""
        cohort = self.cohort(round)
        sizes = self.clients["sizes"]
        skip = int(sum(sizes[c] for c in cohort[:position]))
        client = cohort[position]
        rows = self.rounds[f"order{round}"][skip : skip + sizes[client]] + self.clients["starts"][client]
        ids, labels = self.clients["ids"][rows], self.clients["labels"][rows]
        return torch.from_numpy(ids.astype(np.int64)), torch.from_numpy(labels.astype(np.int64))


def lora_model(job: Job) -> nn.Module:
    """The frozen classifier with a trainable LoRA on each linear layer."""
    model = AutoModelForSequenceClassification.from_pretrained(job.folder / "model")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for name, layer in [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]:
        parent = model.get_submodule(name.rpartition(".")[0])
        setattr(parent, name.rpartition(".")[2], LoraLinear(layer))
    write(model, torch.from_numpy(job.rounds["initial"]))
    return model.eval()


def trained(model: nn.Module) -> list[nn.Parameter]:
    """A and B of every layer, in module order."""
    return [p for m in model.modules() if isinstance(m, LoraLinear) for p in (m.a, m.b)]


@torch.no_grad()
def write(model: nn.Module, flat: Tensor) -> None:
    """Copies a flat vector into the trained parameters."""
    parameters = trained(model)
    for p, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.copy_(part.view_as(p))


def read(model: nn.Module) -> Tensor:
    """The trained parameters as one flat vector, a copy."""
    return torch.cat([p.detach().reshape(-1) for p in trained(model)])


def loss_of(model: nn.Module, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of one step."""
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return functional.cross_entropy(logits.float(), labels)


def train_client(model: nn.Module, ids: Tensor, labels: Tensor, batch: int) -> float:
    """One epoch of Adam over the rows as they come; returns the mean loss of the steps."""
    optimizer = torch.optim.Adam(trained(model), lr=LEARNING_RATE)
    total, steps = 0.0, 0
    for start in range(0, len(ids), batch):
        optimizer.zero_grad()
        loss = loss_of(model, ids[start : start + batch], labels[start : start + batch])
        loss.backward()
        optimizer.step()
        first_step()
        total, steps = total + loss.item(), steps + 1
    return total / steps


_stamped = False


def first_step() -> None:
    """Notes the time of the first optimizer step of the whole job, once, whichever process gets there."""
    global _stamped
    if _stamped:
        return
    _stamped = True
    try:
        with open(os.environ["BENCH_FIRST_STEP"], "x") as file:
            file.write(repr(time.time()))
    except FileExistsError:
        return


def report(out: str, round_s: list[float], final: np.ndarray, loss: float, **more: Any) -> None:
    """Writes what a system answers: seconds of each round, final parameters, mean training loss of the last round."""
    np.save(Path(out).with_suffix(".npy"), np.asarray(final, np.float32))
    Path(out).write_text(json.dumps({"round_s": round_s, "loss": loss, **more}))
