"""A model that is new here is tried before anything is made of it: loaded whole, with adapters, by two clients."""

from __future__ import annotations

from pathlib import Path

from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.probe import probe
from fedtailor.models.families import adapted_linears
from fedtailor.models.load import load_causal, load_classifier, load_tokenizer
from fedtailor.tasks.source import TaskKind

LARGEST_TRIED = 2**31
"""Bytes of weights up to which a model is tried."""


def is_large(folder: Path) -> bool:
    """Whether a folder's weights are above `LARGEST_TRIED`: such a model is loaded by workers alone."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) > LARGEST_TRIED


def try_model(cfg: ModelConfig, kind: TaskKind, folder: Path) -> str:
    """Loads a model in float32 and lets two clients pass through it.

    Args:
        cfg: the model section.
        kind: of the task.
        folder: the model's own, complete folder.

    Returns:
        Why clients run one by one, see `probe`; empty where they do not.

    Raises:
        ModelError: it cannot be loaded, carries no adapters, or reads its padding; names the folder.
    """
    generation = kind == "generation"
    kernel = None if cfg.attention == "auto" else cfg.attention
    try:
        if generation:
            model = load_causal(folder, attn_implementation=kernel)
        else:
            model = load_classifier(folder, ["a", "b"], attn_implementation=kernel, replace_head=True)
        # Of a decoder without a padding token, none is needed here: a copy with one is made for the stages.
        pad = load_tokenizer(folder, padded=not generation).pad_token_id or 0
        model.config.pad_token_id = pad
        net = LaneNet(model, adapted_linears(model, cfg.targets))
        probe(net, pad)
    except ModelError as error:
        told = str(error)
        raise ModelError(told if str(folder) in told else f"model folder {folder}: {told}") from error
    return net.one_by_one
