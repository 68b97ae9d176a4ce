"""Task cldr_instruct: what is asked and answered, whose style it has, and what never leaks."""

from __future__ import annotations

import re
from collections import Counter
from datetime import date, time
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import reading

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.tasks import cldr, cldr_instruct
from fedtailor.tasks.cldr import FED_AYA, MASAKHANEWS, XNLI, locale_for
from fedtailor.tasks.cldr_instruct import KINDS
from fedtailor.tasks.cldr_rules import STYLES, rules
from fedtailor.tasks.config import MASAKHANEWS_LANGUAGES, TaskConfig
from fedtailor.tasks.source import Example, NaturalClient, Pool, Source, normalise
from fedtailor.tasks.task import prepare, task_config

PAPERS_LANGUAGES = tuple(sorted({*MASAKHANEWS, *XNLI, *FED_AYA} - {"ara"}))
OTHERS = ("de", "el", "fa", "he", "hi", "id", "it", "ja", "ko", "nl", "pl", "th", "tr", "ur", "vi", "zh_Hant")


def config(*languages: str, **changes: Any) -> TaskConfig:
    changed = {"languages": languages} if languages else {}
    return task_config("cldr_instruct", **{"clients_per_language": 2, **changed, **changes})


@pytest.fixture(scope="module")
def source() -> Source:
    return cldr_instruct.load(config(clients_per_language=3), 42)


@pytest.fixture(scope="module")
def many() -> Source:
    return cldr_instruct.load(config(*PAPERS_LANGUAGES, clients_per_language=1), 7)


def held(source: Source) -> list[Example]:
    return [e for o in source.natural_clients for e in (*o.train, *o.test)]


# ---- what is answered --------------------------------------------------------------------------------------

WRITTEN = [
    ("date", date(2024, 3, 3), "swa", ("03/03/2024", "3 Mac 2024", "3 Machi 2024", "Jumapili, 3 Machi 2024")),
    ("date", date(2024, 3, 3), "zho", ("2024/3/3", "2024年3月3日", "2024年3月3日", "2024年3月3日星期日")),
    ("date", date(2024, 3, 3), "eng", ("3/3/24", "Mar 3, 2024", "March 3, 2024", "Sunday, March 3, 2024")),
    ("time", time(14, 25, 30), "eng", ("2:25 PM", *["2:25:30 PM"] * 3)),
    ("time", time(14, 25, 30), "ara", ("2:25 م", *["2:25:30 م"] * 3)),
    ("time", time(14, 25, 30), "ko", ("오후 2:25", *["오후 2:25:30"] * 3)),
    ("quantity", (5, "length-kilometer"), "rus", ("5 км", "5 км", "5 километров", "5 километров")),
    ("quantity", (2, "length-kilometer"), "rus", ("2 км", "2 км", "2 километра", "2 километра")),
    ("quantity", (5, "length-kilometer"), "zho", ("5公里",) * 4),
    ("quantity", (5, "length-kilometer"), "swa", ("km 5", "km 5", "kilomita 5", "kilomita 5")),
    ("money", ("12.50", "USD"), "fra", ("12,50 $US", "12,50 $US", *["12,50 dollars des États-Unis"] * 2)),
    ("money", ("12.50", "KES"), "swa", ("Ksh 12.50", "Ksh 12.50", *["shilingi za Kenya 12.50"] * 2)),
    ("relative time", (-3, "day"), "swa", ("siku 3 zilizopita",) * 4),
    ("relative time", (2, "hour"), "rus", ("+2 ч", "через 2 ч", "через 2 часа", "через 2 часа")),
    ("list", ("standard", "weekday", (0, 2)), "fra", (*["lun. et mer."] * 2, *["lundi et mercredi"] * 2)),
    ("list", ("standard", "weekday", (0, 2)), "eng", ("Mon, Wed", "Mon & Wed", *["Monday and Wednesday"] * 2)),
    ("list", ("or", "month", (1, 8)), "spa", ("ene o ago", "ene o ago", "enero o agosto", "enero o agosto")),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "subject", "language", "expected"), WRITTEN)
