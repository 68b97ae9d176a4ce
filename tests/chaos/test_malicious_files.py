"""F31: files made to run code or to appear elsewhere are refused, and the canary stays away."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedtailor.core.errors import ModelError, StorageError
from fedtailor.core.settings import ModelConfig
from fedtailor.models import embedded, hub
from fedtailor.models.load import load_classifier, load_tokenizer
from fedtailor.storage import payloads
from fedtailor.storage.commit import RECORD, DamagedError, ObjectRef, compose, folder, load
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.files import Storage

LABELS = ["a", "b", "c"]
SIZES = ModelConfig(hidden_size=16, heads=2, layers=1, intermediate_size=24, vocab_size=200)
PATH = "artifacts/base-0123"


@pytest.fixture
def canary(tmp_path: Path) -> Iterator[Path]:
    """A file that any code of the attacker would make; the test fails if it is there at the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists(), "the payload ran"
    strangers = [p.name for p in tmp_path.parent.iterdir() if "evil" in p.name]
    assert strangers == [], "a file was written outside"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return embedded.build_embedded(
        ["one two three"] * 10, LABELS, SIZES, 32, 1, tmp_path_factory.mktemp("good") / "tiny"
    )


@pytest.fixture
def model(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / "model"))


class Payload:
    """Makes the canary when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.mkdir, (str(self._path),)


def poison(path: Path) -> bytes:
    return pickle.dumps(Payload(path))


def huge_header(claimed: int, real: int = 64) -> bytes:
    return claimed.to_bytes(8, "little") + b"{" + b" " * real


def test_the_payload_would_work(tmp_path: Path) -> None:
    pickle.loads(poison(tmp_path / "bird"))
    assert (tmp_path / "bird").exists()


@pytest.mark.parametrize(
    "content",
    [
        poison,
        lambda path: huge_header(2**62),
        lambda path: huge_header(2**31),
        lambda path: b"",
        lambda path: b"PK\3\4",
    ],
    ids=["pickle", "header of 4 EB", "header of 2 GB", "empty", "zip"],
)
def test_weights_that_are_no_safetensors_are_refused(
    model: Path, canary: Path, content: Callable[[Path], bytes]
) -> None:
    (model / "model.safetensors").write_bytes(content(canary))
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        hub.check_available(ModelConfig(name="mbert", path=str(model)), 32)
    with pytest.raises(ModelError):
        load_classifier(model, LABELS)


def test_pickled_weights_are_refused_alone_and_ignored_beside_good_ones(model: Path, canary: Path) -> None:
    (model / "pytorch_model.bin").write_bytes(poison(canary))
    (model / "training_args.bin").write_bytes(poison(canary))
    load_classifier(model, LABELS)
    (model / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="pickle, which is never loaded"):
        hub.check_available(ModelConfig(name="mbert", path=str(model)), 32)
    with pytest.raises(ModelError):
        load_classifier(model, LABELS)


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/tmp/evil.safetensors", "sub/../../evil.safetensors"])
def test_an_index_that_names_shards_elsewhere_is_refused(model: Path, canary: Path, name: str) -> None:
    (model / "model.safetensors").unlink()
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"w": name}}))
    with pytest.raises(ModelError, match="1 are missing"):
        hub.check_available(ModelConfig(name="mbert", path=str(model)), 32)


@pytest.mark.parametrize("key", ["AutoModelForSequenceClassification", "AutoConfig", "AutoTokenizer"])
def test_code_that_comes_with_a_model_does_not_run(model: Path, canary: Path, key: str) -> None:
    (model / "evil.py").write_text(f"import os\nos.mkdir({str(canary)!r})\nclass Evil: pass\n")
    place = model / ("tokenizer_config.json" if key == "AutoTokenizer" else "config.json")
    content = json.loads(place.read_text())
    evil: Any = ["evil.Evil", "evil.Evil"] if key == "AutoTokenizer" else "evil.Evil"
    place.write_text(json.dumps({**content, "auto_map": {key: evil}}))
    with suppress(ModelError):  # refused or loaded with transformers' own code: both are right
        load_classifier(model, LABELS)
        load_tokenizer(model)


def resealed(tmp_path: Path, name: str, data: bytes, at: str | None = None) -> CommitLog:
    """A log whose newest round an attacker has rewritten, hashes and seal included."""
    log = CommitLog(Storage(tmp_path), PATH)
    log.commit(0, {"global/shared": {"a": np.ones(3, np.float32)}}, {"round": 0})
    place = at or f"rounds/000000/{name}"
    file = tmp_path / PATH / "rounds/000000" / name
    if at is None:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(data)
    ref = ObjectRef(place, payloads.sha256(data), len(data), payloads.sha256(data))
    (tmp_path / PATH / folder(0) / RECORD).write_bytes(compose(0, None, {"round": 0}, {name: ref}))
    return log


@pytest.mark.parametrize("make", [poison, lambda path: huge_header(2**62), lambda path: huge_header(2**25, 2**25 + 9)])
def test_tensors_of_a_commit_that_are_no_safetensors_are_refused_even_with_a_true_hash(
    tmp_path: Path, canary: Path, make: Callable[[Path], bytes]
) -> None:
    log = resealed(tmp_path, "shared.safetensors", make(canary))
    commit = log.read(0)
    with pytest.raises(StorageError, match=r"refused|not a readable"):
        commit.tensors("shared.safetensors")


def test_a_table_of_a_commit_that_is_no_parquet_is_refused(tmp_path: Path, canary: Path) -> None:
    log = resealed(tmp_path, "metrics.parquet", poison(canary))
    with pytest.raises(StorageError, match="not a readable Parquet"):
        log.read(0).table("metrics.parquet")


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("shared.safetensors", "../../../evil"),
        ("shared.safetensors", "/tmp/evil"),
        ("shared.safetensors", "rounds/000000/../../../../evil"),
        ("../../../evil", "rounds/000000/x"),
        ("adapters/r8/../../../../evil", "rounds/000000/x"),
        ("a\\..\\evil", "rounds/000000/x"),
    ],
)
def test_a_commit_that_names_files_elsewhere_is_refused(tmp_path: Path, canary: Path, name: str, at: str) -> None:
    log = resealed(tmp_path, name, b"", at)
    with pytest.raises(DamagedError):
        load(log.storage, PATH, 0)
    assert log.newest() is None


def test_an_adapter_with_a_pickle_in_place_of_its_weights_is_refused(tmp_path: Path, model: Path, canary: Path) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model
    from safetensors import SafetensorError

    base = load_classifier(model, LABELS)
    get_peft_model(base, LoraConfig(target_modules=["query"], r=2)).save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter/adapter_model.safetensors").write_bytes(poison(canary))
    with pytest.raises(SafetensorError):
        PeftModel.from_pretrained(load_classifier(model, LABELS), tmp_path / "adapter")
