"""One side of a comparison on real weights: ``real_side.py MODEL WORK SIDE DTYPE ATTENTION SIZE FOLDER``.

All sides see the same rows of the same clients: instructions of the Dolly sample, told apart (an encoder) or answered
(a language model). One thread. Prints JSON: seconds of each repetition, tokens that were read, mean loss,
operations of matrix products and attention (counted in a pass of its own, which is not timed).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from flops import counted
from plain_model import LoraLinear
from torch import nn
from torch.nn import functional

from fedtailor.core.messages import StageSpec
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import DecodingConfig, EngineConfig, ModelConfig
from fedtailor.evaluation.decoding import Decoding, answer_all
from fedtailor.lanes.batches import Examples, training_indices
from fedtailor.models.load import load_base, load_tokenizer
from fedtailor.models.packaged import packaged_folder
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.task import prepare
from fedtailor.tasks.tokens import TokenData, tokenise
from fedtailor.worker.open_stage import OpenStage

MODELS = {
    "minilm": SimpleNamespace(task="dolly_category", tokens=64, rows=0, batch=16, new=0),
    "smollm2-135m": SimpleNamespace(task="dolly", tokens=128, rows=8, batch=4, new=32),
}
CLIENTS, RANK, BUDGETS, RATE, SEED, REPEATS = 8, 8, (2, 4, 8, 16), 1e-3, 0, 2
Run = Callable[[], tuple[int, float]]
"""Does the work once; tokens that it read or wrote, and the mean loss."""


def clients(model: str, folder: Path, quick: bool) -> TokenData:
    """Eight seen clients with equally many rows to learn from, and some to answer."""
    shape = MODELS[model]
    if shape.new:
        languages = ("general_qa", "open_qa", "brainstorming", "classification")
        dealt: dict[str, Any] = {"languages": languages, "clients_per_language": 2}
        dealt["max_examples"] = 6 if quick else shape.rows + shape.rows // 2
    else:
        dealt = {"languages": ("eng",), "clients_per_language": 24 if quick else CLIENTS, "alpha": 100.0}
    cfg = TaskConfig(name=shape.task, path="sample", max_length=shape.tokens, test_fraction=0.33, **dealt)
    texts = prepare(cfg, SEED, folder / "texts")
    return tokenise(texts, load_tokenizer(packaged_folder(model)), shape.tokens, folder / "tokens", cfg.template)


def seen(data: TokenData) -> list[str]:
    """Ids, those with more rows first, as workers order them."""
    ids = [entry.id for entry in data.clients if entry.pool == "seen"]
    return sorted(ids, key=lambda name: (-data.client(name).n_train, name))[:CLIENTS]


# ---- ours ----------------------------------------------------------------------------------------------------------


def ours(model: str, work: str, dtype: str, attention: str | None, data: TokenData, folder: Path) -> Run:
    shape = MODELS[model]
    budgets = BUDGETS if work == "budgets" else (RANK,)
    config = {"lr": RATE, "epochs": 1, "batch_size": shape.batch}
    stage = OpenStage.open(
        StageSpec(
            key="personalise/lora/seed0", kind="personalise", method="lora", method_config=config, seed=SEED,
            model_dir=str(packaged_folder(model)), data_dir=str(folder / "tokens"), r_max=max(budgets),
            budgets=budgets, model=ModelConfig(name=model, attention=attention), engine=EngineConfig(dtype=dtype),
        )
    )  # fmt: skip
    names = seen(data)[: 2 if work == "budgets" else CLIENTS]

    def trained() -> Iterator[Any]:
        for group in stage.groups(names):
            ctx = stage.context([names[i] for i in group], 0, None, {}, lambda lane, text: None)
            yield ctx, stage.method.personaliser(ctx)

    def train() -> tuple[int, float]:
        losses = [float(loss) for _, made in trained() for loss in made.metrics["train_loss"]]
        return tokens_of(data, names) * len(budgets), float(np.mean(losses))

    made = list(trained()) if work == "answer" else []

    def answer() -> tuple[int, float]:
        written = 0
        for ctx, _ in made:
            prompts = [prompts_of(data, lane.client.id) for lane in ctx.lanes]
            found = answer_all(stage.net, prompts, decoding(model, data), 2**14)
            written += sum(len(tokens) for lane in found for tokens in lane)
        return written, 0.0

    return answer if work == "answer" else train


# ---- plain ---------------------------------------------------------------------------------------------------------


def plain(model: str, work: str, side: str, dtype: str, attention: str | None, data: TokenData) -> Run:
    shape, names = MODELS[model], seen(data)[: 2 if work == "budgets" else CLIENTS]
    budgets = BUDGETS if work == "budgets" else (RANK,)
    computed = torch.autocast("cpu", dtype=torch.bfloat16) if dtype == "bfloat16" else nullcontext()

    def fresh(rank: int) -> nn.Module:
        base = load_base(packaged_folder(model), data.kind, data.labels, attn_implementation=attention)
        return with_peft(base, rank, data.kind) if side == "peft" else with_lora(base, rank)

    nets = {rank: fresh(rank) for rank in budgets}
    start = {rank: {name: p.detach().clone() for name, p in trainable(net)} for rank, net in nets.items()}

    def train() -> tuple[int, float]:
        losses = []
        for name in names:
            for rank, net in nets.items():
                with torch.no_grad():
                    for key, parameter in trainable(net):
                        parameter.copy_(start[rank][key])
                losses.append(one_epoch(net, data.examples(name, "train"), shape.batch, name, data, computed))
        return tokens_of(data, names) * len(budgets), float(np.mean(losses))

    def answer() -> tuple[int, float]:
        how, written = decoding(model, data), 0
        for name in names:
            prompts = prompts_of(data, name)
            width = max(map(len, prompts))
            ids = torch.full((len(prompts), width), data.pad_id)
            for row, prompt in zip(ids, prompts, strict=True):
                row[width - len(prompt) :] = torch.from_numpy(prompt)
            mask = torch.ones_like(ids)
            for row, prompt in zip(mask, prompts, strict=True):
                row[: width - len(prompt)] = 0
            with torch.no_grad(), computed:
                out = nets[RANK].generate(  # type: ignore[operator]
                    input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=shape.new,
                    eos_token_id=list(how.stop_ids), pad_token_id=data.pad_id,
                )  # fmt: skip
            written += sum(len(how.bare(row)) for row in out[:, width:].tolist())
        return written, 0.0

    return answer if work == "answer" else train


def one_epoch(
    net: nn.Module, rows: Examples, batch: int, name: str, data: TokenData, computed: AbstractContextManager[Any]
) -> float:
    """One epoch of Adam, in the order of rows that the platform takes; the mean loss of the steps."""
    optimizer = torch.optim.Adam([p for _, p in trainable(net)], lr=RATE)
    losses = []
    for index in training_indices(
        len(rows), 1, batch, [numpy_rng(SEED, "personalise", 0, name, "order/personalise", 0)]
    ):
        part = rows.rows(index)
        longest = int(part.lengths.max())
        ids = torch.from_numpy(part.input_ids[:, :longest])
        mask = (torch.arange(longest) < torch.from_numpy(part.lengths).unsqueeze(1)).long()
        optimizer.zero_grad()
        with computed:
            logits = net(input_ids=ids, attention_mask=mask).logits
        if part.prompt_length is None:
            loss = functional.cross_entropy(logits.float(), torch.from_numpy(part.labels))
        else:
            learned = (torch.arange(longest) >= torch.from_numpy(part.prompt_length).unsqueeze(1)) & mask.bool()
            labels = ids.where(learned, torch.tensor(-100))
            loss = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), labels[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    return float(np.mean(losses))


def with_lora(base: nn.Module, rank: int) -> nn.Module:
    """The plain way to write it, on the layers that the platform adapts."""
    from fedtailor.models.families import adapted_linears

    for parameter in base.parameters():
        parameter.requires_grad_(False)
    for name, layer in adapted_linears(base, "all-linear"):
        wrapped = LoraLinear(layer)  # type: ignore[arg-type]
        wrapped.a = nn.Parameter(torch.randn(rank, layer.in_features) / layer.in_features**0.5)  # type: ignore[union-attr]
        wrapped.b = nn.Parameter(torch.zeros(layer.out_features, rank))  # type: ignore[union-attr]
        base.set_submodule(name, wrapped)
    return base.eval()


def with_peft(base: nn.Module, rank: int, kind: str) -> nn.Module:
    """Peft's LoRA on the same layers, called as it is used without a trainer."""
    from peft import LoraConfig, get_peft_model

    from fedtailor.models.families import adapted_linears

    names = [name for name, _ in adapted_linears(base, "all-linear")]
    made: nn.Module = get_peft_model(base, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=names))  # type: ignore[arg-type]
    return made.eval()


