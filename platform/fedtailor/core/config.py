"""One typed, frozen configuration tree: layers of YAML and dotted overrides, checked all at once.

OmegaConf merges the layers and reads ``key=value``; pydantic checks types and ranges. What this file
adds is the wording: every problem is reported in one go, with the key, the value and what is allowed.
"""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar, Union, get_args, get_origin

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, ValidationError

from fedtailor.core.errors import ConfigError


class Config(BaseModel):
    """Base of every node: frozen, unknown keys are errors, defaults are validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)


C = TypeVar("C", bound=Config)


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
    tree = OmegaConf.create({})
    try:
        for layer in layers:
            tree = OmegaConf.unsafe_merge(tree, OmegaConf.create(dict(layer)))
        for word in overrides:
            update = OmegaConf.from_dotlist([word])
            # A name replaces a whole section: `model=mbert` drops the preset's model.hidden_size.
            tree = OmegaConf.unsafe_merge(tree, update)
    except (OmegaConfBaseException, ValueError) as error:
        raise ConfigError(f"cannot read the overrides {list(overrides)}: {error}") from error
    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def validate(kind: type[C], tree: Mapping[str, Any]) -> C:
    """Builds ``kind`` from a plain tree.

    Raises:
        ConfigError: lists every problem, each with its dotted key, the value and the allowed values;
            an unknown key is shown with the nearest known one.
    """
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as error:
        raise ConfigError([_sentence(kind, problem) for problem in error.errors()]) from None


def _sentence(kind: type[Config], problem: Any) -> str:
    path = tuple(problem["loc"])
    key = ".".join(str(part) for part in path)
    value = problem.get("input")
    if problem["type"] == "extra_forbidden":
        parent = _model_at(kind, path[:-1])
        known = sorted(parent.model_fields) if parent else []
        near = difflib.get_close_matches(str(path[-1]), known, n=1, cutoff=0.5)
        if not near:
            everywhere = {name.rsplit(".", 1)[-1]: name for name in dotted_keys(kind)}
            near = [everywhere[m] for m in difflib.get_close_matches(str(path[-1]), list(everywhere), 1, 0.75)]
        hint = f"; did you mean '{near[0]}'?" if near else ""
        return f"unknown key '{key}'{hint} (keys here: {', '.join(known)})"
    if problem["type"] == "missing":
        return f"'{key}' must be given"
    message = str(problem["msg"])
    for prefix in ("Value error, ", "Assertion failed, "):
        message = message.removeprefix(prefix)
    if not key:
        return message
    if f"'{key}'" in message or message.startswith(key):
        return message
    return f"'{key}': {message[0].lower() + message[1:]}, got {value!r}"


def _model_at(kind: type[BaseModel], path: Sequence[Any]) -> type[BaseModel] | None:
    for part in path:
        if not isinstance(part, str):
            continue
        field = kind.model_fields.get(part)
        inner = _config_class(field.annotation) if field else None
        if inner is None:
            return None
        kind = inner
    return kind


def _config_class(annotation: Any) -> type[Config] | None:
    if isinstance(annotation, type) and issubclass(annotation, Config):
        return annotation
    if get_origin(annotation) in (Union, types.UnionType):
        return next((found for a in get_args(annotation) if (found := _config_class(a))), None)
    return None


def dotted_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All leaf keys of a tree in dotted form, in declaration order."""
    for name, field in kind.model_fields.items():
        inner = _config_class(field.annotation)
        if inner:
            yield from dotted_keys(inner, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def flatten(config: BaseModel, prefix: str = "") -> dict[str, Any]:
    """Dotted key to value of every leaf, in declaration order."""
    leaves: dict[str, Any] = {}
    for name in type(config).model_fields:
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            leaves |= flatten(value, f"{prefix}{name}.")
        else:
            leaves[f"{prefix}{name}"] = value
    return leaves


def deviations(config: BaseModel, default: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Leaves that differ from ``default``: dotted key to (default, value)."""
    here, there = flatten(config), flatten(default)
    return {key: (there.get(key), value) for key, value in here.items() if there.get(key) != value}
