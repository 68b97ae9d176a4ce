"""One client's adapter as a peft LoRA folder.

``peft.PeftModel.from_pretrained(base, folder)`` computes W x + scale * B' A x with alpha / r = scale in
every module. peft finds modules by the *end* of their path, in lists of targets and in patterns alike; what
is written here names each module in full and rules out any other reading.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from fedtailor.core.errors import ModelError
from fedtailor.lanes.layers import AdaptedLayer

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"


def export_adapter(
    layers: Sequence[AdaptedLayer],
    a: Mapping[str, Tensor],
    b: Mapping[str, Tensor],
    lam: Mapping[str, Tensor],
    scale: float,
    base_ref: str,
    client: str,
    whole: Mapping[str, Tensor] | None = None,
) -> dict[str, bytes]:
    """Makes the files of a peft LoRA adapter that computes W x + scale * B diag(lambda) A x.

    Ranks with lambda = 0 are dropped, modules without any rank are left out, lambda is folded into B in
    fp32. Per module, alpha = scale * (ranks kept), so that peft's alpha / r stays ``scale`` (FedP2EFT: s is
    not rescaled after pruning). No task type is set: with SEQ_CLS peft would make the classifier a
    trainable copy instead of adapting it.

    Args:
        layers: adapted linear layers of the base model, in its order.
        a: module -> A, (r, d_in), any float dtype and device.
        b: module -> B, (d_out, r).
        lam: module -> lambda, (r,); all ones for plain LoRA.
        scale: s, the factor of the update, dimensionless.
        base_ref: where the base model is, as peft is told (folder, relative or not, or hub id).
        client: client id, for messages.
        whole: weights that replace the base's, by full name: of layers that carry no adapter here.

    Returns:
        File name -> content; the same bytes for the same arguments.

    Raises:
        ModelError: no rank is kept at all, shapes do not fit, or a value is not finite; names the client.
    """
    if not math.isfinite(scale) or scale == 0:
        raise ModelError(f"client {client}: the adapter's scale must be finite and not 0, got {scale}")
    names = [layer.name for layer in layers]
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for name in names:
        down, up = _trim(name, a[name], b[name], lam[name], client)
        if down.shape[0]:
            ranks[name] = down.shape[0]
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
    for name, value in (whole or {}).items():
        if not bool(value.isfinite().all()):
            raise ModelError(f"client {client}, {name}: the weight holds values that are not finite")
        tensors[f"base_model.model.{name}"] = value.detach().to("cpu", torch.float32).contiguous()
    if not ranks:
        raise ModelError(
            f"client {client}: no rank is kept in any of its {len(names)} modules, so there is no adapter "
            f"to export; its model is the base model"
        )
    config = _config(ranks, [name for name in names if name not in ranks], scale, base_ref)
    if whole:
        config["modules_to_save"] = sorted({name.rpartition(".")[0] for name in whole})
    # peft sets it layer by layer where a model has both kinds (GPT-2's head is no Conv1D).
    config["fan_in_fan_out"] = any(layer.transposed and layer.name in ranks for layer in layers)
    return {
        CONFIG_FILE: (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode(),
        WEIGHTS_FILE: save(tensors, metadata={"format": "pt"}),
    }


def _trim(name: str, a: Tensor, b: Tensor, lam: Tensor, client: str) -> tuple[Tensor, Tensor]:
    """The kept rows of A, (k, d_in), and columns of B diag(lambda), (d_out, k), as fp32 on the CPU."""
    if a.dim() != 2 or b.dim() != 2 or lam.dim() != 1 or not a.shape[0] == b.shape[1] == lam.shape[0]:
        raise ModelError(
            f"client {client}, {name}: A {tuple(a.shape)}, B {tuple(b.shape)} and lambda {tuple(lam.shape)} "
            f"must be (r, d_in), (d_out, r) and (r,)"
        )
    a, b, lam = (tensor.detach().to("cpu", torch.float32) for tensor in (a, b, lam))
    if not all(bool(tensor.isfinite().all()) for tensor in (a, b, lam)):
        raise ModelError(f"client {client}, {name}: the adapter holds values that are not finite")
    kept = lam != 0
    return a[kept].contiguous(), (b[:, kept] * lam[kept]).contiguous()


def _config(ranks: Mapping[str, int], dropped: Iterable[str], scale: float, base_ref: str) -> dict[str, Any]:
    keys = _pattern_keys(ranks)
    most = max(ranks.values())
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_ref,
        "inference_mode": True,
        "r": most,
        "lora_alpha": scale * most,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "target_modules": list(ranks),
        "rank_pattern": {keys[name]: rank for name, rank in ranks.items()},
        "alpha_pattern": {keys[name]: scale * rank for name, rank in ranks.items()},
    }
    shadowed = [re.escape(name) for name in dropped if not _ends(name).isdisjoint(ranks)]
    if shadowed:
        config["exclude_modules"] = "|".join(shadowed)
    return config


def _pattern_keys(ranks: Mapping[str, int]) -> dict[str, str]:
    """The key of each module in rank_pattern and alpha_pattern.

    peft takes the first key that, as a regular expression, matches the end of a path. A full path can only be
    mistaken where it also ends another one (``classifier`` and ``head.classifier``): there it is anchored.
    """
    ambiguous = set().union(*(_ends(name) for name in ranks))
    return {name: f"^{re.escape(name)}" if name in ambiguous else name for name in ranks}


def _ends(name: str) -> set[str]:
    """Proper endings of a module path at its dots: ``a.b.c`` -> ``b.c``, ``c``."""
    parts = name.split(".")
    return {".".join(parts[i:]) for i in range(1, len(parts))}
