"""Lanes against one client at a time, where launches and Python dominate: 8 texts x 8 tokens a step."""

from __future__ import annotations

import json
import time
from statistics import median

import torch
from toy import ToyClient, toy_context, toy_net

from fedtailor.federated.context import Lane
from fedtailor.federated.method import Method
from fedtailor.lanes.batches import Examples
from fedtailor.methods import build_method

CLIENTS, EXAMPLES, TOKENS, REPEATS = 16, 64, 8, 5
TRAINING = {"batch_size": 8, "epochs": 1}


def lanes() -> list[Lane]:
    import numpy as np

    from fedtailor.core.seeding import numpy_rng

    made = []
    for number in range(CLIENTS):
        rng = numpy_rng("bench", number)
        ids = rng.integers(5, 100, (EXAMPLES, TOKENS))
        data = Examples(ids, np.full(EXAMPLES, TOKENS), rng.integers(0, 4, EXAMPLES))
        made.append(Lane(ToyClient(f"seen/xx/{number:02d}", "seen", "xx", EXAMPLES, 1), data))  # type: ignore[arg-type]
    return made


def seconds(method: Method, groups: list[list[Lane]]) -> float:
    net = toy_net(torch.float32, hidden_size=64, intermediate_size=128)
    contexts = [toy_context(net, group, method.adapter, method.modules, r_max=4) for group in groups]
    total = 0.0
    for ctx in contexts:
        net.unbind()
        assert method.adapter is not None
        method.adapter.bind(net, ctx.params)
        start = time.perf_counter()
        assert method.local_update is not None
        method.local_update(ctx)
        total += time.perf_counter() - start
    return total


def lanes_rows() -> list[list[str]]:
    rows = []
    for name, config in (
        ("fedavg, LoRA r = 8", ("fedavg", {"adapter": "lora", **TRAINING})),
        ("fedp2eft, r_init = 8", ("fedp2eft", {"stage1": TRAINING})),
    ):
        method, clients = build_method(*config, 4), lanes()
        seconds(method, [clients[:2]])
        alone, together = [], []
        for _ in range(REPEATS):
            alone.append(seconds(method, [[lane] for lane in clients]))
            together.append(seconds(method, [clients]))
        a, b = median(alone), median(together)
        rows.append([name, f"{a:.2f}", f"{b:.2f}", f"{a / b:.2f}x"])
    return rows


def main() -> None:
    torch.set_num_threads(1)
    print(json.dumps(lanes_rows()))


if __name__ == "__main__":
    main()