def trainable(net: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, p) for name, p in net.named_parameters() if p.requires_grad]


# ---- shared --------------------------------------------------------------------------------------------------------


def tokens_of(data: TokenData, names: Sequence[str]) -> int:
    return int(sum(data.examples(name, "train").lengths.sum() for name in names))


def prompts_of(data: TokenData, name: str) -> list[np.ndarray]:
    rows = data.examples(name, "test")
    assert rows.prompt_length is not None
    return [ids[:n] for ids, n in zip(rows.input_ids, rows.prompt_length, strict=True)]


def decoding(model: str, data: TokenData) -> Decoding:
    stops = tuple(map(int, data.manifest["stop_ids"]))
    closing = tuple(map(int, data.manifest["closing"]))
    return Decoding(DecodingConfig(max_new_tokens=MODELS[model].new), stops, data.pad_id, None, closing)


def main() -> None:
    model, work, side, dtype, attention, quick, folder = sys.argv[1:8]
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    kernel = None if attention == "usual" else attention
    data = clients(model, Path(folder), quick == "quick")
    if side == "ours":
        run = ours(model, work, dtype, kernel, data, Path(folder))
    else:
        run = plain(model, work, side, dtype, kernel, data)
    seconds, cpu, found = [], [], (0, 0.0)
    operations = counted(run)
    for _ in range(1 if quick == "quick" else REPEATS):
        start, used = time.perf_counter(), time.process_time()
        found = run()
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - used)
    print(json.dumps({"seconds": seconds, "cpu": cpu, "tokens": found[0], "loss": found[1], "flops": operations}))


if __name__ == "__main__":
    main()
