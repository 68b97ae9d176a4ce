"""Makes a small multilingual base by masked language modelling on the tasks' train texts.

The result is an ordinary Hugging Face folder with a ``pretrain.json`` that says what it was made from. The same
bytes for the same options, texts, library versions and hardware, whether or not the work was interrupted.
"""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file
from transformers import PreTrainedTokenizerBase

import fedtailor
from fedtailor.core.errors import Interrupted, StorageError
from fedtailor.core.files import staged_folder
from fedtailor.models import pretrain_checkpoint as disk
from fedtailor.models.embedded import build_wordpiece
from fedtailor.models.load import load_tokenizer, quiet
from fedtailor.models.pretrain_blocks import Blocks, Sampler, pack_all
from fedtailor.models.pretrain_corpus import gather, vocabulary_texts
from fedtailor.models.pretrain_learner import Learner, Score, guess, special_ids
from fedtailor.models.pretrain_options import PretrainOptions, flag
from fedtailor.models.pretrain_start import log_frequencies, token_vectors

RECORD = "pretrain.json"

MEASURES = 12
"""Points of the loss curve, about."""

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "numpy", "scikit-learn")

Show = Callable[[Mapping[str, Any]], None]
"""Receives events: ``note`` (text), ``start``, ``step`` and ``measure`` (step, steps, loss ...)."""


@dataclass(frozen=True)
class Prepared:
    """The vocabulary, the rows and what is known about them."""

    tokenizer: PreTrainedTokenizerBase
    blocks: Blocks
    corpus: Mapping[str, Any]
    start: Mapping[str, npt.NDArray[np.float32]]


def pretrain(options: PretrainOptions, out: Path, every: int, show: Show, stop: Callable[[], bool]) -> bool:
    """Makes the folder ``out``, or goes on with what an earlier call left in ``out.partial``.

    Args:
        options: what to make.
        out: the folder; it exists only when it is finished.
        every: steps from one checkpoint and measure to the next.
        show: receives events.
        stop: asked after each step; True writes a checkpoint and ends.

    Returns:
        False if ``out`` was there already, made with these options: nothing is done.

    Raises:
        StorageError: ``out`` or ``out.partial`` was made with other options, or is not a pretraining's.
        DataError: see `pretrain_corpus.gather`.
        Interrupted: it was asked to stop.
    """
    work = disk.work_folder(out)
    if _finished(out, options):
        shutil.rmtree(work, ignore_errors=True)
        return False
    prepared = _prepare(options, work, show)
    learner = Learner(options, prepared.tokenizer)
    if prepared.start:
        learner.start_from(prepared.start["vectors"], prepared.start["bias"])
    position = _learn(learner, prepared.blocks, work, every, show, stop)
    final = learner.measure(prepared.blocks.held_out)
    with staged_folder(out) as stage, quiet():
        learner.model.cpu().save_pretrained(stage)
        prepared.tokenizer.save_pretrained(stage)
        disk.write_json(stage / RECORD, _record(options, prepared, position, final))
    shutil.rmtree(work)
    return True


def _finished(out: Path, options: PretrainOptions) -> bool:
    if not out.exists():
        return False
    if not (out / RECORD).is_file():
        raise StorageError(f"'--out' ({out}) exists and was not made by pretraining (no {RECORD}); choose another")
    _same_options(out, disk.read_json(out / RECORD)["options"], options)
    return True


def _same_options(folder: Path, found: Mapping[str, Any], options: PretrainOptions) -> None:
    wanted = options.record()
    differ = [
        f"{flag(key)} {found.get(key)!r} there, {wanted.get(key)!r} here"
        for key in wanted | dict(found)
        if found.get(key) != wanted.get(key)
    ]
    if differ:
        raise StorageError(f"{folder} was made with other options: {'; '.join(differ)}. Choose another '--out'")


def _prepare(options: PretrainOptions, work: Path, show: Show) -> Prepared:
    """Corpus, vocabulary and rows; made once, then read from the work folder."""
    folder = work / disk.PREPARED
    if folder.is_dir():
        _same_options(work, disk.read_json(folder / "options.json"), options)
    else:
        _make_prepared(options, folder, show)
    # Read back even when just made: a first and a resumed run see the same objects.
    corpus, start = disk.read_json(folder / "corpus.json"), load_file(folder / "start.safetensors")
    return Prepared(load_tokenizer(folder), Blocks.open(folder / "blocks.safetensors"), corpus, start)


