from __future__ import annotations

import gzip
import os
from collections import Counter
from pathlib import Path

import datasets
import pytest

from fedtailor.core.errors import DataError
from fedtailor.tasks import masakhanews
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.masakhanews import load, read_tsv
from fedtailor.tasks.source import Source, normalise
from fedtailor.tasks.store import TaskData
from fedtailor.tasks.task import prepare

HEADER = "category\theadline\ttext\turl\n"
REAL = Path(os.environ.get("FEDTAILOR_DATA", "")) / "masakhanews"
needs_data = pytest.mark.skipif(
    not (os.environ.get("FEDTAILOR_DATA") and REAL.is_dir()),
    reason="set FEDTAILOR_DATA to a folder that holds masakhanews/ to test with the real news texts",
)


def rows(*texts: str, category: str = "sports") -> str:
    return HEADER + "".join(f"{category}\thead {text}\t{text}\thttp://x\n" for text in texts)


def write(folder: Path, language: str = "lin", **files: str) -> TaskConfig:
    """A folder with one language; a file is gzipped if its name ends in _gz."""
    (folder / language).mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / language / f"{name.removesuffix('_gz')}.tsv"
        if name.endswith("_gz"):
            path.with_suffix(".tsv.gz").write_bytes(gzip.compress(text.encode()))
        else:
            path.write_text(text, encoding="utf-8")
    return TaskConfig(name="masakhanews", path=str(folder), languages=(language,), clients_per_language=1)


def texts(source: Source, split: str, language: str = "lin") -> list[str]:
    return [e.text for p in ("seen", "unseen") for e in source.pools[p][language].split(split)]  # type: ignore[arg-type, index]


def test_train_and_dev_are_the_train_set_and_text_is_headline_and_article(tmp_path: Path) -> None:
    source = load(write(tmp_path, train=rows("a", "b"), dev_gz=rows("c"), test=rows("d", "e")), 0)
    assert sorted(texts(source, "train")) == ["head a a", "head b b", "head c c"]
    assert sorted(texts(source, "test")) == ["head d d", "head e e"]
    assert source.labels[source.pools["seen"]["lin"].train[0].label] == "sports"


def test_pools_are_seeded_halves(tmp_path: Path) -> None:
    cfg = write(tmp_path, train=rows(*map(str, range(31))), dev=rows(), test=rows(*map(str, range(10))))
    first, again, other = load(cfg, 1), load(cfg, 1), load(cfg, 2)
    assert [len(first.pools[p]["lin"].train) for p in ("seen", "unseen")] == [16, 15]
    assert [len(first.pools[p]["lin"].test) for p in ("seen", "unseen")] == [5, 5]
    assert first.pools == again.pools
    assert first.pools["seen"] != other.pools["seen"]


def test_a_partial_train_file_stands_in_for_a_missing_one_only(tmp_path: Path) -> None:
    cfg = write(tmp_path, train_partial_gz=rows("part"), dev=rows("dev"), test=rows("t", "u"))
    assert sorted(texts(load(cfg, 0), "train")) == ["head dev dev", "head part part"]
    write(tmp_path, train=rows("whole"))
    assert sorted(texts(load(cfg, 0), "train")) == ["head dev dev", "head whole whole"]


def test_quoted_fields_may_hold_line_breaks_tabs_and_very_long_text(tmp_path: Path) -> None:
    path = tmp_path / "f.tsv"
    path.write_text(f'{HEADER}health\t"a ""b"""\t"line 1\nline 2\tend"\tu\nhealth\tlong\t{"x" * 200_000}\tu\n')
    first, second = read_tsv(path)
    assert first.text == 'a "b" line 1\nline 2\tend'
    assert len(second.text) == 200_005


def test_rows_without_any_text_are_dropped_and_counted(tmp_path: Path) -> None:
    blank = "sports\t \t\tu\n"
    source = load(write(tmp_path, train=rows("a") + blank, dev=rows("b"), test=rows("c", "d") + blank), 0)
    assert sorted(texts(source, "train")) == ["head a a", "head b b"]
    assert source.notes["dropped_empty"] == 2


def test_duplicates_of_train_texts_leave_the_test_set_on_request(tmp_path: Path) -> None:
    cfg = write(tmp_path, train=rows("a", "b"), dev=rows("c"), test=rows("A", "c", "d", "d"))
    kept = load(cfg, 0)
    assert (len(texts(kept, "test")), kept.notes["dropped_duplicates"]) == (4, 0)
    assert kept.notes["found_duplicates"] == 2
    clean = load(cfg.model_copy(update={"drop_duplicates": True}), 0)
    assert (texts(clean, "test"), clean.notes["dropped_duplicates"]) == (["head d d"] * 2, 2)
    assert clean.notes["found_duplicates"] == 2


def test_a_missing_folder_names_where_it_came_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = TaskConfig(name="masakhanews", languages=("lin",))
    with pytest.raises(DataError, match=r"task.path: .*/nowhere is not a folder"):
        load(cfg.model_copy(update={"path": str(tmp_path / "nowhere")}), 0)
    monkeypatch.setenv("FEDTAILOR_DATA", str(tmp_path))
    with pytest.raises(DataError, match=r"FEDTAILOR_DATA: .*/masakhanews is not a folder"):
        load(cfg, 0)
    write(tmp_path / "masakhanews", train=rows("a", "b"), dev=rows(), test=rows("c", "d"))
    assert len(texts(load(cfg, 0), "train")) == 2


