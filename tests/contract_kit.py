"""What every method must keep, as checks that any `MethodEntry` can be put through in seconds on a tiny model.

A check that fails names the method and the rule. `CHECKS` is all of them.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
from tiny import tiny
from toy import toy_net

from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec
from fedtailor.core.scope import Scope
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.prepare import make_inputs
from fedtailor.experiment.stages import Stage, stage_spec
from fedtailor.federated.method import Method, MethodEntry
from fedtailor.federated.rounds import RoundOutcome, RoundPlan, RoundState, run_rounds
from fedtailor.methods import METHODS, build_method
from fedtailor.storage.artifacts import Artifacts, artifact_path, model_path
from fedtailor.storage.files import Storage
from fedtailor.tasks.store import POOLED
from fedtailor.tasks.tokens import TokenData
from fedtailor.worker.worker import SerialPool, check_base

ROUNDS, BUDGETS = 2, (1, 2)
SMALL = (
    "task.languages=[eng,yor]", "task.clients_per_language=12", "base.name=none", "base.cohort=4",
    "budgets=[1,2]", "r_max=2", "task.clients_kept=2", f"strategy.rounds={ROUNDS}", "strategy.cohort=4",
    "engine.min_segment=2", "engine.segments=2",
)  # fmt: skip
"""The first two of twelve clients a language, so that each has few texts; all of them in both rounds' cohorts."""


def tiny_section(name: str, section: Mapping[str, Any]) -> list[str]:
    """A method's tiny configuration as words of the command line."""
    return [f"{name}.{key}={_word(value)}" for key, value in section.items()]


def _word(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}: {_word(part)}" for key, part in value.items()) + "}"
    return "[" + ",".join(map(_word, value)) + "]" if isinstance(value, (list, tuple)) else str(value)


def budgets_of(method: Method) -> tuple[int, ...]:
    """Budgets of a stage: of one that is trained for a budget, that budget alone."""
    return BUDGETS[-1:] if method.per_budget else BUDGETS


@dataclass(frozen=True)
class Bench:
    """Data and model that all methods are tried on."""

    exp: ExperimentBase
    root: Path
    model: str
    tokens: str
    sizes: Mapping[str, int]
    """Training examples of the seen clients."""
    clients: tuple[str, ...]
    played: dict[str, Played] = field(default_factory=dict)

    @classmethod
    def make(cls, root: Path, exp: ExperimentBase | None = None) -> Bench:
        exp = exp or tiny(root, *SMALL, "methods=[base]")
        inputs = make_inputs(exp, 42, Artifacts(Storage(exp.storage), "kit", print))
        data = TokenData.open(root / artifact_path(inputs.tokens))
        seen = {c.id: c.n_train for c in data.clients if c.pool == "seen"}
        return cls(exp, root, inputs.model, inputs.tokens, seen, tuple(c.id for c in data.clients))

    def whole(self, entry: MethodEntry) -> Played:
        """The method played once, for all checks."""
        if entry.name not in self.played:
            self.played[entry.name] = play(entry, self)
        return self.played[entry.name]

    def spec(self, entry: MethodEntry, kind: str) -> StageSpec:
        budgets = budgets_of(build_method(entry.name, entry.tiny or {}, max(BUDGETS)))
        stage = Stage(f"{kind}/{entry.name}/seed42", kind, entry.name, 42, "", self.model, None, ROUNDS, 4, budgets, 2)
        folders = (str(self.root / model_path(self.model)), str(self.root / artifact_path(self.tokens)))
        bare = stage_spec(self.exp, replace(stage, method="base"), *folders, None)  # the tree has no section of it
        return replace(bare, method=entry.name, method_config=dict(entry.tiny or {}))


class MemoryLog:
    """Rounds of one stage, kept here."""

    def __init__(self) -> None:
        self.outcomes: list[RoundOutcome] = []

    def newest(self) -> RoundState | None:
        return self.outcomes[-1].state if self.outcomes else None

    def private(self, client: str, round: int) -> FloatArray:
        return self.outcomes[round].private[client]

    def commit(self, outcome: RoundOutcome) -> None:
        self.outcomes.append(outcome)


