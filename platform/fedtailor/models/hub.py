"""Base models from a hub id or a folder: are they there, which bytes are they, what a run starts from."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from huggingface_hub import HfApi, constants, snapshot_download, try_to_load_from_cache

from fedtailor.core.errors import ModelError, did_you_mean, reported_as
from fedtailor.core.settings import ModelConfig
from fedtailor.models.dimensions import meta_model, packaged_config
from fedtailor.models.families import check_kind
from fedtailor.models.folder import check_folder, check_length, check_listing, write_causal
from fedtailor.models.load import first_line, load_classifier, load_extractor, load_tokenizer, save_folder
from fedtailor.models.packaged import PACKAGE_RECORD
from fedtailor.models.packages import PACKAGED
from fedtailor.models.source import EMBEDDED_KINDS, PRESETS, PRETRAINED, ModelSource, embedded_for, resolve
from fedtailor.tasks.source import TaskKind

PRETRAINING = "pretrain.json"
"""What a pretrained folder was made from; it goes along so that reports can say it."""

_PARTS = (".jinja", ".json", ".model", ".safetensors", ".txt")
"""Endings of the files that decide what a model computes."""


def check_available(
    cfg: ModelConfig, max_length: int | None = None, kind: TaskKind = "classification", ask: bool = True
) -> Path | None:
    """Checks, before any work, that the configured model can be loaded and serves the task; downloads nothing.

    Args:
        cfg: the model section.
        max_length: tokens a text may have; checked where the model's config is known.
        kind: of the task.
        ask: whether the hub is asked for a model that is not in the local cache.

    Returns:
        The folder with the model's files; None where there is none yet.

    Raises:
        ModelError: a folder, its weights, shards or tokenizer are missing or unusable, a hub id is neither in the
            local cache nor reachable, or the model is of the other kind; says what was expected where, and what to do.
    """
    source = resolve(cfg)
    if source.kind == "embedded":
        _check_embedded(cfg, kind)
        return None
    folder = Path(source.location)
    if source.kind == "hub":
        if (known := packaged_config(cfg.name)) is not None:
            check_kind(known, kind, f"model={cfg.name}")
            check_length(known, max_length, f"model={cfg.name}")
        cached = _cached(source)
        if cached is None or not (constants.HF_HUB_OFFLINE or _complete(cached, kind)):
            if ask:
                check_listing(_title(source), _remote(source, kind)[1])
            return None
        folder = cached
    check_folder(folder, max_length, kind)
    if cfg.checkpointing and not meta_model(cfg, kind=kind).supports_gradient_checkpointing:
        raise ModelError(f"'model.checkpointing': transformers cannot do that with model={cfg.name}; set it to false")
    return folder


def fetch(source: ModelSource, kind: TaskKind = "classification") -> Path:
    """The folder with the model's files; a hub id is downloaded unless it is complete in the local cache.

    Args:
        source: where the model is.
        kind: of the task.

    Raises:
        ModelError: the source is the embedded model, or the download fails.
    """
    if source.kind == "embedded":
        raise ModelError(f"{source.name} is built from the task's texts and cannot be fetched")
    if source.kind == "folder":
        return Path(source.location)
    cached = _cached(source)
    if cached is not None and _complete(cached, kind):
        return cached
    try:
        folder = snapshot_download(
            source.location,
            revision=source.revision,
            allow_patterns=["model*.safetensors", "*.json", "*.txt", "*.model", "*.jinja"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:
        raise ModelError(f"cannot download {_title(source)}: {first_line(error)}; {_advice(source, kind)}") from error
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
        return f"{source.name}:{source.location}"
    if source.kind == "hub":
        cached = _cached(source)
        return f"{source.location}@{cached.name if cached else _remote(source)[0]}"
    folder = Path(source.location)
    files = sorted(path for path in folder.glob("*") if path.suffix in _PARTS and path.is_file())
    if not files:
        raise ModelError(f"model folder {folder} does not exist or holds no model files")
    total = hashlib.sha256()
    for path in files:
        state = path.stat()
        total.update(f"{path.name}\0{_sha256(path, state.st_size, state.st_mtime_ns)}\n".encode())
    return f"sha256:{total.hexdigest()}"


def materialise(
    cfg: ModelConfig,
    labels: Sequence[str],
    seed: int,
    out: Path,
    kind: TaskKind = "classification",
    max_length: int | None = None,
) -> Path:
    """Writes the folder that all stages start from; the same bytes for the same arguments and library versions.

    For classification it is the model in fp32 with a head for the task's labels: a head for other labels is replaced,
    so is a missing one (``load_classifier``); for extraction one with a head that marks spans. For generation
    the weights stay what they are (`write_causal`).

    Args:
        cfg: the model section; not an embedded model, which `embedded.build_embedded` writes.
        labels: class names in the order of their ids; without meaning for generation.
        seed: run seed of a fresh head.
        out: folder to make or replace, as a whole.
        kind: of the task.
        max_length: tokens a text may have; None: not checked.

    Raises:
        ModelError: see ``check_available`` and ``fetch``; or what was made is not whole.
    """
    folder = fetch(resolve(cfg), kind)
    check_folder(folder, max_length, kind)
    _write(folder, labels, seed, out, kind)
    with reported_as(ModelError, f"model folder {folder}: the copy that stages start from is not whole", ModelError):
        check_folder(out, max_length, kind)
    return out


def _write(folder: Path, labels: Sequence[str], seed: int, out: Path, kind: TaskKind) -> None:
    if kind == "generation":
        write_causal(folder, out)
        return
    if kind == "extraction":
        model = load_extractor(folder, seed=seed)
    else:
        model = load_classifier(folder, labels, seed=seed, replace_head=True)
    tokenizer = load_tokenizer(folder)
    # Decoder-only classifiers read the last token that is not padding, by the config's word: what pads must be it.
    model.config.pad_token_id = tokenizer.pad_token_id
    save_folder(model, tokenizer, out)
    for record in (PRETRAINING, PACKAGE_RECORD):
        if (folder / record).is_file():
            shutil.copyfile(folder / record, out / record)


def _check_embedded(cfg: ModelConfig, kind: TaskKind) -> None:
    made_for = EMBEDDED_KINDS[cfg.name]
    if kind not in made_for:
        raise ModelError(
            f"'model.name' ({cfg.name}) is for tasks of {' and '.join(made_for)}, and this task is one of {kind}: use "
            f"model={embedded_for(kind)}, or another model that can do it"
        )


@lru_cache(maxsize=256)
def _sha256(path: Path, size: int, modified_ns: int) -> str:
    """Of a file of this size and time; a run asks once per seed, and a large model takes a while."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _cached(source: ModelSource) -> Path | None:
    found = try_to_load_from_cache(source.location, "config.json", revision=source.revision)
    return Path(found).parent if isinstance(found, str) else None