def test_things_are_written_as_cldr_has_them_in_the_house_style(
    kind: str, subject: Any, language: str, expected: tuple[str, ...]
) -> None:
    locale = locale_for(language)
    assert tuple(rules()[kind].write(subject, locale, style) for style in STYLES) == expected


@pytest.mark.parametrize(
    ("kind", "subject", "language"),
    [
        ("relative time", (-3, "day"), "sna"),  # root's sign: -3 d
        ("quantity", (5, "length-kilometer"), "lug"),  # a unit's code
        ("list", ("or", "weekday", (0, 1, 2)), "lug"),  # English: or
        ("money", ("5", "USD"), "xho"),  # English: US dollars
        ("money", ("5", "KES"), "orm"),  # a currency's code
        ("time", time(14, 25, 30), "hi"),  # English: pm
        ("time", time(14, 25, 30), "ur"),  # English: p
    ],
)
def test_what_a_locale_does_not_have_is_no_answer(kind: str, subject: Any, language: str) -> None:
    assert [rules()[kind].write(subject, locale_for(language), style) for style in STYLES] == [None] * 4


def test_months_that_babel_finds_in_another_context_only_are_found() -> None:
    assert rules()["date"].write(date(2024, 3, 3), locale_for("ur"), "medium") == "3 مارچ، 2024"
    assert cldr.calendar_name("months", locale_for("yor"), 3, "wide") == "Oṣù Ẹrẹ̀nà"


def test_questions_are_asked_in_english_and_english_ones_by_codes() -> None:
    asked = {kind: rule.ask(rule.subjects[-1], False) for kind, rule in rules().items()}
    assert asked == {
        "date": "Monday, December 31, 2029", "time": "11:55:45 PM", "quantity": "120 gigabytes",
        "money": "150.25 Mexican pesos", "relative time": '"in 59 seconds"', "list": '"December or November"',
    }  # fmt: skip
    coded = {kind: rule.ask(rule.subjects[-1], True) for kind, rule in rules().items()}
    assert coded == {
        "date": "2029-12-31, a Monday", "time": "23:55:45", "quantity": "120 GB", "money": "MXN 150.25",
        "relative time": "59 seconds after now", "list": "the choice Dec, Nov",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("language", "kind", "key", "expected"),
    [
        ("fra", "territory", "DE", ("Germany", "Allemagne")),
        ("swa", "language", "sw", ("the language Swahili", "Kiswahili")),
        ("rus", "script", "Cyrl", ("the script Cyrillic", "кириллица")),
        ("fra", "currency", "CHF", ("the currency Swiss Franc", "franc suisse")),
        ("rus", "unit", "length-kilometer", ("the unit kilometers", "километры")),
        ("amh", "calendar", "month 3", ("March", "ማርች")),
        ("eng", "territory", "KE", ('the territory "KE"', "Kenya")),
        ("eng", "calendar", "weekday 0", ('"Mon"', "Monday")),
    ],
)
def test_names_are_those_of_the_language(language: str, kind: str, key: str, expected: tuple[str, str]) -> None:
    table, _ = cldr.names_of(locale_for(language))
    assert table[kind][key] == expected


def test_names_equal_to_english_or_inherited_are_left_out_and_counted(source: Source) -> None:
    table, dropped = cldr.names_of(locale_for("fra"))
    assert "FR" not in table["territory"]
    assert dropped["dropped_english"] > 0
    assert all(int(source.notes[f"dropped_{why}"]) > 0 for why in ("english", "inherited", "long"))
    for language in set(PAPERS_LANGUAGES) - {"eng"}:
        for kind, names in cldr.names_of(locale_for(language))[0].items():
            assert all(normalise(asked) != normalise(name) for asked, name in names.values()), (language, kind)


