"""Classifier, span extractor or causal language model and its tokenizer, from a folder or hub id, never from pickle."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from fedtailor.core.errors import ModelError
from fedtailor.core.files import staged_folder
from fedtailor.core.seeding import torch_rng
from fedtailor.models.families import check_kind
from fedtailor.tasks.source import TaskKind

if TYPE_CHECKING:  # transformers' base class takes seconds, and who only reads configs and tokens needs none
    from transformers import PreTrainedModel

Quantisation = Literal["8bit", "4bit"]

SPAN_ENDS = ("start", "end")
"""What the two outputs of a span extractor's head are for."""


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
def model_errors(source: str | Path, what: str) -> Iterator[None]:
    """Turns whatever the libraries raise for a bad source into one `ModelError` that names it."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(f"{source}: cannot load {what}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """What an error says first, or its type."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def load_classifier(
    source: str | Path,
    labels: Sequence[str],
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    *,
    attn_implementation: str | None = None,
    replace_head: bool = False,
) -> PreTrainedModel:
    """Loads a base model with a classification head, in evaluation mode.

    A checkpoint without a head (mBERT as published) gets a fresh one: matrices N(0, ``initializer_range``),
    biases 0, drawn from ``seed`` alone, so that every stage and process starts from the same numbers. The
    global random state is neither read nor changed.

    Args:
        source: folder or hub id; weights must be safetensors.
        labels: C class names in the order of their ids, written to the config; the head ends in C outputs.
        dtype: type of all weights.
        seed: run seed of a fresh head.
        attn_implementation: ``eager``, ``sdpa``, ...; default: transformers' choice.
        replace_head: a head for other labels is replaced by a fresh one instead of being refused.

    Raises:
        ModelError: nothing loadable there, the body lacks weights or has other shapes than the config says,
            or the head was made for other labels.
    """
    if not labels:
        raise ModelError(f"{source}: the task has no labels, which a classifier needs")
    auto = AutoModelForSequenceClassification
    return _with_head(auto, source, labels, dtype, seed, attn_implementation, replace_head)


def load_extractor(
    source: str | Path, dtype: torch.dtype = torch.float32, seed: int = 0, *, attn_implementation: str | None = None
) -> PreTrainedModel:
    """Loads a base model with a head that scores every token as a span's first and last one, in evaluation mode.

    A checkpoint without such a head gets a fresh one; see `load_classifier`, also for arguments and errors.
    """
    return _with_head(AutoModelForQuestionAnswering, source, SPAN_ENDS, dtype, seed, attn_implementation, True)


def _with_head(
    auto: Any, source: str | Path, labels: Sequence[str], dtype: torch.dtype, seed: int, attention: str | None,
    replace_head: bool,
) -> PreTrainedModel:  # fmt: skip
    config = load_config(source)
    stored = [str(name) for _, name in sorted(dict(config.id2label or {}).items())]
    name_labels(config, labels)
    model, missing, misshapen = _read(auto, source, config, dtype, attention)
    absent = missing | misshapen
    # A masked-language-model checkpoint has no pooler; it is then as new as the classifier.
    body, pooler = model.base_model_prefix + ".", model.base_model_prefix + ".pooler."
    _refuse_absent(model, source, {name for name in absent if name.startswith(body) and not name.startswith(pooler)})
    unnamed = stored == [f"LABEL_{i}" for i in range(len(stored))]
    same = (len(stored) == len(labels) and (unnamed or stored == list(labels))) or labels is SPAN_ENDS
    if absent or not same:
        head = {name for name, _ in model.named_parameters() if not name.startswith(body)}
        if head - missing and not replace_head:
            raise ModelError(
                f"{source}: the classification head was made for the labels {stored}, the task has {list(labels)}"
            )
        _initialise(model, head | missing, float(getattr(config, "initializer_range", 0.02)), seed)
    return model.eval()  # type: ignore[no-any-return]


def name_labels(config: PretrainedConfig, names: Sequence[str]) -> None:
    """Gives a config a task's class names, in the order of their ids."""
    config.id2label = dict(enumerate(names))
    config.label2id = {name: i for i, name in enumerate(names)}


