"""Texts and pairs of texts to token ids, by the tokenizer's own rules."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from fedtailor.core.errors import ModelError

Ids = npt.NDArray[np.int32]


def check(tokenizer: PreTrainedTokenizerBase, max_length: int, paired: bool) -> None:
    """Checks that a tokenizer can serve.

    Raises:
        ModelError: it has no PAD token, or max_length leaves no room beside special tokens.
    """
    check_pad(tokenizer)
    special = tokenizer.num_special_tokens_to_add(pair=paired)
    if max_length <= special:
        raise ModelError(
            f"'task.max_length' is {max_length}, but the tokenizer adds {special} special tokens to a "
            f"{'pair' if paired else 'text'}"
        )


def check_pad(tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that batches can be padded.

    Raises:
        ModelError: the tokenizer has no PAD token.
    """
    if tokenizer.pad_token_id is None:
        raise ModelError(f"tokenizer {tokenizer.name_or_path!r} has no PAD token; set one before tokenising")


def encode(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], pairs: Sequence[str] | None, max_length: int
) -> tuple[list[Ids], Ids | None]:
    """Tokens of texts or pairs, cut to `max_length`; of a pair, the longer text is cut first.

    Returns:
        Ids of each text, int32 (length,) each; tokens of each pair's first segment, int32 (n,), or None for single
        texts and for tokenizers that do not tell segments apart.

    Raises:
        ModelError: the tokenizer's segments are not two in a row.
    """
    if not len(texts):
        return [], None
    segments = pairs is not None and "token_type_ids" in tokenizer.model_input_names
    encoded = tokenizer(
        list(texts),
        None if pairs is None else list(pairs),
        truncation="longest_first",
        max_length=max_length,
        add_special_tokens=True,
        return_attention_mask=False,
        return_token_type_ids=segments,
    )
    candidates = (tokenizer.unk_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    spare = next(token for token in candidates if token is not None)
    ids = [np.array(row or [spare], dtype=np.int32) for row in encoded["input_ids"]]
    if not segments:
        return ids, None
    return ids, np.array([_first(tokenizer, row) for row in encoded["token_type_ids"]], dtype=np.int32)


def _first(tokenizer: PreTrainedTokenizerBase, types: Sequence[int]) -> int:
    """Tokens of the first segment: types must be 0, ..., 0, 1, ..., 1."""
    count = sum(kind == 0 for kind in types)
    if list(types) != [0] * count + [1] * (len(types) - count):
        raise ModelError(
            f"tokenizer {tokenizer.name_or_path!r} marks the segments of a pair by {sorted(set(types))}; "
            "only zeros followed by ones are supported"
        )
    return count or 1
