"""Peak memory of a LoRA step with a wide vocabulary, logits whole and in pieces: ``logits_memory.py [WAY DTYPE]``.

A Llama of two narrow blocks and 64,000 tokens learns 4 texts of 1,024 tokens, 262 million logits. Without arguments
both ways are measured, each in a process of its own, as a JSON table.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

sys.path[:0] = [str(Path(__file__).parents[1])]

ROWS, TOKENS, VOCABULARY, WIDTH = 4, 1024, 64_000, 128


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(way: str, dtype: str) -> dict[str, float]:
    """What a step adds to the peak of one with a text of two tokens, in MB, its CPU seconds, and its loss."""
    from toy import toy_context, toy_lanes
    from transformers import LlamaConfig, LlamaForCausalLM

    from fedtailor.adapters.lora import LoraAdapter
    from fedtailor.core.scope import Scope
    from fedtailor.core.seeding import numpy_rng
    from fedtailor.lanes import loss as lanes_loss
    from fedtailor.lanes.batches import Examples, make_batch
    from fedtailor.lanes.net import LaneNet
    from fedtailor.models.families import adapted_linears
    from fedtailor.training.local import backward, cross_entropy_of
    from fedtailor.worker.worker import keep_freed_memory

    if way == "whole":
        lanes_loss.WHOLE_LOGITS = 2**60  # type: ignore[misc]
    keep_freed_memory()
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=TOKENS, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    net = LaneNet(model, adapted_linears(model, "all-linear"), dtype)
    ctx = toy_context(net, toy_lanes([1]), LoraAdapter(8, 2.0, Scope.EPHEMERAL))

    def step(tokens: int) -> float:
        ids = numpy_rng("logits", tokens).integers(5, VOCABULARY, (ROWS, tokens))
        full, first = np.full(ROWS, tokens, np.int64), np.ones(ROWS, np.int64)
        batch = make_batch([Examples(ids, full, 0 * full, prompt_length=first)], [np.arange(ROWS)], 0)
        return float(backward(ctx, batch, cross_entropy_of(ctx)))

    step(2)
    before, started = peak_mb(), time.process_time()
    loss = step(TOKENS)
    return {"mb": peak_mb() - before, "cpu_s": time.process_time() - started, "loss": loss}


def rows() -> list[list[str]]:
    """Per compute type: MB and CPU seconds of both ways, and how many times less memory the pieces take."""
    found = []
    for dtype in ("float32", "bfloat16"):
        whole, pieces = (_apart(way, dtype) for way in ("whole", "pieces"))
        if abs(whole["loss"] / pieces["loss"] - 1) > 1e-3:
            raise SystemExit(f"{dtype}: the losses differ, {whole['loss']} and {pieces['loss']}")
        found.append(
            [dtype, f"{whole['mb']:,.0f}", f"{pieces['mb']:,.0f}", f"{whole['mb'] / pieces['mb']:.1f}x"]
            + [f"{each['cpu_s']:.1f}" for each in (whole, pieces)]
        )
    return found


def _apart(way: str, dtype: str) -> dict[str, float]:
    words = [sys.executable, __file__, way, dtype]
    out = subprocess.run(words, env=dict(os.environ), check=True, capture_output=True, text=True).stdout
    return json.loads(out.splitlines()[-1])  # type: ignore[no-any-return]


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(measure(*sys.argv[1:]) if len(sys.argv) > 1 else rows()))


if __name__ == "__main__":
    main()
