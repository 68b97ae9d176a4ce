"""What ``run.json`` says about a run, read leniently: what is absent is shown as absent, never invented."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass
from typing import Any

NOT_RECORDED = "not recorded"


@dataclass(frozen=True)
class Override:
    """A choice that departs from the default; ``default`` and ``value`` as text."""

    key: str
    default: str
    value: str


@dataclass(frozen=True)
class Facts:
    """The facts that a caption and a page header need, as text.

    Args:
        n_modules: L, the number of adapted linear layers.
        failures: number of failed clients, None if the run did not record it. So are ``warnings``.
    """

    run_id: str
    status: str
    task: str
    model: str
    base: str
    base_rounds: str
    strategy_rounds: str
    n_modules: int
    overrides: tuple[Override, ...]
    versions: tuple[tuple[str, str], ...]
    failures: int | None
    warnings: int | None

    @property
    def version_line(self) -> str:
        """``fedtailor 0.1.0, torch 2.13.0``."""
        return ", ".join(f"{name} {version}" for name, version in self.versions) or NOT_RECORDED


_BASES = {"fedavg": "standard FL (FedAvg)", "none": "off the shelf"}


def read_facts(run: Mapping[str, Any], n_modules: int) -> Facts:
    """Facts of a run.

    Args:
        run: content of ``run.json``.
        n_modules: number of adapted linear layers.
    """
    config, status = run.get("config") or {}, run.get("status")
    base = at(config, "base.name")
    state = status.get("state", status.get("status")) if isinstance(status, Mapping) else status
    return Facts(
        run_id=text(run.get("run_id")),
        status=text(state),
        task=text(at(config, "task.name")),
        model=text(at(config, "model.name")),
        base=_BASES.get(str(base), text(base)),
        base_rounds="0" if base == "none" else text(at(config, "base.rounds")),
        strategy_rounds=text(at(config, "strategy.rounds")),
        n_modules=n_modules,
        overrides=tuple(
            Override(str(o["key"]), _value(o.get("default")), _value(o.get("value")))
            for o in run.get("overrides") or ()
        ),
        versions=tuple((str(name), text(v)) for name, v in sorted((run.get("versions") or {}).items())),
        failures=_count(run, status, "failures"),
        warnings=_count(run, status, "warnings"),
    )


def at(tree: Any, path: str) -> Any:
    """Value at a dotted path of a nested mapping, None where there is none."""
    for key in path.split("."):
        if not isinstance(tree, Mapping) or key not in tree:
            return None
        tree = tree[key]
    return tree


def text(value: Any) -> str:
    """A value as people write it: no quotes, lists in brackets, `NOT_RECORDED` for None."""
    return NOT_RECORDED if value is None or value == "" else _value(value)


def counted(n: int, noun: str) -> str:
    """``1 client``, ``2 clients``."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def rounds(number: str) -> str:
    """``20 rounds``, ``1 round``, or that it is not recorded."""
    return counted(int(number), "round") if number.isdigit() else f"rounds {number}"


def leaves(tree: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Dotted key and text of every leaf of a nested mapping, in order; long lists are numbered by index."""
    if isinstance(tree, Mapping) and tree:
        return [
            leaf for key, value in tree.items() for leaf in leaves(value, f"{prefix}.{key}" if prefix else str(key))
        ]
    if _is_list(tree) and any(isinstance(item, Mapping) for item in tree):
        return [leaf for k, value in enumerate(tree) for leaf in leaves(value, f"{prefix}[{k}]")]
    return [(prefix, _value(tree))]


def _value(value: Any) -> str:
    if isinstance(value, str):
        return value
    if _is_list(value):
        return f"[{', '.join(_value(item) for item in value)}]"
    if value is None or isinstance(value, bool | Mapping):
        return json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    return str(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _count(run: Mapping[str, Any], status: Any, key: str) -> int | None:
    found = run.get(key)
    if found is None and isinstance(status, Mapping):
        found = status.get(key)
    if isinstance(found, bool) or found is None:
        return None
    return len(found) if isinstance(found, Sized) else int(found)
