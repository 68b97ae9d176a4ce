"""Model folders: written whole or not at all, and without transformers' chatter."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from fedtailor.core.durable import sync
from fedtailor.core.errors import ModelError


def save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Writes config, safetensors weights and tokenizer files to ``out``, replacing it as a whole."""
    with staged_folder(out) as stage, quiet():
        model.save_pretrained(stage)
        tokenizer.save_pretrained(stage)


@contextmanager
def quiet() -> Iterator[None]:
    """Silences transformers' progress bars and load report: what they would say is checked by the callers."""
    level, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]


@contextmanager
def explained(source: str | Path, what: str) -> Iterator[None]:
    """Turns whatever the libraries raise for a bad source into one `ModelError` that names it."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0] or type(error).__name__
        raise ModelError(f"{source}: cannot load {what}: {reason}") from error


@contextmanager
def staged_folder(out: Path) -> Iterator[Path]:
    """Yields an empty folder beside ``out`` that takes its place, flushed to disk, if the block succeeds.

    An existing ``out`` is replaced as a whole; readers see the old folder, or (for the moment between two
    renames) none, or the new one, never a mixture. If the block fails, ``out`` is as it was.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    unique = uuid.uuid4().hex
    stage, old = out.parent / f".{out.name}.{unique}.new", out.parent / f".{out.name}.{unique}.old"
    stage.mkdir()
    try:
        yield stage
        for path in [*stage.rglob("*"), stage]:
            sync(path)
        if out.exists():
            out.rename(old)
        stage.rename(out)
        sync(out.parent)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    finally:
        for leftover in (stage, old):
            if leftover.exists():
                shutil.rmtree(leftover)
