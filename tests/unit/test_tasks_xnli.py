from __future__ import annotations

import gzip
import os
from collections.abc import Callable
from itertools import combinations
from pathlib import Path

import datasets
import numpy as np
import pytest

from fedtailor.core.errors import DataError
from fedtailor.tasks import xnli
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import Example, LanguagePool, Source, normalise
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare, task_config
from fedtailor.tasks.xnli import LABELS, XNLI_LANGUAGES, load, read_tsv

PLACES = [(pool, split) for pool in ("seen", "unseen") for split in ("train", "test")]
REAL = Path(os.environ.get("FEDTAILOR_DATA", "")) / "xnli"
needs_data = pytest.mark.skipif(
    not (os.environ.get("FEDTAILOR_DATA") and REAL.is_dir()),
    reason="set FEDTAILOR_DATA to a folder that holds xnli/ to test with the real sentence pairs",
)


def rows(language: str, stem: str, triples: int) -> str:
    """Three rows per premise, one per label, as XNLI has them."""
    lines = [
        f"{language} {stem} premise {i}\t{language} {stem} hypothesis {i} {label}\t{label}\n"
        for i in range(triples)
        for label in LABELS
    ]
    return "".join(lines)


def write(folder: Path, *languages: str, **files: str | int) -> TaskConfig:
    """Files per language: a number of triples, or the text itself; gzipped if the name ends in _gz."""
    for language in languages:
        (folder / language).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            stem = name.removesuffix("_gz")
            text = rows(language, stem, content) if isinstance(content, int) else content
            path = folder / language / f"{stem}.tsv"
            if name.endswith("_gz"):
                path.with_suffix(".tsv.gz").write_bytes(gzip.compress(text.encode()))
            else:
                path.write_text(text, encoding="utf-8")
    return task_config("xnli", path=str(folder), languages=languages, clients_per_language=2)


def part(source: Source, pool: str, split: str, language: str = "en") -> list[Example]:
    pool_part: LanguagePool = source.pools[pool][language]  # type: ignore[index]
    return list(pool_part.split(split))  # type: ignore[arg-type]


def stems(source: Source, split: str) -> set[str]:
    """The files that the texts of a split came from (`rows` writes the file's name into each text)."""
    return {e.text.split()[1] for pool in ("seen", "unseen") for e in part(source, pool, split)}


def test_without_a_train_file_train_texts_come_from_test_and_test_texts_from_dev(tmp_path: Path) -> None:
    cfg = write(tmp_path, "en", "fr", dev_gz=6, test=12)
    for seed in range(5):
        source = load(cfg, seed)
        assert (stems(source, "train"), stems(source, "test")) == ({"test"}, {"dev"})
    assert (source.notes["train_texts_from"], source.notes["test_texts_from"]) == ("test", "dev")


def test_with_a_train_file_train_texts_come_from_it_and_test_texts_from_test(tmp_path: Path) -> None:
    source = load(write(tmp_path, "en", "fr", train_gz=20, dev=6, test=12), 0)
    assert (stems(source, "train"), stems(source, "test")) == ({"train"}, {"test"})
    assert (source.notes["train_texts_from"], source.notes["test_texts_from"]) == ("train", "test")


def test_the_rule_is_one_for_all_languages(tmp_path: Path) -> None:
    cfg = write(tmp_path, "en", "fr", dev=6, test=12)
    write(tmp_path, "fr", train=12)
    with pytest.raises(DataError, match="fr with a train file, en without"):
        load(cfg, 0)


def test_an_example_is_premise_hypothesis_and_label(tmp_path: Path) -> None:
    for example in part(load(write(tmp_path, "en", dev=6, test=12), 0), "seen", "train"):
        number, label = example.text.split()[-1], LABELS[example.label]
        assert example.text == f"en test premise {number}"
        assert example.pair == f"en test hypothesis {number} {label}"


