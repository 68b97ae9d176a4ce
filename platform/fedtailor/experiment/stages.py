"""A run as a graph of stages, each an artifact whose name is the hash of all that can change its numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from fedtailor import NUMERICS_VERSION
from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.config import Config, at_absent
from fedtailor.core.messages import StageSpec
from fedtailor.core.settings import BaseStageConfig, StrategyStageConfig
from fedtailor.experiment.config import (
    ExperimentBase,
    base_seed,
    cohort_size,
    method_of,
    method_section,
    scaled,
    server_side_of,
    to_json,
)
from fedtailor.experiment.privacy import resolved

NUMERIC_ENGINE_KEYS = ("threads", "token_budget", "max_lanes", "segments", "min_segment", "dtype")
_LISTED = ("key", "kind", "method", "seed", "artifact", "parent", "strategy", "rounds", "cohort")


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
        unknown: see `tasks.unknown_tokens`; empty where they were not counted.
    """

    data: str
    model: str
    tokens: str
    unknown: Mapping[str, tuple[int, int]] = field(default_factory=dict)


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
        budgets: that the stage serves; empty for the base.
        r_max: largest budget that the method is built for.
        server_side: of a round stage, the sections around its method; see `server_side_of`.
    """

    key: str
    kind: str
    method: str
    seed: int
    artifact: str = ""
    parent: str = ""
    strategy: str | None = None
    rounds: int = 0
    cohort: int = 0
    budgets: tuple[int, ...] = ()
    r_max: int = 0
    server_side: Mapping[str, Any] = field(default_factory=dict)

    @property
    def listed(self) -> dict[str, Any]:
        """What a run's folder says of the stage."""
        return {name: getattr(self, name) for name in _LISTED} | {"budgets": list(self.budgets)}


def method_json(exp: ExperimentBase, method: str) -> dict[str, Any]:
    """Resolved configuration of a method."""
    return to_json(method_section(exp, method))


def named_by(config: Config) -> dict[str, Any]:
    """JSON-like data of a configuration without keys at the value that an older run folder means by their absence."""
    data: dict[str, Any] = json.loads(config.model_dump_json(exclude=at_absent(config)))
    return data


def plan_stages(exp: ExperimentBase, seed: int, inputs: Inputs, seen: int) -> list[Stage]:
    """The graph of one seed in an order in which it can run.

    Args:
        exp: whole configuration.
        seed: run seed.
        inputs: artifacts of data, model and tokens.
        seen: clients of the seen pool.
    """
    stages: list[Stage] = []
    common = {
        "numerics": NUMERICS_VERSION,
        "torch": torch.__version__,
        "tokens": inputs.tokens,
        "targets": exp.model.targets,
        "attention": exp.model.attention,
        "engine": {key: getattr(exp.engine, key) for key in NUMERIC_ENGINE_KEYS},
        "device": exp.engine.device,
        **_choices(exp),
    }
    server_side = server_side_of(resolved(exp, seen))
    of_rounds = {
        "on_client_failure": exp.engine.on_client_failure,
        "quorum": exp.engine.quorum,
        **{f"guard/{name}": section for name, section in server_side.items()},
    }
    every = exp.strategy.evaluate_every
    scored = [every, exp.personalise.pools, named_by(exp.decoding) if exp.task_entry.kind == "generation" else None]
    of_models = {
        "pools": exp.personalise.pools,
        "chunk": exp.personalise.chunk,
        "adapters": exp.save_adapters,
        **({"score_train": True} if exp.personalise.score_train else {}),
        **({"decoding": named_by(exp.decoding)} if exp.task_entry.kind == "generation" else {}),
        **({"predictions": True} if exp.personalise.save_predictions else {}),
    }

    def add(stage: Stage, **own: Any) -> str:
        """Names a stage by the hash of all that can change its numbers."""
        content = {
            **common, **own, "seed": stage.seed, "kind": stage.kind, "method": stage.method,
            "config": named_by(method_section(exp, stage.method)),
            "parent": stage.parent, "strategy": stage.strategy, "rounds": stage.rounds, "cohort": stage.cohort,
        }  # fmt: skip
        if stage.method in exp.code:
            content["code"] = exp.code[stage.method]
        stages.append(replace(stage, artifact=f"{stage.kind}-{short_hash(content)}"))
        return stages[-1].artifact

    def trained(key: str, method: str, seed: int, parent: str, **more: Any) -> Stage:
        """A stage with rounds."""
        kind = key.split("/")[0]
        section: BaseStageConfig | StrategyStageConfig = getattr(exp, kind)
        return Stage(
            key, kind, method, seed, parent=parent, rounds=scaled(section.rounds, exp.scale),
            cohort=cohort_size(section.cohort, seen), server_side=server_side, **more,
        )  # fmt: skip

    base = inputs.model
    if exp.base.name != "none":
        first = base_seed(exp, seed)
        base = add(trained(f"base/seed{first}", exp.base.name, first, base, r_max=exp.r_max), **of_rounds)
    for method in exp.methods:
        built = method_of(exp, method)
        apart = built.per_budget and built.local_update is not None
        for budgets in [(r,) for r in exp.budgets] if apart else [exp.budgets]:
            r_max = budgets[0] if apart else exp.r_max
            path = f"{method}/r{r_max}/seed{seed}" if apart else f"{method}/seed{seed}"
            serves: dict[str, Any] = {"budgets": budgets, "r_max": r_max}
            own, strategy = {"r_max": r_max, "base_dropout": exp.model.base_dropout}, None
            if built.local_update is not None:
                over = {"evaluate_every": scored} if every else {}
                strategy = add(trained(f"strategy/{path}", method, seed, base, **serves), **own, **of_rounds, **over)
            last = Stage(f"personalise/{path}", "personalise", method, seed, parent=base, strategy=strategy, **serves)
            add(last, **own, budgets=budgets, **of_models)
    return stages


