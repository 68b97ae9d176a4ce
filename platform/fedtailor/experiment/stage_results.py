"""What a stage hands to those after it: the base as a model, SHARED parameters, what clients kept, the privacy spent.

A method's privacy is spent by its base and by its own rounds together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from fedtailor.core.messages import FloatArray, Row, StageInfo
from fedtailor.core.scope import ParamSpec
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.privacy import mechanism
from fedtailor.experiment.stages import Stage, has_overlay
from fedtailor.federated.method import best_of
from fedtailor.federated.release import RecordSpend, no_ledger
from fedtailor.models.load import load_base, load_tokenizer, save_folder
from fedtailor.privacy.accounting import Mechanism, Spent
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.files import Storage, join
from fedtailor.storage.journal import PrivacyLedger
from fedtailor.storage.round_store import CommittedRounds
from fedtailor.tasks.source import TaskKind

RowsOf = Callable[[Sequence[str]], Mapping[str, FloatArray]]
"""Clients to the flat rows that some of them have."""


@dataclass(frozen=True)
class EarlierStages:
    """Reads the commits of earlier stages of one run."""

    storage: Storage
    exp: ExperimentBase

    def shared(self, stage: Stage, info: StageInfo) -> Row | None:
        """SHARED state (P,) that a personalising stage starts from; None without SHARED parameters."""
        if not info.shared:
            return None
        state = self._rounds(stage.strategy, info.shared).newest()
        return info.initial if state is None else best_of(state.server, state.shared)

    def private(self, stage: Stage, info: StageInfo) -> RowsOf:
        """PRIVATE rows as the strategy stage left them; a client that was never sampled keeps its initial ones."""
        if not info.private or stage.strategy is None:
            return lambda clients: {}
        return self._rows(stage.strategy)

    def overlay(self, stage: Stage) -> RowsOf:
        """What clients keep of their base."""
        if stage.kind == "base" or not has_overlay(self.exp):
            return lambda clients: {}
        return self._rows(stage.parent)

    def _rows(self, artifact: str) -> RowsOf:
        rounds = self._rounds(artifact, None)
        at = rounds.private_at()
        return lambda clients: {c: rounds.private(c, at[c]) for c in clients if c in at}

    def _rounds(self, artifact: str | None, shared: Sequence[ParamSpec] | None) -> CommittedRounds:
        log = CommitLog(self.storage, f"artifacts/{artifact}")
        return CommittedRounds(log, shared or (), self.exp.engine.keep_rounds)


def spending(storage: Storage, exp: ExperimentBase, stage: Stage, stages: Sequence[Stage], seen: int) -> RecordSpend:
    """The stage's ledger, on top of what its base and its method's earlier strategies have spent.

    Args:
        storage: where the artifacts are.
        exp: whole configuration.
        stage: the stage that is about to run.
        stages: all stages of the run, in order.
        seen: clients that cohorts are drawn from.
    """
    noise = mechanism(exp, seen)
    if noise is None:
        return no_ledger
    earlier = takewhile(lambda other: other.key != stage.key, stages)
    before = [_ledger(storage, noise, other).spent() for other in earlier if _is_of_one_pipeline(other, stage)]
    return _ledger(storage, noise, stage, before).record_spend


def _ledger(storage: Storage, noise: Mechanism, stage: Stage, before: Sequence[Spent] = ()) -> PrivacyLedger:
    folder, cohorts = join("artifacts", stage.artifact), f"{stage.kind}/seed{stage.seed}"
    return PrivacyLedger(storage, folder, noise, cohorts, stage.cohort, before)


def _is_of_one_pipeline(earlier: Stage, stage: Stage) -> bool:
    same = (earlier.kind, earlier.method, earlier.seed) == (stage.kind, stage.method, stage.seed)
    return earlier.artifact == stage.parent or (same and earlier.rounds > 0)


@runtime_checkable
class Mergeable(Protocol):
    """Parameters that can become plain weights."""

    def merge(self, model: nn.Module, tensors: Mapping[str, Row]) -> None:
        """Writes ``tensors`` into an unwrapped model's weights, in place and in float32."""


def write_merged(
    source: Path,
    labels: Sequence[str],
    part: Mergeable,
    tensors: Mapping[str, Row],
    out: Path,
    kind: TaskKind = "classification",
) -> None:
    """Writes the model in ``source`` with further parameters merged, as a whole: what adapters stack on.

    It is in float32, whatever type a stage kept its base in: a bfloat16 model could not hold what a LoRA of a few
    rounds adds to it.
    """
    model = load_base(source, kind, labels)
    with torch.no_grad():
        part.merge(model, tensors)
    save_folder(model, load_tokenizer(source), out)
