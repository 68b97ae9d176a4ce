"""Layers of YAML and dotted overrides to one plain tree: OmegaConf merges and reads ``key=value``.

Workers are sent a tree that is merged already, and start without OmegaConf's grammar, which takes a while to load.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fedtailor.core.errors import ConfigError


def merge_layers(layers: Sequence[Mapping[str, Any]], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Merges YAML layers and dotted overrides, later ones winning; lists are replaced, not joined.

    Args:
        layers: plain trees, for example loaded presets.
        overrides: ``key=value`` words as typed, e.g. ``strategy.rounds=20`` or ``methods=[lora,fedp2eft]``.

    Raises:
        ConfigError: an override is not of the form key=value, or its value is not valid YAML.
    """
    bad = [word for word in overrides if "=" not in word or not word.split("=", 1)[0]]
    if bad:
        raise ConfigError([f"'{word}' is not an override; write key=value, e.g. strategy.rounds=20" for word in bad])
    tree, at = OmegaConf.create({}), "the presets"
    try:
        for layer in layers:
            tree = _merge(tree, OmegaConf.create(dict(layer)))
        # Sections before the keys in them, wherever they stand: `task.alpha=1 task=cldr` keeps alpha.
        for word in sorted(overrides, key=lambda word: "." in word.split("=", 1)[0]):
            at = f"the override '{word}'"
            tree = _merge(tree, OmegaConf.from_dotlist([word]))
        plain = OmegaConf.to_container(tree, resolve=True)
    except (OmegaConfBaseException, YAMLError, ValueError) as error:
        reason = str(error).split("\n")[0]
        hint = "write key=value, e.g. methods=[lora,fedp2eft]"
        raise ConfigError(f"cannot read {at}: {reason}; {hint}") from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _merge(tree: DictConfig, update: Any) -> DictConfig:
    """Later keys win. A section given by its name (``model=mbert``) replaces the whole section before it;
    keys that follow (``model.path=...``) join the name."""
    for key, value in update.items():
        if OmegaConf.is_dict(value) and isinstance(tree.get(key), str):
            tree[key] = {"name": tree[key]}
    merged = OmegaConf.unsafe_merge(tree, update)
    assert isinstance(merged, DictConfig)
    return merged
