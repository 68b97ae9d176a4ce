"""What a stage takes from the stages before it: shared parameters, and what each client kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fedtailor.core.early_stop import best_of
from fedtailor.core.messages import FloatArray
from fedtailor.core.method import Row
from fedtailor.core.pool import StageInfo
from fedtailor.core.scope import ParamSpec
from fedtailor.runs.commit_log import CommitLog
from fedtailor.runs.experiment import ExperimentBase
from fedtailor.runs.round_log import CommittedRounds
from fedtailor.runs.stages import Stage, has_overlay
from fedtailor.runs.storage import Storage

RowsOf = Callable[[Sequence[str]], Mapping[str, FloatArray]]
"""Clients to the flat rows that some of them have."""


@dataclass(frozen=True)
class Inherited:
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
