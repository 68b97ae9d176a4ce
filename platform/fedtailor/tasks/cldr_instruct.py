"""Task ``cldr_instruct``: instructions about languages, answered by Unicode CLDR. No download: generation's default.

Two families, read through Babel's public API: names ("What is Kenya called in Yoruba?", `cldr`), and things that
a language writes by rule ("Write Sunday, March 3, 2024 in Swahili.", `cldr_rules`). A client has one predominant
language and up to three others, its own mix of kinds, and one house style (CLDR's short, medium, long or full), which
instructions do not mention: whoever knows the client only can answer as the client would.

A subject (Kenya; a date; 5 kilometers) belongs to one pool, and in each language to train or test, drawn from
(seed, subject, language) alone. So no instruction is shared by pools, or by train and test of any two clients.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from babel import Locale

from fedtailor.core.errors import ConfigError
from fedtailor.core.seeding import numpy_rng, seed_for
from fedtailor.tasks.cldr import NAME_KINDS, Table, is_english, locales_of, names_of
from fedtailor.tasks.cldr_rules import STYLES, rules
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.partition import client_id
from fedtailor.tasks.source import POOLS, SPLITS, Example, NaturalClient, Pool, Source, Split, TaskEntry

KINDS: Final = (*rules(), *NAME_KINDS)
"""Kinds of subjects: what follows a rule, then names."""

Stock = Mapping[str, Sequence[Any]]
"""Kind -> subjects (of names CLDR keys)."""


EXAMPLES: Final = (60, 150)
"""Fewest and most examples of a client, train and test together; sizes are log-normal between them."""

MEDIAN: Final = 85
SPREAD: Final = 0.35
"""Standard deviation of the logarithm of a client's size."""

LANGUAGES: Final = (0.4, 0.3, 0.2, 0.1)
"""Probabilities of 1, 2, 3 and 4 languages."""

SIDE: Final = (0.2, 0.4)
"""Share of the examples that are in other languages than the predominant one, where there are others: from, to."""

_NAME_WORDINGS = (
    "What is {} called in {language}?",
    "How do you say {} in {language}?",
    "Give me the {language} name of {}.",
)

_RULE_WORDINGS = ("Write {} in {language}.", "How is {} written in {language}?", "Put into {language}: {}")
Floats = npt.NDArray[np.float64]


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
    names: Table
    stock: Mapping[tuple[Pool, Split], Stock]


def languages_of(cfg: TaskConfig, seed: int) -> tuple[dict[str, Language], dict[str, int]]:
    """The languages by code, in the order of ``task.languages``, and counts of names that were left out.

    Raises:
        DataError: an unknown language, or two codes of one locale.
    """
    key = seed_for(seed, "cldr_instruct", "places").to_bytes(8, "little")
    by_pool = {kind: _by_pool(kind, rule.subjects, key) for kind, rule in rules().items()}
    dropped: Counter[str] = Counter()
    languages = {}
    for code, locale in locales_of(cfg.languages).items():
        names, lost = names_of(locale)
        dropped.update(lost)
        stock: dict[tuple[Pool, Split], dict[str, Sequence[Any]]] = {(p, s): {} for p in POOLS for s in SPLITS}
        for kind in KINDS:
            for pool in POOLS:
                if kind in by_pool:
                    able = [s for s in by_pool[kind][pool] if _writes(kind, rules()[kind].part(s), locale)]
                else:
                    able = _by_pool(kind, sorted(names[kind]), key)[pool]
                test = [_share(key, kind, subject, code) < cfg.test_fraction for subject in able]
                stock[pool, "train"][kind] = [s for s, tests in zip(able, test, strict=True) if not tests]
                stock[pool, "test"][kind] = [s for s, tests in zip(able, test, strict=True) if tests]
        languages[code] = Language(code, str(locale.english_name), locale, names, stock)
    return languages, dict(dropped)


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


