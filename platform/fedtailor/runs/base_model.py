"""The trained base model as a Hugging Face folder: what adapters stack on and what a user takes away."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from fedtailor.adapters.full import FullModel, plain_name
from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.errors import CapabilityError
from fedtailor.core.messages import StageSpec
from fedtailor.core.method import Method, Row
from fedtailor.core.net import LaneNet
from fedtailor.core.worker_stage import load_net
from fedtailor.models.classifier import load_classifier, load_tokenizer
from fedtailor.models.folder import save_folder


def write_base(spec: StageSpec, method: Method, tensors: Mapping[str, Row], labels: Sequence[str], out: Path) -> None:
    """Writes initial model + SHARED parameters as one model; LoRA is merged in float32.

    Raises:
        CapabilityError: the method's adapter cannot become plain weights.
    """
    model = load_classifier(Path(spec.model_dir), len(labels), labels)
    weights = dict(model.named_parameters())
    with torch.no_grad():
        if isinstance(method.adapter, FullModel):
            for name, value in tensors.items():
                weights[name].copy_(torch.from_numpy(value))
        elif isinstance(method.adapter, LoraAdapter):
            for name, delta in _lora_deltas(load_net(spec, labels), method.adapter, tensors).items():
                weights[f"{name}.weight"].add_(delta)
        else:
            raise CapabilityError(f"{method.name}: its parameters cannot be merged into a base model")
    save_folder(model, load_tokenizer(spec.model_dir), out)


def _lora_deltas(net: LaneNet, adapter: LoraAdapter, tensors: Mapping[str, Row]) -> dict[str, torch.Tensor]:
    return {
        plain_name(site.name): adapter.scale
        * torch.from_numpy(tensors[f"lora_B.{site.name}"])
        @ torch.from_numpy(tensors[f"lora_A.{site.name}"])
        for site in net.sites
    }
