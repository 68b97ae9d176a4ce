"""Floating-point operations of a round of PF2LoRA and its baselines, as torch counts them, scaled from one step.

A client of one row plays one local step of each method on a RoBERTa of random weights; what torch's counter saw is
scaled to the round of PF2LoRA's Table 22 (8 clients, 10 steps of 16 rows of 512 tokens). All steps are taken with the
math attention kernel: the counter knows nothing of the CPU's fused one and would count no attention at all.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import RobertaConfig, RobertaForSequenceClassification

sys.path[:0] = [str(Path(__file__).parents[1])]

CLIENTS, STEPS, ROWS, TOKENS, LABELS = 8, 10, 16, 512, 3
PUBLISHED: Mapping[str, float] = {"homlora": 258.40, "hetlora": 272.60, "perfedavg_lora": 908.00, "pf2lora": 1202.40}
"""TFLOPs a round, Table 22; that of centralised LoRA is HOMLoRA's."""
BANDS: Mapping[str, tuple[float, float]] = {"perfedavg_lora": (3.1, 3.6), "pf2lora": (4.1, 4.7)}
"""What a round may cost as a multiple of HOMLoRA's: published 3.51 and 4.65, of matrix products alone 3.2 and 4.2."""


def roberta_base(layers: int = 12, hidden: int = 768, tokens: int = TOKENS) -> RobertaForSequenceClassification:
    """RoBERTa-base's shapes, or narrower ones, with random weights."""
    config = RobertaConfig(
        vocab_size=50_265, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=4 * hidden, max_position_embeddings=tokens + 2, type_vocab_size=1, pad_token_id=1,
        num_labels=LABELS,
    )  # fmt: skip
    torch.manual_seed(1)
    return RobertaForSequenceClassification(config)


def counted(work: Callable[[], Any]) -> int:
    """Operations of matrix products and attention, forward and backward, by the math kernel."""
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        work()
    return int(counter.get_total_flops())


def step_flops(name: str, model: RobertaForSequenceClassification, tokens: int = TOKENS, **how: Any) -> int:
    """Those of one local step of a method on one full row.

    Args:
        name: of the method.
        model: see `roberta_base`.
        tokens: of the row.
        how: keys of the method's section; defaults are the paper's.
    """
    from toy import ToyClient, toy_context

    from fedtailor.core.seeding import numpy_rng
    from fedtailor.federated.context import Lane
    from fedtailor.lanes.batches import Examples
    from fedtailor.lanes.net import LaneNet
    from fedtailor.methods import build_method
    from fedtailor.models.families import adapted_linears

    method = build_method(name, {"local_steps": 1, "batch_size": 1, **how}, 16)
    net = LaneNet(model, adapted_linears(model, ("query", "value", "classifier.dense", "classifier.out_proj")))
    ids = numpy_rng("flops", tokens).integers(5, 50_000, (1, tokens))
    row = Examples(ids, np.full(1, tokens, np.int64), np.zeros(1, np.int64))
    lane = Lane(ToyClient("seen/xx/00", "seen", "xx", 1, 1), row)  # type: ignore[arg-type]
    assert method.local_update is not None
    ctx = toy_context(net, [lane], method.adapter, method.modules)
    update = method.local_update
    try:
        return counted(lambda: update(ctx))
    finally:
        net.unbind()


def rows(layers: int = 12) -> list[list[str]]:
    """Per method: TFLOPs a round as counted and as published, both as multiples of HOMLoRA's, and its band."""
    from fedtailor.methods import METHODS

    found = {name: step_flops(name, roberta_base(layers)) * CLIENTS * STEPS * ROWS / 1e12 for name in PUBLISHED}
    lines = []
    for name, tflops in found.items():
        ratio, published, band = tflops / found["homlora"], PUBLISHED[name], BANDS.get(name)
        shown = [f"{tflops:,.2f}", f"{published:,.2f}", f"{ratio:.2f}x", f"{published / PUBLISHED['homlora']:.2f}x"]
        goal = (
            [f"{band[0]} to {band[1]}x", "met" if band[0] <= ratio <= band[1] else "**missed**"] if band else ["", ""]
        )
        lines.append([METHODS[name].title, *shown, *goal])
    return lines


def main() -> None:
    """Prints `rows` as JSON; ``--quick`` takes one layer."""
    print(json.dumps(rows(1 if "--quick" in sys.argv else 12)))


if __name__ == "__main__":
    main()