def test_a_missing_file_names_folder_and_alternatives(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"lin: missing file, one of dev.tsv, dev.tsv.gz"):
        load(write(tmp_path, train=rows("a"), test=rows("b")), 0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (rows("a", "b") + "sports\tcut in the", r"line 4: 2 columns, expected 4; the file may be truncated"),
        (rows("a") + 'sports\th\t"two\nlines"\tu\nsports\tcut', r"line 5: 2 columns"),
        (rows("a") + 'sports\th\t"open\nquote\nto the end', r"line 3: damaged or truncated TSV"),
        (rows("a") + "weather\th\tt\tu\n", r"line 3: unknown category 'weather'; allowed: business"),
        ("", r"line 1: header is \[\], expected"),
        ("a\tb\n", r"line 1: header is \['a', 'b'\]"),
    ],
)
def test_a_damaged_tsv_names_file_and_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match="lin/train.tsv, " + message):
        load(write(tmp_path, train=text, dev=rows("b"), test=rows("c")), 0)


def test_a_truncated_or_damaged_gzip_names_file_and_line(tmp_path: Path) -> None:
    cfg = write(tmp_path, train_gz=rows(*(f"{i * 7919} text" for i in range(9000))), dev=rows("b"), test=rows("c"))
    path = tmp_path / "lin" / "train.tsv.gz"
    whole = path.read_bytes()
    for damaged, reason in (
        (whole[: len(whole) // 2], "ended before the end"),
        (whole[:-8] + bytes(8), "CRC check failed"),
        (b"x", ""),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=rf"train.tsv.gz, line \d+: damaged or truncated gzip: .*{reason}"):
            load(cfg, 0)
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError) as caught:
        load(cfg, 0)
    assert 3000 < int(str(caught.value).split("line ")[1].split(":")[0]) < 6000


def test_gzip_files_of_several_members_are_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "f.tsv.gz"
    path.write_bytes(gzip.compress(rows("a").encode()) + gzip.compress(b"health\tx\ty\tz\n"))
    assert [e.text for e in read_tsv(path)] == ["head a a", "x y"]


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_text_that_is_not_utf8_names_file_and_line(tmp_path: Path, suffix: str) -> None:
    cfg = write(tmp_path, dev=rows("b"), test=rows("c"))
    raw = rows("a", "b").encode() + b"sports\tcaf\xe9\tt\tu\n"
    (tmp_path / "lin" / f"train.tsv{suffix}").write_bytes(gzip.compress(raw) if suffix else raw)
    with pytest.raises(DataError, match=rf"train.tsv{suffix}, line 4: not UTF-8: .* 0xe9"):
        load(cfg, 0)


def test_an_unknown_language_is_an_error(tmp_path: Path) -> None:
    cfg = TaskConfig(name="masakhanews", path=str(tmp_path), languages=("deu", "lin"))
    with pytest.raises(DataError, match=r"\['deu'\] not in masakhanews; allowed: amh, eng"):
        load(cfg, 0)


def test_without_folder_or_hub_the_error_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)

    def offline(*args: object, **kwargs: object) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"\(lin, train\) .*ConnectionError: no network.*task.path.*FEDTAILOR_DATA"):
        load(TaskConfig(name="masakhanews", languages=("lin",)), 0)


@pytest.mark.parametrize("column", ["category", "label"])
def test_the_hubs_rows_are_read_by_config_and_split(monkeypatch: pytest.MonkeyPatch, column: str) -> None:
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)
    value = "health" if column == "category" else masakhanews.LABELS.index("health")

    def hub(name: str, config: str, split: str) -> object:
        assert (name, config) == ("masakhane/masakhanews", "lin")
        return datasets.Dataset.from_list([{column: value, "headline": split, "text": None}] * 2)

    monkeypatch.setattr(datasets, "load_dataset", hub)
    source = load(TaskConfig(name="masakhanews", languages=("lin",)), 0)
    assert Counter(texts(source, "train")) == {"train ": 2, "validation ": 2}
    assert texts(source, "test") == ["test "] * 2
    assert {source.labels[e.label] for e in source.pools["seen"]["lin"].train} == {"health"}


COUNTS = {
    "amh": (769 + 188, 376), "eng": (1221 + 472, 948), "fra": (797 + 211, 422), "hau": (1270 + 317, 637),
    "ibo": (1356 + 194, 390), "lin": (608 + 87, 175), "lug": (771 + 110, 223), "orm": (1128 + 162, 325),
    "pcm": (1060 + 152, 305), "run": (1117 + 159, 322), "sna": (1288 + 185, 369), "som": (1021 + 148, 294),
    "swa": (985 + 237, 476), "tir": (300 + 137, 272), "xho": (1032 + 147, 297), "yor": (1433 + 206, 411),
}  # fmt: skip
"""(train + dev, test) rows of the development copy, whose train files of six languages are partial."""


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return prepare(TaskConfig(name="masakhanews", path=str(REAL)), 42, tmp_path_factory.mktemp("real"))


@needs_data
@pytest.mark.data
def test_the_real_data_makes_320_clients_of_equal_size_per_language(real: TaskData) -> None:
    assert len(real.clients) == 320
    for language, (train, test) in COUNTS.items():
        clients = [c for c in real.clients if c.language == language]
        assert len(clients) == 20
        assert sum(c.n_train for c in clients) == train
        assert sum(c.n_test for c in clients) == test
        assert max(c.n_train for c in clients) - min(c.n_train for c in clients) <= 2
    assert real.manifest["notes"]["unused_test_texts"] == 0


@needs_data
@pytest.mark.data
def test_dropping_duplicates_of_the_real_data_leaves_a_clean_test_set() -> None:
    source = load(TaskConfig(name="masakhanews", path=str(REAL), drop_duplicates=True), 42)
    assert source.notes["dropped_duplicates"] == source.notes["found_duplicates"] > 25  # type: ignore[operator]
    for language in COUNTS:
        train = {normalise(text) for text in texts(source, "train", language)}
        assert not train & {normalise(text) for text in texts(source, "test", language)}
