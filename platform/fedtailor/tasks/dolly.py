"""Task ``dolly``: databricks-dolly-15k, 15,011 instructions written by people, in 8 categories (CC BY-SA 3.0).

A category takes the place that a language has in the multilingual tasks: it is shuffled by seed and halved into the
seen and the unseen pool, and each half is dealt to ``task.clients_per_language`` clients of that category alone, at
random and in equal sizes. Results are reported by category.

Under ``task.dealing`` all rows are one pool of seen clients, as in pFedGPT; see `dealing`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from fedtailor.core.errors import ConfigError, DataError, did_you_mean
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.dealing import check_tasks, held_out_pool
from fedtailor.tasks.instructions import is_complete, none_dropped, read_example
from fedtailor.tasks.partition import MIN_EXAMPLES, held_out
from fedtailor.tasks.places import find_file
from fedtailor.tasks.rows import Row, hub_rows, read_rows
from fedtailor.tasks.source import POOLS, Example, LanguagePool, Pool, Source, TaskEntry, seeded_halves

DOLLY_CATEGORIES: tuple[str, ...] = (
    "brainstorming", "classification", "closed_qa", "creative_writing", "general_qa", "information_extraction",
    "open_qa", "summarization",
)  # fmt: skip
"""Categories of databricks-dolly-15k, which take the place of languages."""

HUB_ID = "databricks/databricks-dolly-15k"

SAMPLE = "sample"
"""``task.path``: the 3,003 rows that come with the package (``dolly_sample.md`` has source and licence)."""

FILES = ("databricks-dolly-15k.jsonl", "databricks-dolly-15k.json")


def load(cfg: TaskConfig, seed: int) -> Source:
    """Instructions by pool and category from ``task.path``, else $FEDTAILOR_DATA/dolly, else the hub (see `read`).

    The context of an instruction belongs to it (see `instructions`). Rows without a response or an instruction, and
    rows that repeat an earlier one, are dropped and counted; under ``task.dealing`` repeated rows stay, for training.

    Args:
        cfg: `path`, `languages` (the categories), `clients_per_language`, `test_fraction`, `max_examples`, `context`
            and `dealing` are used.
        seed: run seed.

    Raises:
        ConfigError: unknown category in ``task.languages``, or ``task.unseen``, which has no meaning here.
        DataError: missing or damaged file, a row of another shape or category (names file and line), a category with
            too few rows for its clients, or the hub cannot be reached.
    """
    _check(cfg)
    by_category, notes = read(cfg.path, cfg.languages, None if cfg.dealing else normal_form, cfg.context)
    if cfg.dealing:
        one = held_out_pool("dolly", by_category, cfg.test_fraction, seed)
        return Source(labels=cfg.languages, pools=one, notes=notes, disjoint=True, kind="generation")
    pools: dict[Pool, dict[str, LanguagePool]] = {pool: {} for pool in POOLS}
    for category, examples in by_category.items():
        for pool, half in seeded_halves(examples, seed, "dolly", category).items():
            pools[pool][category] = _pool(half, f"{pool} pool of category {category!r}", cfg)
    return Source(labels=cfg.languages, pools=pools, notes=notes, disjoint=True, kind="generation")


def normal_form(example: Example) -> str:
    """By which two examples are the same."""
    return example.normal


def read(
    path: str | None,
    categories: Sequence[str],
    same: Callable[[Example], str] | None = normal_form,
    context: bool = True,
) -> tuple[dict[str, list[Example]], dict[str, int]]:
    """The usable examples of each category, and counts of the rows that were read and dropped.

    Args:
        path: ``task.path``, which may be `SAMPLE`; None: $FEDTAILOR_DATA/dolly, else the hub.
        categories: those to keep; their order numbers them.
        same: of examples for which it is equal the first is kept; None: all are.
        context: keep the contexts of instructions.

    Raises:
        DataError: see `load`.
    """
    file = Path(__file__).with_name("dolly_sample.json.gz") if path == SAMPLE else find_file(path, "dolly", FILES)
    return _by_category(read_rows(file) if file else hub_rows(HUB_ID, split="train"), categories, same, context)


def _check(cfg: TaskConfig) -> None:
    problems = []
    for category in cfg.languages:
        if category not in DOLLY_CATEGORIES:
            allowed = ", ".join(DOLLY_CATEGORIES) + did_you_mean(category, DOLLY_CATEGORIES)
            problems.append(f"'task.languages' has {category!r}, no category of dolly; allowed: {allowed}")
    if cfg.unseen:
        problems.append(
            f"'task.unseen' ({', '.join(cfg.unseen)}) has no meaning for task=dolly: half of every category's rows "
            "makes the unseen clients"
        )
    if problems:
        raise ConfigError(problems)
    check_tasks(cfg, cfg.languages)


def _by_category(
    rows: Iterable[Row], categories: Sequence[str], same: Callable[[Example], str] | None, context: bool
) -> tuple[dict[str, list[Example]], dict[str, int]]:
    found: dict[str, list[Example]] = {category: [] for category in categories}
    dropped, repeated, read = none_dropped(), 0, 0
    known = set[str]()
    for row in rows:
        read += 1
        category = row.values.get("category")
        if category not in DOLLY_CATEGORIES:
            allowed = ", ".join(DOLLY_CATEGORIES)
            raise DataError(f"{row.where}: 'category' is {category!r}; allowed: {allowed}")
        values = row.values if context else {key: cell for key, cell in row.values.items() if key != "context"}
        example = read_example(Row(row.where, values))
        if category in found and is_complete(example, dropped):
            if same is not None and same(example) in known:
                repeated += 1
            else:
                known.add(same(example) if same else "")
                found[category].append(example._replace(label=categories.index(category)))
    return found, {"rows_read": read, **dropped, "dropped_repeated_rows": repeated}


def _pool(examples: Sequence[Example], where: str, cfg: TaskConfig) -> LanguagePool:
    """Train and test of one pool; under ``task.max_examples`` all clients get the same numbers of both."""
    n = cfg.clients_per_language
    each = len(examples) // n
    if each < MIN_EXAMPLES:
        raise DataError(
            f"the {where} has {len(examples)} rows for {n} clients (task.clients_per_language); "
            f"at most {len(examples) // MIN_EXAMPLES} would have the {MIN_EXAMPLES} rows that are needed"
        )
    if cfg.max_examples is None:
        tests = max(n, held_out(len(examples), cfg.test_fraction))
        tests = min(tests, len(examples) - 2 * n)
    else:
        each = min(each, cfg.max_examples)
        examples, tests = examples[: n * each], n * held_out(each, cfg.test_fraction)
    return LanguagePool(train=tuple(examples[tests:]), test=tuple(examples[:tests]))


ENTRY = TaskEntry(
    load,
    "generation",
    label_skew=False,
    defaults={"languages": DOLLY_CATEGORIES, "max_length": 1024, "test_fraction": 0.2},
)
