"""Which token fills rows, where a tokenizer names none: FedP2EFT A.2."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from transformers import PreTrainedTokenizerBase

PAD = "<pad>"


@dataclass(frozen=True)
class Padding:
    """A tokenizer's padding token, and how it came by it.

    Args:
        token: as text.
        id: its number.
        how: ``own`` (the tokenizer named it), ``unknown`` (the token for unknown text serves, as for MobileLLaMA) or
            ``added`` (a new token `PAD`, as for Llama 3.2).
    """

    token: str
    id: int
    how: Literal["own", "unknown", "added"]


def settle_padding(tokenizer: PreTrainedTokenizerBase) -> Padding:
    """Gives a tokenizer a padding token, in place, if it has none.

    It becomes the unknown token where there is one that is nothing else, or a new one: also where the tokenizer has
    reserved tokens that nobody uses (Llama 3.2), because the paper adds ``<pad>``.
    """
    how: Literal["own", "unknown", "added"] = "own"
    if tokenizer.pad_token_id is None:
        unknown = tokenizer.unk_token
        if unknown is not None and unknown not in (tokenizer.bos_token, tokenizer.eos_token):
            tokenizer.pad_token, how = unknown, "unknown"
        else:
            tokenizer.add_special_tokens({"pad_token": PAD})
            how = "added"
    return Padding(str(tokenizer.pad_token), int(tokenizer.pad_token_id), how)
