"""Makes a small multilingual base by masked language modelling on the tasks' train texts.

The result is an ordinary Hugging Face folder with a ``pretrain.json`` that says what it was made from. The same
bytes for the same options, texts, library versions and hardware, whether or not the work was interrupted: until it is
finished, the prepared rows and the newest state of the learner are on disk.
"""

from __future__ import annotations

import json
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import safetensors.numpy
import safetensors.torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import fedtailor
from fedtailor.core.errors import Interrupted, StorageError, reported_as
from fedtailor.core.files import staged_folder
from fedtailor.models.embedded import build_wordpiece
from fedtailor.models.load import load_tokenizer, quiet
from fedtailor.models.pretrain_data import (
    Blocks,
    Rows,
    Sampler,
    gather,
    log_frequencies,
    pack,
    token_vectors,
    vocabulary_texts,
)
from fedtailor.models.pretrain_learner import Learner, PretrainOptions, Score, flag, special_ids

RECORD = "pretrain.json"
STATE, TENSORS, PREPARED = "state.json", "learner.safetensors", "prepared"
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


@dataclass(frozen=True)
class Position:
    """All of a pretraining's state but the tensors. With the seed, the step names every random stream.

    Args:
        step: updates made.
        drawn: rows read of each stream.
        loss_sum: of the steps since the newest measure.
        curve: measures so far.
    """

    step: int = 0
    drawn: Mapping[str, int] = field(default_factory=dict)
    loss_sum: float = 0.0
    curve: tuple[Mapping[str, Any], ...] = ()


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
        DataError: see `pretrain_data.gather`.
        Interrupted: it was asked to stop.
    """
    work = out.parent / f"{out.name}.partial"
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
        write_json(stage / RECORD, _record(options, prepared, position, final))
    shutil.rmtree(work)
    return True


def _finished(out: Path, options: PretrainOptions) -> bool:
    if not out.exists():
        return False
    if not (out / RECORD).is_file():
        raise StorageError(f"'--out' ({out}) exists and was not made by pretraining (no {RECORD}); choose another")
    _same_options(out, read_json(out / RECORD)["options"], options)
    return True


def _same_options(folder: Path, found: Mapping[str, Any], options: PretrainOptions) -> None:
    wanted = options.record()
    other = [key for key in wanted | dict(found) if found.get(key) != wanted.get(key)]
    if other:
        differ = "; ".join(f"{flag(key)} {found.get(key)!r} there, {wanted.get(key)!r} here" for key in other)
        raise StorageError(f"{folder} was made with other options: {differ}. Choose another '--out'")


def _prepare(options: PretrainOptions, work: Path, show: Show) -> Prepared:
    """Corpus, vocabulary and rows; made once, then read from the work folder."""
    folder = work / PREPARED
    if folder.is_dir():
        _same_options(work, read_json(folder / "options.json"), options)
    else:
        _make_prepared(options, folder, show)
    # Read back even when just made: a first and a resumed run see the same objects.
    corpus, start = read_json(folder / "corpus.json"), safetensors.numpy.load_file(folder / "start.safetensors")
    return Prepared(load_tokenizer(folder), Blocks.open(folder / "blocks.safetensors"), corpus, start)


def _make_prepared(options: PretrainOptions, folder: Path, show: Show) -> None:
    show({"kind": "note", "text": f"reading the train texts of {', '.join(options.tasks)}"})
    corpus = gather(options.tasks, options.held_out, options.seed)
    show({"kind": "note", "text": "learning the vocabulary"})
    texts = vocabulary_texts(corpus.train, options.smoothing)
    tokenizer = build_wordpiece(texts, options.vocab_size, options.max_position)
    show({"kind": "note", "text": "tokenising"})
    both = (
        {s: pack(part[s], tokenizer, options.block) for s in sorted(part) if part[s]}
        for part in (corpus.train, corpus.held_out)
    )
    blocks = Blocks(*both)
    start = {}
    if options.start == "counts":
        show({"kind": "note", "text": "counting which tokens go together"})
        size, special = len(tokenizer), special_ids(tokenizer)
        start["vectors"] = token_vectors(blocks.train, size, special, options.hidden_size, options.seed)
        start["bias"] = log_frequencies(list(blocks.train.values()), size, special)
    with staged_folder(folder) as stage, quiet():
        tokenizer.save_pretrained(stage)
        blocks.save(stage / "blocks.safetensors")
        safetensors.numpy.save_file(start, stage / "start.safetensors")
        write_json(stage / "corpus.json", corpus.describe() | blocks.describe(int(tokenizer.pad_token_id)))
        write_json(stage / "options.json", options.record())


def _learn(learner: Learner, blocks: Blocks, work: Path, every: int, show: Show, stop: Callable[[], bool]) -> Position:
    """All steps that are left, measured at fixed steps whenever the checkpoints are."""
    options = learner.options
    position, tensors = load(work) or (Position(), {})
    if tensors:
        learner.restore(tensors, position.step)
    sampler = Sampler(blocks.train, options.smoothing, options.batch, options.seed, dict(position.drawn))
    between = max(1, options.steps // MEASURES)
    show({"kind": "start", "step": position.step, "steps": options.steps, "tokens": options.batch * options.block})
    while (step := position.step) < options.steps:
        loss = learner.step(sampler.next(step), step)
        position = Position(step + 1, dict(sampler.drawn), position.loss_sum + loss, position.curve)
        show({"kind": "step", "step": position.step, "loss": loss})
        if position.step % between == 0 or position.step == options.steps:
            position = _measured(position, learner.measure(blocks.held_out))
            show({"kind": "measure", **position.curve[-1]})
        asked = stop()
        if asked or position.step % every == 0:
            save(work, position, learner.state())
        if asked and position.step < options.steps:
            done = f"{position.step} of {options.steps}"
            raise Interrupted(f"stopped at step {done}; the same command goes on from there")
    return position


def _measured(position: Position, scores: Mapping[str, Score]) -> Position:
    since = position.step - (position.curve[-1]["step"] if position.curve else 0)
    means = sum(scores.values(), Score()).means()
    held_out = {"held_out_loss": means["loss"], "held_out_accuracy": means["accuracy"]}
    point = {"step": position.step, "train_loss": round(position.loss_sum / since, 6), **held_out}
    return replace(position, loss_sum=0.0, curve=(*position.curve, point))


def _record(
    options: PretrainOptions, prepared: Prepared, position: Position, final: Mapping[str, Score]
) -> dict[str, Any]:
    train, held_out, vocabulary = prepared.blocks.train, prepared.blocks.held_out, len(prepared.tokenizer)
    special, here = special_ids(prepared.tokenizer), {name: version(name) for name in PACKAGES}
    bars = {stream: guess(train[stream], held_out[stream], vocabulary, special) for stream in final}
    streams = [stream.split("/", 1) for stream in sorted(train)]
    return {
        "options": options.record(),
        "languages": {task: [language for name, language in streams if name == task] for task in options.tasks},
        "corpus": dict(prepared.corpus),
        "vocabulary": vocabulary,
        "tokens_read": options.steps * options.batch * options.block,
        "rows_read": dict(position.drawn),
        "final": dict(position.curve[-1]),
        "held_out": {stream: score.means() | bars[stream] for stream, score in final.items()},
        "curve": [dict(point) for point in position.curve],
        "versions": {"python": platform.python_version(), "fedtailor": fedtailor.__version__, **here},
    }


def guess(train: Rows, held_out: Rows, vocabulary: int, special: list[int]) -> dict[str, float]:
    """What knowing a stream's token frequencies alone gives: the bar that a model must pass."""
    known, tokens = log_frequencies([train], vocabulary, special), held_out[~np.isin(held_out, special)]
    if not len(tokens):
        return {}
    loss, accuracy = -known[tokens].mean(dtype=np.float64), (tokens == known.argmax()).mean()
    return {"frequency_loss": round(float(loss), 6), "frequency_accuracy": round(float(accuracy), 6)}