RAW = re.compile(
    r"[{}]|\bM(0\d|1[0-2])\b|\b(length|mass|volume|duration|area|speed|power|electric|digital|temperature|angle)-"
    r"|[\u200e\u200f\u061c\u00a0\u202f]|  "
)


def test_no_response_has_place_holders_codes_of_units_or_invisible_marks(source: Source, many: Source) -> None:
    others = cldr_instruct.load(config(*OTHERS, clients_per_language=1), 3)
    for example in [*held(source), *held(many), *held(others)]:
        assert example.pair
        assert not RAW.search(example.pair), example
        assert not re.search(r"[{}]|  ", example.text), example


# ---- clients -----------------------------------------------------------------------------------------------


def test_every_language_of_the_papers_has_clients_of_the_documented_size(many: Source, source: Source) -> None:
    assert len(many.natural_clients) == 2 * len(PAPERS_LANGUAGES) >= 60
    low, high = cldr_instruct.EXAMPLES
    for client in (*many.natural_clients, *source.natural_clients):
        assert low <= len(client.train) + len(client.test) <= high
        assert 12 <= len(client.test) <= 30
    assert len({len(o.train) for o in source.natural_clients}) > 20


def test_clients_come_in_turns_of_the_languages_so_that_a_share_has_all(source: Source, tmp_path: Path) -> None:
    cfg = config("eng", "swa", "yor", clients_per_language=4)
    assert source.labels == MASAKHANEWS_LANGUAGES
    some = prepare(cfg.model_copy(update={"clients_kept": 2}), 1, tmp_path / "some")
    everyone = prepare(cfg, 1, tmp_path / "all")
    assert sorted(c.id for c in some.pool("seen")) == [f"seen/{x}/0{i}" for x in ("eng", "swa", "yor") for i in (0, 1)]
    for client in some.clients:
        assert some.pairs(client.id, "train") == everyone.pairs(client.id, "train")


def test_a_client_has_one_to_four_languages_and_one_of_them_has_more_than_half(source: Source) -> None:
    numbers: Counter[int] = Counter()
    for client in source.natural_clients:
        counts = Counter(source.labels[e.label] for e in (*client.train, *client.test))
        assert counts[client.language] > sum(counts.values()) / 2
        numbers[len(counts)] += 1
    assert set(numbers) == {1, 2, 3, 4}


def profiles(cfg: TaskConfig, seed: int) -> list[cldr_instruct.Profile]:
    pools: tuple[Pool, ...] = ("seen", "unseen")
    return [cldr_instruct.profile(cfg, seed, p, x, i) for p in pools for x in cfg.languages for i in range(10)]


def test_clients_differ_in_style_and_in_their_mix_of_kinds() -> None:
    found = profiles(config(), 42)
    styles = Counter(who.style for who in found)
    assert set(styles) == set(STYLES)
    assert min(styles.values()) > len(found) / 8
    share = sum(p for who in found for kind, p in zip(KINDS, who.mix, strict=True) if kind in cldr.NAME_KINDS)
    assert share / len(found) == pytest.approx(1 / 3, abs=0.05)
    largest = median(who.mix.max() for who in found)
    assert largest > median(who.mix.max() for who in profiles(config(alpha=100.0), 42)) + 0.2


def test_all_dates_of_a_client_have_its_style(source: Source) -> None:
    cfg, weekday = config(clients_per_language=3), re.compile(r"^\w+day, ")
    dates = 0
    for client in (o for o in source.natural_clients if o.language == "eng"):
        style = cldr_instruct.profile(cfg, 42, client.pool, "eng", int(client.name)).style
        for example in (e for e in client.train if re.search(r"\d{4}-\d\d-\d\d, a", e.text) and e.label == 1):
            shapes = {"short": r"^\d+/\d+/\d\d$", "medium": r"^\w{3} \d+, \d{4}$", "long": r"^\w{3,} \d+, \d{4}$"}
            assert re.search(shapes.get(style, weekday.pattern), str(example.pair)), (style, example)
            dates += 1
    assert dates > 5


