"""The sample of Dolly that comes with the package, as a task of classes and as one of answers."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from importlib import resources
from pathlib import Path

import pytest

from fedtailor.core.errors import ConfigError
from fedtailor.tasks.dolly import DOLLY_CATEGORIES
from fedtailor.tasks.task import prepare, task_config

PUBLISHED = {
    "open_qa": 722, "general_qa": 438, "classification": 427, "closed_qa": 365, "brainstorming": 354,
    "information_extraction": 302, "summarization": 253, "creative_writing": 142,
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_data_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FEDTAILOR_DATA", raising=False)


def test_the_sample_is_whole_small_and_has_its_licence_beside_it() -> None:
    file = resources.files("fedtailor.tasks") / "dolly_sample.json.gz"
    raw = file.read_bytes()
    assert len(raw) < 2**20
    assert Counter(row["category"] for row in json.loads(gzip.decompress(raw))) == PUBLISHED
    assert "CC BY-SA 3.0" in (resources.files("fedtailor.tasks") / "dolly_sample.md").read_text()


def test_every_client_has_texts_and_no_instruction_is_in_two_places(tmp_path: Path) -> None:
    data = prepare(task_config("dolly_category"), 42, tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["labels"] == list(DOLLY_CATEGORIES)
    assert len(data.clients) == 32
    assert manifest["notes"]["dropped_repeated_rows"] == 9
    assert {manifest["notes"][key] for key in manifest["notes"] if key.startswith("leak")} == {0}
    assert sum(c.n_train + c.n_test for c in data.clients) == 3003 - 9
    assert min(c.n_train for c in data.clients) >= 70


def test_half_of_every_category_is_in_each_pool(tmp_path: Path) -> None:
    prepare(task_config("dolly_category"), 1, tmp_path)
    counts: dict[str, list[int]] = {"seen": [0] * 8, "unseen": [0] * 8}
    for client in json.loads((tmp_path / "manifest.json").read_text())["clients"]:
        pool = client["id"].split("/")[0]
        both = zip(client["train_classes"], client["test_classes"], strict=True)
        counts[pool] = [total + train + test for total, (train, test) in zip(counts[pool], both, strict=True)]
    assert all(abs(seen - unseen) <= 1 for seen, unseen in zip(*counts.values(), strict=True))


def test_its_answers_are_a_task_too(tmp_path: Path) -> None:
    data = prepare(task_config("dolly", path="sample", clients_per_language=1), 42, tmp_path)
    assert len(data.clients) == 16
    assert json.loads((tmp_path / "manifest.json").read_text())["kind"] == "generation"


def test_another_language_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'task.languages' \(swa\): dolly_category is in English alone \(eng\)"):
        prepare(task_config("dolly_category", languages=("swa",)), 42, tmp_path)