def test_pools_take_the_numbers_asked_for_and_halves_where_there_are_fewer(tmp_path: Path) -> None:
    cfg = write(tmp_path, "en", "fr", dev=6, test=12)
    sizes = {key: len(part(load(cfg, 0), *key)) for key in PLACES}
    assert sizes == {("seen", "train"): 18, ("unseen", "train"): 18, ("seen", "test"): 9, ("unseen", "test"): 9}
    asked = cfg.model_copy(update={"train_per_pool": 8, "test_per_pool": 4})
    for key in PLACES:
        for language in cfg.languages:
            assert len(part(load(asked, 0), *key, language)) == (8 if key[1] == "train" else 4)


def test_rows_of_a_premise_stay_together_and_row_numbers_are_equal_in_all_languages(tmp_path: Path) -> None:
    source = load(write(tmp_path, "en", "fr", "ur", dev=40, test=80), 7)
    for key in PLACES:
        english = [e.text.removeprefix("en ") for e in part(source, *key)]
        for language in ("fr", "ur"):
            assert [e.text.removeprefix(f"{language} ") for e in part(source, *key, language)] == english
    premises = {key: {e.text for e in part(source, *key)} for key in PLACES}
    assert not any(premises[a] & premises[b] for a, b in combinations(PLACES, 2))


def test_premises_that_are_one_text_in_one_language_only_stay_together_in_all(tmp_path: Path) -> None:
    """Premises 2 i and 2 i + 1 differ in English and are the same text in Urdu."""
    cfg = write(tmp_path, "en", "ur", dev=20, test=40)
    for stem, triples in (("dev", 20), ("test", 40)):
        text = rows("ur", stem, triples)
        for i in range(0, triples, 2):
            text = text.replace(f"{stem} premise {i + 1}\t", f"{stem}  PREMISE {i}\t")
        write(tmp_path, "ur", **{stem: text})
    source = load(cfg, 3)
    groups = {key: {int(e.text.split()[-1]) // 2 for e in part(source, *key)} for key in PLACES}
    for split in ("train", "test"):
        assert not groups["seen", split] & groups["unseen", split]


def test_a_premise_in_both_files_is_used_from_one_only(tmp_path: Path) -> None:
    cfg = write(tmp_path, "en", dev=rows("en", "test", 4) + rows("en", "dev", 6), test=20)
    source = load(cfg.model_copy(update={"train_per_pool": 30}), 0)
    assert len(part(source, "seen", "train")) == len(part(source, "unseen", "train")) == 30
    train, test = ({e.text for p in ("seen", "unseen") for e in part(source, p, s)} for s in ("train", "test"))
    assert not train & test
    assert len(test) == 6


def test_the_seed_decides_who_gets_which_rows_in_which_order(tmp_path: Path) -> None:
    cfg = write(tmp_path, "en", "fr", dev=20, test=40)
    first, again, other = load(cfg, 1), load(cfg, 1), load(cfg, 2)
    assert first.pools == again.pools
    assert {e.text for e in part(first, "seen", "train")} != {e.text for e in part(other, "seen", "train")}
    numbers = [int(e.text.split()[-1]) for e in part(first, "seen", "train")]
    assert numbers != sorted(numbers)


def test_another_language_moves_no_row(tmp_path: Path) -> None:
    one, two = write(tmp_path, "en", dev=20, test=40), write(tmp_path, "en", "fr", dev=20, test=40)
    assert load(one, 4).pools["seen"]["en"] == load(two, 4).pools["seen"]["en"]


def test_a_row_that_lacks_a_text_in_one_language_is_left_out_of_all_and_counted(tmp_path: Path) -> None:
    cfg = write(tmp_path, "en", "fr", dev=6, test=12)
    broken = rows("fr", "test", 12).replace("fr test hypothesis 3 neutral", " ").replace("fr test premise 5\t", "\t")
    write(tmp_path, "fr", test=broken)
    source = load(cfg, 0)
    assert source.notes["dropped_empty"] == 4
    for language in ("en", "fr"):
        used = [e for pool in ("seen", "unseen") for e in part(source, pool, "train", language)]
        # 16 each, less what is left of the group that fills the seen pool.
        assert 30 <= len(used) <= 32
        assert all(e.text.strip() and e.pair and e.pair.strip() for e in used)
        assert not any(e.text.endswith("premise 5") or e.pair == "en test hypothesis 3 neutral" for e in used)


def test_quotes_are_text_and_lines_may_end_in_crlf_or_nothing(tmp_path: Path) -> None:
    path = tmp_path / "f.tsv"
    path.write_bytes('"a "b\tc"\u2028\x85d\tneutral\r\nx\ty\tentailment'.encode())
    assert read_tsv(path).to_pylist() == [
        {"premise": '"a "b', "hypothesis": 'c"\u2028\x85d', "label": 1},
        {"premise": "x", "hypothesis": "y", "label": 0},
    ]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: t + "cut in the", r"line 37: 1 columns, expected 3; the file may be truncated"),
        (lambda t: t + "a\tb\tneutral\textra\n", r"line 37: 4 columns, expected 3"),
        (lambda t: t.replace("\tneutral\n", "\tmaybe\n", 1), r"line 2: unknown label 'maybe'; allowed: entailment"),
        (lambda t: t + "\n", r"line 37: 1 columns"),
        (lambda t: "".join(t.splitlines(True)[1:]), r"35 rows, but .*en/test.tsv has 36; rows must be parallel"),
        (lambda t: "".join(t.splitlines(True)[::-1]), r"line 1: label contradiction, but .*/en/test.tsv has entail"),
    ],
)
def test_a_damaged_file_is_named_with_its_line(tmp_path: Path, damage: Callable[[str], str], message: str) -> None:
    cfg = write(tmp_path, "en", "fr", dev=6, test=12)
    write(tmp_path, "fr", test=damage(rows("fr", "test", 12)))
    with pytest.raises(DataError, match=rf"fr/test\.tsv.*{message}"):
        load(cfg, 0)


