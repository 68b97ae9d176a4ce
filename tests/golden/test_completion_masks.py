"""What is learned of an instruction is what TRL's completion-only collator leaves in the loss on the same text.

`completion_masks.json` was made by `make_completion_masks.py` with TRL 0.15.2, which formats the texts itself. Tokens,
prompt length and learned tokens are equal, the closing token included, but for what follows; each has a test below.

* TRL looks for the template's marker and takes its last occurrence, so an answer that quotes the marker is not learned
  up to the quote. Here the boundary is known from the template.
* Where the tokenizer joins the template's newlines with an answer's own, TRL does not find the marker and the sample
  is not learned at all. Here prompt and response are never joined.
* GPT-2 keeps the two newlines of Llama 3's header as two tokens if a word follows, and as one token at the end of a
  prompt. TRL trains on the former and is asked with the latter; here the prompt has the latter in both.
* The names of special tokens in the data become special tokens with TRL, so that an answer may end in its middle.
  Here they are ordinary text.
* With PAD = EOS TRL leaves the closing token out of the loss. Here padding is known by length.
"""

from __future__ import annotations

import hashlib
import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from instruction_cases import CASES, ODD, Case, byte_tokenizer, dolly, gpt2_tokenizer, piece_tokenizer

from fedtailor.tasks.encoding import Encoded, Encoder, Sample

GOLDEN: dict[str, list[list[Any]]] = json.loads(
    Path(__file__).with_name("completion_masks.json").read_text(encoding="utf-8")
)
DATA = Path(os.environ.get("FEDTAILOR_DATA", ""))
HAS_DATA = bool(os.environ.get("FEDTAILOR_DATA")) and all((DATA / n).is_dir() for n in ("dolly", "tokenizers"))
EMBEDDED = [key.rpartition("/")[0] for key in GOLDEN if key.endswith("/cases") and not key.startswith("gpt2")]
WHY = "set FEDTAILOR_DATA to a folder that holds dolly/ and tokenizers/gpt2/ to test with them"
needs_data = pytest.mark.skipif(not HAS_DATA, reason=WHY)


@cache
def tokenizer_of(name: str) -> Any:
    return {"bytes": byte_tokenizer, "pieces": piece_tokenizer, "gpt2": lambda: gpt2_tokenizer(DATA)}[name]()


def ours(setting: str, cases: list[Case]) -> list[Encoded]:
    name, template = setting.split("/")
    found = Encoder(template, tokenizer_of(name), 4096).encode([Sample(*case) for case in cases])
    return [row for row in found if row is not None]


def digest(ids: Any) -> str:
    return hashlib.sha256(np.asarray(ids, dtype="<i4").tobytes()).hexdigest()[:12]


def rows(encoded: list[Encoded]) -> list[list[Any]]:
    return [[digest(e.ids), len(e.ids), e.prompt_tokens, len(e.ids), digest(e.ids[e.prompt_tokens :])] for e in encoded]


def odd(setting: str, name: str) -> tuple[list[Any], list[Any]]:
    at = list(ODD).index(name)
    return rows(ours(setting, [ODD[name]]))[0], GOLDEN[f"{setting}/odd"][at]


@pytest.mark.parametrize("setting", EMBEDDED)
def test_the_same_tokens_are_learned(setting: str) -> None:
    assert rows(ours(setting, CASES)) == GOLDEN[f"{setting}/cases"]


@needs_data
@pytest.mark.parametrize("template", ["alpaca", "alpaca_input", "chat"])
def test_the_same_tokens_of_200_real_samples_are_learned(template: str) -> None:
    assert len(GOLDEN[f"gpt2/{template}/dolly"]) == 200
    assert rows(ours(f"gpt2/{template}", dolly(DATA))) == GOLDEN[f"gpt2/{template}/dolly"]


@needs_data
def test_the_same_responses_of_200_real_samples_are_learned_where_newlines_end_the_prompt() -> None:
    """See `LOOSE` in the script."""
    found = rows(ours("gpt2/llama3", dolly(DATA)))
    stored = GOLDEN["gpt2/llama3/dolly"]
    assert [row[4] for row in found] == [row[4] for row in stored]
    # One newline token in the prompt instead of two learned ones.
    assert [(n + 1, start - 1) for _, n, start, _, _ in found] == [(n, start) for _, n, start, _, _ in stored]


@pytest.mark.parametrize("setting", ["bytes/alpaca", "pieces/alpaca"])
def test_an_answer_that_quotes_the_marker_is_learned_as_a_whole(setting: str) -> None:
    mine, trl = odd(setting, "marker in the response")
    assert mine[:2] == trl[:2]
    assert mine[2] < trl[2]
    mine, trl = odd(setting, "marker in the instruction")
    assert mine == trl


@pytest.mark.parametrize(
    ("setting", "name"),
    [
        ("bytes/llama3", "response begins with a newline"),
        ("bytes/chat", "response begins with a newline"),
        ("bytes/chat", "response begins with two newlines"),
    ],
)
def test_an_answer_that_begins_with_a_newline_is_learned(setting: str, name: str) -> None:
    mine, trl = odd(setting, name)
    assert trl[2] == trl[3] == 0
    learned = ours(setting, [ODD[name]])[0]
    text = tokenizer_of("bytes").decode(learned.ids[mine[2] :], skip_special_tokens=True)
    assert text == ODD[name].response


@pytest.mark.parametrize("setting", EMBEDDED)
def test_special_tokens_in_the_data_are_text(setting: str) -> None:
    mine, trl = odd(setting, "special tokens named in the data")
    assert mine[0] != trl[0]
    ids = ours(setting, [ODD["special tokens named in the data"]])[0].ids.tolist()
    tokenizer = tokenizer_of(setting.split("/")[0])
    assert ids.count(tokenizer.bos_token_id) == 1
    closings = {tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(["<|eot_id|>", "<|im_end|>"])}
    assert set(ids[mine[2] : -1]).isdisjoint(closings - {tokenizer.unk_token_id})
    assert ids[-1] in closings


@needs_data
def test_the_closing_token_is_learned_though_it_may_be_the_padding() -> None:
    with_pad, without = GOLDEN["gpt2/alpaca/cases"], GOLDEN["gpt2/alpaca/pad is eos"]
    assert [row[3] for row in without] == [row[3] - 1 for row in with_pad]
    tokenizer = gpt2_tokenizer(DATA)
    tokenizer.pad_token = tokenizer.eos_token
    found = Encoder("alpaca", tokenizer, 4096).encode([Sample(*case) for case in CASES])
    assert rows([row for row in found if row is not None]) == with_pad
