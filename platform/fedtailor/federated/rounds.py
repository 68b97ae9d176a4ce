"""The only loop over rounds: it samples a cohort, pushes segments, merges sums in order, steps and commits.

No method's name occurs here, and no arithmetic on weights: that is the aggregator's and the server optimizer's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np

from fedtailor.core.errors import ClientError, RoundError
from fedtailor.core.messages import ClientCost, Failure, FloatArray, Row, SegmentJob, SegmentResult, metric_row
from fedtailor.core.seeding import numpy_rng
from fedtailor.federated.checks import checked_results
from fedtailor.federated.method import Method, without_record
from fedtailor.federated.pool import Pool
from fedtailor.federated.release import NoisedAggregate, PrivacySpend, RecordSpend, RoundId, no_ledger, still
from fedtailor.federated.updates import clipped_share, norm_alarms
from fedtailor.lanes.grouping import segments


@dataclass(frozen=True)
class RoundState:
    """What a commit keeps of a stage.

    Args:
        round: rounds done.
        shared: SHARED parameters (P,) float32.
        server: server optimizer's state.
        private_at: client to the round whose commit holds its newest PRIVATE row.
    """

    round: int
    shared: Row
    server: Mapping[str, Row]
    private_at: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class RoundOutcome:
    """Everything that a round adds: committed as a whole or not at all."""

    state: RoundState
    cohort: tuple[str, ...]
    weights: Mapping[str, float]
    metrics: Sequence[Mapping[str, Any]]
    private: Mapping[str, FloatArray]
    failures: Sequence[Failure]
    warnings: Sequence[Mapping[str, Any]]
    seconds: Mapping[str, float]
    costs: Mapping[str, ClientCost] = field(default_factory=dict)
    spent: PrivacySpend | None = None
    """What was written down for this release, where the method has one."""


class RoundLog(Protocol):
    """Where rounds are kept."""

    def newest(self) -> RoundState | None:
        """The newest verified round, or None."""

    def private(self, client: str, round: int) -> FloatArray:
        """A client's PRIVATE row as committed in ``round``."""

    def commit(self, outcome: RoundOutcome) -> None:
        """Keeps a round; afterwards it is never lost or changed."""


@dataclass(frozen=True)
class RoundPlan:
    """Numbers of a stage.

    Args:
        stage: stage key.
        seed: run seed.
        rounds: how many in all.
        clients: the seen pool, sorted.
        sizes: training examples of each client.
        cohort: clients per round.
        segments: most pieces of a cohort.
        min_segment: fewest clients of a piece.
        drop_failures: commit a round without the clients that failed.
        quorum: share of the cohort that must succeed.
        private: PRIVATE numbers that every client sends back; None: not checked.
        poisson: every client is sampled by itself, ``cohort`` of them on average.
    """

    stage: str
    seed: int
    rounds: int
    clients: tuple[str, ...]
    sizes: Mapping[str, int]
    cohort: int
    segments: int
    min_segment: int
    drop_failures: bool = False
    quorum: float = 0.5
    private: int | None = None
    poisson: bool = False


def cohort_of(plan: RoundPlan, round: int) -> tuple[str, ...]:
    """Clients of a round: uniformly without replacement in sampling order, or each by itself (Poisson) in pool order.

    The stream is named (seed, stage kind, round): methods of the same stage kind meet the same cohorts.
    """
    kind = plan.stage.split("/")[0]
    if plan.poisson:
        chances = numpy_rng(plan.seed, kind, round, "poisson-cohort").random(len(plan.clients))
        rate = plan.cohort / len(plan.clients)
        return tuple(client for client, chance in zip(plan.clients, chances, strict=True) if chance < rate)
    indices = numpy_rng(plan.seed, kind, round, "cohort").choice(len(plan.clients), size=plan.cohort, replace=False)
    return tuple(plan.clients[i] for i in indices)