def test_a_truncated_gzip_and_text_that_is_not_utf8_name_file_and_line(tmp_path: Path) -> None:
    cfg = write(tmp_path, "en", dev=6, test_gz=2000)
    path = tmp_path / "en" / "test.tsv.gz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"test.tsv.gz, line \d+: damaged or truncated gzip"):
        load(cfg, 0)
    path.write_bytes(gzip.compress(b"a\tb\tneutral\ncaf\xe9\tb\tneutral\n"))
    with pytest.raises(DataError, match=r"test.tsv.gz, line 2: not UTF-8: .* 0xe9"):
        load(cfg, 0)


def test_missing_folders_files_and_unknown_languages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = write(tmp_path, "en", dev=6)
    with pytest.raises(DataError, match=r"en: missing file, one of test.tsv, test.tsv.gz"):
        load(cfg, 0)
    with pytest.raises(DataError, match=r"task.path: .*/nowhere is not a folder"):
        load(cfg.model_copy(update={"path": str(tmp_path / "nowhere")}), 0)
    with pytest.raises(DataError, match=r"\['eng'\] not in xnli; allowed: ar, bg, de"):
        load(cfg.model_copy(update={"languages": ("en", "eng")}), 0)
    monkeypatch.setenv("FEDTAILOR_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"FEDTAILOR_DATA: .*/xnli is not a folder"):
        load(cfg.model_copy(update={"path": None}), 0)


def test_empty_files_are_an_error_that_names_a_client(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="client seen/en/00 would be empty"):
        prepare(write(tmp_path, "en", dev="", test=""), 0, tmp_path / "out")


def test_without_folder_or_hub_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"xnli \(en, train\) .*ConnectionError: no network.*task.path.*FEDTAILOR_DATA"):
        load(task_config("xnli", languages=("en",)), 0)


