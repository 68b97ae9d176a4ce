from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import reading

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.tasks import task
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import Example, LanguagePool, Source, TaskEntry, check_leakage
from fedtailor.tasks.store import BLOCK, TaskData
from fedtailor.tasks.task import prepare

CFG = TaskConfig(languages=("yor", "amh", "sna"), clients_per_language=4)
FILES = ("manifest.json", "texts.arrow", "examples.arrow")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> TaskData:
    return prepare(CFG, 42, tmp_path_factory.mktemp("data"))


def split_texts(*texts: str) -> list[Example]:
    return [Example(text, i % 2) for i, text in enumerate(texts)]


def custom(monkeypatch: pytest.MonkeyPatch, source: Source) -> TaskConfig:
    """Registers `source` as the only task."""
    monkeypatch.setattr(task, "TASKS", {"toy": TaskEntry(lambda cfg, seed: source, "classification")})
    languages = tuple(source.pools["seen"])
    return TaskConfig(name="toy", languages=languages, clients_per_language=2)


def toy(part: LanguagePool, *, labels: tuple[str, ...] = ("a", "b"), disjoint: bool = False) -> Source:
    other = LanguagePool(*([Example("other " + e.text, e.label) for e in part.split(s)] for s in ("train", "test")))
    return Source(labels, {"seen": {"x": part}, "unseen": {"x": other}}, {}, disjoint)


def test_clients_are_sorted_by_pool_language_and_index(data: TaskData) -> None:
    ids = [client.id for client in data.clients]
    assert ids == [
        f"{p}/{lang}/{i:02d}" for p in ("seen", "unseen") for lang in ("amh", "sna", "yor") for i in range(4)
    ]
    assert [c.id for c in data.pool("unseen")] == ids[12:]
    first = data.clients[0]
    assert (first.pool, first.language) == ("seen", "amh")


def test_texts_have_the_sizes_and_classes_that_the_manifest_says(data: TaskData) -> None:
    for client, entry in zip(data.clients, data.manifest["clients"], strict=True):
        for split, n in (("train", client.n_train), ("test", client.n_test)):
            texts, labels = data.texts(client.id, split)  # type: ignore[arg-type]
            assert len(texts) == len(labels) == n == entry[f"n_{split}"]
            assert labels.dtype == np.int64
            assert np.bincount(labels, minlength=len(data.labels)).tolist() == entry[f"{split}_classes"]


def test_the_clients_of_a_pool_hold_all_its_train_texts_once(data: TaskData) -> None:
    for pool in ("seen", "unseen"):
        held = Counter(text for c in data.pool(pool) for text in data.texts(c.id, "train")[0])
        assert held == Counter(data.train_texts(pool))


def test_labels_belong_to_their_texts(data: TaskData) -> None:
    source = task.TASKS["cldr"].load(CFG, 42)
    for client in data.clients:
        part = source.pools[client.pool][client.language]  # type: ignore[index]
        for split in ("train", "test"):
            texts, labels = data.texts(client.id, split)  # type: ignore[arg-type]
            assert set(zip(texts, labels.tolist(), strict=True)) <= {e[:2] for e in part.split(split)}  # type: ignore[arg-type]


def test_equal_seeds_give_equal_bytes_and_another_seed_another_partition(data: TaskData, tmp_path: Path) -> None:
    again, other = prepare(CFG, 42, tmp_path / "again"), prepare(CFG, 43, tmp_path / "other")
    assert all((data.path / name).read_bytes() == (again.path / name).read_bytes() for name in FILES)
    assert other.hash != data.hash
    assert other.texts("seen/amh/00", "train")[0] != data.texts("seen/amh/00", "train")[0]


def test_the_order_of_the_languages_in_the_config_does_not_matter() -> None:
    assert reading.fingerprint(CFG, 42) == reading.fingerprint(
        TaskConfig(languages=("sna", "amh", "yor"), clients_per_language=4), 42
    )


def test_the_fingerprint_is_the_manifests_hash_and_depends_on_the_partition(data: TaskData) -> None:
    assert reading.fingerprint(CFG, 42) == data.hash
    different = [
        TaskConfig(languages=CFG.languages, clients_per_language=4, **{k: v})
        for k, v in (("alpha", 5.0), ("resample", 9))
    ]
    assert len({data.hash, *(reading.fingerprint(cfg, 42) for cfg in different)}) == 3
    assert (
        reading.fingerprint(TaskConfig(languages=CFG.languages, clients_per_language=4, max_length=9), 42) == data.hash
    )


def test_clients_with_different_texts_have_different_hashes(data: TaskData) -> None:
    hashes = [entry["sha256"] for entry in data.manifest["clients"]]
    assert len(set(hashes)) == len(hashes)


def test_unseen_clients_are_skewed_by_their_own_labels(tmp_path: Path) -> None:
    """Reusing the seen pool's row numbers, as the reference does for XNLI, would make the unseen pool IID."""
    cfg = TaskConfig(languages=("fra", "amh"), clients_per_language=8)
    manifest = prepare(cfg, 42, tmp_path).manifest
    for pool in ("seen", "unseen"):
        counts = np.array([c["train_classes"] for c in manifest["clients"] if c["id"].startswith(f"{pool}/amh")])
        shares = counts / counts.sum(axis=1, keepdims=True)
        overall = counts.sum(axis=0) / counts.sum()
        # Expected distance of an IID client: half the sum of the mean absolute deviations of its shares.
        noise = np.sqrt(2 / np.pi * overall * (1 - overall) / counts[0].sum()).sum() / 2
        assert (np.abs(shares - overall).sum(axis=1) / 2).mean() > 2 * noise


