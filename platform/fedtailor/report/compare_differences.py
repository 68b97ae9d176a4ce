"""What the compared runs are and where their configurations differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from fedtailor.experiment.stages import NUMERIC_ENGINE_KEYS
from fedtailor.methods import METHODS
from fedtailor.report import setting
from fedtailor.report.compare_read import Side
from fedtailor.report.names import in_pool_order
from fedtailor.report.wording import at, leaves, text

ABSENT_KEY = "not set"

Row = tuple[str, tuple[str, ...]]
"""Name or key, and a text per run."""

_NEUTRAL = ("storage", "save_adapters", "wandb.")

_ENGINE = {
    f"engine.{key}"
    for key in (
        *NUMERIC_ENGINE_KEYS, "micro_batch", "zero.ranks", "on_client_failure", "quorum", "num_gpus", "memory_gb",
    )
}  # fmt: skip
"""Keys of the engine that can change a number; GPU keys choose the device."""

_ORIGINS = ("versions.fedtailor", "versions.torch", "git.sha")

_DIGITS = 12


@dataclass(frozen=True)
class Differences:
    """Configuration keys whose values differ.

    Args:
        rows: keys that can change a number, and the versions of code and torch.
        neutral: keys that cannot: where results are computed, kept or sent, and sections of methods that none of the
            runs uses.
    """

    rows: tuple[Row, ...]
    neutral: tuple[str, ...]


def facts(sides: Sequence[Side]) -> tuple[Row, ...]:
    """State, digest and setting of each run."""
    configs = [side.info["config"] for side in sides]
    rows = [
        ("State", [_state(side) for side in sides]),
        ("Digest", [side.digest[:_DIGITS] if side.digest else "none yet" for side in sides]),
        ("Task", [text(at(config, "task.name")) for config in configs]),
        ("Model", [text(at(config, "model.name")) for config in configs]),
        ("Base", [setting.base_line(side.info) for side in sides]),
        ("Strategies", [setting.strategy_line(side.info) for side in sides]),
        ("Seeds", [_plain(at(config, "seeds")) for config in configs]),
        ("Scale", [text(at(config, "scale") or 1) for config in configs]),
        ("Budgets r", [_plain(at(config, "budgets")) for config in configs]),
        ("Clients tested", [_clients(side) for side in sides]),
    ]
    return tuple((name, tuple(values)) for name, values in rows)


def differences(sides: Sequence[Side]) -> Differences:
    """Keys in the order of the configuration whose values are not the same in all runs."""
    trees = [dict(leaves(side.info["config"])) for side in sides]
    used = {name for side in sides for name in (*side.info["config"]["methods"], side.info["config"]["base"]["name"])}
    unused = tuple(f"{name}." for name in METHODS if name not in used)
    rows, neutral = [], []
    for key in dict.fromkeys(key for tree in trees for key in tree):
        values = tuple(tree.get(key, ABSENT_KEY) for tree in trees)
        if len(set(values)) == 1:
            continue
        if key.startswith((*_NEUTRAL, *unused)) or (key.startswith("engine.") and key not in _ENGINE):
            neutral.append(key)
        else:
            rows.append((key, values))
    for key in _ORIGINS:
        values = tuple(text(at(side.info, key)) for side in sides)
        rows += [(key, values)] if len(set(values)) > 1 else []
    return Differences(tuple(rows), tuple(neutral))


def told_apart(row: Row) -> Row:
    """The row with lists cut by their common beginning, so that long ones can be told apart.

    >>> told_apart(("task.languages", ("[amh, eng, yor]", "[amh, eng]")))
    ('task.languages', ('[…, yor]', '[…]'))
    >>> told_apart(("lora.lr", ("0.001", "0.01")))
    ('lora.lr', ('0.001', '0.01'))
    """
    key, values = row
    lists = [value[1:-1].split(", ") for value in values if value.startswith("[") and value.endswith("]")]
    if len(lists) < len(values):
        return row
    shared = sum(1 for _ in takewhile(lambda items: len(set(items)) == 1, zip(*lists, strict=False)))
    if not shared:
        return row
    return key, tuple(f"[{', '.join(['…', *items[shared:]])}]" for items in lists)


def notes(sides: Sequence[Side]) -> tuple[str, ...]:
    """Sentences on what makes the averages of the runs unlike: unfinished runs, other languages or seeds."""
    found = []
    for side in sides:
        done, total = side.stages
        if done < total:
            found.append(f"{side.run_id} is unfinished ({done} of {total} stages); its numbers are of what is there.")
    for pool in in_pool_order(pool for side in sides for pool in side.values["pool"]):
        spoken = {
            side.run_id: frozenset(here["language"])
            for side in sides
            if len(here := side.values[side.values["pool"] == pool])
        }
        if len(set(spoken.values())) > 1:
            counts = ", ".join(f"{run_id}: {len(codes)}" for run_id, codes in spoken.items())
            found.append(f"The runs average over different {sides[0].measure.groups} of the {pool} pool ({counts}).")
    seeds = {side.run_id: sorted(set(side.values["seed"])) for side in sides}
    if len({tuple(values) for values in seeds.values()}) > 1:
        listed = ", ".join(f"{run_id}: {_plain(values)}" for run_id, values in seeds.items())
        found.append(f"The runs average over different seeds ({listed}).")
    return tuple(found)


def _state(side: Side) -> str:
    done, total = side.stages
    return side.state if done == total else f"{side.state}, {done} of {total} stages"


def _clients(side: Side) -> str:
    counts = side.values.groupby("pool")["client"].nunique()
    return " + ".join(f"{counts[pool]} {pool}".strip() for pool in in_pool_order(counts.index))


def _plain(values: object) -> str:
    return text(values).strip("[]")
