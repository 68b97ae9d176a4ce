"""Runs a whole experiment: stages in order, each resumed where its commits end, on any pool."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedtailor.core.errors import CapabilityError, ClientError, Interrupted, RoundError
from fedtailor.core.messages import SegmentJob, SegmentResult, StageInfo, StageSpec
from fedtailor.experiment.config import ExperimentBase, base_seed, method_of, method_section
from fedtailor.experiment.prepare import make_inputs
from fedtailor.experiment.round_scores import RoundScores
from fedtailor.experiment.stage_results import EarlierStages, Mergeable, spending, write_merged
from fedtailor.experiment.stages import Inputs, Stage, plan_stages, short_hash, stage_spec
from fedtailor.federated.checks import checked_results
from fedtailor.federated.method import Method
from fedtailor.federated.pool import OnEvent, Pool
from fedtailor.federated.rounds import RoundOutcome, RoundPlan, run_rounds
from fedtailor.lanes.grouping import segments
from fedtailor.methods.build import build_server_side
from fedtailor.storage.artifacts import Artifacts, artifact_path, fetch, model_path, on_this_node
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.files import Storage
from fedtailor.storage.lock import Lock
from fedtailor.storage.payloads import Payload
from fedtailor.storage.round_store import (
    METRIC_SCHEMA,
    METRICS,
    PREDICTIONS,
    SHARED,
    CommittedRounds,
    adapter_files,
    named,
    predictions_table,
    table_of,
)
from fedtailor.storage.run_folder import DONE, RunFolder
from fedtailor.tasks.store import POOLED
from fedtailor.tasks.tokens import TokenData
from fedtailor.tracking.events import spent_event

STRATEGIES = "strategies.safetensors"


class Execution:
    """One run from its configuration to its last commit.

    Args:
        exp: checked configuration.
        run: its folder, created or opened.
        make_pool: builds the pool; called once, after the inputs exist.
        emit: receives events: progress, failures, warnings.
        should_stop: asked between segments; True ends the run at the last commit.
    """

    def __init__(
        self,
        exp: ExperimentBase,
        run: RunFolder,
        make_pool: Callable[[OnEvent], Pool],
        emit: OnEvent,
        should_stop: Callable[[], bool],
    ) -> None:
        self.exp, self.run, self.emit, self.should_stop = exp, run, emit, should_stop
        self.storage = Storage(exp.storage)
        self.artifacts = Artifacts(self.storage, run.run_id, self._waiting)
        self._earlier = EarlierStages(self.storage, exp)
        self._noticed: set[str] = set()
        self._make_pool = make_pool
        self._pool: Pool | None = None
        self._stages: list[Stage] = []

    def execute(self) -> None:
        """Runs all stages of all seeds.

        Raises:
            TailorError: whatever ended the run; commits made before it stay. StorageError:
                another process has this run.
        """
        with Lock(self.storage, self.run.run_id, self.run.run_id, on_event=self._storage_event):
            self._all_stages()

    def _all_stages(self) -> None:
        try:
            work = [self._prepare(seed) for seed in self.exp.seeds]
            # Seeds that share a base list it once.
            todo = list({s.key: (s, inputs) for inputs, stages in work for s in stages}.values())
            self._stages = [stage for stage, _ in todo]
            unknown = {inputs.tokens: inputs.unknown for inputs, _ in work}
            self.run.set_stages([{**stage.listed, "data": inputs.data} for stage, inputs in todo], unknown)
            for number, (stage, inputs) in enumerate(todo, start=1):
                self._stage(stage, inputs, number, len(todo))
        finally:
            if self._pool is not None:
                self._pool.close()

    def _prepare(self, seed: int) -> tuple[Inputs, list[Stage]]:
        self.emit({"kind": "stage", "stage": f"data/seed{seed}", "state": "preparing"})
        inputs = make_inputs(self.exp, base_seed(self.exp, seed), self.artifacts)
        data = self._tokens(inputs)
        seen = [c for c in data.clients if c.pool == "seen"]
        return inputs, plan_stages(self.exp, seed, inputs, len(seen))

    @property
    def pool(self) -> Pool:
        """The pool, made at first use: a run that finds all stages committed needs none."""
        if self._pool is None:
            self._pool = self._make_pool(self._pool_event)
        return self._pool

    def _pool_event(self, event: dict[str, Any]) -> None:
        self.emit({**event, "how": event.get("kind", ""), "kind": "pool"})

    def _storage_event(self, event: dict[str, Any]) -> None:
        self.emit({**event, "kind": "storage"})

    def _waiting(self, text: str) -> None:
        self.emit({"kind": "waiting", "text": text})

    def _is_done(self, folder: str) -> bool:
        return self.storage.exists(f"{folder}/{DONE}")

    def _stage(self, stage: Stage, inputs: Inputs, number: int, total: int) -> None:
        folder = f"artifacts/{stage.artifact}"
        event = {"kind": "stage", "stage": stage.key, "artifact": stage.artifact, "number": number, "of": total}
        if self._is_done(folder):
            self.emit({**event, "state": "reused"})
            return
        with Lock(self.storage, folder, self.run.run_id, on_wait=self._waiting, on_event=self._storage_event) as held:
            if self._is_done(folder):
                self.emit({**event, "state": "reused"})
                return
            self.emit({**event, "state": "running"})
            log = CommitLog(self.storage, folder, self._storage_event, held.check)
            spec = self._spec(stage, inputs)
            method = build_server_side(
                stage.method, method_section(self.exp, stage.method), stage.r_max, spec.server_side
            )
            data = self._tokens(inputs, method.validation_pool)
            if stage.kind == "personalise":
                info = self._personalise(stage, spec, data, log)
            else:
                info = self._rounds(stage, method, spec, data, log)
            if stage.kind == "base":
                self._export(stage, method, spec, data, log, info)
            done = {"stage": stage.key, "modules": list(info.modules), "r_init": info.r_init}
            self.storage.write_json(f"{folder}/{DONE}", done)
            self.emit({**event, "state": "done"})

    def _spec(self, stage: Stage, inputs: Inputs) -> StageSpec:
        """What workers are told; each finds or fetches the folders on its own node."""
        model, engine = self.exp.model, self.exp.engine
        # All that cached features depend on; the clients' part of the base through its stage.
        source = [stage.parent, inputs.tokens, model.targets, model.attention, engine.dtype, engine.device]
        if method_of(self.exp, stage.method, stage.r_max).validation_pool:
            source.append("without the validation pool")
        features = artifact_path(f"features/{short_hash(source)}")
        spec = stage_spec(self.exp, stage, model_path(stage.parent), artifact_path(inputs.tokens), features)
        return replace(spec, storage=self.storage.address)

    def _tokens(self, inputs: Inputs, pool_apart: bool = False) -> TokenData:
        return TokenData.open(fetch(self.storage, artifact_path(inputs.tokens)), pool_apart)

    def _opened(self, stage: Stage, spec: StageSpec) -> StageInfo:
        info = self.pool.open(spec)
        for what in info.notices:
            if what not in self._noticed:
                self._noticed.add(what)
                self.emit({"kind": "warning", "stage": stage.key, "round": 0, "what": what})
        return info

    def _rounds(self, stage: Stage, method: Method, spec: StageSpec, data: TokenData, log: CommitLog) -> StageInfo:
        engine, pooled = self.exp.engine, method.pooled != "no"
        seen = (data.client(POOLED),) if pooled else data.pool("seen")
        info = self._opened(stage, spec)
        plan = RoundPlan(
            stage=stage.key,
            seed=stage.seed,
            rounds=stage.rounds,
            clients=tuple(c.id for c in seen),
            sizes={c.id: c.n_train for c in seen},
            cohort=1 if pooled else stage.cohort,
            segments=engine.segments,
            min_segment=engine.min_segment,
            drop_failures=engine.on_client_failure == "drop",
            quorum=engine.quorum,
            private=sum(param.size for param in info.private),
            poisson=self.exp.privacy.sampler == "poisson",
        )
        rounds, overlay = CommittedRounds(log, info.shared, engine.keep_rounds), self._earlier.overlay(stage)
        models = [c.id for c in data.clients if c.pool in self.exp.personalise.pools]
        scores = RoundScores(self.exp, stage, spec, self.pool, rounds, models, overlay, self._may_go_on)
        run_rounds(
            plan, method, self.pool, info.initial, rounds, self._received, partial(self._committed, stage),
            overlay, spending(self.storage, self.exp, stage, self._stages, len(seen)), scores,
        )  # fmt: skip
        return info

    def _may_go_on(self, result: SegmentResult) -> None:
        if self.should_stop():
            raise Interrupted(f"stopped in {result.stage}, round {result.round}: its commits are kept")

    def _received(self, result: SegmentResult) -> None:
        self._may_go_on(result)
        self.emit({"kind": "segment", "stage": result.stage, "clients": len(result.valid), **result.host})

    def _committed(self, stage: Stage, outcome: RoundOutcome) -> None:
        done = outcome.state.round
        self._note(stage, done - 1, outcome.failures, outcome.warnings)
        self.run.timing(stage.key, done - 1, outcome.seconds, outcome.costs)
        if outcome.spent is not None:
            self.emit(spent_event(stage.key, outcome))
        self._progress(stage, done, stage.rounds, len(outcome.weights), "round")

    def _progress(self, stage: Stage, done: int, total: int, clients: int, what: str) -> None:
        self.emit({"kind": "progress", "stage": stage.key, "done": done, "total": total, "clients": clients})
        if self.should_stop() and done < total:
            raise Interrupted(f"stopped after {stage.key}, {what} {done} of {total}")

    def _note(self, stage: Stage, index: int, failures: Any, warnings: Any) -> None:
        for failure in failures:
            self.run.failures.append(asdict(failure))
            self.emit({**asdict(failure), "kind": "failure", "failure": failure.kind})
        for warning in warnings:
            self.emit({"kind": "warning", "stage": stage.key, "round": index, "what": warning})

    def _export(
        self, stage: Stage, method: Method, spec: StageSpec, data: TokenData, log: CommitLog, info: StageInfo
    ) -> None:
        part, commit = method.adapter, log.newest()
        if not isinstance(part, Mergeable):
            raise CapabilityError(f"{method.name}: its parameters cannot be merged into a base model")
        tensors = named(info.shared, info.initial) if commit is None else commit.tensors(SHARED)
        source = Path(on_this_node(spec).model_dir)
        self.artifacts.replace(
            f"{stage.artifact}/model",
            lambda out: write_merged(source, data.labels, part, tensors, out, self.exp.task_entry.kind),
        )

    def _personalise(self, stage: Stage, spec: StageSpec, data: TokenData, log: CommitLog) -> StageInfo:
        clients = [c.id for c in data.clients if c.pool in self.exp.personalise.pools]
        size, engine = self.exp.personalise.chunk, self.exp.engine
        chunks = [clients[i : i + size] for i in range(0, len(clients), size)]
        info = self._opened(stage, spec)
        shared = self._earlier.shared(stage, info)
        own, overlay = self._earlier.private(stage, info), self._earlier.overlay(stage)
        for index in range(len(log.all(repair=True)), len(chunks)):
            jobs = [
                SegmentJob(stage.key, index, number, part, private=own(part), overlay=overlay(part))
                for number, part in enumerate(segments(chunks[index], engine.segments, engine.min_segment))
            ]
            results = self.pool.run(jobs, shared, self._received)
            self._commit_chunk(stage, index, chunks[index], results, log)
            self._progress(stage, index + 1, len(chunks), len(chunks[index]), "chunk")
        return info

    def _commit_chunk(
        self, stage: Stage, index: int, clients: Sequence[str], results: Sequence[SegmentResult], log: CommitLog
    ) -> None:
        engine = self.exp.engine
        results = checked_results(results, segments(clients, engine.segments, engine.min_segment))
        failures = [failure for result in results for failure in result.failures]
        if failures and engine.on_client_failure == "fail":
            raise ClientError(failures[0].client, stage.key, index, failures[0].reason)
        if len(failures) > (1 - engine.quorum) * len(clients):
            raise RoundError(f"{stage.key}, chunk {index}: {len(failures)} of {len(clients)} clients failed")
        objects: dict[str, Payload] = {METRICS: table_of((row for r in results for row in r.metrics), METRIC_SCHEMA)}
        answers = [row for result in results for row in result.predictions]
        if answers:
            objects[PREDICTIONS] = predictions_table(answers)
        strategies = {f"lambda/{client}": lam for r in results for client, lam in r.tensors.items()}
        if strategies:
            objects[STRATEGIES] = strategies
        for result in results:
            for lane, files in result.adapters.items():
                objects |= {f"{adapter_files(lane)}{name}": content for name, content in files.items()}
        rejected = [asdict(failure) for failure in failures]
        log.commit(index, objects, {"kind": "chunk", "cohort": list(clients), "rejected": rejected})
        seconds = {client: s for result in results for client, s in result.seconds.items()}
        self._note(stage, index, failures, [w for r in results for w in r.warnings])
        self.run.timing(stage.key, index, seconds, {c: cost for r in results for c, cost in r.costs.items()})