def test_datasets_opens_the_files(data: TaskData) -> None:
    texts = datasets.Dataset.from_file(str(data.path / "texts.arrow"))
    assert texts.column_names == ["pool", "language", "split", "text", "label"]
    examples = datasets.Dataset.from_file(str(data.path / "examples.arrow"))
    assert len(examples) == sum(c.n_train + c.n_test for c in data.clients)


def test_more_texts_than_one_block_keep_their_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    train = split_texts(*(f"train {i}" for i in range(2 * BLOCK + 7)))
    cfg = custom(monkeypatch, toy(LanguagePool(train, split_texts("t0", "t1", "t2", "t3"))))
    data = prepare(cfg, 0, tmp_path)
    held = [e for c in data.pool("seen") for e in zip(*data.texts(c.id, "train"), strict=True)]
    assert sorted(held) == sorted((e.text, e.label) for e in train)
    assert sorted(data.train_texts("unseen")) == sorted("other " + e.text for e in train)


def test_long_and_odd_texts_survive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    odd = ["x" * 100_000, "line\nbreak\r\n", "nul \0 byte", "🌍 é", " "]
    cfg = custom(monkeypatch, toy(LanguagePool(split_texts(*odd), split_texts("t0", "t1"))))
    data = prepare(cfg, 0, tmp_path)
    assert sorted(t for c in data.pool("seen") for t in data.texts(c.id, "train")[0]) == sorted(odd)


def test_resampling_thousands_of_clients_stores_each_text_once(tmp_path: Path) -> None:
    cfg = TaskConfig(languages=("amh", "sna"), clients_per_language=1000, resample=30)
    data = prepare(cfg, 42, tmp_path)
    assert {(c.n_train, c.n_test) for c in data.clients} == {(30, 11)}
    assert len(data.clients) == 4000
    assert data.clients[-1].id == "unseen/sna/999"
    small = prepare(cfg.model_copy(update={"clients_per_language": 2}), 42, tmp_path / "small")
    assert (data.path / "texts.arrow").stat().st_size == (small.path / "texts.arrow").stat().st_size
    assert data.texts("seen/sna/001", "train")[0] == small.texts("seen/sna/01", "train")[0]


def test_leaks_are_counted_for_pools_and_for_splits() -> None:
    seen = LanguagePool(split_texts("A", "b", "c"), split_texts("a ", "d"))
    unseen = LanguagePool(split_texts("e", "D"), split_texts("f", "g"))
    source = Source(("a", "b"), {"seen": {"x": seen}, "unseen": {"y": unseen}})
    assert check_leakage(source) == {
        "leak_seen_unseen": 1,
        "leak_seen_train_test": 1,
        "leak_unseen_train_test": 0,
    }


def test_a_source_that_promises_disjoint_texts_must_keep_its_promise(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    part = LanguagePool(split_texts("a", "b", "c", "d"), split_texts("A", "e"))
    with pytest.raises(DataError, match="leak_seen_train_test': 1"):
        prepare(custom(monkeypatch, toy(part, disjoint=True)), 0, tmp_path)
    assert prepare(custom(monkeypatch, toy(part)), 0, tmp_path).manifest["notes"]["leak_seen_train_test"] == 1


def test_one_class_in_the_whole_task_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    part = LanguagePool([Example(f"{i}", 1) for i in range(9)], [Example("t", 0), Example("u", 1)])
    with pytest.raises(DataError, match=r"one class in the whole task \(b\)"):
        reading.fingerprint(custom(monkeypatch, toy(part)), 0)


def test_a_language_with_too_little_text_says_how_many_clients_fit() -> None:
    with pytest.raises(DataError, match=r"client seen/sna/\d\d would .*'sna' has \d+ train .*at most \d+ would fit"):
        reading.fingerprint(TaskConfig(languages=("fra", "sna"), clients_per_language=60), 42)


def test_an_unknown_task_is_a_config_error_with_the_nearest_name() -> None:
    with pytest.raises(
        ConfigError,
        match=r"'task.name' is 'masakanews', allowed: cldr, .*masakhanews, .*; did you mean 'masakhanews'",
    ):
        reading.fingerprint(TaskConfig(name="masakanews"), 0)


def test_an_unknown_client_is_an_error(data: TaskData) -> None:
    with pytest.raises(DataError, match="no client 'seen/amh/9'"):
        data.texts("seen/amh/9", "train")


@pytest.mark.parametrize("name", FILES)
def test_missing_cut_or_foreign_files_are_named(data: TaskData, tmp_path: Path, name: str) -> None:
    for file in FILES:
        (tmp_path / file).write_bytes((data.path / file).read_bytes())
    whole = (tmp_path / name).read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", b"\x93garbage" * 9):
        (tmp_path / name).write_bytes(damaged)
        with pytest.raises(DataError, match=name):
            TaskData.open(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(DataError, match=name):
        TaskData.open(tmp_path)


def test_a_manifest_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps(["x"]))
    with pytest.raises(DataError, match="not a manifest"):
        TaskData.open(tmp_path)
