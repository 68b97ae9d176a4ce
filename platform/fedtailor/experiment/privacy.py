"""Privacy of an experiment before it runs: noise, delta and the epsilon of each method's rounds.

What epsilon says nothing about is printed with it, wherever it is printed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite

from fedtailor.core.errors import ConfigError, reported_as
from fedtailor.experiment.config import ExperimentBase, cohort_size, method_of, scaled
from fedtailor.privacy.accounting import Mechanism, Spent, default_delta, epsilon, noise_for
from fedtailor.privacy.secure_aggregation import Traffic, degree, traffic

NOT_COVERED: tuple[str, ...] = (
    "personalised adapters, lambda strategies and PRIVATE parts, which are made from one client's data",
    "metrics of single clients (train losses, accuracies) and each round's norms, which carry no noise",
    "client features that are kept with the run, and which clients took part",
    "a tokenizer or a start model that was made from the task's own texts",
    "training rows of a validation pool ('task.validation_per_class'), which the server sees",
    "choices made by looking at results: search over hyper-parameters, early stopping, picking a seed",
)


@dataclass(frozen=True)
class Forecast:
    """Epsilon after all rounds, known before the first.

    Args:
        mechanism: with the noise that will be used.
        by_method: base and strategy of one method.
        together: base and all strategies, if all are published.
    """

    mechanism: Mechanism
    by_method: Mapping[str, float]
    together: float


def mechanism_of(exp: ExperimentBase, seen: int, noise: float = 0.0) -> Mechanism:
    """What is the same in all rounds, with a given noise multiplier."""
    cfg = exp.privacy
    return Mechanism(noise, cfg.clip, cfg.delta or default_delta(seen), cfg.sampler, seen)


def resolved(exp: ExperimentBase, seen: int) -> ExperimentBase:
    """The configuration with a noise multiplier in the place of a target epsilon.

    Raises:
        ConfigError: no noise reaches the target.
    """
    cfg = exp.privacy
    if cfg.target_epsilon is None:
        return exp
    blank = mechanism_of(exp, seen, 1.0)
    dearest = max(_pipelines(exp, seen).values(), key=lambda spent: epsilon(blank, spent))
    with reported_as(ConfigError, "'privacy.target_epsilon'", ValueError):
        noise = noise_for(cfg.target_epsilon, blank, dearest)
    section = cfg.model_copy(update={"noise_multiplier": noise, "target_epsilon": None})
    return exp.model_copy(update={"privacy": section})


def mechanism(exp: ExperimentBase, seen: int) -> Mechanism | None:
    """The mechanism of all rounds; None without differential privacy."""
    if exp.privacy.name == "none":
        return None
    return mechanism_of(exp, seen, resolved(exp, seen).privacy.noise_multiplier or 0.0)


def forecast(exp: ExperimentBase, seen: int) -> Forecast | None:
    """Epsilon at the end of the run; None without differential privacy."""
    found = mechanism(exp, seen)
    if found is None:
        return None
    pipelines = _pipelines(exp, seen)
    base = next(iter(pipelines.values()))[: exp.base.name != "none"]
    strategies = tuple(s for p in pipelines.values() for s in p[len(base) :])
    by_method = {name: epsilon(found, spent) for name, spent in pipelines.items()}
    return Forecast(found, by_method, epsilon(found, base + strategies))


def privacy_lines(exp: ExperimentBase, seen: int) -> list[str]:
    """Sentences for the plan and for the head of a run; empty without anything to tell."""
    lines = []
    if (found := forecast(exp, seen)) is not None:
        lines += _dp_lines(found)
    cfg = exp.privacy
    if cfg.secure_aggregation != "none":
        k = [_neighbours(exp, seen, stage) for stage in ("base", "strategy")]
        lines.append(
            f"{cfg.secure_aggregation}, simulated: {k[0]} (base) and {k[1]} (strategy) neighbours per client, ring of "
            f"{cfg.secagg.modulus_bits} bits, step {cfg.secagg.step:g}, {cfg.secagg.dropout:.0%} of a cohort vanish. "
            "It measures cost and drop-outs and protects nobody."
        )
        lines.append("Off: the norm alarm. Each client checks itself for NaN; metrics travel in the clear.")
    return lines


def _dp_lines(found: Forecast) -> list[str]:
    m = found.mechanism
    kind = "cohorts of fixed size" if m.sampler == "fixed" else "Poisson cohorts"
    head = f"central DP over clients: {m.clipping}, noise multiplier {m.noise_multiplier:g}, {kind}, N = {m.pool}"
    if not any(found.by_method.values()):
        return [head, "No stage has rounds: there is nothing that noise could be added to, and no guarantee."]
    if not isfinite(found.together):
        return [head, "No guarantee: epsilon is infinite without noise or without a clip."]
    each = ", ".join(f"{name} {value:.3g}" for name, value in found.by_method.items())
    return [
        head,
        f"epsilon at delta = {m.delta:.3g} ({m.relation}), base and strategy: {each}; "
        f"all methods published together: {found.together:.3g}. Of every seed by itself.",
        "It covers the SHARED parameters of one seed's base and of one method's strategy on it, as released round by "
        "round.",
        f"It does not cover: {'; '.join(NOT_COVERED)}.",
        "The noise is seeded and drawn in floating point: this simulates the accuracy of a private run, it protects "
        "nobody.",
    ]


def _pipelines(exp: ExperimentBase, seen: int) -> dict[str, tuple[Spent, ...]]:
    """Method to the releases of its base and of its own rounds: of no strategy, of one, or of one per budget."""
    base, strategy = (
        Spent(name, cohort_size(stage.cohort, seen), (1,) * scaled(stage.rounds, exp.scale))
        for name, stage in (("base", exp.base), ("strategy", exp.strategy))
    )
    pipelines = {}
    for name in exp.methods:
        method = method_of(exp, name)
        trained = 0 if method.local_update is None else len(exp.budgets) if method.per_budget else 1
        pipelines[name] = (base,) * (exp.base.name != "none") + (strategy,) * trained
    return pipelines


def masked_traffic(exp: ExperimentBase, seen: int, stage: str, shared: int) -> Traffic | None:
    """Bytes of one client in one round of a stage besides the broadcast; None without secure aggregation.

    Args:
        exp: whole configuration.
        seen: clients that cohorts are drawn from.
        stage: ``base`` or ``strategy``.
        shared: SHARED numbers of the method.
    """
    if exp.privacy.secure_aggregation == "none":
        return None
    return traffic(shared + 1, _neighbours(exp, seen, stage), exp.privacy.secagg.modulus_bits)


def _neighbours(exp: ExperimentBase, seen: int, stage: str) -> int:
    cfg = exp.privacy
    cohort = cohort_size(getattr(exp, stage).cohort, seen)
    return degree(cohort, cfg.secagg.neighbours, cfg.secure_aggregation == "secagg")
