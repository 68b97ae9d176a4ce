"""The configuration sections that do not belong to one method. Defaults are FedP2EFT's (MasakhaNEWS, A.4)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from fedtailor.core.config import Config

Positive = Annotated[int, Field(ge=1)]
Natural = Annotated[int, Field(ge=0)]
Rate = Annotated[float, Field(gt=0)]
Cohort = Rate | Literal["all"]
_WANDB_KEY = re.compile(r"(?<![0-9a-f])[0-9a-f]{40}(?![0-9a-f])|wandb_v\d_")


class Named(Config):
    """A section that may be given by its name alone: ``model=mbert``."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value


_MODEL_DEFAULTS = {"tiny-llama": {"hidden_size": 128, "layers": 4, "heads": 4, "intermediate_size": 384}}
"""Embedded model -> sizes that differ from the fields' own defaults."""


class ModelConfig(Named):
    """Base model before any federated training."""

    name: str = "tiny-bert"
    """Classification: ``tiny-bert`` (embedded, random weights), ``mini-mbert`` (made by ``fedtailor pretrain``, looked
    for below $FEDTAILOR_MODELS, else ./models), ``mbert``, any hub id, or a local folder. Generation: ``tiny-llama``
    (embedded, the default there), ``mobilellama-1.4b``, ``llama-3.2-3b``, ``alpaca-7b``, any hub id or folder."""
    path: str | None = None
    """Local folder with weights and tokenizer for a named preset such as ``mbert`` or ``mini-mbert``."""
    revision: str | None = None
    """Hub revision."""
    hidden_size: Positive = 64
    """tiny-bert and tiny-llama (128, 4, 4, 384, 4000) only, as are the four below."""
    layers: Positive = 2
    heads: Positive = 2
    intermediate_size: Positive = 128
    vocab_size: Annotated[int, Field(ge=200)] = 4000
    targets: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that carry adapters: all but the output embedding (reference: mBERT L = 74, pooler
    and classifier included), or names that end a module path, e.g. ``[query, value]``."""
    weights: Literal["float32", "bfloat16", "8bit", "4bit"] = "float32"
    """How the frozen base is kept; whatever is trained stays float32. Below float32 it needs engine.dtype=bfloat16, and
    a base that is trained as a whole needs float32. 8bit and 4bit need a GPU and bitsandbytes."""
    checkpointing: bool = False
    """Compute activations of every block again in the backward pass instead of keeping them."""
    attention: Literal["sdpa", "eager", "auto"] | None = None
    """Attention kernel; default: transformers' choice. ``auto``: the faster one here, measured when the run begins."""
    base_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout of the frozen base while adapters train; above 0 one client at a time (no lanes)."""

    @model_validator(mode="before")
    @classmethod
    def _model_defaults(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        name = value.get("name") if isinstance(value, dict) else None
        return _MODEL_DEFAULTS[name] | value if isinstance(name, str) and name in _MODEL_DEFAULTS else value

    @model_validator(mode="after")
    def _heads(self) -> ModelConfig:
        if self.hidden_size % self.heads:
            sizes = f"'model.hidden_size' ({self.hidden_size}) must be a multiple of 'model.heads' ({self.heads})"
            raise ValueError(sizes)
        return self


class BaseStageConfig(Named):
    """How the base model is trained before personalisation (FedP2EFT 4.2: standard FL, full fine-tuning)."""

    name: str = "fedavg"
    """A method whose entry says ``base=True``, e.g. ``fedavg``: standard FL; ``feddpa``: personalised FL, a part of the
    base is each client's own; or ``none``: off-the-shelf."""
    rounds: Natural = 100
    cohort: Cohort = 0.1
    """Clients sampled each round: a share of the seen pool below 1, else a number; ``all`` of them."""
    seed: Natural | None = None
    """Seed of partition, initial head and base, one for all runs (reference: 42); None: each run's own. Later stages
    follow the run's."""


class StrategyStageConfig(Config):
    """Rounds of a method's own federated training (FedP2EFT 4.1: 150 rounds, 10 % of the seen clients)."""

    when_absent: ClassVar[Mapping[str, Any]] = {"evaluate_every": 0}
    rounds: Natural = 150
    cohort: Cohort = 0.1
    evaluate_every: Natural = 0
    """Every so many rounds all clients' models are made and scored, as in the end: ``test_loss``, ... 0: never."""


class PersonaliseStageConfig(Config):
    """The stage that makes and evaluates one model per client and budget."""

    pools: tuple[Literal["seen", "unseen"], ...] = ("seen", "unseen")
    chunk: Positive = 40
    """Clients per commit."""
    score_train: bool = False
    """Also score models on their training texts (``train_accuracy``, ``train_loss_after``), as FedP2EFT does (A.4)."""
    save_predictions: bool = False
    """Generation: keep every answer with its prompt and reference, e.g. for ``fedtailor judge``."""


