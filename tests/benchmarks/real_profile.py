"""What a stage on real weights is made of: ``real_profile.py MODEL WORK DTYPE ATTENTION FOLDER``, on one thread.

A stage is opened as a worker opens it, and sixteen clients (of SmolLM2 four where nothing else is said) go through a
step or two. Prints JSON: CPU seconds, tokens that were read or written, operations of matrix products as torch counts
them, and shares of the operators' time by torch's profiler. The three come from three passes after a first one, since
each disturbs the others.
"""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flops import counted
from profile_work import WORKS, Work

from fedtailor.core.messages import StageSpec
from fedtailor.core.settings import DecodingConfig, EngineConfig, ModelConfig
from fedtailor.models.load import load_tokenizer
from fedtailor.models.packaged import packaged_folder
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.task import prepare
from fedtailor.tasks.tokens import TokenData, tokenise
from fedtailor.worker.open_stage import OpenStage
from fedtailor.worker.scoring import scores_on_test, scores_on_train

MODELS: Mapping[str, Mapping[str, Any]] = {
    "minilm": {
        "task": TaskConfig(
            name="dolly_category", path="sample", languages=("eng",), clients_per_language=48, alpha=100.0
        ),
        "tokens": 64, "batch": 16, "clients": 16,
    },
    "smollm2-135m": {
        "task": TaskConfig(
            name="dolly", path="sample", languages=("general_qa", "open_qa", "brainstorming", "classification"),
            clients_per_language=4, max_examples=4, test_fraction=0.5,
        ),
        "tokens": 256, "batch": 2, "clients": 4,
    },
}  # fmt: skip
NEW_TOKENS = 16

SHARES: Mapping[str, str] = {
    "products": r"^(add)?mm$|mkldnn|linear$",
    "batched products": r"bmm|scaled_dot|flash",
    "copies, casts": r"copy_|clone|cat$|fill_|zero_|gather|scatter|index|empty|stack|repeat",
    "activations, norms, softmax": r"gelu|silu|tanh|sigmoid|softmax|layer_norm|rsqrt|pow|mean|nll",
    "additions, multiplications": r"add|mul|sub|div|neg|sum|where|square|sqrt|lerp",
}  # fmt: skip
"""Torch's operators by the first pattern that their name has; the rest, and what is between them, is *other*."""


def opened(model: str, work: Work, dtype: str, attention: str, folder: Path) -> tuple[OpenStage, list[str]]:
    """The stage, and its clients: those with more rows first, as workers order them."""
    shape, config = MODELS[model], _resolved(work, MODELS[model]["batch"])
    data, lanes = _tokens(model, folder), {"max_lanes": work.lanes, "token_budget": 2**14} if work.lanes else {}
    stage = OpenStage.open(
        StageSpec(
            key=f"{work.kind}/{work.method}/seed0", kind=work.kind, method=work.method, method_config=config, seed=0,
            model_dir=str(packaged_folder(model)), data_dir=str(folder / "tokens"), r_max=max(work.budgets),
            budgets=work.budgets if work.kind == "personalise" else (), rounds=1, cohort=4,
            model=ModelConfig(name=model, attention=None if attention == "usual" else attention),
            engine=EngineConfig(dtype=dtype, **lanes),
            decoding=DecodingConfig(max_new_tokens=NEW_TOKENS),
        )
    )  # fmt: skip
    ids = sorted((c.id for c in data.pool("seen")), key=lambda name: (-data.client(name).n_train, name))
    return stage, ids[: work.clients or shape["clients"]]


def _resolved(work: Work, batch: int) -> dict[str, Any]:
    """The method's section with the model's batches, nested sections included."""
    if work.method == "fedp2eft":
        return {name: {**work.config.get(name, {}), "batch_size": batch} for name in ("stage1", "finetune")}
    return {**work.config, "batch_size": batch} if work.method != "base" else {}


def _tokens(model: str, folder: Path) -> TokenData:
    shape = MODELS[model]
    cfg = shape["task"].model_copy(update={"max_length": shape["tokens"]})
    texts = prepare(cfg, 0, folder / "texts")
    return tokenise(texts, load_tokenizer(packaged_folder(model)), shape["tokens"], folder / "tokens", cfg.template)


def played(stage: OpenStage, work: Work, clients: Sequence[str]) -> Callable[[], None]:
    """What is timed."""

    def contexts() -> Iterator[Any]:
        shared = None if work.kind == "personalise" else torch.from_numpy(stage.info().initial)
        for group in stage.groups(clients):
            yield stage.context([clients[i] for i in group], 0, shared, {}, lambda lane, text: None)

    def run() -> None:
        for ctx in contexts():
            if work.kind == "rounds":
                assert stage.method.local_update is not None
                stage.method.local_update(ctx)
                continue
            made = stage.method.personaliser(ctx)
            if work.then != "nothing":
                ctx.net.train_mode(False)
                (scores_on_train if work.then == "read" else scores_on_test)(stage, made)

    return run


def tokens_of(stage: OpenStage, work: Work, clients: Sequence[str]) -> int:
    """Tokens that are read once by each budget; of answers those that are written at most."""
    if work.then == "answer":
        return NEW_TOKENS * sum(len(stage.data.examples(name, "test")) for name in clients)
    return len(work.budgets) * sum(int(stage.data.examples(name, "train").lengths.sum()) for name in clients)


def shares(run: Callable[[], None]) -> dict[str, float]:
    """Part of the operators' time by kind."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as seen:
        run()
    found: dict[str, float] = dict.fromkeys([*SHARES, "other"], 0.0)
    for event in seen.key_averages():
        own = event.key.removeprefix("aten::") if event.key.startswith("aten::") else ""
        kind = next((kind for kind, pattern in SHARES.items() if re.search(pattern, own)), "other")
        found[kind] += event.self_cpu_time_total
    total = sum(found.values())
    return {kind: value / total for kind, value in found.items()}


def main() -> None:
    model, name, dtype, attention, folder = sys.argv[1:6]
    torch.set_num_threads(1)
    work = WORKS[name]
    stage, clients = opened(model, work, dtype, attention, Path(folder))
    run = played(stage, work, clients)
    run()  # clients' features are computed once and kept
    operations = counted(run)
    began = time.process_time()
    run()
    cpu = time.process_time() - began
    print(
        json.dumps({"cpu": cpu, "tokens": tokens_of(stage, work, clients), "flops": operations, "shares": shares(run)})
    )


if __name__ == "__main__":
    main()
