"""The validation pool: which rows it is, who trains without them, who gets them, and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from tiny import run_tiny, talk, tiny

from fedtailor.core.errors import ConfigError, DataError
from fedtailor.core.messages import Client
from fedtailor.experiment.plan import make_plan
from fedtailor.federated.context import ClientContext
from fedtailor.federated.method import Method, MethodEntry, Report
from fedtailor.methods import METHODS
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.partition import Shard
from fedtailor.tasks.source import Example, LanguagePool, Source
from fedtailor.tasks.store import POOLED
from fedtailor.tasks.task import TaskData, prepare, task_config
from fedtailor.tasks.tokens import TokenData
from fedtailor.tasks.validation import draw_pool, pool_notes

SMALL = ("methods=[lora,fedprox]", "task.languages=[eng,yor]", "base.name=none", "strategy.rounds=1", "budgets=[1]")


def made(folder: Path, seed: int = 42, **keys: Any) -> TaskData:
    given = {"languages": ("eng", "yor"), "clients_per_language": 3, "validation_per_class": 2, **keys}
    return prepare(task_config("cldr", **given), seed, folder)


def train_labels(data: TaskData, rows: np.ndarray) -> np.ndarray:
    return np.array([data.batches[0].column("label")[int(row)].as_py() for row in rows])


def test_so_many_training_rows_of_every_class_of_seen_clients_by_seed(tmp_path: Path) -> None:
    data = made(tmp_path / "a")
    trained = data.rows_of(POOLED, "train")
    classes = [data.labels[c] for c in np.unique(train_labels(data, trained))]
    assert set(data.manifest["validation"]) == set(classes)
    assert np.isin(data.pool_rows, trained).all()
    assert train_labels(data, data.pool_rows).tolist() == [data.labels.index(c) for c in classes for _ in range(2)]
    assert made(tmp_path / "b").manifest == data.manifest
    assert made(tmp_path / "c", seed=1).manifest["validation"] != data.manifest["validation"]


def test_the_pool_does_not_depend_on_the_number_of_clients_and_names_the_data(tmp_path: Path) -> None:
    three, five = (made(tmp_path / str(n), clients_per_language=n) for n in (3, 5))
    assert three.manifest["validation"] == five.manifest["validation"]
    without = made(tmp_path / "none", validation_per_class=0)
    assert "validation" not in without.manifest
    assert "validation_per_class" not in without.manifest["config"]
    assert without.hash != three.hash != made(tmp_path / "more", validation_per_class=3).hash


def test_apart_from_the_pool_clients_keep_their_other_rows_in_order(tmp_path: Path) -> None:
    data = made(tmp_path)
    apart = TaskData.open(tmp_path, pool_apart=True)
    for before, after in zip(data.clients, apart.clients, strict=True):
        rows = data.rows_of(before.id, "train")
        kept = apart.rows_of(before.id, "train")
        assert kept.tolist() == [row for row in rows if row not in data.pool_rows]
        assert (after.n_train, after.n_test) == (len(kept), before.n_test)
        assert apart.rows_of(before.id, "test").tolist() == data.rows_of(before.id, "test").tolist()
    taken = sum(c.n_train for c in data.pool("seen")) - apart.client(POOLED).n_train
    assert taken == len(data.pool_rows) == len(data.rows_of(POOLED, "train")) - len(apart.rows_of(POOLED, "train"))


@pytest.fixture
def tuner() -> Iterator[dict[str, list[ClientContext]]]:
    """FedProx, as if it asked for the pool; what it and LoRA were called with."""
    seen: dict[str, list[ClientContext]] = {"fedprox": [], "lora": []}

    def build(name: str, own: MethodEntry, pool: bool) -> Any:
        def built(cfg: Any, r_max: int) -> Method:
            method = own.build(cfg, r_max)
            update, personaliser = method.local_update, method.personaliser

            def noted(ctx: ClientContext) -> Report:
                seen[name].append(ctx)
                assert update is not None
                return update(ctx)

            class Noted:
                budgeted = personaliser.budgeted

                def __call__(self, ctx: ClientContext) -> Any:
                    seen[name].append(ctx)
                    return personaliser(ctx)

            return replace(method, local_update=noted if update else None, personaliser=Noted(), validation_pool=pool)

        return built

    changed = {name: replace(METHODS[name], build=build(name, METHODS[name], name == "fedprox")) for name in seen}
    with patch.dict(METHODS, changed):
        yield seen


def test_a_method_that_asks_gets_the_pool_and_trains_without_it(
    tuner: dict[str, list[ClientContext]], tmp_path: Path
) -> None:
    exp = tiny(tmp_path, *SMALL, "task.validation_per_class=2")
    run = run_tiny(exp)
    tokens = TokenData.open(next((tmp_path / "artifacts").glob("tokens-*")))
    apart = TokenData.open(tokens.path, pool_apart=True)
    for ctx in tuner["lora"]:
        assert ctx.validation is None
        assert all(lane.size == tokens.client(lane.client.id).n_train for lane in ctx.lanes)
    rounds = [ctx for ctx in tuner["fedprox"] if ctx.stage == "strategy"]
    assert rounds
    assert {lane.client.pool for ctx in tuner["fedprox"] for lane in ctx.lanes} == {"seen", "unseen"}
    labels = np.concatenate([block[2] for block in tokens.blocks])
    for ctx in tuner["fedprox"]:
        assert ctx.validation is not None
        assert ctx.validation.labels.tolist() == labels[tokens.pool_rows].tolist()
        assert ctx.federation.class_counts == apart.class_counts()
        for lane in ctx.lanes:
            assert lane.client == apart.client(lane.client.id)
            assert lane.train.input_ids.tolist() == apart.examples(lane.client.id, "train").input_ids.tolist()
    assert len(ctx.validation) == len(tokens.pool_rows)
    weights = {row["client"]: row["weight"] for row in run_weights(run)}
    assert weights == {c.id: float(c.n_train) for c in apart.clients if c.id in weights}
    assert any(weights[c.id] < c.n_train for c in tokens.clients if c.id in weights)


def run_weights(run: RunFolder) -> list[dict[str, Any]]:
    rows = run.metrics()
    kept = rows[(rows["stage"] == "strategy") & (rows["method"] == "fedprox") & (rows["metric"] == "train_loss")]
    return list(kept.to_dict("records"))


def test_a_plan_counts_the_steps_of_what_is_left(tuner: dict[str, list[ClientContext]], tmp_path: Path) -> None:
    exp = tiny(tmp_path, *SMALL, "task.validation_per_class=2", "fedprox.batch_size=1", "fedprox.epochs=1")
    plan = make_plan(exp)
    assert plan.data is not None
    pool = sum(map(len, plan.data["validation"].values()))
    assert sum(plan.population.train) - sum(plan.population.train_apart) == pool
    steps = {row.stage.key: row.estimate.steps for row in plan.stages}
    row = next(row for row in plan.stages if row.stage.key == "strategy/fedprox/seed42")
    assert steps[row.stage.key] == round(sum(plan.population.train_apart) * row.stage.cohort / plan.population.seen)
    assert any(note.startswith("Validation pool: 2 training rows of each class") for note in plan.notes)


def test_a_pool_that_leaves_a_class_without_rows_is_refused_with_its_counts(tmp_path: Path) -> None:
    smallest = min(n for n in np.array(made(tmp_path / "a").manifest["class_counts"]["seen/eng/train"]) if n)
    with pytest.raises(DataError, match=r"class '\w+' has \d+.* at seen clients; at most \d+ leave each class a row"):
        made(tmp_path / "b", validation_per_class=10_000)
    both = made(tmp_path / "c", validation_per_class=int(smallest) - 1)
    assert all(len(rows) == smallest - 1 for rows in both.manifest["validation"].values())


def test_a_pool_that_leaves_a_client_without_rows_is_refused() -> None:
    texts = [Example(f"text {number}", 0) for number in range(6)]
    source = Source(("a",), {"seen": {"x": LanguagePool(texts[:5], texts[5:])}})
    dealt = [
        (Client(f"seen/x/0{k}", "seen", "x", len(rows), 0), Shard(np.array(rows), np.array([], np.int64)))
        for k, rows in enumerate(([0, 1], [2, 3, 4]))
    ]
    assert len(draw_pool(source, dealt[1:], 1, 42)["a"]) == 1
    with pytest.raises(
        DataError, match=r"fewer than the 2 training rows that are needed: client 'seen/x/0\d' keeps \d of"
    ):
        draw_pool(source, dealt, 3, 42)


def test_rows_that_are_too_long_leave_the_pool() -> None:
    lengths = np.array([3, 0, 5, 0])
    trained = [np.array([0, 1, 2, 3])]
    clients = [{"id": "seen/x/00"}]

    def kept(pool: dict[str, list[int]], trained: list[np.ndarray] = trained) -> dict[str, Any]:
        return dict(pool_notes({"validation": pool, "clients": clients}, lengths, trained))

    assert kept({"a": [0, 1]}) == {"validation": {"a": [0]}}
    assert pool_notes({"clients": clients}, lengths, trained) == {}
    with pytest.raises(DataError, match=r"class 'b': all 2 rows of the validation pool are longer"):
        kept({"a": [0], "b": [1, 3]})
    with pytest.raises(DataError, match=r"client 'seen/x/00' would train on rows of the validation pool alone"):
        kept({"a": [0, 2]}, [np.array([0, 2])])


def test_instructions_have_a_pool_of_each_group(tmp_path: Path) -> None:
    exp = talk(tmp_path, "task.validation_per_class=3", "methods=[base]")
    data = prepare(exp.task, 42, tmp_path / "data")
    assert {name: len(rows) for name, rows in data.manifest["validation"].items()} == dict.fromkeys(data.labels, 3)


def test_what_cannot_be_is_said_before_anything_is_loaded(
    tuner: dict[str, list[ClientContext]], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"'methods': fedprox tunes on a validation pool, and there is none"):
        tiny(tmp_path, *SMALL)
    with pytest.raises(ConfigError, match=r"validation_per_class' and 'task.resample' exclude each other"):
        tiny(tmp_path, "methods=[lora]", "task.validation_per_class=1", "task.resample=5")
    with pytest.raises(
        ConfigError, match=r"'task.validation_per_class' = 2 is of each class or group, and task 'squad'"
    ):
        tiny(tmp_path, "task=squad", "methods=[base]", "task.validation_per_class=2", "model=tiny-bert")
