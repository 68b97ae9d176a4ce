"""A run as a graph of stages, each an artifact whose name is the hash of all that can change its numbers."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import torch

from fedtailor import NUMERICS_VERSION
from fedtailor.core.messages import StageSpec
from fedtailor.methods import build_method
from fedtailor.runs.experiment import ExperimentBase, cohort_size, method_section, to_json

NUMERIC_ENGINE_KEYS = ("threads", "token_budget", "max_lanes", "segments", "min_segment", "dtype")


def short_hash(content: Any) -> str:
    """First 16 hex digits of the sha256 of canonical JSON."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Inputs:
    """Prepared data and model of one seed.

    Args:
        data: artifact name of the partitioned texts.
        model: artifact name of the initial model and tokenizer.
        tokens: artifact name of the tokenised clients.
    """

    data: str
    model: str
    tokens: str


@dataclass(frozen=True)
class Stage:
    """One node of the graph.

    Args:
        key: ``base/seed42``, ``strategy/fedp2eft/seed42``, ``personalise/lora/seed42``.
        kind: ``base``, ``strategy`` or ``personalise``.
        method: row of METHODS.
        seed: run seed.
        artifact: folder name, kind and hash.
        parent: artifact of the stage whose result is the (frozen) model; the initial model if it is one.
        strategy: artifact of the strategy stage that a personalising stage uses.
        rounds: of a round stage; 0 otherwise.
        cohort: clients per round.
    """

    key: str
    kind: str
    method: str
    seed: int
    artifact: str
    parent: str
    strategy: str | None = None
    rounds: int = 0
    cohort: int = 0


def method_json(exp: ExperimentBase, method: str) -> dict[str, Any]:
    """Resolved configuration of a method."""
    return to_json(method_section(exp, method))


def plan_stages(exp: ExperimentBase, seed: int, inputs: Inputs, seen: int) -> list[Stage]:
    """The graph of one seed in an order in which it can run.

    Args:
        exp: whole configuration.
        seed: run seed.
        inputs: artifacts of data, model and tokens.
        seen: clients of the seen pool.
    """
    common: dict[str, Any] = {
        "numerics": NUMERICS_VERSION,
        "torch": torch.__version__,
        "seed": seed,
        "tokens": inputs.tokens,
        "targets": exp.model.targets,
        "engine": {key: getattr(exp.engine, key) for key in NUMERIC_ENGINE_KEYS},
        "device": device_of(exp),
    }
    stages: list[Stage] = []

    def add(kind: str, method: str, parent: str, strategy: str | None, rounds: int, cohort: int, **own: Any) -> Stage:
        content = {
            **common, **own, "kind": kind, "method": method, "config": method_json(exp, method), "parent": parent,
            "strategy": strategy, "rounds": rounds, "cohort": cohort,
        }  # fmt: skip
        key = f"base/seed{seed}" if kind == "base" else f"{kind}/{method}/seed{seed}"
        stage = Stage(key, kind, method, seed, f"{kind}-{short_hash(content)}", parent, strategy, rounds, cohort)
        stages.append(stage)
        return stage

    base = inputs.model
    policy = {"on_client_failure": exp.engine.on_client_failure, "quorum": exp.engine.quorum}
    if exp.base.name != "none":
        size = cohort_size(exp.base.cohort, seen)
        base = add("base", exp.base.name, inputs.model, None, exp.base.rounds, size, **policy).artifact
    for method in exp.methods:
        trained = None
        if build_method(method, method_section(exp, method), exp.r_max).local_update is not None:
            size = cohort_size(exp.strategy.cohort, seen)
            own = {"r_max": exp.r_max, "base_dropout": exp.model.base_dropout, **policy}
            trained = add("strategy", method, base, None, exp.strategy.rounds, size, **own).artifact
        add(
            "personalise", method, base, trained, 0, 0, budgets=exp.budgets, r_max=exp.r_max,
            pools=exp.personalise.pools, chunk=exp.personalise.chunk, base_dropout=exp.model.base_dropout,
            adapters=exp.save_adapters,
        )  # fmt: skip
    return stages


def device_of(exp: ExperimentBase) -> str:
    """``cuda`` where GPUs are asked for."""
    return "cuda" if exp.engine.num_gpus > 0 or exp.engine.memory_gb is not None else "cpu"


def stage_spec(exp: ExperimentBase, stage: Stage, model_dir: str, data_dir: str, cache_dir: str | None) -> StageSpec:
    """What workers are told about a stage."""
    return StageSpec(
        key=stage.key,
        kind="personalise" if stage.kind == "personalise" else "rounds",
        method=stage.method,
        method_config=method_json(exp, stage.method),
        seed=stage.seed,
        model_dir=model_dir,
        data_dir=data_dir,
        targets=exp.model.targets,
        base_dropout=0.0 if stage.kind == "base" else exp.model.base_dropout,
        budgets=exp.budgets if stage.kind == "personalise" else (),
        r_max=exp.r_max,
        threads=exp.engine.threads,
        token_budget=exp.engine.token_budget,
        max_lanes=exp.engine.max_lanes,
        dtype=exp.engine.dtype,
        save_adapters=exp.save_adapters and stage.kind == "personalise",
        cache_dir=cache_dir,
        rounds=stage.rounds,
        device=device_of(exp),
    )
