from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import reading

from fedtailor.core.config import validate
from fedtailor.core.errors import ConfigError, DataError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import overrides_of
from fedtailor.tasks import cldr, task
from fedtailor.tasks.config import MASAKHANEWS_LANGUAGES, TaskConfig
from fedtailor.tasks.source import Example, LanguagePool, Source, TaskEntry
from fedtailor.tasks.task import prepare, task_config
from fedtailor.tasks.xnli import XNLI_LANGUAGES

CFG = TaskConfig(languages=("yor", "amh"), clients_per_language=5)
SPLITS = ("train", "test")


def changed(**update: object) -> TaskConfig:
    return CFG.model_copy(update=update)


@pytest.mark.parametrize("resample", [0, 9])
def test_a_kept_client_is_the_same_client_as_in_the_whole_task(tmp_path: Path, resample: int) -> None:
    whole = prepare(changed(resample=resample), 42, tmp_path / "whole")
    some = prepare(changed(resample=resample, clients_kept=2), 42, tmp_path / "some")
    assert [c.id for c in some.clients] == [
        f"{p}/{lang}/{i:02d}" for p in ("seen", "unseen") for lang in ("amh", "yor") for i in (0, 1)
    ]
    entries = {entry["id"]: entry for entry in whole.manifest["clients"]}
    for client, entry in zip(some.clients, some.manifest["clients"], strict=True):
        assert entry == entries[client.id]
        for split in SPLITS:
            texts, labels = some.texts(client.id, split)  # type: ignore[arg-type]
            same, same_labels = whole.texts(client.id, split)  # type: ignore[arg-type]
            assert texts == same
            assert (labels == same_labels).all()


def test_the_texts_of_dropped_clients_are_gone_also_for_the_vocabulary(tmp_path: Path) -> None:
    some = prepare(changed(clients_kept=2), 42, tmp_path)
    held = [text for c in some.pool("seen") for text in some.texts(c.id, "train")[0]]
    assert sorted(some.train_texts()) == sorted(held)
    assert some.manifest["rows"] == sum(c.n_train + c.n_test for c in some.clients)


def test_keeping_all_clients_changes_nothing() -> None:
    assert (
        reading.fingerprint(changed(clients_kept=5), 42)
        == reading.fingerprint(CFG, 42)
        != reading.fingerprint(changed(clients_kept=4), 42)
    )
    assert (CFG.clients_used, changed(clients_kept=4).clients_used) == (5, 4)


def test_more_clients_kept_than_there_are_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match=r"'task.clients_kept': 6 is above .* = 5 \(allowed: 1 ... 5\)"):
        compose([], ["task.clients_per_language=5", "task.clients_kept=6"])


def skewed(monkeypatch: pytest.MonkeyPatch, unseen: int = 400) -> TaskConfig:
    """Two pools of equal sizes whose labels stand in different orders."""

    def part(name: str, count: int) -> LanguagePool:
        order = np.random.default_rng(len(name)).permutation(count)
        return LanguagePool(
            [Example(f"{name} train {i}", int(order[i]) % 3) for i in range(count)],
            [Example(f"{name} test {i}", int(order[i]) % 3) for i in range(count // 4)],
        )

    pools = {"seen": {"en": part("seen", 400)}, "unseen": {"en": part("unseen", unseen)}}
    monkeypatch.setattr(
        task, "TASKS", {"toy": TaskEntry(lambda cfg, seed: Source(("a", "b", "c"), pools), "classification")}
    )
    return TaskConfig(name="toy", languages=("en",), clients_per_language=8, reference_unseen_partition=True)


def test_the_references_unseen_clients_hold_the_row_numbers_of_the_seen_ones(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = prepare(skewed(monkeypatch), 1, tmp_path)
    for index in range(8):
        for split in SPLITS:
            seen, unseen = (
                [text.split()[-1] for text in data.texts(f"{pool}/en/{index:02d}", split)[0]]  # type: ignore[arg-type]
                for pool in ("seen", "unseen")
            )
            assert seen == unseen


def test_the_references_unseen_clients_have_hardly_any_label_skew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spread = {}
    for reference in (True, False):
        cfg = skewed(monkeypatch).model_copy(update={"reference_unseen_partition": reference})
        manifest = prepare(cfg, 1, tmp_path / str(reference)).manifest
        for pool in ("seen", "unseen"):
            counts = [c["train_classes"] for c in manifest["clients"] if c["id"].startswith(f"{pool}/")]
            spread[pool, reference] = np.std(counts, axis=0).mean()
    assert spread["seen", True] == spread["seen", False]
    assert spread["unseen", True] < 4 < 10 < spread["unseen", False]


def test_the_references_partition_leaves_out_row_numbers_that_the_unseen_pool_lacks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = prepare(skewed(monkeypatch, unseen=396), 1, tmp_path)
    assert sum(c.n_train for c in data.pool("unseen")) == 396
    with pytest.raises(DataError, match=r"client unseen/en/0\d would have .*reference_unseen_partition"):
        prepare(skewed(monkeypatch, unseen=12), 1, tmp_path / "small")


def test_the_references_partition_and_resampling_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match=r"'task.reference_unseen_partition' and 'task.resample' exclude each other"):
        compose([], ["task.reference_unseen_partition=true", "task.resample=9"])


def test_the_references_partition_is_printed_where_overrides_are() -> None:
    keys = {o["key"] for o in overrides_of(compose([], ["task.reference_unseen_partition=true"]))}
    assert "task.reference_unseen_partition" in keys


@pytest.mark.parametrize("words", [["task=xnli"], ["task.name=xnli"], ["task.name=xnli", "task.alpha=1"]])
def test_xnli_has_its_own_defaults(words: list[str]) -> None:
    cfg = compose([], words).task
    assert (cfg.languages, cfg.clients_per_language, cfg.max_length) == (XNLI_LANGUAGES, 20, 128)
    assert (cfg.train_per_pool, cfg.test_per_pool, cfg.clients_kept) == (2000, 500, None)


def test_what_is_given_wins_over_a_tasks_defaults_and_survives_a_round_trip() -> None:
    cfg = compose([], ["task=xnli", "task.languages=[en,fr]", "task.max_length=64"]).task
    assert (cfg.languages, cfg.clients_per_language, cfg.max_length) == (("en", "fr"), 20, 64)
    assert validate(TaskConfig, cfg.model_dump(mode="json")) == cfg


def test_other_tasks_keep_the_general_defaults() -> None:
    for name in ("cldr", "masakhanews"):
        cfg = task_config(name)
        assert (cfg.languages, cfg.clients_per_language, cfg.max_length) == (MASAKHANEWS_LANGUAGES, 10, 256)
    assert task_config("xnli") == compose([], ["task=xnli"]).task


def test_cldr_knows_the_languages_of_xnli() -> None:
    source = cldr.load(TaskConfig(name="cldr", languages=XNLI_LANGUAGES), 0)
    assert all(len(part.train) > 300 for _, _, part in source.parts())
