"""What travels between driver and workers: plain, picklable records of names, numbers and flat arrays."""

from __future__ import annotations

import resource
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from fedtailor.core.scope import ParamSpec
from fedtailor.core.settings import DecodingConfig, EngineConfig, ModelConfig, PersonaliseStageConfig

FloatArray = npt.NDArray[np.floating[Any]]
Row = npt.NDArray[np.float32]

_BLANK_METRIC: dict[str, Any] = {
    "stage": "", "method": "", "seed": 0, "round": 0, "pool": "", "language": "", "client": "",
    "budget": -1, "module": "", "metric": "", "value": 0.0, "weight": 0.0,
}  # fmt: skip
"""One row per measured number. ``stage`` is base | strategy | personalise; ``round`` the round or chunk;
``budget`` -1 and strings "" where they do not apply; ``value`` float64; ``weight`` the number of examples
behind it. Every column is deterministic: times and hosts live elsewhere."""

METRIC_COLUMNS: tuple[str, ...] = tuple(_BLANK_METRIC)


@dataclass(frozen=True)
class StageSpec:
    """Everything a worker must know to run one stage; equal specs give equal results.

    Args:
        key: ``base/seed42``, ``strategy/fedp2eft/seed42`` or ``personalise/lora/seed42``.
        kind: ``rounds`` or ``personalise``.
        method: row of the METHODS table.
        method_config: that method's resolved config, as JSON-like data.
        seed: run seed.
        model_dir: Hugging Face folder of the frozen (or initial) model; with ``storage`` a path in it.
        data_dir: folder of the tokenised clients; with ``storage`` a path in it.
        r_max: largest budget of the run, the paper's r_max target.
        budgets: total rank per adapted layer, ascending; empty for round stages.
        rounds: number of rounds of a round stage, for schedules over rounds.
        cohort: clients of a round; 0 where there are no rounds.
        model: how the base is kept, and which of its linear layers carry adapters.
        engine: where and how it is computed.
        personalise: what personalised models are scored on, and what is kept of their answers.
        decoding: how a generation task's answers are made and scored.
        save_adapters: whether every personalised client becomes a peft adapter.
        cache_dir: folder of cached features; None: they are not kept.
        storage: where model, data and cache are; empty: they are folders of this node.
        base_method: method that trained the base, if its clients keep something of their own (an overlay).
        base_config: that method's resolved config.
        server_side: sections ``aggregation``, ``attack`` and ``privacy`` that differ from their defaults, see
            `experiment.config`.
        code: methods of the two above that come from outside, name to ``package.module:ENTRY``; the worker imports
            them.
    """

    key: str
    kind: str
    method: str
    method_config: Mapping[str, Any]
    seed: int
    model_dir: str
    data_dir: str
    r_max: int
    budgets: tuple[int, ...] = ()
    rounds: int = 0
    cohort: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    personalise: PersonaliseStageConfig = field(default_factory=PersonaliseStageConfig)
    decoding: DecodingConfig = field(default_factory=DecodingConfig)
    save_adapters: bool = False
    cache_dir: str | None = None
    storage: str = ""
    base_method: str = ""
    base_config: Mapping[str, Any] = field(default_factory=dict)
    server_side: Mapping[str, Any] = field(default_factory=dict)
    code: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class SegmentJob:
    """A fixed piece of a cohort, or of a chunk of clients to personalise. Idempotent: running it twice
    gives the same bytes; ``attempt`` only tells two tries apart."""

    stage: str
    round: int
    index: int
    clients: tuple[str, ...]
    attempt: int = 0
    private: Mapping[str, FloatArray] = field(default_factory=dict)
    """PRIVATE state of the clients that have some, one flat float32 row each."""
    presum: bool = True
    overlay: Mapping[str, FloatArray] = field(default_factory=dict)
    """What clients keep of their base: the base stage's PRIVATE rows; a client without one starts from the initial."""
    cohort: tuple[str, ...] = ()
    """Everybody in the round, where clients mask their rows against each other."""


