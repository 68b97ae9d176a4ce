"""What comes out when a tiny model of each architecture goes through all that a run does.

``python tests/architecture_table.py`` (`make architectures`) writes the table that README.md shows people.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from architectures import AUTO, BOTH, CELLS, HEADS, Architecture, model_of
from contract_kit import MemoryLog
from peft import PeftModel
from tiny import talk, tiny
from torch.nn import functional
from toy import write_adapter

from fedtailor.core.errors import ModelError
from fedtailor.core.messages import FloatArray, SegmentJob, SegmentResult, StageSpec
from fedtailor.core.settings import ModelConfig
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.prepare import make_inputs
from fedtailor.experiment.stages import Stage, stage_spec
from fedtailor.experiment.trial import try_model
from fedtailor.federated.rounds import RoundPlan, run_rounds
from fedtailor.lanes.batches import Examples
from fedtailor.methods import build_method
from fedtailor.models.folder import check_folder
from fedtailor.models.hub import materialise
from fedtailor.models.load import load_tokenizer, name_labels, quiet
from fedtailor.storage.artifacts import Artifacts, artifact_path, model_path
from fedtailor.storage.files import Storage
from fedtailor.tasks.source import TaskKind
from fedtailor.tasks.tokens import TokenData
from fedtailor.worker.worker import SerialPool

METHODS = ("lora", "fedp2eft")
BUDGET, CLIENTS, TESTED = 2, 3, 5
STEPS: Mapping[str, Mapping[str, int]] = {
    "classification": {"batch_size": 8, "epochs": 2}, "generation": {"batch_size": 16, "epochs": 1},
}  # fmt: skip


def section(method: str, kind: TaskKind) -> dict[str, Any]:
    """Rates so large that little training changes a test loss."""
    if method == "lora":
        return {"lr": 3e-2, **STEPS[kind]}
    # One step: Adam turns the rounding of gradients near zero into whole steps, after which losses differ.
    once = {"batch_size": 128, "epochs": 1}
    return {"stage1": once, "finetune": {"lr": 3e-2, **STEPS[kind]}, "psg": {"bias": 0.1, "gain": 0.1}}


COMMON = (
    "base.name=none", "methods=[base,lora,fedp2eft]", "budgets=[2]", "r_max=2", "save_adapters=true", "base.cohort=2",
    "strategy.cohort=2", "task.clients_per_language=40", "task.clients_kept=2", "task.languages=[eng,yor]",
    "decoding.max_new_tokens=2", f"decoding.max_test={TESTED}", "task.max_length=48",
    "engine.token_budget=16384",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """Clients and tokenizer of one kind of task, for models of all architectures."""

    kind: TaskKind
    exp: ExperimentBase
    root: Path
    tokenizer: Path
    data: TokenData
    clients: tuple[str, ...]

    @classmethod
    def make(cls, kind: TaskKind, root: Path) -> Bench:
        exp = talk(root, *COMMON, "task.clients_per_language=80") if kind == "generation" else tiny(root, *COMMON)
        inputs = make_inputs(exp, 42, Artifacts(Storage(exp.storage), "bench", print))
        data = TokenData.open(root / artifact_path(inputs.tokens))
        few = sorted(data.pool("seen"), key=lambda c: c.n_train)[:CLIENTS]
        # As a run orders them: by falling number of examples.
        clients = tuple(client.id for client in reversed(few))
        return cls(kind, exp, root, root / model_path(inputs.model), data, clients)

    def spec(self, key: str, method: str, model: Path, lanes: int) -> StageSpec:
        stage = Stage(key, key.split("/")[0], "base", 42, budgets=(BUDGET,), r_max=BUDGET, rounds=1)
        exp = self.exp.model_copy(update={"engine": self.exp.engine.model_copy(update={"max_lanes": lanes})})
        bare = stage_spec(exp, stage, str(model), str(self.data.path), None)
        return replace(bare, method=method, method_config=section(method, self.kind))

    def strategy(self, method: str, model: Path, lanes: int, pool: SerialPool) -> tuple[FloatArray | None, list[float]]:
        """SHARED state after one round, and what the clients reported; nothing of a method without rounds."""
        built, log = build_method(method, section(method, self.kind), BUDGET), MemoryLog()
        if built.local_update is None:
            return None, []
        key = f"strategy/{method}/seed42"
        info = pool.open(self.spec(key, method, model, lanes))
        sizes = {client: self.data.client(client).n_train for client in self.clients}
        plan = RoundPlan(key, 42, 1, self.clients, sizes, CLIENTS, 1, 1)
        state = run_rounds(plan, built, pool, info.initial, log, lambda _: None, lambda _: None)
        return state.shared, [row["value"] for row in log.outcomes[0].metrics if "loss" in row["metric"]]

    def personalise(
        self, method: str, model: Path, lanes: int, pool: SerialPool, shared: FloatArray | None
    ) -> SegmentResult:
        """Personal models of all clients."""
        key = f"personalise/{method}/seed42"
        pool.open(self.spec(key, method, model, lanes))
        assert pool._worker._stage is not None
        assert len(pool._worker._stage.groups(self.clients)) == CLIENTS // lanes, "all beside each other, or each alone"
        [result] = pool.run([SegmentJob(key, 0, 0, self.clients)], shared, lambda _: None)
        assert not result.failures, result.failures
        return result


@dataclass(frozen=True)
class Row:
    """What came out.

    Args:
        plan: what `fedtailor plan` says.
        lanes: how clients run; empty, like all that follows, where the plan refuses the model.
        lora: LoRA changes a client's test loss, and FedP2EFT does.
        same: clients beside each other have the test losses and adapters that each has alone.
        exported: plain transformers and peft give those losses too, text by text, without padding.
    """

    plan: str
    lanes: str = ""
    lora: bool = False
    fedp2eft: bool = False
    same: bool = False
    exported: bool = False

    def line(self, name: str, kind: TaskKind) -> str:
        holds = [{True: "yes", False: "**no**"}[x] for x in (self.lora, self.fedp2eft, self.same, self.exported)]
        cells = [self.lanes, *holds] if self.lanes else [""] * 5
        return f"| {' | '.join([name, HEADS[kind], *cells, self.plan])} |"


def folder_of(architecture: Architecture, bench: Bench, folder: Path) -> Path:
    """A Hugging Face folder; one whose model cannot answer at all holds one that classifies."""
    tokenizer = load_tokenizer(bench.tokenizer)
    end = tokenizer.eos_token_id if bench.kind == "generation" else tokenizer.sep_token_id
    config = architecture.config(len(tokenizer), end)
    name_labels(config, bench.data.labels)
    kind = bench.kind if type(config) in AUTO[bench.kind]._model_mapping else "classification"
    with quiet():
        model_of(config, kind).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def measure(architecture: Architecture, bench: Bench, root: Path) -> Row:
    """Builds the model's folder and goes the way of a run: plan, then stages."""
    folder, base = folder_of(architecture, bench, root / "model"), root / "base"
    cfg = ModelConfig(name=str(folder))
    try:
        check_folder(folder, 16, bench.kind)
        said = try_model(cfg, bench.kind, folder)
    except ModelError as error:
        reason = str(error).removeprefix("model folder ").replace(f"{folder}: ", "")
        return Row("refused: " + reason.partition(" (allowed")[0])
    materialise(cfg, bench.data.labels, 42, base, bench.kind)
    same, found = True, {}
    # As in a run, a worker keeps the model from stage to stage.
    pools = {lanes: SerialPool(bench.exp.engine, print) for lanes in (CLIENTS, 1)}
    for method in METHODS:
        shared, reported = bench.strategy(method, base, CLIENTS, pools[CLIENTS])
        beside, by_itself = (bench.personalise(method, base, *side, shared) for side in pools.items())
        same &= _close(reported, bench.strategy(method, base, 1, pools[1])[1])
        same &= _close(*(losses(result, bench.clients) for result in (beside, by_itself)))
        found[method] = _personal(bench, base, beside, root / method)
    alone = any(clause.startswith("clients run one by one") for clause in said)
    notes = [clause for clause in said if not clause.startswith("clients run one by one")]
    return Row(
        plan="; ".join(notes),
        lanes="one by one" if alone else "side by side",
        lora=found["lora"][0],
        fedp2eft=found["fedp2eft"][0],
        same=same,
        exported=all(equal for _, equal in found.values()),
    )