def _read(
    auto: Any, source: str | Path, config: PretrainedConfig, dtype: torch.dtype, attention: str | None, **options: Any
) -> tuple[Any, set[str], set[str]]:
    """A model from safetensors, and the names of the weights that are missing and of those of another shape."""
    if attention:
        options["attn_implementation"] = attention
    # transformers draws missing weights from the global generator, which is not ours to move.
    with model_errors(source, "model weights"), quiet(), torch.random.fork_rng(devices=[]):
        model, info = auto.from_pretrained(
            str(source),
            config=config,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    return model, set(info["missing_keys"]), {name for name, *_ in info["mismatched_keys"]}


def _refuse_absent(model: PreTrainedModel, source: str | Path, names: set[str]) -> None:
    if names:
        raise ModelError(
            f"{source}: {len(names)} weights of {type(model).__name__} are missing or have another shape than "
            f"config.json says, e.g. {', '.join(sorted(names)[:3])}"
        )


def _initialise(model: nn.Module, names: set[str], spread: float, seed: int) -> None:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name in names and weight.dim() > 1:
                drawn = torch.empty(weight.shape).normal_(0.0, spread, generator=torch_rng(seed, "model", "head", name))
                weight.copy_(drawn)
            elif name in names and name.endswith("bias"):
                weight.zero_()


def load_tokenizer(source: str | Path, *, padded: bool = True) -> PreTrainedTokenizerBase:
    """Loads a tokenizer that can pad, unless ``padded`` is False: then it may lack a padding token.

    Raises:
        ModelError: there is none, or it has no padding token.
    """
    with model_errors(source, "a tokenizer"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(str(source), trust_remote_code=False)
    if padded and tokenizer.pad_token_id is None:
        raise ModelError(
            f"{source}: its tokenizer has no padding token, which batches need; set 'pad_token' in its "
            f"tokenizer_config.json (for example to the unknown or end-of-text token)"
        )
    return tokenizer


def load_config(source: str | Path, revision: str | None = None) -> PretrainedConfig:
    """Loads ``config.json`` of a folder or hub id.

    Raises:
        ModelError: it is missing, unreadable, or of an architecture that transformers does not know.
    """
    with model_errors(source, "a model config"), quiet():
        config: PretrainedConfig = AutoConfig.from_pretrained(
            str(source), revision=revision or "main", trust_remote_code=False
        )
    return config


def load_causal(
    source: str | Path,
    dtype: torch.dtype = torch.float32,
    *,
    attn_implementation: str | None = None,
    quantisation: Quantisation | None = None,
) -> PreTrainedModel:
    """Loads a causal language model, in evaluation mode; each weight goes into ``dtype`` as it is read.

    Args:
        source: folder or hub id; weights must be safetensors, in any type.
        dtype: type of the weights; with ``quantisation`` of those that are not quantised.
        attn_implementation: ``eager``, ``sdpa``, ...; default: transformers' choice.
        quantisation: keep linear layers but the output embedding in 8 bits (Dettmers et al., 2022) or in 4-bit
            NormalFloat (Dettmers et al., 2023) on the current GPU; needs bitsandbytes.

    Raises:
        ModelError: nothing loadable there, not a causal language model, one whose scores are not its output embedding
            of the last hidden state, or weights that are missing or have other shapes than config.json says.
    """
    config = load_config(source)
    check_kind(config, "generation", str(source))
    options: dict[str, Any] = {}
    if quantisation:
        # It would say at every layer and step that it rounds what it is given to float16 first.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        four = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
        bits: Any = BitsAndBytesConfig
        options["quantization_config"] = bits(**({"load_in_8bit": True} if quantisation == "8bit" else four))
    model, missing, misshapen = _read(AutoModelForCausalLM, source, config, dtype, attn_implementation, **options)
    _refuse_absent(model, source, missing | misshapen)
    return model.eval()  # type: ignore[no-any-return]


def load_base(
    folder: str | Path,
    kind: TaskKind,
    labels: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    *,
    quantisation: Quantisation | None = None,
    **how: Any,
) -> PreTrainedModel:
    """Loads the model of a task's kind, in evaluation mode.

    Args:
        folder: as `hub.materialise` or a base stage wrote it.
        kind: ``classification`` (`load_classifier`), ``extraction`` (`load_extractor`), ``generation`` (`load_causal`)
            or ``regression`` (the model ``linear``).
        labels: class names in the order of their ids; without meaning for others.
        dtype: type of the weights.
        quantisation: of a language model only.
        how: keywords of all.

    Raises:
        ModelError: see `load_classifier` and `load_causal`.
    """
    if kind == "generation":
        return load_causal(folder, dtype, quantisation=quantisation, **how)
    if kind == "regression":
        from fedtailor.models.linear import LinearRegressor

        with model_errors(folder, "model weights"), quiet():
            made: PreTrainedModel = LinearRegressor.from_pretrained(str(folder), dtype=dtype, use_safetensors=True)
        return made.eval()  # type: ignore[no-any-return,no-untyped-call]
    if kind == "extraction":
        return load_extractor(folder, dtype, **how)
    return load_classifier(folder, labels, dtype, **how)