def _share(key: bytes, *place: Any) -> float:
    digest = hashlib.blake2b("\0".join(map(str, place)).encode(), key=key, digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64


@dataclass(frozen=True)
class Profile:
    """What makes a client differ from others.

    Args:
        languages: predominant one first.
        style: house style.
        mix: probability of each of `KINDS`, before kinds that a language lacks are left out.
        examples: train and test together.
        side: share of the examples that are in the other languages.
    """

    languages: tuple[str, ...]
    style: str
    mix: Floats
    examples: int
    side: float


def load(cfg: TaskConfig, seed: int) -> Source:
    """Clients by language and pool, `task.clients_per_language` of each, with the language as their predominant one.

    Clients are in turns of the languages, so that the first share of them has all languages.

    Args:
        cfg: `languages` (codes of `tasks.cldr` or Babel locale names), `clients_per_language`, `test_fraction`,
            `alpha` of the Dirichlet mix of kinds and `names` in it are used.
        seed: run seed.

    Raises:
        ConfigError: ``task.unseen`` is given.
        DataError: an unknown language, or two codes of one locale.
    """
    if cfg.unseen:
        raise ConfigError("'task.unseen': cldr_instruct draws its own unseen clients (remove it)")
    languages, notes = languages_of(cfg, seed)
    clients = []
    for pool in POOLS:
        for index in range(cfg.clients_per_language):
            for code in sorted(languages):
                clients.append(_client(pool, index, profile(cfg, seed, pool, code, index), languages, cfg, seed))
    return Source(cfg.languages, notes=notes, disjoint=True, kind="generation", natural_clients=tuple(clients))


def profile(cfg: TaskConfig, seed: int, pool: Pool, language: str, index: int) -> Profile:
    """Draws a client's profile from (seed, pool, language, index); `cfg` gives the other languages and alpha."""
    rng = numpy_rng(seed, "cldr_instruct", "profile", pool, language, index)
    others = sorted(set(cfg.languages) - {language})
    more = min(int(rng.choice(len(LANGUAGES), p=LANGUAGES)), len(others))
    chosen: list[int] = rng.choice(len(others), size=more, replace=False).tolist() if more else []
    concentration = [cfg.alpha * (1.0 if kind in rules() else cfg.names) for kind in KINDS]
    return Profile(
        languages=(language, *(others[i] for i in chosen)),
        style=STYLES[int(rng.integers(len(STYLES)))],
        mix=rng.dirichlet(concentration),
        examples=int(np.clip(round(rng.lognormal(np.log(MEDIAN), SPREAD)), *EXAMPLES)),
        side=float(rng.uniform(*SIDE)) if more else 0.0,
    )


# ---- clients -----------------------------------------------------------------------------------------------


def _client(
    pool: Pool, index: int, who: Profile, languages: Mapping[str, Language], cfg: TaskConfig, seed: int
) -> NaturalClient:
    main = who.languages[0]
    tests = max(1, round(who.examples * cfg.test_fraction))
    sizes: dict[Split, int] = {"train": who.examples - tests, "test": tests}
    parts: dict[Split, tuple[Example, ...]] = {}
    for split, n in sizes.items():
        rng = numpy_rng(seed, "cldr_instruct", split, pool, main, index)
        others = len(who.languages) - 1
        # The predominant language has more than half of the examples.
        side = rng.multinomial(int(who.side * n), np.full(others, 1 / others)).tolist() if others else []
        drawn: list[Example] = []
        for code, quota in zip(who.languages, [n - sum(side), *side], strict=True):
            label = cfg.languages.index(code)
            drawn += [Example(q, label, a) for q, a in _answers(languages[code], (pool, split), who, quota, rng)]
        parts[split] = tuple(drawn[i] for i in rng.permutation(len(drawn)))
    name = client_id(pool, main, index, cfg.clients_per_language).rsplit("/", 1)[1]
    return NaturalClient(name, pool, main, parts["train"], parts["test"])


def _answers(
    language: Language, place: tuple[Pool, Split], who: Profile, quota: int, rng: np.random.Generator
) -> Iterator[tuple[str, str]]:
    """(instruction, response), each of another subject; fewer than `quota` only where the language has no more."""
    stock = language.stock[place]
    left = {kind: rng.permutation(len(stock[kind])).tolist() for kind in KINDS}
    done = 0
    while done < quota and any(left.values()):
        # A little of every kind, so that what is left can always be drawn.
        weights = np.array([p + 1e-6 if left[kind] else 0.0 for kind, p in zip(KINDS, who.mix, strict=True)])
        for kind, n in zip(KINDS, rng.multinomial(quota - done, weights / weights.sum()).tolist(), strict=True):
            for _ in range(min(n, len(left[kind]))):
                made = _answer(language, kind, stock[kind][left[kind].pop()], who.style, rng)
                if made is not None:
                    done += 1
                    yield made


def _answer(
    language: Language, kind: str, subject: Any, style: str, rng: np.random.Generator
) -> tuple[str, str] | None:
    if kind in NAME_KINDS:
        thing, response = language.names[kind][subject]
        wordings: tuple[str, ...] = _NAME_WORDINGS
    else:
        rule = rules()[kind]
        written = rule.write(subject, language.locale, style)
        if written is None:
            return None
        thing, response = rule.ask(subject, is_english(language.locale)), written
        wordings = _RULE_WORDINGS
    return wordings[int(rng.integers(len(wordings)))].format(thing, language=language.name), response


ENTRY = TaskEntry(load, "generation", embedded=True, defaults={"max_length": 96, "test_fraction": 0.2})
