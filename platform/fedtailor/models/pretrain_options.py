"""What ``fedtailor pretrain`` is asked to make; every problem is told before any work, by the option's name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import torch
from pydantic import ConfigDict, Field, field_validator, model_validator

from fedtailor.core.config import Config, validate
from fedtailor.core.errors import ConfigError
from fedtailor.core.settings import Natural, Positive, Rate
from fedtailor.tasks.task import TASKS


def flag(name: str) -> str:
    """The option of a field: ``vocab_size`` to ``--vocab-size``; a list's option is its singular.

    >>> flag("learning_rate"), flag("tasks")
    ('--learning-rate', '--task')
    """
    return "--task" if name == "tasks" else f"--{name.replace('_', '-')}"


class PretrainOptions(Config):
    """All that decides the bytes of a pretrained folder, next to texts, library versions and hardware.

    Keys are the command line's options, so that messages name what was typed. The default architecture is a BERT
    (Devlin et al., 2019) of 4 layers and 256 hidden units; the optimiser's constants are RoBERTa's (Liu et al.,
    2019, table 9); no dropout, since a corpus of this size is read about once.
    """

    model_config = ConfigDict(alias_generator=flag)

    tasks: Annotated[tuple[str, ...], Field(min_length=1)]
    """Tasks whose train texts are read; their order does not matter."""
    layers: Positive = 4
    hidden_size: Positive = 256
    heads: Positive = 4
    intermediate_size: Positive = 1024
    max_position: Annotated[int, Field(ge=8)] = 256
    vocab_size: Annotated[int, Field(ge=200)] = 16000
    block: Annotated[int, Field(ge=8)] = 128
    """Tokens of a row, [CLS] included."""
    shift: bool = True
    """Let each row begin at a drawn position (SHAPE, Kiyono et al., 2021), so that positions beyond the block are
    learned too."""
    batch: Positive = 32
    """Rows of a step."""
    steps: Positive = 4000
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 1e-3
    """Peak, reached after the warm-up; falls linearly to 0 at the last step."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.06
    """Share of the steps."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Of matrices; biases and layer norms are not decayed."""
    clip: Rate = 1.0
    """Largest norm of the gradient."""
    mask: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Share of tokens to predict; of these 80 % are shown as [MASK], 10 % as another token. BERT has 0.15; more teaches
    more per step at nearly no cost (Wettig et al., 2023)."""
    smoothing: Annotated[float, Field(ge=0, le=1)] = 0.5
    """alpha of XLM (Conneau and Lample, 2019, section 3.1): languages are drawn in proportion to tokens ** alpha."""
    start: Literal["counts", "random"] = "counts"
    """Token vectors and output bias before the first step: from the corpus by counting (`pretrain_start`), or drawn."""
    held_out: Annotated[float, Field(gt=0, lt=0.5)] = 0.01
    """Share of each language's documents that is only measured on, one at least."""
    seed: Natural = 42
    precision: Literal["bfloat16", "float32"] = "float32"
    """Of matrix products (autocast); weights, moments and sums are float32."""
    device: str = "cpu"
    """cpu, cuda or cuda:N."""

    @field_validator("tasks")
    @classmethod
    def _tasks(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        allowed = [name for name, entry in TASKS.items() if entry.kind == "classification"]
        if not set(value) <= set(allowed):
            raise ValueError(f"allowed: {', '.join(allowed)}")
        return tuple(sorted(set(value)))

    @model_validator(mode="after")
    def _consistent(self) -> PretrainOptions:
        if self.hidden_size % self.heads:
            raise ValueError(f"'--hidden-size' ({self.hidden_size}) must be a multiple of '--heads' ({self.heads})")
        if self.block > self.max_position:
            raise ValueError(f"'--block' ({self.block}) must be at most '--max-position' ({self.max_position})")
        return self

    def record(self) -> dict[str, Any]:
        """The options as JSON, by field name."""
        return self.model_dump(mode="json")


def chosen(given: Mapping[str, Any]) -> PretrainOptions:
    """Options from what was typed, by field name; device and precision may be ``auto``.

    Raises:
        ConfigError: every problem, by the option's name.
    """
    device = choose_device(str(given.get("device", "auto")))
    precision = choose_precision(str(given.get("precision", "auto")), device)
    values = {**given, "device": device, "precision": precision}
    return validate(PretrainOptions, {flag(name): value for name, value in values.items()})


def choose_device(name: str) -> str:
    """``auto`` to cuda or cpu; anything else is checked.

    Raises:
        ConfigError: no such device here.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = ["cpu"]
    if torch.cuda.is_available():
        there += ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in there:
        raise ConfigError(f"'--device' is {name!r}, allowed here: auto, {', '.join(there)}")
    return name


def choose_precision(name: str, device: str) -> str:
    """``auto`` to bfloat16 where the device has instructions for it, else to float32; others as they are.

    Raises:
        ConfigError: another word.
    """
    if name not in ("auto", "bfloat16", "float32"):
        raise ConfigError(f"'--precision' is {name!r}, allowed: auto, bfloat16, float32")
    if name != "auto":
        return name
    if device != "cpu":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float32"
    able = torch.cpu.get_capabilities()
    return "bfloat16" if any(able.get(key) for key in ("avx512_bf16", "amx_bf16", "bf16")) else "float32"
