"""Combinations of the privacy section with the others that would do nothing, or something other than they say."""

from __future__ import annotations

from fedtailor.methods import build_method
from fedtailor.runs.experiment import ExperimentBase, cohort_size, method_section

_FEWEST_MASKED = 3


def privacy_problems(exp: ExperimentBase, seen: int) -> list[str]:
    """One sentence per broken rule.

    Args:
        exp: whole configuration.
        seen: clients that cohorts are drawn from.
    """
    cfg, problems = exp.privacy, list[str]()
    stages = _stages_with_rounds(exp)
    cohorts = {stage: cohort_size(getattr(exp, stage).cohort, seen) for stage in stages}
    if cfg.name == "central_dp":
        problems += _dp_problems(exp, cohorts)
    if cfg.secure_aggregation != "none":
        problems += _masking_problems(exp, cohorts)
    return problems


def _dp_problems(exp: ExperimentBase, cohorts: dict[str, int]) -> list[str]:
    problems, how = [], exp.aggregation.name
    if how == "norm_bound":
        problems.append("privacy=central_dp bounds updates itself: set 'privacy.clip' and leave 'aggregation' alone")
    elif how != "method":
        problems.append(
            f"privacy=central_dp adds noise to a mean of clipped updates; 'aggregation' = {how} is none (use method)"
        )
    problems += [
        f"'{name}.patience': stopping early looks at train metrics that carry no noise, so epsilon would not hold with "
        f"privacy=central_dp (set {name}.patience=null)"
        for name in _used(exp)
        if build_method(name, method_section(exp, name), exp.r_max).early_stop is not None
    ]
    if exp.privacy.noise_multiplier != 0:
        problems += [
            f"'{stage}.cohort' is 1 client: noise hides a client in its cohort, so privacy=central_dp needs 2 or more"
            for stage, cohort in cohorts.items()
            if cohort == 1
        ]
    if exp.privacy.target_epsilon is not None and not cohorts:
        problems.append("'privacy.target_epsilon': no stage of this run has rounds, so no noise can be found for it")
    return problems


def _masking_problems(exp: ExperimentBase, cohorts: dict[str, int]) -> list[str]:
    cfg, problems, how = exp.privacy, [], exp.aggregation.name
    kind = cfg.secure_aggregation
    if how not in ("method", "norm_bound"):
        problems.append(
            f"'aggregation' = {how} compares single updates, which 'privacy.secure_aggregation' = {kind} hides from "
            "the server (allowed: method, norm_bound)"
        )
    if cfg.sampler == "poisson":
        problems.append(
            f"'privacy.secure_aggregation' = {kind} needs a cohort of known size, 'privacy.sampler' = poisson draws "
            "any (allowed: fixed)"
        )
    for stage, cohort in cohorts.items():
        if cohort < _FEWEST_MASKED:
            problems.append(
                f"'{stage}.cohort' is {cohort}: in a sum of fewer than {_FEWEST_MASKED} one client knows the other's "
                f"update, so 'privacy.secure_aggregation' = {kind} hides nothing"
            )
        elif cfg.secagg.neighbours is not None and cfg.secagg.neighbours > cohort - 1:
            problems.append(
                f"'privacy.secagg.neighbours' = {cfg.secagg.neighbours}: a client of '{stage}' has {cohort - 1} others "
                f"in its cohort (allowed: 2 ... {cohort - 1})"
            )
    return problems


def _used(exp: ExperimentBase) -> list[str]:
    return list(dict.fromkeys([*([] if exp.base.name == "none" else [exp.base.name]), *exp.methods]))


def _stages_with_rounds(exp: ExperimentBase) -> list[str]:
    trained = [build_method(name, method_section(exp, name), exp.r_max).local_update for name in exp.methods]
    base = ["base"] if exp.base.name != "none" and exp.base.rounds else []
    return base + (["strategy"] if any(trained) and exp.strategy.rounds else [])
