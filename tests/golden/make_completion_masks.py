"""Writes completion_masks.json: what TRL's completion-only collator learns of the texts in `instruction_cases`.

Needs trl==0.15.2, transformers==4.49.0, torch, and FEDTAILOR_DATA; nothing of fedtailor. Run in an
environment of its own:

    python -m venv env && env/bin/pip install trl==0.15.2 transformers==4.49.0 torch
    FEDTAILOR_DATA=... env/bin/python tests/golden/make_completion_masks.py

The texts are formatted here, as scripts that use the collator do, with one BOS and no newline after the closing token.
Of every text: [hash of the token ids, their number, first learned one, end of the learned ones, hash of the learned].
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
from trl import DataCollatorForCompletionOnlyLM

sys.path.insert(0, str(Path(__file__).parents[1]))
from instruction_cases import CASES, ODD, Case, byte_tokenizer, dolly, gpt2_tokenizer, piece_tokenizer

ALPACA = """Below is an instruction that describes a task. Write a response that appropriately completes the request.

### Instruction:
{}\x20

### Response: {}{}"""
ALPACA_INPUT = """Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{}\x20

### Input:
{}\x20

### Response: {}{}"""
LLAMA3 = """<|start_header_id|>user<|end_header_id|>

{}<|eot_id|><|start_header_id|>assistant<|end_header_id|>

{}{}"""
MARKERS = {"alpaca": "### Response:", "alpaca_input": "### Response:"}
MARKERS |= {"llama3": "<|start_header_id|>assistant<|end_header_id|>\n\n", "chat": "<|im_start|>assistant\n"}
LOOSE = {"gpt2/llama3": 2}
"""GPT-2 does not keep the marker's two newlines together when a word follows, so that the collator does not find them.
It is given the marker without them; then they are learned too, and left out of the hash of what is learned."""


def written(template: str, tokenizer: Any, case: Case) -> str:
    if template == "chat":
        turns = [{"role": "user", "content": case.instruction}, {"role": "assistant", "content": case.response}]
        return str(tokenizer.apply_chat_template(turns, tokenize=False)).removesuffix("\n")
    if template == "llama3":
        return LLAMA3.format(case.instruction, case.response, "<|eot_id|>")
    first, gap, rest = case.instruction.partition("\n\n")
    if template == "alpaca_input" and gap:
        return ALPACA_INPUT.format(first, rest, case.response, tokenizer.eos_token)
    return ALPACA.format(case.instruction, case.response, tokenizer.eos_token)


def digest(ids: list[int]) -> str:
    return hashlib.sha256(np.array(ids, dtype="<i4").tobytes()).hexdigest()[:12]


def masks(template: str, tokenizer: Any, cases: list[Case], loose: int = 0) -> list[list[Any]]:
    marker = tokenizer.encode(MARKERS[template][: -loose or None], add_special_tokens=False)
    if tokenizer.convert_ids_to_tokens(marker)[0].startswith("▁"):
        # The blank that SentencePiece puts before a text is not there inside one.
        marker = tokenizer.encode("\n" + MARKERS[template], add_special_tokens=False)[2:]
    collator = DataCollatorForCompletionOnlyLM(marker, tokenizer=tokenizer)
    found: list[list[Any]] = []
    for case in cases:
        ids = tokenizer(written(template, tokenizer, case))["input_ids"]
        learned = np.flatnonzero(np.array(collator([{"input_ids": ids}])["labels"][0]) != -100)
        assert len(learned) == 0 or (np.diff(learned) == 1).all()
        start, end = (int(learned[0]), int(learned[-1]) + 1) if len(learned) else (0, 0)
        found.append([digest(ids), len(ids), start, end, digest(ids[start + loose : end])])
    return found


def main() -> None:
    data = Path(os.environ["FEDTAILOR_DATA"])
    tokenizers = {"bytes": byte_tokenizer(), "pieces": piece_tokenizer(), "gpt2": gpt2_tokenizer(data)}
    golden: dict[str, Any] = {}
    for name, tokenizer in tokenizers.items():
        for template in MARKERS:
            if name == "pieces" and template in ("llama3", "chat"):
                continue
            sets = {"cases": CASES, "odd": list(ODD.values())} | ({"dolly": dolly(data)} if name == "gpt2" else {})
            for kind, cases in sets.items():
                golden[f"{name}/{template}/{kind}"] = masks(
                    template, tokenizer, cases, LOOSE.get(f"{name}/{template}", 0)
                )
    tokenizer = gpt2_tokenizer(data)
    tokenizer.pad_token = tokenizer.eos_token
    golden["gpt2/alpaca/pad is eos"] = masks("alpaca", tokenizer, CASES)
    rows = ",\n".join(f" {json.dumps(key)}: {json.dumps(value)}" for key, value in sorted(golden.items()))
    Path(__file__).with_name("completion_masks.json").write_text("{\n" + rows + "\n}\n", encoding="utf-8")


main()