class DecodingConfig(Config):
    """How answers of a generation task are made and scored (FedP2EFT A.2: greedy, at most 1,024 new tokens)."""

    when_absent: ClassVar[Mapping[str, Any]] = {"length_penalty": 1.0}
    max_new_tokens: Positive = 1024
    """Most tokens of an answer."""
    beams: Positive = 1
    """1: greedy."""
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = 1.0
    """Of beams: an answer's log-likelihood is divided by (its tokens)^this (LoRA's recipe for data-to-text: 0.8)."""
    no_repeat_ngram: Natural = 0
    """No n-gram of this length occurs twice in an answer; 0: no rule."""
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    tokenizer: Literal["unicode", "ascii"] = "unicode"
    """How texts are cut into words for ROUGE: letters and digits of any script (Han and kana one by one), or Latin
    letters only, as the reference's default does, which scores Arabic, Russian, Telugu and Chinese about 0."""
    max_test: Positive | None = None
    """Answer at most so many test examples of each client, the first; None: all."""


class ZeroConfig(Config):
    """A base that does not fit one worker: DeepSpeed ZeRO over the ranks of a group (Rajbhandari et al., 2020)."""

    ranks: Positive = 1
    """Processes (whole GPUs, or gloo on CPUs) that hold the model of one worker together; 1: no group."""
    stage: Literal[1, 2, 3] = 3
    """3: the base is partitioned over the ranks. 1: every rank holds the whole base, and its part of the optimizer's
    state of what is trained. 2 would partition gradients too, and is refused: they are written as one buffer."""
    offload: bool = False
    """Stage 3: keep each rank's part of the base in host memory."""
    deadline_s: Annotated[float, Field(gt=0)] = 600.0
    """Seconds after which a collective without all ranks is an error and the group starts again."""

    @field_validator("stage", mode="before")
    @classmethod
    def _stage(cls, value: Any) -> Any:
        if value not in (1, 2, 3):
            raise ValueError("allowed: 1, 3")  # 2 is refused later, with the reason
        return value


class AggregationConfig(Named):
    """How the server joins the clients' SHARED parameters, in every stage with rounds.

    ``method``: as the method itself says (mostly the mean weighted by examples). The others withstand a share of
    clients that send anything; all but ``norm_bound`` need every client's own update, and count each client once.
    """

    name: Literal["method", "median", "trimmed_mean", "krum", "norm_bound"] = "method"
    trim: Annotated[float, Field(ge=0, lt=0.5)] = 0.3
    """trimmed_mean: share of the values cut at each end of every coordinate (Yin et al., 2018)."""
    byzantine: Annotated[float, Field(ge=0, lt=0.5)] = 0.3
    """krum: share of the cohort that may be anything (Blanchard et al., 2017)."""
    kept: Positive | None = None
    """krum: clients averaged at the end (Multi-Krum); default: all but the share above; 1 is Krum itself."""
    bound: Rate | None = None
    """norm_bound: largest L2 norm of a client's update; longer ones are scaled down to it (Sun et al., 2019)."""
    alarm: Annotated[float, Field(gt=1)] = 10.0
    """An update longer than so many medians of its cohort is reported as an event, whatever the aggregation."""

    @model_validator(mode="after")
    def _has_bound(self) -> AggregationConfig:
        if (self.name == "norm_bound") != (self.bound is not None):
            raise ValueError("'aggregation.bound' is needed by aggregation=norm_bound, and used by it alone")
        return self


class AttackConfig(Named):
    """Clients that lie to the server, in every stage with rounds: what ``aggregation`` is to withstand.

    They train honestly, and send something else in the place of their update (what they trained minus what they
    received). Their metrics are true.
    """

    name: Literal["none", "sign_flip", "scale", "noise"] = "none"
    """``sign_flip``: minus ``factor`` times the update (Li et al., 2019). ``scale``: ``factor`` times the update
    (Bagdasaryan et al., 2020). ``noise``: a Gaussian vector of ``factor`` times its length (Blanchard et al., 2017)."""
    share: Annotated[float, Field(gt=0, le=1)] | None = None
    """Liars among the seen clients, rounded to nearest; the same ones in every round, stage and seed."""
    clients: tuple[str, ...] = ()
    """Ids of seen clients that lie, in the place of ``share``."""
    factor: Rate | None = None
    """Default 1; needed by ``scale``."""

    @model_validator(mode="after")
    def _consistent(self) -> AttackConfig:
        if self.name == "none":
            given = [f"'attack.{key}'" for key in ("share", "clients", "factor") if getattr(self, key)]
            if given:
                raise ValueError(f"{' and '.join(given)} without attack=sign_flip, scale or noise would do nothing")
        elif (self.share is None) != bool(self.clients):
            raise ValueError(f"attack={self.name} needs one of 'attack.share' and 'attack.clients': who lies")
        elif self.name == "scale" and self.factor in (None, 1):
            raise ValueError("attack=scale needs 'attack.factor', other than 1")
        if len(set(self.clients)) != len(self.clients):
            raise ValueError("'attack.clients': has repeats")
        return self

    def __str__(self) -> str:
        who = ", ".join(self.clients) if self.share is None else f"a share of {self.share:g} of the seen clients"
        return f"{self.name} (factor {self.factor or 1:g}) by {who}"