# ---- leaks and determinism ---------------------------------------------------------------------------------


def test_no_instruction_is_shared_by_pools_or_by_train_and_test_of_any_clients(source: Source, many: Source) -> None:
    for made in (source, many):
        places: dict[str, set[tuple[str, str]]] = {}
        for client in made.natural_clients:
            for split, part in (("train", client.train), ("test", client.test)):
                for example in part:
                    places.setdefault(normalise(example.text), set()).add((client.pool, split))
        assert {len(where) for where in places.values()} == {1}


def test_a_subject_keeps_its_pool_in_all_languages(many: Source) -> None:
    pools: dict[str, set[str]] = {}
    for client in many.natural_clients:
        for example in (*client.train, *client.test):
            if found := re.search(r"the (?:currency|script|language) (.+?)(?: called| in |\.)", example.text):
                pools.setdefault(found[0].replace(" in ", " called"), set()).add(client.pool)
    assert len(pools) > 300
    assert {len(where) for where in pools.values()} == {1}


def test_a_client_is_asked_about_a_subject_once(source: Source) -> None:
    for client in source.natural_clients:
        texts = [normalise(e.text) for e in (*client.train, *client.test)]
        assert len(set(texts)) == len(texts)


def test_equal_seeds_give_equal_clients_and_others_other_ones() -> None:
    cfg = config("eng", "amh", "yor")
    assert cldr_instruct.load(cfg, 5) == cldr_instruct.load(cfg, 5)
    assert reading.fingerprint(cfg, 5) != reading.fingerprint(cfg, 6)


def test_a_client_does_not_depend_on_how_many_there_are() -> None:
    def clients(n: int) -> dict[tuple[str, str, int], NaturalClient]:
        made = cldr_instruct.load(config("eng", "amh", clients_per_language=n), 5)
        return {(o.pool, o.language, int(o.name)): o for o in made.natural_clients}

    few, more = clients(1), clients(3)
    assert all(more[key] == client for key, client in few.items())


# ---- size and bad input ------------------------------------------------------------------------------------


def test_instructions_and_responses_are_short(many: Source) -> None:
    assert median(len(e.text.split()) for e in held(many)) <= 12
    assert median(len(str(e.pair).split()) for e in held(many)) <= 4
    assert max(len(str(e.pair)) for e in held(many)) <= 80


def test_counts_tell_what_each_language_can_be_asked() -> None:
    languages, _ = cldr_instruct.languages_of(config("eng", "lug", "swa"), 42)
    counts = {
        code: {kind: sum(len(stock[kind]) for stock in language.stock.values()) for kind in KINDS}
        for code, language in languages.items()
    }
    assert counts["lug"]["quantity"] == counts["lug"]["list"] == 0 < counts["swa"]["quantity"]
    assert counts["eng"]["date"] == 3653
    assert sum(counts["swa"].values()) > sum(counts["lug"].values())


def test_one_language_alone_works() -> None:
    made = cldr_instruct.load(config("sna", clients_per_language=1), 0)
    assert {e.label for e in held(made)} == {0}


@pytest.mark.parametrize(
    ("languages", "message"),
    [(("klingon",), "'klingon' is neither a known code"), (("swa", "sw"), "'swa' and 'sw' are the same CLDR locale")],
)
def test_bad_languages_are_refused(languages: tuple[str, ...], message: str) -> None:
    with pytest.raises(DataError, match=message):
        cldr_instruct.load(config(*languages), 0)


def test_it_draws_its_own_unseen_clients() -> None:
    with pytest.raises(ConfigError, match=r"'task\.unseen': cldr_instruct draws its own"):
        cldr_instruct.load(config("eng", unseen=("0",)), 0)