def _make_prepared(options: PretrainOptions, folder: Path, show: Show) -> None:
    show({"kind": "note", "text": f"reading the train texts of {', '.join(options.tasks)}"})
    corpus = gather(options.tasks, options.held_out, options.seed)
    show({"kind": "note", "text": "learning the vocabulary"})
    texts = vocabulary_texts(corpus.train, options.smoothing)
    tokenizer = build_wordpiece(texts, options.vocab_size, options.max_position)
    show({"kind": "note", "text": "tokenising"})
    blocks = Blocks(*(pack_all(part, tokenizer, options.block) for part in (corpus.train, corpus.held_out)))
    start = {}
    if options.start == "counts":
        show({"kind": "note", "text": "counting which tokens go together"})
        size, special = len(tokenizer), special_ids(tokenizer)
        start["vectors"] = token_vectors(blocks.train, size, special, options.hidden_size, options.seed)
        start["bias"] = log_frequencies(list(blocks.train.values()), size, special)
    with staged_folder(folder) as stage, quiet():
        tokenizer.save_pretrained(stage)
        blocks.save(stage / "blocks.safetensors")
        save_file(start, stage / "start.safetensors")
        disk.write_json(stage / "corpus.json", corpus.describe() | blocks.describe(int(tokenizer.pad_token_id)))
        disk.write_json(stage / "options.json", options.record())


def _learn(
    learner: Learner, blocks: Blocks, work: Path, every: int, show: Show, stop: Callable[[], bool]
) -> disk.Position:
    """All steps that are left, measured at fixed steps whenever the checkpoints are."""
    options = learner.options
    position, tensors = disk.load(work) or (disk.Position(), {})
    if tensors:
        learner.restore(tensors, position.step)
    sampler = Sampler(blocks.train, options.smoothing, options.batch, options.seed, dict(position.drawn))
    between = max(1, options.steps // MEASURES)
    show({"kind": "start", "step": position.step, "steps": options.steps, "tokens": options.batch * options.block})
    while (step := position.step) < options.steps:
        loss = learner.step(sampler.next(step), step)
        position = disk.Position(step + 1, dict(sampler.drawn), position.loss_sum + loss, position.curve)
        show({"kind": "step", "step": position.step, "loss": loss})
        if position.step % between == 0 or position.step == options.steps:
            position = _measured(position, learner.measure(blocks.held_out))
            show({"kind": "measure", **position.curve[-1]})
        asked = stop()
        if asked or position.step % every == 0:
            disk.save(work, position, learner.state())
        if asked and position.step < options.steps:
            raise Interrupted(
                f"stopped at step {position.step} of {options.steps}; the same command goes on from there"
            )
    return position


def _measured(position: disk.Position, scores: Mapping[str, Score]) -> disk.Position:
    since = position.step - (position.curve[-1]["step"] if position.curve else 0)
    means = sum(scores.values(), Score()).means()
    point = {
        "step": position.step,
        "train_loss": round(position.loss_sum / since, 6),
        "held_out_loss": means["loss"],
        "held_out_accuracy": means["accuracy"],
    }
    return replace(position, loss_sum=0.0, curve=(*position.curve, point))


def _record(
    options: PretrainOptions, prepared: Prepared, position: disk.Position, final: Mapping[str, Score]
) -> dict[str, Any]:
    return {
        "options": options.record(),
        "languages": {
            task: sorted(s.partition("/")[2] for s in prepared.blocks.train if s.startswith(f"{task}/"))
            for task in options.tasks
        },
        "corpus": dict(prepared.corpus),
        "vocabulary": len(prepared.tokenizer),
        "tokens_read": options.steps * options.batch * options.block,
        "rows_read": dict(position.drawn),
        "final": dict(position.curve[-1]),
        "held_out": {stream: score.means() | _bar(prepared, stream) for stream, score in final.items()},
        "curve": [dict(point) for point in position.curve],
        "versions": {"python": platform.python_version(), "fedtailor": fedtailor.__version__}
        | {name: version(name) for name in PACKAGES},
    }


def _bar(prepared: Prepared, stream: str) -> dict[str, float]:
    blocks, tokenizer = prepared.blocks, prepared.tokenizer
    return guess(blocks.train[stream], blocks.held_out[stream], len(tokenizer), special_ids(tokenizer))