@dataclass
class Played:
    """One method from its first round to its personal models."""

    method: Method
    pool: SerialPool
    info: StageInfo | None = None
    log: MemoryLog = field(default_factory=MemoryLog)
    state: RoundState | None = None
    jobs: list[SegmentJob] = field(default_factory=list)
    made: SegmentResult | None = None

    def check_base(self, who: str) -> None:
        worker = self.pool._worker
        if worker._stage is not None and not worker._stage.trains_base:
            check_base(worker._base, worker._stage.net.fingerprint(), who)


@contextmanager
def listed(entry: MethodEntry) -> Iterator[Method]:
    """The entry as a row of METHODS, and its record."""
    if entry.tiny is None:
        raise AssertionError(f"the ENTRY of method {entry.name} needs `tiny`, a small section for the contracts")
    with patch.dict(METHODS, {entry.name: entry}):
        yield build_method(entry.name, entry.tiny, max(BUDGETS))


def play(entry: MethodEntry, bench: Bench, log: MemoryLog | None = None, until: int = ROUNDS) -> Played:
    """Rounds, if the method has any, then the personal models of all clients."""
    with listed(entry) as method:
        done = Played(method, SerialPool(bench.exp.engine, print), log=log or MemoryLog())
        if method.local_update is not None:
            done.info = done.pool.open(bench.spec(entry, "strategy"))
            private = sum(spec.size for spec in done.info.private)
            sizes = bench.sizes if method.pooled == "no" else {POOLED: sum(bench.sizes.values())}
            plan = RoundPlan(
                f"strategy/{entry.name}/seed42", 42, until, tuple(sizes), sizes, len(sizes), 2, 2, private=private
            )
            pool = _Watched(done)
            done.state = run_rounds(plan, method, pool, done.info.initial, done.log, lambda _: None, lambda _: None)
            done.check_base(f"method {entry.name}")
        if until == ROUNDS:
            done.made = personalise(done, entry, bench, private_rows(done))
            done.check_base(f"method {entry.name}")
        return done


class _Watched(SerialPool):
    """The pool of a `Played`, whose jobs are noted down."""

    def __init__(self, done: Played) -> None:
        self._done = done

    def run(self, jobs: Sequence[SegmentJob], *rest: Any, **named: Any) -> list[SegmentResult]:
        self._done.jobs += jobs
        return self._done.pool.run(jobs, *rest, **named)


def personalise(done: Played, entry: MethodEntry, bench: Bench, private: Mapping[str, FloatArray]) -> SegmentResult:
    with listed(entry):
        done.pool.open(bench.spec(entry, "personalise"))
        shared = done.state.shared if done.state is not None and done.info and done.info.shared else None
        job = SegmentJob(f"personalise/{entry.name}/seed42", 0, 0, bench.clients, private=private)
        [result] = done.pool.run([job], shared, lambda _: None)
        return result


def private_rows(done: Played) -> dict[str, FloatArray]:
    if done.state is None:
        return {}
    return {client: done.log.private(client, at) for client, at in done.state.private_at.items()}


def moved(rows: Mapping[str, FloatArray]) -> dict[str, FloatArray]:
    """Other rows: not moved by one number, which a norm after an embedding takes out again."""
    return {
        client: row + np.float32(0.05) * np.cos(np.arange(row.size, dtype=np.float32)) for client, row in rows.items()
    }


def losses(result: SegmentResult) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for row in result.metrics:
        if row["metric"] == "loss":
            found.setdefault(row["client"], []).append(row["value"])
    return found


def demand(holds: bool, entry: MethodEntry, rule: str) -> None:
    if not holds:
        raise AssertionError(f"method {entry.name}: {rule}")


def every_client_gets_a_model(entry: MethodEntry, bench: Bench) -> None:
    """Nothing fails, nobody is left out, and the frozen base is what it was."""
    done = bench.whole(entry)
    assert done.made is not None
    failures = [f for outcome in done.log.outcomes for f in outcome.failures] + done.made.failures
    demand(not failures, entry, f"every client succeeds on the tiny task, but {failures[:1]}")
    each = len(budgets_of(done.method)) if done.method.personaliser.budgeted else 1
    found = losses(done.made)
    demand(set(found) == set(bench.clients), entry, "every client gets a personal model")
    demand({len(v) for v in found.values()} == {each}, entry, f"every client is scored {each} times, once a budget")


