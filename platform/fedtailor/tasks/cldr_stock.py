"""What `cldr_instruct` can ask in each language, and where it belongs: pool by subject, split also by language."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

from babel import Locale

from fedtailor.core.errors import DataError
from fedtailor.core.seeding import seed_for
from fedtailor.core.task_settings import TaskConfig
from fedtailor.tasks import cldr_names
from fedtailor.tasks.cldr_rules import rules
from fedtailor.tasks.locales import locale_for
from fedtailor.tasks.source import POOLS, SPLITS, Pool, Split

KINDS: Final = (*rules(), *cldr_names.KINDS)
"""Kinds of subjects: what follows a rule, then names."""

Stock = Mapping[str, Sequence[Any]]
"""Kind -> subjects (of names CLDR keys)."""


@dataclass(frozen=True)
class Language:
    """One language of the task.

    Args:
        code: as in ``task.languages``.
        name: in English.
        locale: of CLDR.
        names: the names that it has.
        stock: what can be asked, by pool and split.
    """

    code: str
    name: str
    locale: Locale
    names: cldr_names.Table
    stock: Mapping[tuple[Pool, Split], Stock]


def languages_of(cfg: TaskConfig, seed: int) -> tuple[dict[str, Language], dict[str, int]]:
    """The languages by code, in the order of ``task.languages``, and counts of names that were left out.

    Raises:
        DataError: an unknown language, or two codes of one locale.
    """
    key = seed_for(seed, "cldr_instruct", "places").to_bytes(8, "little")
    by_pool = {kind: _by_pool(kind, rule.subjects, key) for kind, rule in rules().items()}
    dropped: Counter[str] = Counter()
    holders: dict[str, str] = {}
    languages = {}
    for code in cfg.languages:
        locale = locale_for(code)
        other = holders.setdefault(str(locale), code)
        if other != code:
            raise DataError(f"task.languages: {other!r} and {code!r} are the same CLDR locale {locale}")
        names, lost = cldr_names.names(locale)
        dropped += lost
        stock: dict[tuple[Pool, Split], dict[str, Sequence[Any]]] = {(p, s): {} for p in POOLS for s in SPLITS}
        for kind in KINDS:
            for pool in POOLS:
                if kind in by_pool:
                    able = [s for s in by_pool[kind][pool] if _writes(kind, rules()[kind].part(s), locale)]
                else:
                    able = _by_pool(kind, sorted(names[kind]), key)[pool]
                parts = _by_split(kind, able, code, key, cfg.test_fraction)
                stock[pool, "train"][kind], stock[pool, "test"][kind] = parts
        languages[code] = Language(code, str(locale.english_name), locale, names, stock)
    return languages, {name: dropped[name] for name in ("dropped_inherited", "dropped_english", "dropped_long")}


@cache
def _writes(kind: str, part: Any, locale: Locale) -> bool:
    """A language has what it takes to write this part of a kind, tried on one subject."""
    rule = rules()[kind]
    sample = next(subject for subject in rule.subjects if rule.part(subject) == part)
    return rule.write(sample, locale, "long") is not None


def _by_pool(kind: str, subjects: Sequence[Any], key: bytes) -> dict[Pool, list[Any]]:
    found: dict[Pool, list[Any]] = {pool: [] for pool in POOLS}
    for subject in subjects:
        found[POOLS[int(_share(key, kind, subject) < 0.5)]].append(subject)
    return found


def _by_split(
    kind: str, subjects: Sequence[Any], code: str, key: bytes, test_fraction: float
) -> tuple[list[Any], list[Any]]:
    train: list[Any] = []
    test: list[Any] = []
    for subject in subjects:
        (test if _share(key, kind, subject, code) < test_fraction else train).append(subject)
    return train, test


def _share(key: bytes, *place: Any) -> float:
    digest = hashlib.blake2b("\0".join(map(str, place)).encode(), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64
