from __future__ import annotations

import time
from collections import Counter

import pytest

from fedtailor.core.errors import DataError
from fedtailor.tasks import cldr
from fedtailor.tasks.cldr import FED_AYA, MASAKHANEWS, XNLI, locale_for
from fedtailor.tasks.config import MASAKHANEWS_LANGUAGES, TaskConfig
from fedtailor.tasks.source import Source, normalise

PAPERS_LANGUAGES = tuple(sorted({*MASAKHANEWS, *XNLI, *FED_AYA} - {"ara"}))
"""``ara`` and ``arb`` are one locale."""


@pytest.fixture(scope="module")
def source() -> Source:
    return cldr.load(TaskConfig(languages=PAPERS_LANGUAGES), 42)


def texts(source: Source, language: str) -> dict[str, str]:
    parts = [source.pools[pool][language] for pool in ("seen", "unseen")]
    return {e.text: source.labels[e.label] for part in parts for e in (*part.train, *part.test)}


def test_no_normalised_string_is_shared_by_pools_or_by_train_and_test_in_any_language(source: Source) -> None:
    places: dict[str, set[tuple[str, str]]] = {}
    for pool, _, part in source.parts():
        for split in ("train", "test"):
            for example in part.split(split):
                places.setdefault(normalise(example.text), set()).add((pool, split))
    assert {len(where) for where in places.values()} == {1}
    assert {next(iter(where)) for where in places.values()} == {
        ("seen", "train"), ("seen", "test"), ("unseen", "train"), ("unseen", "test")
    }  # fmt: skip


def test_no_string_occurs_twice_or_with_two_labels_in_one_language(source: Source) -> None:
    for language in PAPERS_LANGUAGES:
        parts = [source.pools[pool][language] for pool in ("seen", "unseen")]
        normal = [normalise(e.text) for part in parts for e in (*part.train, *part.test)]
        assert len(normal) == len(set(normal))
        assert all(normal)
    assert source.notes["dropped_two_labels"] > 0


def test_strings_that_equal_english_or_root_are_dropped_except_in_english(source: Source) -> None:
    english = {normalise(text) for text in texts(source, "eng")}
    assert {"kenya", "swahili"} <= english
    for language in set(PAPERS_LANGUAGES) - {"eng"}:
        assert not english & {normalise(text) for text in texts(source, language)}


@pytest.mark.parametrize(
    ("language", "text", "kind"),
    [
        ("eng", "Kenya", "territory"), ("fra", "Allemagne", "territory"), ("swa", "Kiswahili", "language"),
        ("rus", "кириллица", "script"), ("fra", "franc suisse", "currency"),
        ("fra", "heure d’Europe centrale", "time zone"), ("fra", "heures", "unit"),
        ("deu", "Montag", "date"), ("zho", "星期一", "date"),
    ],
)  # fmt: skip
def test_known_names_have_their_kind(source: Source, language: str, text: str, kind: str) -> None:
    assert texts(source, language)[text] == kind


def test_every_language_of_the_papers_holds_enough_text_for_ten_clients_per_pool(source: Source) -> None:
    for pool, language, part in source.parts():
        assert len(part.train) >= 20, (pool, language)
        assert len(part.test) >= 10, (pool, language)


def test_languages_have_as_many_names_as_cldr_translates(source: Source) -> None:
    counts = {language: Counter(texts(source, language).values()) for language in PAPERS_LANGUAGES}
    assert counts["amh"].total() > 5 * counts["sna"].total()
    assert counts["lug"]["time zone"] == 0
    assert all(counts["eng"][kind] for kind in cldr.KINDS)


def test_the_test_share_follows_the_config() -> None:
    source = cldr.load(TaskConfig(languages=("amh", "fra"), test_fraction=0.5), 0)
    for _, _, part in source.parts():
        assert 0.42 < len(part.test) / (len(part.train) + len(part.test)) < 0.58


def test_adding_a_language_moves_no_text_of_another() -> None:
    alone = cldr.load(TaskConfig(languages=("yor",)), 42)
    more = cldr.load(TaskConfig(languages=("fra", "yor", "amh")), 42)
    assert all(alone.pools[p]["yor"] == more.pools[p]["yor"] for p in ("seen", "unseen"))


def test_another_seed_splits_differently() -> None:
    cfg = TaskConfig(languages=("yor",))
    assert cldr.load(cfg, 42).pools["seen"] == cldr.load(cfg, 42).pools["seen"]
    assert cldr.load(cfg, 42).pools["seen"] != cldr.load(cfg, 43).pools["seen"]


def test_sixteen_languages_load_in_seconds() -> None:
    start = time.process_time()
    cldr.load(TaskConfig(languages=MASAKHANEWS_LANGUAGES), 1)
    assert time.process_time() - start < 5


def test_any_babel_locale_is_accepted() -> None:
    assert str(locale_for("pt_BR")) == "pt_BR"
    assert str(locale_for("zh-Hant")) == "zh_Hant"
    assert texts(cldr.load(TaskConfig(languages=("nl",)), 0), "nl")["Duitsland"] == "territory"


@pytest.mark.parametrize("language", ["amhh", "", "root", "../amh", "xx", "a/b"])
def test_an_unknown_language_is_an_error_that_names_it(language: str) -> None:
    with pytest.raises(DataError, match=f"task.languages: '{language}' is neither"):
        cldr.load(TaskConfig(languages=(language,)), 0)


def test_two_codes_of_one_locale_are_an_error() -> None:
    with pytest.raises(DataError, match="'amh' and 'am' are the same CLDR locale"):
        cldr.load(TaskConfig(languages=("amh", "am")), 0)