def _choices(exp: ExperimentBase) -> dict[str, Any]:
    """Settings that change numbers but are seldom made; left out where they are not, so that names stay."""
    chosen: dict[str, Any] = {}
    if exp.model.weights != "float32":
        chosen["weights"] = exp.model.weights
    if exp.engine.micro_batch is not None:
        chosen["micro_batch"] = exp.engine.micro_batch
    if exp.engine.zero.ranks > 1:
        chosen["zero"] = exp.engine.zero.ranks
    base = None if exp.base.name == "none" else method_of(exp, exp.base.name).adapter
    if isinstance(base, LoraAdapter) and base.head and base.targets in ("all-linear", "head"):
        chosen["merge"] = 2  # before, a head's LoRA was lost when it was merged into the base
    return chosen


def stage_spec(exp: ExperimentBase, stage: Stage, model_dir: str, data_dir: str, cache_dir: str | None) -> StageSpec:
    """What workers are told about a stage."""
    personal, model, overlay = stage.kind == "personalise", exp.model, dict[str, Any]()
    if stage.kind == "base":  # a base method chooses its layers itself
        model = model.model_copy(update={"targets": "all-linear", "base_dropout": 0.0})
    elif has_overlay(exp):
        overlay = {"base_method": exp.base.name, "base_config": method_json(exp, exp.base.name)}
    return StageSpec(
        key=stage.key,
        kind="personalise" if personal else "rounds",
        method=stage.method,
        method_config=method_json(exp, stage.method),
        seed=stage.seed,
        model_dir=model_dir,
        data_dir=data_dir,
        r_max=stage.r_max,
        budgets=stage.budgets if personal else (),
        rounds=stage.rounds,
        cohort=stage.cohort,
        model=model,
        engine=exp.engine,
        personalise=exp.personalise,
        decoding=exp.decoding,
        save_adapters=exp.save_adapters and personal,
        cache_dir=cache_dir,
        server_side=stage.server_side,
        code={name: exp.code[name] for name in (stage.method, exp.base.name) if name in exp.code},
        **overlay,
    )


def has_overlay(exp: ExperimentBase) -> bool:
    """Whether clients keep a part of the base."""
    return exp.base.name != "none" and method_of(exp, exp.base.name).overlay is not None
