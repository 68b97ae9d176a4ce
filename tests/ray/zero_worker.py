"""A worker that trains BayesTune-LoRA on a small LLaMA, alone or as one of several ranks, with faults on order."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).parents[1]))

from toy import toy_context, toy_lanes, with_prompts
from transformers import LlamaConfig, LlamaForCausalLM

from fedtailor.adapters.bayestune_lora import BayesTuneLora
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageInfo, StageSpec, metric_row
from fedtailor.core.scope import Ranks, Scope
from fedtailor.core.settings import EngineConfig, ZeroConfig
from fedtailor.lanes import loss
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.net import LaneNet
from fedtailor.methods import build_method
from fedtailor.models.families import adapted_linears
from fedtailor.models.zero import base_bytes, load_partitioned
from fedtailor.training.bayestune import RankSearchConfig, search_ranks
from fedtailor.worker.worker import check_answer

SEARCH = RankSearchConfig(lr=1e-3, lambda_lr=1e-2, epochs=5, batch_size=8, alpha_s=1.0)
BUDGETS = (2, 4)


def make_base(folder: Path) -> None:
    """A LLaMA of 0.6 M random weights, embeddings tied, in several files."""
    config = LlamaConfig(
        vocab_size=120, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=64, tie_word_embeddings=True, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(11)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.data.normal_(0, 0.1)
    model.save_pretrained(folder, max_shard_size="500KB")


def zero_stage(folder: Path, ranks: int = 2, **faults: Any) -> StageSpec:
    """A stage on the base in ``folder``."""
    return StageSpec(
        key="personalise/bayestune_lora/seed3", kind="personalise", method="bayestune_lora", seed=3,
        method_config={"folder": str(folder), **faults}, model_dir=str(folder / "base"), data_dir="",
        budgets=BUDGETS, r_max=4, engine=EngineConfig(token_budget=512, max_lanes=1, zero=ZeroConfig(ranks=ranks)),
    )  # fmt: skip


class ZeroWorker:
    """Five steps of the rank search on one client of eight examples, then its adapters."""

    def __init__(self, ranks: Ranks | None = None) -> None:
        self._ranks = ranks
        if ranks is not None:  # of a process of its own: responses are scored in pieces, whose weight is gathered once
            loss.WHOLE_LOGITS, loss.PIECE_LOGITS = 1_000, 500  # type: ignore[misc]

    def open(self, spec: StageSpec) -> StageInfo:
        self._config = spec.method_config
        if self._config.get("no_gather"):
            _switch_gathering_off()
        folder = Path(spec.model_dir)
        if self._ranks is None:
            model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
            self._net = LaneNet(model, adapted_linears(model, "all-linear"))
        else:
            model, probe = load_partitioned(folder, "generation", (), torch.float32, self._ranks.size)
            linears = adapted_linears(model, "all-linear")
            self._net = LaneNet(model, linears, ranks=self._ranks, verify=probe.check)
        self._spec = spec
        return StageInfo((), (), np.zeros(0, np.float32), self._net.modules, 8)

    def run(self, job: SegmentJob, shared: FloatArray | None) -> SegmentResult:
        result = SegmentResult(job.stage, job.round, job.index, job.attempt, valid=job.clients)
        [lane] = with_prompts(toy_lanes([8]))
        ctx = toy_context(self._net, [lane], BayesTuneLora(8), budgets=BUDGETS, r_max=4)
        start = torch.full((1, len(self._net.adapted), 8), 0.05)
        self._misbehave(job)
        lam, metrics = search_ranks(ctx, start, SEARCH)
        result.tensors = {"lambda": lam.numpy(), "a_b": ctx.params.flat(Scope.EPHEMERAL).detach().numpy().copy()}
        loss = float(metrics["train_loss"])
        result.metrics = [metric_row(client=job.clients[0], metric="train_loss", value=loss)]
        self._export(result, ctx, job.clients[0])
        if self._ranks is not None:
            self._net.verify()
            check_answer(result, self._net)
        # Not part of the answer: each rank says its own.
        result.host = {"base_bytes": base_bytes(self._net.model)}
        return result

    def _export(self, result: SegmentResult, ctx: Any, client: str) -> None:
        method = build_method("bayestune_lora", self._personal(), 4)
        made = method.personaliser(ctx)
        batch = make_batch([lane.train for lane in made.lanes], [np.arange(8)] * 2, 0)
        result.tensors["logits"] = made.logits(batch).detach().numpy()
        for lane, budget in enumerate(BUDGETS):
            result.adapters[f"r{budget}/{client}"] = made.export(lane, "base")  # type: ignore[misc]
        if self._config.get("empty_export"):
            from safetensors.torch import load, save

            files = result.adapters[f"r2/{client}"]
            tensors = {name: value[:0] for name, value in load(files["adapter_model.safetensors"]).items()}
            result.adapters[f"r2/{client}"] = {**files, "adapter_model.safetensors": save(tensors)}

    def _personal(self) -> Mapping[str, Any]:
        return {
            "search": {"lr": 1e-3, "batch_size": 8, "epochs": 1},
            "finetune": {"lr": 1e-2, "batch_size": 8, "epochs": 2},
        }

    def _misbehave(self, job: SegmentJob) -> None:
        for fault in ("kill", "freeze"):
            if self._config.get(fault) and self._ranks is not None and self._ranks.index == 1 and self._first(fault):
                os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)

    def _first(self, name: str) -> bool:
        """Whether no process has been here before."""
        try:
            (Path(self._config["folder"]) / name).touch(exist_ok=False)
        except FileExistsError:
            return False
        return True


def _switch_gathering_off() -> None:
    """Collectives that gather say that they did and leave what was there."""
    import torch.distributed as dist

    class Done:
        def wait(self) -> None:
            return None

    def nothing(output: torch.Tensor, *_: Any, **__: Any) -> Done:
        output.zero_()
        return Done()

    import deepspeed.comm

    dist.all_gather_into_tensor = nothing
    deepspeed.comm.allgather_fn = nothing
