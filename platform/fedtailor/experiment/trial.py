"""A model whose files are here, tried before any work: all that a run will do with it, on a few tokens."""

from __future__ import annotations

import warnings
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from fedtailor.adapters.peft_export import export_adapter
from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.lanes.batches import Examples, LaneBatch
from fedtailor.lanes.features import client_features
from fedtailor.lanes.layers import detach
from fedtailor.lanes.net import LaneNet, scores_of
from fedtailor.lanes.probe import ROUNDING, bind_strong, probe, tiny_batch
from fedtailor.models.families import adapted_linears, notices
from fedtailor.models.load import first_line, load_causal, load_classifier, load_extractor, load_tokenizer, quiet
from fedtailor.tasks.source import TaskKind

LARGEST_TRIED = 2**31
"""Bytes of weights up to which a model is loaded to be tried."""


def try_model(cfg: ModelConfig, kind: TaskKind, folder: Path) -> tuple[str, ...]:
    """Tries lanes, the features of clients and an exported adapter in peft; negligible beside loading the model.

    Args:
        cfg: which layers carry adapters, and which attention is used.
        kind: of the task.
        folder: the model's own, complete folder, see `models.folder.check_folder`.

    Returns:
        What the user should know, a clause each; see `models.families.notices`.

    Raises:
        ModelError: the model cannot be loaded, or would not do what a run takes for granted; names the folder.
    """
    if sum(file.stat().st_size for file in folder.glob("*.safetensors")) > LARGEST_TRIED:
        return ("the model is large: whether its clients can share forward passes is found when it is loaded",)
    try:
        return _try(cfg, kind, folder)
    except ModelError as error:
        told = str(error)
        raise ModelError(told if str(folder) in told else f"model folder {folder}: {told}") from error


def _try(cfg: ModelConfig, kind: TaskKind, folder: Path) -> tuple[str, ...]:
    generation = kind == "generation"
    kernel = None if cfg.attention == "auto" else cfg.attention
    if generation:
        model = load_causal(folder, attn_implementation=kernel)
    elif kind == "extraction":
        model = load_extractor(folder, attn_implementation=kernel)
    else:
        model = load_classifier(folder, ["a", "b"], attn_implementation=kernel, replace_head=True)
    # Of a decoder without a padding token, none is needed here: a copy with one is made for the stages.
    pad = load_tokenizer(folder, padded=not generation).pad_token_id or 0
    model.config.pad_token_id = pad
    net = LaneNet(model, adapted_linears(model, cfg.targets))
    probe(net, pad)
    batch = tiny_batch(net, pad)
    ids, mask = batch.input_ids[0], batch.attention_mask[0]
    name, lengths = type(model).__name__, mask.sum(1)
    prompt = (lengths - 2).numpy() if generation else None
    texts = Examples(ids.numpy(), lengths.numpy(), torch.zeros_like(lengths).numpy(), prompt_length=prompt)
    try:
        with quiet(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what peft and transformers say to each other is nothing to act on
            features = client_features(net, texts, pad)
            ours, plain, bare = _exported(net, batch)
    except Exception as error:  # any model's code may fail here in its own way
        raise ModelError(f"{name}: {type(error).__name__}: {first_line(error)}") from error
    if not features.isfinite().all():
        raise ModelError(f"{name}: what its layers read is not finite; FedP2EFT's generator is told its mean and SD")
    if (ours - plain).abs().max() > ROUNDING[ours.dtype] * (ours - bare).abs().max():
        raise ModelError(f"{name}: an exported adapter gives other scores in peft than here; not supported")
    return notices(net, cfg.targets)


@torch.no_grad()
def _exported(net: LaneNet, batch: LaneBatch) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of texts: ours with an adapter, those of the exported one in peft, those without; undresses ``net``."""
    from peft import PeftModel  # takes seconds, and is used here alone

    ids, mask = batch.input_ids[0], batch.attention_mask[0]
    bind_strong(net)
    ours = net.lane_logits(batch, 0)[0]
    a = {layer.name: layer.a[0] for layer in net.layers if layer.a is not None}
    b = {layer.name: layer.b[0] for layer in net.layers if layer.b is not None}
    lam = {name: torch.ones(len(value)) for name, value in a.items()}
    net.unbind()
    detach(net.model, net.layers)
    bare = scores_of(net.model(input_ids=ids, attention_mask=mask), mask)
    with TemporaryDirectory(prefix="fedtailor-trial-") as folder:
        for file, content in export_adapter(net.adapted, a, b, lam, 1.0, "", "trial").items():
            (Path(folder) / file).write_bytes(content)
        plain = scores_of(PeftModel.from_pretrained(net.model, folder).eval()(input_ids=ids, attention_mask=mask), mask)
    if len(ours) == ids.numel():  # every token is scored
        plain, bare, ours = (
            scores.reshape(-1, scores.shape[-1])[mask.flatten().bool()] for scores in (plain, bare, ours)
        )
    return ours, plain, bare
