"""From the model section of a configuration to the place where the base model is."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.models.packages import PACKAGED
from fedtailor.tasks.source import TaskKind

EMBEDDED = "tiny-bert"
EMBEDDED_CAUSAL = "tiny-llama"
EMBEDDED_LINEAR = "linear"
EMBEDDED_KINDS: dict[str, tuple[TaskKind, ...]] = {
    EMBEDDED: ("classification", "extraction"),
    EMBEDDED_CAUSAL: ("generation",),
    EMBEDDED_LINEAR: ("regression",),
}
"""Models that are built from a task's texts, and the kinds of task that each is for."""

PRETRAINED = "mini-mbert"
"""The small multilingual base that ``fedtailor pretrain`` makes."""

PRESETS: dict[str, str] = {
    "mbert": "google-bert/bert-base-multilingual-cased",
    "roberta-base": "FacebookAI/roberta-base",
    "roberta-large": "FacebookAI/roberta-large",
    "gpt2-medium": "openai-community/gpt2-medium",
    "gpt2-xl": "openai-community/gpt2-xl",
    "deberta-v3-base": "microsoft/deberta-v3-base",
    "mobilellama-1.4b": "mtgv/MobileLLaMA-1.4B-Base",
    "llama-3.2-3b": "meta-llama/Llama-3.2-3B-Instruct",
    "alpaca-7b": "chavinlo/alpaca-native",
}
"""Short names of hub ids; ``model.path`` puts a local copy in their place. FedP2EFT A.2 has mbert, MobileLLaMA and
Llama, pFedGPT Alpaca."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


@dataclass(frozen=True)
class ModelSource:
    """Where a base model comes from.

    Attributes:
        kind: ``embedded`` (built from the task's texts), ``folder`` (local) or ``hub``.
        name: as configured, for messages.
        location: hub id, or path of the folder; for ``embedded`` the sizes that define the model.
        revision: hub revision; None: the default branch.
    """

    kind: Literal["embedded", "folder", "hub"]
    name: str
    location: str
    revision: str | None = None


def embedded_for(kind: TaskKind) -> str:
    """The embedded model for tasks of a kind."""
    return next(name for name, kinds in EMBEDDED_KINDS.items() if kind in kinds)


def resolve(cfg: ModelConfig) -> ModelSource:
    """Decides which model is meant, without looking for it.

    But ``mini-mbert`` must have been made, and a packaged model is written into this node's cache if it is not there.

    ``model.path`` wins over a preset's hub id and over the folder of ``mini-mbert``. A name is a folder if one
    exists there or if it is written like a path (``./m``, ``~/m``, ``/data/m``), else a hub id.

    Raises:
        ModelError: a name that can be neither, a path given for the embedded model, ``mini-mbert`` not made yet, or a
            package that is not installed.
    """
    if cfg.name in EMBEDDED_KINDS:
        if cfg.path is not None:
            raise ModelError(
                f"'model.path' ({cfg.path}) has no meaning for {cfg.name}; name the model it holds instead"
            )
        sizes = (cfg.hidden_size, cfg.layers, cfg.heads, cfg.intermediate_size, cfg.vocab_size)
        return ModelSource("embedded", cfg.name, "x".join(str(size) for size in sizes))
    if cfg.name == PRETRAINED and cfg.path is None:
        made = pretrained_folder()
        if not made.is_dir():
            command = f"fedtailor pretrain --task masakhanews --task xnli --out {shlex.quote(str(made))}"
            raise ModelError(
                f"model={PRETRAINED}: there is no folder {made}; make it with '{command}' (about half an hour on two "
                f"idle cores; its texts are found through FEDTAILOR_DATA), or name a copy with model.path=FOLDER or "
                f"FEDTAILOR_MODELS=PARENT_FOLDER"
            )
        return ModelSource("folder", cfg.name, str(made))
    if cfg.name in PACKAGED and cfg.path is None:
        from fedtailor.models.packaged import packaged_folder  # loads transformers, which listing names need not

        return ModelSource("folder", cfg.name, str(packaged_folder(cfg.name)))
    written = cfg.path or cfg.name
    folder = Path(written).expanduser()
    like_a_path = written.startswith((".", "/", "~")) or written.count("/") > 1
    if cfg.path is not None or like_a_path or (cfg.name not in PRESETS and folder.is_dir()):
        return ModelSource("folder", cfg.name, str(folder))
    if not _HUB_ID.fullmatch(cfg.name):
        raise ModelError(
            f"'model.name' ({cfg.name}) is neither {EMBEDDED}, {EMBEDDED_CAUSAL}, {PRETRAINED}, a preset "
            f"({', '.join([*PACKAGED, *PRESETS])}), a hub id (owner/name) nor a folder"
        )
    return ModelSource("hub", cfg.name, PRESETS.get(cfg.name, cfg.name), cfg.revision)


def model_title(cfg: ModelConfig) -> str:
    """What is really used, for people.

    >>> model_title(ModelConfig(name="tiny-bert")), model_title(ModelConfig(name="mbert"))
    ('tiny-bert', 'mbert (google-bert/bert-base-multilingual-cased)')
    >>> model_title(ModelConfig(name="mbert", path="~/mine", weights="bfloat16"))
    'mbert (from ~/mine, kept in bfloat16)'
    """
    usual = PACKAGED[cfg.name].title if cfg.name in PACKAGED else PRESETS.get(cfg.name)
    told = [
        f"from {cfg.path}" if cfg.path else usual,
        f"revision {cfg.revision}" if cfg.revision and not cfg.path else None,
        None if cfg.weights == "float32" else f"kept in {cfg.weights}",
    ]
    details = ", ".join(filter(None, told))
    return f"{cfg.name} ({details})" if details else cfg.name


def pretrained_folder() -> Path:
    """Where ``mini-mbert`` is looked for and made: below $FEDTAILOR_MODELS, else below ./models."""
    return Path(os.environ.get("FEDTAILOR_MODELS") or "models").expanduser() / PRETRAINED
