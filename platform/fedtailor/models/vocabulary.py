"""Room for new tokens in a model's files: only the shards that hold an embedding are written anew."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PretrainedConfig

from fedtailor.core.errors import ModelError
from fedtailor.models.families import meta_causal


def embedding_tensors(config: PretrainedConfig, shards: Mapping[str, str], where: str) -> dict[str, set[str]]:
    """The stored tensors with one row per token, by shard.

    Args:
        config: of the model.
        shards: stored name -> file.
        where: name of the model for the message.

    Raises:
        ModelError: the files do not name the input embedding as the model does.
    """
    model = meta_causal(config)
    output: nn.Module = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    tables = [*model.get_input_embeddings().parameters(), *output.parameters()]
    named = model.named_parameters(remove_duplicate=False)
    names = [name for name, parameter in named if any(parameter is table for table in tables)]
    found: dict[str, set[str]] = {}
    for name in names:
        # Files of a bare body leave its prefix out.
        bare = name.removeprefix(f"{model.base_model_prefix}.")
        stored = name if name in shards else bare
        if stored in shards:
            found.setdefault(shards[stored], set()).add(stored)
    if not found:
        raise ModelError(f"{where}: cannot add a padding token: its files hold none of {', '.join(names)}")
    return found


def grow_shard(source: Path, target: Path, names: set[str], rows: int) -> None:
    """Copies a shard; the named tensors get ``rows`` rows, the new ones the mean of the old ones."""
    with safe_open(source, framework="pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in sorted(shard.keys())}
        metadata = shard.metadata()
    for name in names:
        tensors[name] = grown(tensors[name], rows)
    save_file(tensors, target, metadata=metadata)


def grown(table: Tensor, rows: int) -> Tensor:
    """A table (V, ...) with ``rows`` >= V rows, the new ones at the mean of the others (Hewitt, 2021).

    Summed in float64 and block by block: no second table in another type, and the same bytes whatever the threads.
    """
    total = torch.zeros(table.shape[1:], dtype=torch.float64)
    for block in torch.split(table, 4096):
        total += block.double().sum(0)
    mean = (total / len(table)).to(table.dtype)
    return torch.cat([table, mean.expand(rows - len(table), *table.shape[1:])])