def _personal(bench: Bench, base: Path, result: SegmentResult, out: Path) -> tuple[bool, bool]:
    """Whether a client's adapter changes its test loss, and whether peft gives the committed one."""
    client = bench.clients[0]
    texts = bench.data.examples(client, "test")
    if bench.kind == "generation":
        texts = texts.rows(slice(TESTED))
    write_adapter(result.adapters[f"r{BUDGET}/{client}"], out)
    with quiet(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = PeftModel.from_pretrained(AUTO[bench.kind].from_pretrained(base).eval(), out).eval()
    loss = plain_loss(model, texts)
    with model.disable_adapter():
        before = plain_loss(model, texts)
    return not _close([loss], [before], 2e-5), _close([loss], losses(result, [client]))


def _close(some: Sequence[float], others: Sequence[float], within: float = 2e-4) -> bool:
    return bool(np.allclose(some, others, rtol=0, atol=within))


def losses(result: SegmentResult, clients: Sequence[str]) -> list[float]:
    """Test loss of each client: the mean over its rows, which are one for each group of texts."""
    rows = [[row for row in result.metrics if (row["client"], row["metric"]) == (c, "loss")] for c in clients]
    return [float(np.average([x["value"] for x in own], weights=[x["weight"] for x in own])) for own in rows]


def plain_loss(model: Any, texts: Examples) -> float:
    """The same by nothing of ours, text by text, without padding."""
    found: list[float] = []
    with torch.no_grad():
        for row, length in enumerate(texts.lengths):
            ids = torch.tensor(texts.input_ids[row : row + 1, :length])
            scores, wanted = model(input_ids=ids).logits, torch.tensor(texts.labels[row : row + 1])
            if texts.prompt_length is not None:
                start = texts.prompt_length[row]
                scores, wanted = scores[0, start - 1 : -1], ids[0, start:]
            found.append(float(functional.cross_entropy(scores, wanted)))
    return float(np.mean(found))


TABLE = Path(__file__).parent / "contracts/ARCHITECTURES.md"
HEAD = """# Architectures

Tiny random models, each through all that a run does: `fedtailor plan`, LoRA and FedP²EFT for three clients, the
exported adapter. Written by `make architectures`; `tests/contracts/test_architectures.py` measures every row again.

* **head**: `class` tells texts apart, `text` answers.
* **clients**: side by side in one forward pass, or one by one where a model's layers do not allow that (slower).
* **LoRA**, **FedP²EFT**: the method trains, and changes a client's test loss.
* **lanes**: clients beside each other have the test losses that each has alone.
* **peft**: plain transformers and peft, text by text and without padding, give the exported adapter's test loss.
* **plan says**: what a user reads before the run; a refusal comes before any work.

| architecture | head | clients | LoRA | FedP²EFT | lanes | peft | plan says |
|---|---|---|---|---|---|---|---|
"""


def table() -> str:
    """The whole page."""
    lines = []
    with TemporaryDirectory() as home:
        benches = {kind: Bench.make(kind, Path(home) / kind) for kind in BOTH}
        for number, (architecture, kind) in enumerate(CELLS):
            lines.append(measure(architecture, benches[kind], Path(home) / str(number)).line(architecture.name, kind))
            print(lines[-1], file=sys.stderr)
    return HEAD + "\n".join(lines) + "\n"


if __name__ == "__main__":
    torch.set_num_threads(1)
    TABLE.write_text(table(), encoding="utf-8")