def resumed_is_uninterrupted(entry: MethodEntry, bench: Bench) -> None:
    """A round depends on what was committed and on nothing that a worker remembers."""
    whole = bench.whole(entry)
    if whole.state is None:
        return
    again = play(entry, bench, play(entry, bench, until=1).log)
    assert again.state is not None
    rule = "after a restart the {} are those of an uninterrupted run, bit for bit"
    same = whole.state.shared.tobytes() == again.state.shared.tobytes()
    demand(same, entry, rule.format("SHARED parameters"))
    kept = [{client: row.tobytes() for client, row in private_rows(done).items()} for done in (whole, again)]
    demand(kept[0] == kept[1], entry, rule.format("PRIVATE parameters"))
    assert whole.made is not None
    assert again.made is not None
    demand(losses(whole.made) == losses(again.made), entry, rule.format("scores of the personal models"))


def private_state_comes_back_and_is_used(entry: MethodEntry, bench: Bench) -> None:
    """PRIVATE parameters are trained, come back to a client that returns, matter there, and matter in the end.

    Of a method one of whose ``modules`` says that it is ``settled`` they are what a client's first round made them.
    """
    done = bench.whole(entry)
    if done.info is None or not done.info.private:
        return
    first, second = done.log.outcomes
    last = [job for job in done.jobs if job.round == ROUNDS - 1]
    for job in last:
        back = all(np.array_equal(row, first.private[client]) for client, row in job.private.items())
        demand(back and set(job.private) == set(job.clients), entry, "a client that returns gets its own PRIVATE row")
    with listed(entry):
        done.pool.open(bench.spec(entry, "strategy"))
        shared = first.state.shared
        others = done.pool.run([replace(job, private=moved(job.private)) for job in last], shared, lambda _: None)
    settled = any(getattr(part, "settled", False) for part in done.method.modules)
    for result in others:
        for client, row in result.private.items():
            demand(
                np.array_equal(first.private[client], second.private[client]) is settled, entry,
                "settled PRIVATE parameters stay as the first round made them" if settled
                else "PRIVATE parameters are trained in every round of their client",
            )  # fmt: skip
            demand(
                not np.array_equal(row, second.private[client]), entry,
                "a local update goes on from the PRIVATE state that came back: with another one it gives the same",
            )  # fmt: skip
    assert done.made is not None
    if Scope.PRIVATE not in scopes_of(done.method, modules=False):
        return  # an optimizer's state, say, is no part of a model
    plain, other = losses(done.made), losses(personalise(done, entry, bench, moved(private_rows(done))))
    for client in bench.sizes:
        demand(
            plain[client] != other[client], entry,
            "the personal model uses the client's PRIVATE state: with another one it scores the same",
        )  # fmt: skip


def owns_what_its_file_says(entry: MethodEntry, bench: Bench) -> None:
    """The docstring of a method's file names the owner of each symbol, and so do its parameters."""
    says = re.findall(r"->\s+(SHARED|PRIVATE)\b", sys.modules[entry.build.__module__].__doc__ or "")
    with listed(entry) as method:
        declared = scopes_of(method)
    for scope in (Scope.SHARED, Scope.PRIVATE):
        name = scope.name
        demand(
            (name in says) == (scope in declared), entry,
            f"its file says '-> {name}', but it declares no {name} parameter" if name in says
            else f"it declares {name} parameters, but its file names no symbol '-> {name}'",
        )  # fmt: skip


def scopes_of(method: Method, modules: bool = True) -> frozenset[Scope]:
    """Scopes of what a method declares, in its modules beside the adapter too."""
    parts = [*([method.adapter] if method.adapter else []), *(method.modules if modules else ())]
    net = toy_net()
    return frozenset(spec.scope for part in parts for spec in part.specs(net))


CHECKS: tuple[Callable[[MethodEntry, Bench], None], ...] = (
    every_client_gets_a_model,
    resumed_is_uninterrupted,
    private_state_comes_back_and_is_used,
    owns_what_its_file_says,
)


def check_all(entry: MethodEntry, bench: Bench) -> None:
    """All checks, one after the other."""
    for check in CHECKS:
        check(entry, bench)