@dataclass(frozen=True)
class Failure:
    """A client without a valid result, and why."""

    client: str
    stage: str
    round: int
    kind: str
    """``exception`` or ``rejected`` (NaN, Inf or wrong shape)."""
    reason: str


@dataclass(frozen=True)
class ClientCost:
    """What one client's part of a call cost; its seconds are beside it. Never part of a digest.

    Args:
        examples: its training examples.
        tokens: real tokens that its training steps read, in every epoch and for every budget; 0 where nothing is
            trained. Runs of earlier versions noted the tokens of its examples, each once.
        bytes_down: SHARED float32 row that a real client would receive; 0 for methods that send none.
        bytes_up: SHARED row that came back; 0 from a failed client and where nothing is aggregated.
        bytes_kept: PRIVATE rows and its part of the base: a real client keeps them, only the simulation moves them.
        peak_rss: highest resident bytes of the process, since it started.
        peak_gpu: highest bytes that torch had allocated on the GPU while its group ran; 0 without a GPU.
        attempt: how often the call had been lost before.
        host: machine.
        pid: process.
        actor: number of the actor; -1 without actors.
        search_seconds: of its seconds, those that it searched before it trained, as pFedGPT does.
    """

    examples: int
    tokens: int
    bytes_down: int
    bytes_up: int
    bytes_kept: int
    peak_rss: int
    peak_gpu: int
    attempt: int
    host: str
    pid: int
    actor: int = -1
    search_seconds: float = 0.0


def peak_rss() -> int:
    """Highest resident memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


ALL_BUDGETS = "all"
"""In the place of a budget: adapters of a method that makes a client one model for all of them."""


@dataclass
class SegmentResult:
    """Answer to a `SegmentJob`."""

    stage: str
    round: int
    index: int
    attempt: int
    partial: Any = None
    """The aggregator's state over this segment's valid clients (None without SHARED parameters)."""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    """Rows of METRIC_COLUMNS, in client order."""
    private: dict[str, FloatArray] = field(default_factory=dict)
    tensors: dict[str, FloatArray] = field(default_factory=dict)
    """Further results to commit, e.g. ``lambda/<client>`` (L, r_init) float32."""
    adapters: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Exported adapters: ``r8/<client>``, or `ALL_BUDGETS` in the place of r8, -> file name -> content."""
    predictions: list[dict[str, Any]] = field(default_factory=list)
    """Answers with question and reference, in client order, where ``save_predictions`` asks for them."""
    failures: list[Failure] = field(default_factory=list)
    warnings: list[dict[str, Any]] = field(default_factory=list)
    valid: tuple[str, ...] = ()
    """Clients counted in ``partial``, in order."""
    norms: dict[str, float] = field(default_factory=dict)
    """L2 norm of each valid client's SHARED update, before any bound."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall time per client (a group's time shared equally). Not part of any digest."""
    costs: dict[str, ClientCost] = field(default_factory=dict)
    host: dict[str, Any] = field(default_factory=dict)


def metric_row(**values: Any) -> dict[str, Any]:
    """A row of METRIC_COLUMNS with the blanks filled in."""
    if unknown := values.keys() - _BLANK_METRIC.keys():
        raise KeyError(f"not metric columns: {sorted(unknown)}")
    return {**_BLANK_METRIC, **values}


@dataclass(frozen=True)
class StageInfo:
    """What a worker learned by opening a stage; equal on every worker.

    Args:
        shared: SHARED parameters in flat order.
        private: PRIVATE parameters in flat order.
        initial: SHARED state before round 0, flat float32, (P,).
        modules: names of the L adapted linear layers.
        r_init: rank before pruning (0 where the method has none).
        notices: what a user should know of how adapters sit in the model.
    """

    shared: tuple[ParamSpec, ...]
    private: tuple[ParamSpec, ...]
    initial: FloatArray
    modules: tuple[str, ...]
    r_init: int
    notices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Client:
    """One member of the population.

    Args:
        id: ``seen/amh/00``.
        n_train: number of train texts.
        n_test: number of test texts.
    """

    id: str
    pool: str
    language: str
    n_train: int
    n_test: int
