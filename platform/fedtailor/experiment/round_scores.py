"""Personal models over the rounds: what they would be worth if the rounds ended now, committed with the round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedtailor.core.errors import ClientError
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageSpec
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.stages import Stage, stage_spec
from fedtailor.federated.checks import checked_results
from fedtailor.federated.pool import Pool
from fedtailor.federated.rounds import RoundLog, RoundOutcome
from fedtailor.lanes.grouping import segments
from fedtailor.worker.scoring import SCORES


@dataclass(frozen=True)
class RoundScores:
    """Scores every ``strategy.evaluate_every`` rounds; a ``score`` of `run_rounds`.

    The models are made by the method's personaliser from the state after the round, with the random streams of the
    personalising stage: after the last round the scores are those of the run.

    Args:
        exp: whole configuration.
        stage: with rounds.
        spec: what workers were told of the stage; they are back at it afterwards.
        pool: with the stage open.
        log: the stage's commits.
        clients: of the pools that the run personalises.
        overlay: what some clients keep of their base.
        on_result: called once per accepted segment.
    """

    exp: ExperimentBase
    stage: Stage
    spec: StageSpec
    pool: Pool
    log: RoundLog
    clients: Sequence[str]
    overlay: Callable[[Sequence[str]], Mapping[str, FloatArray]]
    on_result: Callable[[SegmentResult], None]

    def __call__(self, outcome: RoundOutcome) -> Sequence[Mapping[str, Any]]:
        """Metric rows ``test_...`` of the round, or none.

        Raises:
            ClientError: a client's model cannot be made, and the policy is to fail.
        """
        every, engine = self.exp.strategy.evaluate_every, self.exp.engine
        if not every or self.stage.kind != "strategy" or outcome.state.round % every:
            return ()
        key = "/".join(("personalise", *self.stage.key.split("/")[1:]))
        last = replace(self.stage, kind="personalise", key=key)
        spec = stage_spec(self.exp, last, self.spec.model_dir, self.spec.data_dir, self.spec.cache_dir)
        at = outcome.state.round - 1
        parts = segments(tuple(self.clients), engine.segments, engine.min_segment)
        jobs = [
            SegmentJob(key, at, number, part, private=self._private(outcome, part), overlay=self.overlay(part))
            for number, part in enumerate(parts)
        ]
        info = self.pool.open(replace(spec, storage=self.spec.storage, save_adapters=False))
        shared = outcome.state.shared if info.shared else None
        results = checked_results(self.pool.run(jobs, shared, self.on_result), parts)
        self.pool.open(self.spec)
        failures = [failure for result in results for failure in result.failures]
        if failures and engine.on_client_failure == "fail":
            raise ClientError(failures[0].client, self.stage.key, at, failures[0].reason)
        return list(self._rows(results))

    def _private(self, outcome: RoundOutcome, clients: Sequence[str]) -> dict[str, FloatArray]:
        """PRIVATE rows after the round, of the clients that have some."""
        before = {client: at for client, at in outcome.state.private_at.items() if client not in outcome.private}
        return {
            client: outcome.private[client] if client in outcome.private else self.log.private(client, before[client])
            for client in clients
            if client in outcome.state.private_at
        }

    def _rows(self, results: Sequence[SegmentResult]) -> Iterator[Mapping[str, Any]]:
        for result in results:
            for row in result.metrics:
                if row["metric"] in SCORES and not row["module"]:
                    yield {**row, "stage": self.stage.kind, "metric": f"test_{row['metric']}"}
