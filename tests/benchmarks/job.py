"""Writes a job to disk, once for the platform and once, in plain arrays, for everybody else.

Every system reads the same weights, texts, cohorts and order of rows, so that their final parameters can be compared.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from regimes import CLASSES, LEARNING_RATE, RANK, SCALE, VOCAB, Regime

from fedtailor.core.messages import StageSpec
from fedtailor.core.seeding import numpy_rng
from fedtailor.core.settings import EngineConfig
from fedtailor.federated.rounds import RoundPlan, cohort_of
from fedtailor.lanes.batches import training_indices
from fedtailor.tasks.store import BLOCK, EXAMPLES, write_stream
from fedtailor.tasks.tokens import TOKENS

if TYPE_CHECKING:
    from transformers import PreTrainedModel

STAGE, SEED = "base/seed0", 0


def write_job(regime: Regime, folder: Path) -> Path:
    """Model, clients, cohorts, orders and initial LoRA of a regime; returns the folder."""
    from transformers.utils.logging import disable_progress_bar

    from fedtailor.worker.open_stage import OpenStage

    disable_progress_bar()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "regime.json").write_text(json.dumps(regime.as_json()))
    _model(regime).save_pretrained(folder / "model")
    sizes = _clients(regime, folder)
    plan = round_plan(regime, folder, EngineConfig())
    numbers = {name: i for i, name in enumerate(plan.clients)}
    cohorts = [[numbers[name] for name in cohort_of(plan, r)] for r in range(regime.rounds)]
    orders = [
        np.concatenate([_order(regime, r, plan.clients[c], sizes[c]) for c in cohort])
        for r, cohort in enumerate(cohorts)
    ]
    spec = stage_spec(regime, folder, EngineConfig())
    initial = OpenStage.open(spec).info().initial
    rows = {f"order{r}": order for r, order in enumerate(orders)}
    np.savez(folder / "rounds.npz", cohorts=np.array(cohorts), initial=initial, **rows)
    return folder


def client_names(regime: Regime) -> tuple[str, ...]:
    """Names of the population, sorted."""
    return tuple(f"seen/xx/{i:05d}" for i in range(regime.population))


def client_sizes(regime: Regime) -> np.ndarray:
    """Texts of each client, (population,), whole batches."""
    least, most = regime.sizes
    return regime.batch * numpy_rng("bench", regime.name).integers(least, most + 1, regime.population)


def round_plan(regime: Regime, folder: Path, engine: EngineConfig) -> RoundPlan:
    """What `run_rounds` is told."""
    names = client_names(regime)
    sizes = dict(zip(names, client_sizes(regime).tolist(), strict=True))
    return RoundPlan(
        STAGE, SEED, regime.rounds, names, sizes, regime.cohort, engine.segments, engine.min_segment
    )  # fmt: skip


def stage_spec(regime: Regime, folder: Path, engine: EngineConfig) -> StageSpec:
    """What a worker is told."""
    config = {
        "adapter": "lora", "rank": RANK, "scale": SCALE, "lr": LEARNING_RATE, "epochs": 1, "batch_size": regime.batch,
    }  # fmt: skip
    return StageSpec(
        key=STAGE, kind="rounds", method="fedavg", method_config=config, seed=SEED, model_dir=str(folder / "model"),
        data_dir=str(folder / "tokens"), r_max=RANK, rounds=regime.rounds, engine=engine,
    )  # fmt: skip


def _model(regime: Regime) -> PreTrainedModel:
    from transformers import BertConfig, BertForSequenceClassification  # two seconds that who only plays does not pay

    h = regime.hidden
    config = BertConfig(
        vocab_size=VOCAB, hidden_size=h, num_hidden_layers=regime.layers, num_attention_heads=max(2, h // 64),
        intermediate_size=4 * h, max_position_embeddings=max(32, regime.tokens), num_labels=CLASSES,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(7)
        return BertForSequenceClassification(config)


def _clients(regime: Regime, folder: Path) -> np.ndarray:
    rng, sizes = numpy_rng("bench", regime.name, "texts"), client_sizes(regime)
    # One text for test at the end of each client: a worker asks for the longest of both splits.
    held = sizes + 1
    ids = rng.integers(5, VOCAB, (int(held.sum()), regime.tokens)).astype(np.int32)
    labels = rng.integers(0, CLASSES, len(ids)).astype(np.int32)
    # What can be learned: a label's own token stands first in most texts.
    ids[:, 1] = np.where(rng.random(len(ids)) < 0.8, labels + 1, ids[:, 1])
    starts = np.concatenate([[0], np.cumsum(held)])
    np.savez(folder / "clients.npz", ids=ids, labels=labels, starts=starts[:-1], sizes=sizes)
    _write_tokens(regime, folder / "tokens", ids, labels, sizes)
    return sizes


def _write_tokens(regime: Regime, out: Path, ids: np.ndarray, labels: np.ndarray, sizes: np.ndarray) -> None:
    out.mkdir(exist_ok=True)
    blocks = [slice(i, i + BLOCK) for i in range(0, len(ids), BLOCK)]
    texts = (
        pa.record_batch([pa.array(list(ids[b]), TOKENS.field("ids").type), pa.array(labels[b])], schema=TOKENS)
        for b in blocks
    )
    write_stream(out / "tokens.arrow", TOKENS, texts)
    owner = np.repeat(np.arange(len(sizes)), sizes + 1)
    test = np.zeros(len(ids), bool)
    test[np.cumsum(sizes + 1) - 1] = True
    members = (
        pa.record_batch(
            [pa.array(owner[b], pa.int32()), pa.array(test[b]), pa.array(np.arange(len(ids))[b], pa.int32())],
            schema=EXAMPLES,
        )
        for b in blocks
    )
    write_stream(out / "examples.arrow", EXAMPLES, members)
    clients = [
        {"id": name, "n_train": int(n), "n_test": 1, "longest": regime.tokens, "train_tokens": int(n) * regime.tokens}
        for name, n in zip(client_names(regime), sizes, strict=True)
    ]
    manifest = {
        "labels": [f"c{i}" for i in range(CLASSES)], "pad_id": 0, "max_length": regime.tokens, "data_hash": "bench",
        "hash": "bench", "rows": len(ids), "clients": clients,
    }  # fmt: skip
    (out / "manifest.json").write_text(json.dumps(manifest))


def _order(regime: Regime, round: int, client: str, size: int) -> np.ndarray:
    rng = numpy_rng(SEED, STAGE.split("/")[0], round, client, "order/train", 0)
    return np.concatenate(training_indices(int(size), 1, regime.batch, [rng]))
