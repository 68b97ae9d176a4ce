"""Base models from a hub id or a folder: are they there, which bytes are they, what a run starts from.

The other functions of the model package are re-exported here.
"""

from __future__ import annotations

import difflib
import hashlib
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

from fedtailor.core.errors import ModelError
from fedtailor.core.settings import ModelConfig
from fedtailor.models.classifier import load_classifier, load_tokenizer
from fedtailor.models.completeness import check_folder, check_listing
from fedtailor.models.dimensions import ModelDimensions, dimensions
from fedtailor.models.folder import save_folder
from fedtailor.models.source import EMBEDDED, PRESETS, PRETRAINED, ModelSource, resolve

__all__ = [
    "EMBEDDED",
    "PRESETS",
    "ModelDimensions",
    "ModelSource",
    "check_available",
    "dimensions",
    "fetch",
    "fingerprint",
    "load_classifier",
    "load_tokenizer",
    "materialise",
    "resolve",
]

PRETRAINING = "pretrain.json"
"""What a pretrained folder was made from; it goes along so that reports can say it."""

_PARTS = (".json", ".model", ".safetensors", ".txt")
"""Endings of the files that decide what a model computes."""


def check_available(cfg: ModelConfig, max_length: int | None = None) -> None:
    """Checks, before any work, that the configured model can be loaded; downloads nothing.

    Args:
        cfg: the model section.
        max_length: tokens a text may have; checked where the model's files are local.

    Raises:
        ModelError: a folder, its weights, shards or tokenizer are missing or unusable, or a hub id is neither
            in the local cache nor reachable; says what was expected where, and what to do.
    """
    source = resolve(cfg)
    if source.kind == "embedded":
        return
    if source.kind == "folder":
        check_folder(Path(source.location), max_length)
        return
    cached = _cached(source)
    if cached is not None and (constants.HF_HUB_OFFLINE or _complete(cached)):
        check_folder(cached, max_length)
        return
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{_title(source)} is not in the local cache and HF_HUB_OFFLINE is set; {_advice(source)}")
    check_listing(_title(source), _remote_files(source))


def fetch(source: ModelSource) -> Path:
    """The folder with the model's files; a hub id is downloaded unless it is complete in the local cache.

    Raises:
        ModelError: the source is the embedded model, or the download fails.
    """
    if source.kind == "embedded":
        raise ModelError(f"{EMBEDDED} is built from the task's texts and cannot be fetched")
    if source.kind == "folder":
        return Path(source.location)
    cached = _cached(source)
    if cached is not None and _complete(cached):
        return cached
    try:
        folder = snapshot_download(
            source.location,
            revision=source.revision,
            allow_patterns=["model*.safetensors", "*.json", "*.txt", "*.model"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:
        raise ModelError(f"cannot download {_title(source)}: {_first_line(error)}; {_advice(source)}") from error
    return Path(folder)


def fingerprint(source: ModelSource) -> str:
    """Names the exact model, for the hash of everything that is computed from it.

    Returns:
        ``sha256:...`` over names and bytes of config, weights and tokenizer files of a folder;
        ``id@commit`` of a hub id, whose branch is resolved to the commit; the sizes of the embedded model
        (its vocabulary also depends on the task's texts: add the data manifest's hash, or take the
        fingerprint of the built folder).

    Raises:
        ModelError: a folder without such files, or a hub id that is neither cached nor reachable.
    """
    if source.kind == "embedded":
        return f"{EMBEDDED}:{source.location}"
    if source.kind == "hub":
        return f"{source.location}@{_commit(source)}"
    folder = Path(source.location)
    files = sorted(path for path in folder.glob("*") if path.suffix in _PARTS and path.is_file())
    if not files:
        raise ModelError(f"model folder {folder} does not exist or holds no model files")
    total = hashlib.sha256()
    for path in files:
        with path.open("rb") as stream:
            total.update(f"{path.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return f"sha256:{total.hexdigest()}"


def materialise(cfg: ModelConfig, labels: Sequence[str], seed: int, out: Path) -> Path:
    """Writes the folder that all stages start from: the model in fp32 with a head for the task's labels.

    A head for other labels is replaced; so is a missing one (``load_classifier``). The same bytes for the
    same model, labels, seed and library versions.

    Args:
        cfg: the model section; not the embedded model, which ``tiny_bert.build`` writes.
        labels: class names in the order of their ids.
        seed: run seed of a fresh head.
        out: folder to make or replace, as a whole.

    Raises:
        ModelError: see ``check_available`` and ``fetch``.
    """
    folder = fetch(resolve(cfg))
    check_folder(folder)
    model = load_classifier(folder, len(labels), labels, seed=seed, replace_head=True)
    tokenizer = load_tokenizer(folder)
    # Decoder-only classifiers read the last token that is not padding and need to know which that is.
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    save_folder(model, tokenizer, out)
    record = folder / PRETRAINING
    if record.is_file():
        shutil.copyfile(record, out / PRETRAINING)
    return out


def _cached(source: ModelSource) -> Path | None:
    found = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def _complete(folder: Path) -> bool:
    try:
        check_folder(folder)
    except ModelError:
        return False
    return True


def _commit(source: ModelSource) -> str:
    cached = _cached(source)
    if cached is not None:
        return cached.name
    if constants.HF_HUB_OFFLINE:
        raise ModelError(f"{_title(source)} is not in the local cache and HF_HUB_OFFLINE is set; {_advice(source)}")
    return _remote(source)[0]


def _remote_files(source: ModelSource) -> frozenset[str]:
    return _remote(source)[1]


def _remote(source: ModelSource) -> tuple[str, frozenset[str]]:
    try:
        info = HfApi().model_info(source.location, revision=source.revision, timeout=10)
    except Exception as error:
        raise ModelError(f"cannot reach {_title(source)}: {_first_line(error)}; {_advice(source)}") from error
    return str(info.sha), frozenset(part.rfilename for part in info.siblings or [])


def _title(source: ModelSource) -> str:
    at = f" at revision {source.revision}" if source.revision else ""
    return f"model '{source.location}'{at} on the Hugging Face hub"


def _advice(source: ModelSource) -> str:
    near = difflib.get_close_matches(source.name, [EMBEDDED, PRETRAINED, *PRESETS], n=1)
    hint = f"did you mean '{near[0]}'? " if near and near[0] != source.name else ""
    return (
        f"{hint}Give a local folder with 'model.path=FOLDER', fetch it once with "
        f"'hf download {source.location}', or use model={EMBEDDED}"
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