@pytest.mark.parametrize(("label", "message"), [(None, None), (-1, r"\(fr, test\), row 4: unknown label -1")])
def test_the_hubs_rows_are_read_by_config_and_split(
    monkeypatch: pytest.MonkeyPatch, label: int | None, message: str | None
) -> None:
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)

    def hub(name: str, config: str, split: str) -> object:
        assert name == xnli.HUB_ID
        found = [{"premise": f"{config} {split} {i // 3}", "hypothesis": f"h {i}", "label": i % 3} for i in range(24)]
        if label is not None and (config, split) == ("fr", "test"):
            found[4]["label"] = label
        features = {c: datasets.Value("string") for c in ("premise", "hypothesis")}
        features["label"] = datasets.ClassLabel(names=list(LABELS)) if label is None else datasets.Value("int64")
        return datasets.Dataset.from_list(found, features=datasets.Features(features))

    monkeypatch.setattr(datasets, "load_dataset", hub)
    cfg = task_config("xnli", languages=("en", "fr"))
    if message:
        with pytest.raises(DataError, match=message):
            load(cfg, 0)
        return
    source = load(cfg, 0)
    assert (stems(source, "train"), stems(source, "test")) == ({"train"}, {"test"})
    assert all(e.pair and int(e.pair.split()[1]) % 3 == e.label for e in part(source, "unseen", "train", "fr"))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return prepare(task_config("xnli", path=str(REAL)), 42, tmp_path_factory.mktemp("real"))


@needs_data
@pytest.mark.data
def test_the_real_data_makes_600_clients_of_100_and_25_pairs(real: TaskData) -> None:
    assert len(real.clients) == 600
    assert {(c.n_train, c.n_test) for c in real.clients} == {(100, 25)}
    assert (real.clients[0].id, real.clients[-1].id) == ("seen/ar/00", "unseen/zh/19")
    notes = real.manifest["notes"]
    assert (notes["train_texts_from"], notes["test_texts_from"]) == ("test", "dev")
    assert {notes[key] for key in notes if not key.endswith("_from")} == {0}


@needs_data
@pytest.mark.data
def test_both_pools_of_the_real_data_are_skewed_by_their_own_labels(real: TaskData) -> None:
    for pool in ("seen", "unseen"):
        counts = np.array([c["train_classes"] for c in real.manifest["clients"] if c["id"].startswith(pool)])
        # An IID client of 100 has about 33 +- 5 of each class.
        assert counts.std(axis=0).min() > 15


@pytest.fixture(scope="module")
def sources() -> dict[int, Source]:
    return {seed: load(task_config("xnli", path=str(REAL)), seed) for seed in (42, 52, 62)}


def line_numbers(language: str, stem: str) -> dict[tuple[str, str, int], set[int]]:
    """Example -> the lines of the file that hold it (a few examples stand in two)."""
    found: dict[tuple[str, str, int], set[int]] = {}
    columns = read_tsv(REAL / language / f"{stem}.tsv.gz").to_pydict()
    for line, row in enumerate(zip(*columns.values(), strict=True)):
        found.setdefault(row, set()).add(line)
    return found


@needs_data
@pytest.mark.data
@pytest.mark.parametrize(("split", "stem", "size"), [("train", "test", 2000), ("test", "dev", 500)])
def test_the_pools_of_the_real_data_have_the_same_lines_in_every_language(
    sources: dict[int, Source], split: str, stem: str, size: int
) -> None:
    lines = {language: line_numbers(language, stem) for language in XNLI_LANGUAGES}
    for source in sources.values():
        used: set[int] = set()
        for pool in ("seen", "unseen"):
            parts = [part(source, pool, split, language) for language in XNLI_LANGUAGES]
            for row in zip(*parts, strict=True):
                places = [lines[lang][e.text, str(e.pair), e.label] for lang, e in zip(lines, row, strict=True)]
                common = set.intersection(*places)
                assert len(common) == 1
                used |= common
        assert len(used) == 2 * size


@needs_data
@pytest.mark.data
@pytest.mark.parametrize("seed", [42, 52, 62])
def test_no_premise_of_the_real_data_is_in_two_pools_or_splits_in_any_language(
    sources: dict[int, Source], seed: int
) -> None:
    premises = {
        key: {normalise(e.text) for lang in XNLI_LANGUAGES for e in part(sources[seed], *key, lang)} for key in PLACES
    }
    assert {len(premises[a] & premises[b]) for a, b in combinations(PLACES, 2)} == {0}


@needs_data
@pytest.mark.data
def test_no_seed_tests_on_a_pair_that_another_trains_on(sources: dict[int, Source]) -> None:
    train, test = (
        {(e.text, e.pair) for source in sources.values() for _, _, p in source.parts() for e in p.split(split)}  # type: ignore[arg-type]
        for split in ("train", "test")
    )
    assert len(train & test) == 0