class EngineConfig(Config):
    """Where and how clients run; of it `stages.NUMERIC_ENGINE_KEYS`, micro_batch and zero may change numbers."""

    backend: Literal["ray", "serial"] = "ray"
    actors: Positive | None = None
    """Worker processes; default: one per GPU share, or one per CPU (at most 8) without a GPU."""
    mode: Literal["pool", "per_client"] = "pool"
    num_gpus: Annotated[float, Field(ge=0)] = 0.0
    """GPUs per actor, fractions allowed."""
    memory_gb: Annotated[float, Field(gt=0)] | None = None
    """GPU memory per actor; the fraction 1/k is derived from it and enforced. Excludes num_gpus."""
    num_cpus: Annotated[float, Field(gt=0)] = 1.0
    """CPUs per actor."""
    address: str | None = None
    """Ray cluster to join: ``auto`` (of this machine), ``host:port`` or ``ray://host:port``; ``local``: one of its own.
    Default: the one that $RAY_ADDRESS names, which Ray sets in jobs, else ``local``."""
    threads: Positive = 1
    """torch threads per worker."""
    segments: Positive = 8
    """Most pieces that a cohort is cut into; each is summed as a whole, so the bytes do not depend on actors."""
    min_segment: Positive = 4
    """Fewest clients in a piece (but for the last), so that lanes have clients to fuse."""
    token_budget: Positive = 4096
    """Tokens of one fused step over all lanes."""
    max_lanes: Positive = 32
    micro_batch: Positive | None = None
    """Most rows per lane of one forward pass in training; a larger step is cut and its gradients are added up, so that
    the step stays what it is. None: the whole step at once."""
    zero: ZeroConfig = ZeroConfig()
    dtype: Literal["float32", "bfloat16", "auto"] = "float32"
    """Compute type (autocast); whatever is trained stays float32. ``auto``: bfloat16 if a training step is at least 1.3
    times as fast with it here, measured when the run begins; the run's configuration then names what was chosen."""
    retries: Natural = 3
    """How often a segment is given to another actor after a death or a missed deadline."""
    deadline_s: Annotated[float, Field(gt=0)] = 1800.0
    """Seconds after which an actor that has not answered is taken for hung and replaced."""
    on_client_failure: Literal["fail", "drop"] = "fail"
    quorum: Annotated[float, Field(gt=0, le=1)] = 0.5
    """With ``drop``: share of the cohort that must succeed."""
    keep_rounds: Positive = 2
    """Newest round states that stay on disk."""

    @property
    def device(self) -> str:
        """``cuda`` where GPUs are asked for."""
        return "cuda" if self.num_gpus > 0 or self.memory_gb is not None else "cpu"

    @model_validator(mode="after")
    def _one_gpu_measure(self) -> EngineConfig:
        if self.memory_gb is not None and self.num_gpus:
            raise ValueError("'engine.memory_gb' and 'engine.num_gpus' exclude each other: give one")
        if self.num_gpus > 1 and self.num_gpus != int(self.num_gpus):
            raise ValueError(f"'engine.num_gpus': a fraction must be below 1, or a whole number, got {self.num_gpus}")
        return self


class WandbConfig(Config):
    """Weights & Biases as a sink of committed metrics; ``fedtailor sync`` feeds it at any later time."""

    mode: Literal["disabled", "auto", "offline", "online"] = "disabled"
    """``auto``: online if there is a key (and WANDB_MODE does not say otherwise), else offline."""
    project: str = "fedtailor"
    entity: str | None = None
    """User or team; default: the key's."""
    group: str | None = None
    """Group of the run in W&B; default: task and model. Trials of a sweep are grouped by its name."""
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = ()
    job_type: str | None = None
    artifacts: tuple[Literal["figures", "adapters", "report"], ...] = ()
    """What a complete run also gives: the report's figures as images, the report and the clients' adapters as
    artifacts (these two online only; adapters need ``save_adapters``)."""
    timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Longest wait for the server to answer at the beginning, and again for it to take everything at the end."""

    @field_validator("project", "entity", "group", "job_type", "tags")
    @classmethod
    def _no_key(cls, value: str | tuple[str, ...] | None, info: ValidationInfo) -> str | tuple[str, ...] | None:
        for text in (value,) if isinstance(value, str) else value or ():
            if _WANDB_KEY.search(text):
                raise ValueError(
                    f"'wandb.{info.field_name}': this looks like a key, which belongs into WANDB_API_KEY, into the "
                    "file that WANDB_API_KEY_FILE names, or into ~/.netrc; never into a configuration"
                )
        return value
