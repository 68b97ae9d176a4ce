"""One typed, frozen configuration tree, checked all at once.

Pydantic checks types and ranges. What this file adds is the wording: every problem is reported in one go, with the key,
the value and what is allowed. Layers of YAML and dotted overrides become a tree in `core.overrides`.
"""

from __future__ import annotations

import gc
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import reduce
from importlib import import_module
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from fedtailor.core.errors import ConfigError, nearest

C = TypeVar("C", bound="Config")
_MOST_HINTS = 3
"""Keys of one name that are worth naming."""


class Config(BaseModel):
    """Base of every node: frozen, unknown keys are errors, defaults are validated too."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, allow_inf_nan=False)

    when_absent: ClassVar[Mapping[str, Any]] = {}
    """Keys that came after runs had been stored: the value that means what was done before there was the key. A run
    folder without the key is read so, and at this value the key is no part of an artifact's name."""

    @classmethod
    def for_task(cls, given: Mapping[str, Any], task: Any) -> Mapping[str, Any]:
        """A method's section as it was given, with what it takes from the task (a `TaskConfig`) where it is silent."""
        return given

    def beside(self, tree: Any) -> Self:
        """A method's section with what it takes from the tree's other sections where it is silent."""
        return self

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_as_number(cls, value: Any, info: ValidationInfo) -> Any:
        kind = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and _is_number(kind):
            raise ValueError("must be a number")  # pydantic would read true as 1
        return value


def _is_number(annotation: Any) -> bool:
    """Whether only a number fits, or None."""
    if get_origin(annotation) is Annotated:
        return _is_number(get_args(annotation)[0])
    if get_origin(annotation) in (Union, types.UnionType):
        parts = [part for part in get_args(annotation) if part is not type(None) and get_origin(part) is not Literal]
        return bool(parts) and all(map(_is_number, parts))
    return annotation in (int, float)


def validate(kind: type[C], tree: Mapping[str, Any]) -> C:
    """Builds ``kind`` from a plain tree.

    Raises:
        ConfigError: lists every problem, each with its dotted key, the value and the allowed values;
            an unknown key is shown with the nearest known one.
    """
    try:
        return kind.model_validate(dict(tree))
    except ValidationError as error:
        places: dict[tuple[Any, ...], list[Any]] = {}
        for problem in error.errors():
            # pydantic adds the branch of a union, such as "tuple[str, ...]", to the place.
            place = tuple(part for part in problem["loc"] if not re.search(r"\[|^constrained-", str(part)))
            places.setdefault(place, []).append(problem)
        raise ConfigError([_sentence(kind, place, problems) for place, problems in places.items()]) from None


def _sections(kind: type[BaseModel]) -> dict[str, type[Config]]:
    """Keys that are nodes themselves."""
    kinds = {name: field.annotation for name, field in kind.model_fields.items()}
    return {name: found for name, found in kinds.items() if isinstance(found, type) and issubclass(found, Config)}


def completed(kind: type[Config], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A stored tree of ``kind`` with the keys that it is older than, by `Config.when_absent`."""
    tree = {**kind.when_absent, **stored}
    for name, inner in _sections(kind).items():
        section = tree.get(name, {})
        if isinstance(section, Mapping) and (more := completed(inner, section)):
            tree[name] = more
    return tree


def at_absent(config: Config) -> dict[str, Any]:
    """Leaves at their `Config.when_absent` value, as pydantic's ``exclude`` takes them."""
    leaves: dict[str, Any] = {key: True for key, value in config.when_absent.items() if getattr(config, key) == value}
    inner = {name: at_absent(getattr(config, name)) for name in _sections(type(config))}
    return leaves | {name: below for name, below in inner.items() if below}


def dotted_keys(kind: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """All leaf keys of a tree in dotted form, in declaration order."""
    sections = _sections(kind)
    for name in kind.model_fields:
        if name in sections:
            yield from dotted_keys(sections[name], f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def flatten(config: BaseModel) -> dict[str, Any]:
    """Dotted key to value of every leaf, in declaration order."""
    return {key: reduce(getattr, key.split("."), config) for key in dotted_keys(type(config))}


def deviations(config: BaseModel, default: BaseModel) -> dict[str, tuple[Any, Any]]:
    """Leaves that differ from ``default``: dotted key to (default, value)."""
    here, there = flatten(config), flatten(default)
    return {key: (there.get(key), value) for key, value in here.items() if there.get(key) != value}


def _sentence(kind: type[Config], path: tuple[Any, ...], problems: Sequence[Any]) -> str:
    """What is wrong at one place of a tree of ``kind``."""
    problem, key = problems[0], ".".join(map(str, path))
    if problem["type"] == "extra_forbidden":
        parent: type[BaseModel] = kind
        for part in path[:-1]:
            parent = _sections(parent).get(str(part), BaseModel)
        known = sorted(parent.model_fields)
        near = [found] if (found := nearest(str(path[-1]), known)) else _keys_below(kind, path)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        return f"unknown key '{key}'{hint} (keys here: {', '.join(known)})"
    if problem["type"] == "missing":
        return f"'{key}' must be given"
    messages = [re.sub("^(Value error|Assertion failed), ", "", str(found["msg"])) for found in problems]
    if not key or messages[0].startswith((f"'{key}", key)):
        return messages[0]
    return f"'{key}': {'; or '.join(map(_plainly, problems, messages))}, got {problem.get('input')!r}"


def _keys_below(kind: type[Config], path: tuple[Any, ...]) -> list[str]:
    """Keys like the last of ``path``, dotted: deeper in the section that it is in, never in another section."""
    prefix = f"{path[0]}." if len(path) > 1 else ""
    by_name: dict[str, list[str]] = {}
    for key in dotted_keys(kind):
        if key.startswith(prefix):
            by_name.setdefault(key.rsplit(".", 1)[-1], []).append(key)
    near = nearest(str(path[-1]), by_name, 0.5 if prefix else 0.75)
    return by_name[near][:_MOST_HINTS] if near else []


def _plainly(problem: Any, message: str) -> str:
    """What is wrong with a value, in words of the command line instead of Python's."""
    if problem["type"] == "tuple_type":
        return "must be a list such as [a,b]"
    if problem["type"] == "model_type":
        return "is a section; set the keys below it"
    if problem["type"] == "literal_error":
        allowed = [word.strip("'") for word in re.split(", | or ", str(problem["ctx"]["expected"]))]
        near = nearest(given, allowed, 0.6) if isinstance(given := problem.get("input"), str) else None
        return f"allowed: {', '.join(allowed)}" + (f" (did you mean '{near}'?)" if near else "")
    return message[0].lower() + message[1:]


@contextmanager
def importing() -> Iterator[None]:
    """Heavy imports of a process that exists for them: Python's collector of cycles rests, and skips them afterwards.

    Torch and transformers make a million objects that stay. Looking through them again and again is a quarter of the
    CPU time of their import, and half a second of every full collection that comes later.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def resolve(dotted: str) -> Any:
    """What ``package.module:name`` names, imported.

    Raises:
        ConfigError: the module, or one that it needs, is not installed.
    """
    module, _, name = dotted.partition(":")
    try:
        return getattr(import_module(module), name)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{dotted} needs the module '{error.name}', which is not installed here: install it"
        ) from error