def save(work: Path, position: Position, tensors: Mapping[str, Tensor]) -> None:
    """Writes ``checkpoint-STEP`` as a whole, then removes the older ones: a readable one is there at any time."""
    target = work / f"checkpoint-{position.step:08d}"
    with staged_folder(target) as stage:
        safetensors.torch.save_file(dict(tensors), stage / TENSORS)
        write_json(stage / STATE, asdict(position))
    for old in sorted({*work.glob("checkpoint-*")} - {target}):
        shutil.rmtree(old)


def load(work: Path) -> tuple[Position, dict[str, Tensor]] | None:
    """The newest checkpoint; None if there is none.

    Raises:
        StorageError: it is damaged; names the file.
    """
    newest = max(work.glob("checkpoint-*"), default=None)
    if newest is None:
        return None
    state = read_json(newest / STATE)
    try:
        tensors = safetensors.torch.load_file(newest / TENSORS)
    except (safetensors.SafetensorError, OSError) as error:
        raise StorageError(f"{newest / TENSORS} is damaged: {error}; remove {newest} to go on") from error
    return Position(state["step"], state["drawn"], state["loss_sum"], tuple(state["curve"])), tensors


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes one JSON object, keys in the order given."""
    path.write_text(json.dumps(value, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON object.

    Raises:
        StorageError: it is missing or damaged; names the file.
    """
    with reported_as(StorageError, f"{path} is missing or damaged", OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise StorageError(f"{path} is damaged: expected an object")
    return value
