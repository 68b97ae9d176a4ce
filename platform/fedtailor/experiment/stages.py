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
from fedtailor.experiment.config import (
    ExperimentBase,
    base_seed,
    cohort_size,
    method_section,
    scaled,
    server_side_of,
    to_json,
)
from fedtailor.experiment.privacy import resolved
from fedtailor.methods import build_method

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
        budgets: that the stage serves; empty for the base.
        r_max: largest budget that the method is built for.
        server_side: of a round stage, the sections around its method; see `server_side_of`.
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
    common: dict[str, Any] = {
        "numerics": NUMERICS_VERSION,
        "torch": torch.__version__,
        "seed": seed,
        "tokens": inputs.tokens,
        "targets": exp.model.targets,
        "attention": exp.model.attention,
        "engine": {key: getattr(exp.engine, key) for key in NUMERIC_ENGINE_KEYS},
        "device": device_of(exp),
        **_choices(exp),
    }
    graph = _Graph(exp, seed, common, server_side_of(resolved(exp, seen)), [])
    base = graph.base(inputs.model, seen)
    for method in exp.methods:
        built = build_method(method, method_section(exp, method), exp.r_max)
        if built.per_budget and built.local_update is not None:
            for budget in exp.budgets:
                graph.method(method, base, seen, (budget,), budget, trained=True, path=f"{method}/r{budget}")
        else:
            graph.method(method, base, seen, exp.budgets, exp.r_max, built.local_update is not None, method)
    return graph.stages


@dataclass(frozen=True)
class _Graph:
    exp: ExperimentBase
    seed: int
    common: Mapping[str, Any]
    server_side: Mapping[str, Any]
    stages: list[Stage]

    def base(self, model: str, seen: int) -> str:
        """Adds the base stage, if there is one, and returns the artifact that is the frozen model."""
        exp = self.exp
        if exp.base.name == "none":
            return model
        size = cohort_size(exp.base.cohort, seen)
        seed = base_seed(exp, self.seed)
        stage = Stage(f"base/seed{seed}", "base", exp.base.name, seed, "", model, None,
                      scaled(exp.base.rounds, exp.scale), size, (), exp.r_max)  # fmt: skip
        return self._add(stage, **self._policy())

    def method(
        self, method: str, base: str, seen: int, budgets: tuple[int, ...], r_max: int, trained: bool, path: str
    ) -> None:
        """Adds a method's strategy stage, if it has rounds of its own, and its personalising stage."""
        exp, strategy = self.exp, None
        if trained:
            size, rounds = cohort_size(exp.strategy.cohort, seen), scaled(exp.strategy.rounds, exp.scale)
            stage = Stage(f"strategy/{path}/seed{self.seed}", "strategy", method, self.seed, "", base, None, rounds,
                          size, budgets, r_max)  # fmt: skip
            strategy = self._add(stage, r_max=r_max, base_dropout=exp.model.base_dropout, **self._policy())
        stage = Stage(f"personalise/{path}/seed{self.seed}", "personalise", method, self.seed, "", base, strategy,
                      0, 0, budgets, r_max)  # fmt: skip
        self._add(
            stage, budgets=budgets, r_max=r_max, pools=exp.personalise.pools, chunk=exp.personalise.chunk,
            base_dropout=exp.model.base_dropout, adapters=exp.save_adapters,
            **({"score_train": True} if exp.personalise.score_train else {}),
            **({"decoding": to_json(exp.decoding)} if exp.task_entry.kind == "generation" else {}),
            **({"predictions": True} if exp.personalise.save_predictions else {}),
        )  # fmt: skip

    def _policy(self) -> dict[str, Any]:
        server_side = {f"guard/{name}": section for name, section in self.server_side.items()}
        return {"on_client_failure": self.exp.engine.on_client_failure, "quorum": self.exp.engine.quorum, **server_side}

    def _add(self, stage: Stage, **own: Any) -> str:
        content = {
            **self.common, **own, "seed": stage.seed, "kind": stage.kind, "method": stage.method,
            "config": named_by(method_section(self.exp, stage.method)),
            "parent": stage.parent, "strategy": stage.strategy, "rounds": stage.rounds, "cohort": stage.cohort,
        }  # fmt: skip
        if stage.method in self.exp.code:
            content["code"] = self.exp.code[stage.method]
        server_side = {} if stage.kind == "personalise" else self.server_side
        named = replace(stage, artifact=f"{stage.kind}-{short_hash(content)}", server_side=server_side)
        self.stages.append(named)
        return named.artifact


def _choices(exp: ExperimentBase) -> dict[str, Any]:
    """Settings that change numbers but are seldom made; left out where they are not, so that names stay."""
    chosen: dict[str, Any] = {}
    if exp.model.weights != "float32":
        chosen["weights"] = exp.model.weights
    if exp.engine.micro_batch is not None:
        chosen["micro_batch"] = exp.engine.micro_batch
    if exp.engine.zero.ranks > 1:
        chosen["zero"] = exp.engine.zero.ranks
    if _merges_head(exp):
        chosen["merge"] = 2  # before, a head's LoRA was lost when it was merged into the base
    return chosen


def _merges_head(exp: ExperimentBase) -> bool:
    """Whether the base is a LoRA that also trains, and adapts, the classification head."""
    base = exp.base.name
    adapter = None if base == "none" else build_method(base, method_section(exp, base), exp.r_max).adapter
    return isinstance(adapter, LoraAdapter) and adapter.head and adapter.targets in ("all-linear", "head")


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
        # A base method chooses its layers itself.
        targets="all-linear" if stage.kind == "base" else exp.model.targets,
        base_dropout=0.0 if stage.kind == "base" else exp.model.base_dropout,
        budgets=stage.budgets if stage.kind == "personalise" else (),
        r_max=stage.r_max,
        threads=exp.engine.threads,
        token_budget=exp.engine.token_budget,
        max_lanes=exp.engine.max_lanes,
        dtype=exp.engine.dtype,
        save_adapters=exp.save_adapters and stage.kind == "personalise",
        score_train=exp.personalise.score_train and stage.kind == "personalise",
        cache_dir=cache_dir,
        rounds=stage.rounds,
        device=device_of(exp),
        attention=exp.model.attention,
        micro_batch=exp.engine.micro_batch,
        weights=exp.model.weights,
        checkpointing=exp.model.checkpointing,
        decoding=to_json(exp.decoding),
        save_predictions=exp.personalise.save_predictions and stage.kind == "personalise",
        zero=to_json(exp.engine.zero) if exp.engine.zero.ranks > 1 else {},
        server_side=stage.server_side,
        code={name: exp.code[name] for name in (stage.method, exp.base.name) if name in exp.code},
        **_overlay(exp, stage),
    )


def _overlay(exp: ExperimentBase, stage: Stage) -> dict[str, Any]:
    """The base method, where its clients keep a part of the base."""
    if stage.kind == "base" or not has_overlay(exp):
        return {}
    return {"base_method": exp.base.name, "base_config": method_json(exp, exp.base.name)}


def has_overlay(exp: ExperimentBase) -> bool:
    """Whether clients keep a part of the base."""
    if exp.base.name == "none":
        return False
    return build_method(exp.base.name, method_section(exp, exp.base.name), exp.r_max).overlay is not None