def _complete(folder: Path, kind: TaskKind) -> bool:
    try:
        check_folder(folder, kind=kind)
    except ModelError:
        return False
    return True


def _remote(source: ModelSource, kind: TaskKind = "classification") -> tuple[str, frozenset[str]]:
    """Commit and files of a hub id, by asking the hub."""
    if constants.HF_HUB_OFFLINE:
        reason = "is not in the local cache and HF_HUB_OFFLINE is set"
        raise ModelError(f"{_title(source)} {reason}; {_advice(source, kind)}")
    try:
        info = HfApi().model_info(source.location, revision=source.revision, timeout=10)
    except Exception as error:
        raise ModelError(f"cannot reach {_title(source)}: {first_line(error)}; {_advice(source, kind)}") from error
    return str(info.sha), frozenset(part.rfilename for part in info.siblings or [])


def _title(source: ModelSource) -> str:
    at = f" at revision {source.revision}" if source.revision else ""
    return f"model '{source.location}'{at} on the Hugging Face hub"


def _advice(source: ModelSource, kind: TaskKind = "classification") -> str:
    hint = did_you_mean(source.name, [*EMBEDDED_KINDS, PRETRAINED, *PACKAGED, *PRESETS]).removeprefix("; ")
    return (
        f"{hint}{' ' * bool(hint)}Give a local folder with 'model.path=FOLDER', fetch it once with "
        f"'hf download {source.location}', or use model={embedded_for(kind)}"
    )