def _pieces(plan: RoundPlan, cohort: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Segments; none of an empty cohort, which a Poisson sample may be."""
    return segments(cohort, plan.segments, plan.min_segment) if cohort else []


def run_rounds(
    plan: RoundPlan,
    method: Method,
    pool: Pool,
    initial: Row,
    log: RoundLog,
    on_result: Callable[[SegmentResult], None],
    on_round: Callable[[RoundOutcome], None],
    overlay: Callable[[Sequence[str]], Mapping[str, FloatArray]] = lambda clients: {},
    record_spend: RecordSpend = no_ledger,
    score: Callable[[RoundOutcome], Sequence[Mapping[str, Any]]] = lambda outcome: (),
) -> RoundState:
    """Runs what is missing of a stage and returns its last state.

    The driver commits a round while the workers play the next one, each the piece that it was handed first; further
    pieces wait for the commit, and nothing is concluded from the next round before it is there. Where clients have
    PRIVATE state, which they get from the commit, and where releases are paid for in epsilon, the next round begins
    after the commit.

    Args:
        plan: numbers of the stage.
        method: built record.
        pool: with the stage open.
        initial: SHARED state before round 0, (P,).
        log: where rounds are kept.
        on_result: called once per accepted segment, for progress.
        on_round: called after each commit.
        overlay: what some clients keep of their base.
        record_spend: writes down what a release costs, before it is made.
        score: metric rows about a round that is about to be committed, which they will be part of.

    Raises:
        ClientError: a client failed and the policy is to fail.
        RoundError: no valid update, or fewer than the quorum; nothing of that round is kept.
    """
    state = log.newest() or RoundState(0, initial, method.server.init(initial))
    closed: list[RoundOutcome] = []

    def settle() -> None:
        while closed:
            outcome = closed.pop()
            log.commit(outcome)
            on_round(outcome)

    while state.round < plan.rounds and not (method.early_stop and method.early_stop.reached(state.server)):
        cohort = cohort_of(plan, state.round)
        jobs = [
            SegmentJob(
                plan.stage,
                state.round,
                index,
                clients,
                private={c: log.private(c, state.private_at[c]) for c in clients if c in state.private_at},
                presum=method.aggregator.presum,
                overlay=overlay(clients),
                cohort=cohort if method.masking else (),
            )
            for index, clients in enumerate(_pieces(plan, cohort))
        ]
        try:
            results = pool.run(jobs, state.shared, on_result, settle) if jobs else []
        finally:
            settle()
        outcome = close_round(plan, method, state, cohort, results, record_spend)
        closed.append(replace(outcome, metrics=[*outcome.metrics, *score(outcome)]))
        state = closed[0].state
        if method.mechanism is not None or closed[0].private:
            settle()
    settle()
    return state


def close_round(
    plan: RoundPlan,
    method: Method,
    state: RoundState,
    cohort: tuple[str, ...],
    results: Sequence[SegmentResult],
    record_spend: RecordSpend = no_ledger,
) -> RoundOutcome:
    """Merges segment sums in index order and lets the server step.

    Raises:
        ClientError, RoundError: see `run_rounds`.
    """
    results = checked_results(results, _pieces(plan, cohort), method.aggregator, state.shared.size, plan.private)
    failures = [failure for result in results for failure in result.failures]
    valid = [client for result in results for client in result.valid]
    crashed = [f for f in failures if f.kind == "exception"]
    if crashed and not plan.drop_failures:
        raise ClientError(crashed[0].client, plan.stage, state.round, crashed[0].reason)
    needed = max(1, int(np.ceil(plan.quorum * len(cohort)))) if plan.drop_failures else min(1, len(cohort))
    if len(valid) < needed:
        reasons = "; ".join(f"{f.client}: {f.reason}" for f in failures[:5])
        raise RoundError(
            f"{plan.stage}, round {state.round}: {len(valid)} of {len(cohort)} updates are valid, "
            f"{needed} needed ({reasons})"
        )
    released, spent = _released(plan, method, state, cohort, valid, _merge(method, results), record_spend)
    consensus = released.consensus
    if not np.isfinite(consensus).all():
        raise RoundError(f"{plan.stage}, round {state.round}: the aggregate is not finite")
    shared, server = method.server.step(state.shared, consensus - state.shared, without_record(state.server))
    metrics = [row for result in results for row in result.metrics]
    if method.early_stop is not None:
        server = server | method.early_stop.follow(state.shared, state.server, metrics)
    private = {client: row for result in results for client, row in result.private.items()}
    norms = {client: norm for result in results for client, norm in result.norms.items()}
    rejected = sum(failure.kind != "absent" for failure in failures)
    numbers = ({"rejected_clients": rejected} if rejected else {}) | dict(released.metrics)
    if method.mechanism is not None and (share := clipped_share(norms, method.bound)) is not None:
        numbers["clipped_share"] = share
    metrics += [
        metric_row(
            stage=plan.stage.split("/")[0], method=method.name, seed=plan.seed, round=state.round, metric=name,
            value=float(value), weight=1.0,
        )
        for name, value in numbers.items()
    ]  # fmt: skip
    return RoundOutcome(
        state=RoundState(state.round + 1, shared, server, {**state.private_at, **dict.fromkeys(private, state.round)}),
        cohort=cohort,
        weights={client: 1.0 if method.mechanism else float(plan.sizes[client]) for client in valid},
        metrics=metrics,
        private=private,
        failures=failures,
        warnings=[
            *(w for result in results for w in result.warnings),
            *norm_alarms(norms, method.norm_alarm),
            *released.warnings,
            *(still(state.shared, shared) if method.mechanism or method.masking else ()),
        ],
        seconds={client: s for result in results for client, s in result.seconds.items()},
        costs={client: cost for result in results for client, cost in result.costs.items()},
        spent=spent,
    )


def _released(
    plan: RoundPlan,
    method: Method,
    state: RoundState,
    cohort: tuple[str, ...],
    valid: Sequence[str],
    total: Any,
    record_spend: RecordSpend,
) -> tuple[NoisedAggregate, PrivacySpend | None]:
    """Opens the sum where it is masked, and releases it: written down first, then noised."""
    round_id = RoundId(plan.seed, plan.stage, state.round, cohort)
    numbers: dict[str, float] = {}
    if method.masking is not None:
        opened = method.masking.open(total, state.shared, valid, round_id)
        total, numbers = opened.total, dict(opened.metrics)
    if method.mechanism is None:
        return NoisedAggregate(method.aggregator.result(total), numbers), None
    spend = record_spend(state.round, method.mechanism.fingerprint(total))
    released = method.mechanism(total, state.shared, plan.cohort, round_id, spend.number)
    if np.isfinite(spend.epsilon):
        numbers["epsilon"] = spend.epsilon
    return NoisedAggregate(released.consensus, {**numbers, **released.metrics}, released.warnings), spend


def _merge(method: Method, results: Sequence[SegmentResult]) -> Any:
    aggregator, total = method.aggregator, None
    for result in results:
        part = result.partial
        if isinstance(part, list):
            for _, row, weight in part:
                total = aggregator.add(aggregator.zero(row.size) if total is None else total, row, weight)
        elif part is not None:
            total = part if total is None else aggregator.merge(total, part)
    return total
