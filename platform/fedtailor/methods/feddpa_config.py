"""Settings of FedDPA in all its forms, and where each of them may be used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from fedtailor.core.config import Config
from fedtailor.core.errors import ConfigError
from fedtailor.core.settings import Natural, Positive, Rate
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.task import TASKS

Share = Annotated[float, Field(ge=0, le=1)]


class FedDpaConfig(Config):
    """Defaults: FedP2EFT A.3."""

    when_absent: ClassVar[Mapping[str, Any]] = {
        "local_steps": None, "form": "sum", "train_weight": 0.5, "max_weight": 0.5, "instances": 5,
    }  # fmt: skip
    form: Literal["sum", "t", "f"] = "sum"
    """``sum``: FedP2EFT's, whose settings the defaults are. ``t`` and ``f``: the paper's, which weigh inputs, of tasks
    that ask for text; the public code trains them at scale 2 with lr 3e-4 and 3 epochs, pFedGPT with 1 epoch."""
    train_weight: Share = 0.5
    """form=t: w while the local LoRA is trained."""
    max_weight: Share = 0.5
    """form=t and f: w_max, the largest w of an answer; 0: the global LoRA alone answers."""
    instances: Positive = 5
    """form=t and f: S, training prompts that an input is compared with."""
    targets: tuple[str, ...] = ("query", "value")
    rank: Positive = 8
    local_rank: Natural = 8
    """0: no local LoRA, i.e. FedAvg on LoRA."""
    scale: Rate = 1.0
    """alpha / r = 8 / 8."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.05
    lr: Rate = 5e-5
    epochs: Positive = 2
    """Of each of the two phases."""
    local_steps: Positive | None = None
    """Exactly so many steps in the place of epochs, in each of the two phases."""
    batch_size: Positive = 32
    server_lr: Rate = 1.0

    @model_validator(mode="after")
    def _local_part(self) -> FedDpaConfig:
        if self.form != "sum" and not self.local_rank:
            raise ValueError(f"'feddpa.local_rank' = 0: form={self.form} needs a local LoRA (allowed: from 1)")
        if self.form == "f" and self.local_rank != self.rank:
            raise ValueError(
                f"'feddpa.local_rank' = {self.local_rank}: in form f the local LoRA begins as the global one, of rank "
                f"{self.rank} (allowed: {self.rank})"
            )
        return self

    @classmethod
    def for_task(cls, given: Mapping[str, Any], task: TaskConfig) -> Mapping[str, Any]:
        """Forms that weigh prompts need a task that has some."""
        entry = TASKS.get(task.name)
        if entry and entry.kind != "generation" and given.get("form", "sum") != "sum":
            raise ValueError(
                f"'feddpa.form' = {given['form']} weighs prompts, and task '{task.name}' ({entry.kind}) has none "
                "(allowed: sum)"
            )
        return given

    def beside(self, tree: Any) -> Self:
        """As it is; not every form may be a base.

        Raises:
            ConfigError: later stages would build on both parts without their weights.
        """
        if self.form != "sum" and tree.base.name == "feddpa":
            raise ConfigError(
                f"'feddpa.form' = {self.form} weighs its two parts by the input, which no later stage can build on "
                "(allowed with base.name=feddpa: sum)"
            )
        return self
