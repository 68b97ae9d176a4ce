"""PF2LoRA's synthetic task: made-up regressions as tokens, their loss and measures, and what they rule out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from tiny import run_tiny

from fedtailor.adapters.spectrum import rank90
from fedtailor.core.errors import ConfigError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.plan import make_plan
from fedtailor.lanes.batches import Examples, make_batch
from fedtailor.lanes.loss import lane_losses, whole_losses
from fedtailor.models.embedded import build_linear
from fedtailor.models.load import load_base, load_tokenizer
from fedtailor.report import report_of
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.pf2lora_synthetic import VARIANCES, load, lower_bound, targets
from fedtailor.tasks.task import task_config
from fedtailor.tasks.tokens import TokenData
from fedtailor.worker.open_stage import load_net

SHORT = [
    "seeds=[42]",
    "strategy.rounds=3",
    "strategy.evaluate_every=3",
    "pf2lora.local_steps=2",
    "hetlora.local_steps=2",
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    storage = tmp_path_factory.mktemp("synthetic")
    exp = compose(["pf2lora_synthetic"], [*SHORT, f"storage={storage}", "task.variant=solvable"])
    return run_tiny(exp)


def numbers(text: str) -> tuple[list[float], list[float]]:
    x, y = ([float(word) for word in part.split()] for part in text.split("|"))
    return x, y


@pytest.mark.parametrize(("variant", "apart"), [("paper", 7), ("solvable", 3)])
def test_targets_have_the_ranks_that_they_should_have(variant: str, apart: int) -> None:
    first, second = targets(variant, 42)
    assert [np.linalg.matrix_rank(w) for w in (first, second, first - second)] == [3, 4, apart]
    assert not np.array_equal(first, targets(variant, 43)[0])


def test_rows_are_made_by_the_targets() -> None:
    source = load(task_config("pf2lora_synthetic"), 42)
    assert [client.id for client in source.natural_clients] == ["seen/rank3/1", "seen/rank4/2"]
    for client, variance in zip(source.natural_clients, VARIANCES, strict=True):
        assert (len(client.train), len(client.test)) == (700, 300)
        x, y = map(np.array, zip(*(numbers(e.text) for e in [*client.train, *client.test]), strict=True))
        noise = y - x @ np.array(source.truth[client.id])
        assert noise.var() == pytest.approx(variance, rel=0.05)
        assert x.var() == pytest.approx(1, rel=0.05)


def test_the_loss_is_the_squared_error_of_the_rows_that_tokens_name(tmp_path: Path) -> None:
    texts = ["1 2 | 3 4 5", "0.5 -1 | 1 0 -2", "0 1 | 1 1 1"]
    folder = build_linear(texts, tmp_path / "model")
    ids = torch.tensor(load_tokenizer(folder)(texts)["input_ids"])
    assert ids.shape == (3, 1)
    net = load_net(folder, compose(["pf2lora_synthetic"], []).model, (), "regression", pad_id=0)
    assert (net.modules, net.heads, net.one_by_one) == (("body.linear",), (), "")
    rows = Examples(ids.numpy(), np.ones(3, np.int64), np.zeros(3, np.int64))
    batch = make_batch([rows, rows], [np.array([0, 1]), np.array([2])], 0)
    a, b = torch.randn(2, 1, 2), torch.randn(2, 3, 1)
    net.layers[0].bind(a, b, None, 1.0)
    w = (b @ a).transpose(1, 2)
    x, y = (torch.tensor(part) for part in zip(*(numbers(text) for text in texts), strict=True))
    errors = [(x[:2] @ w[0] - y[:2]).square().sum(1).mean(), (x[2] @ w[1] - y[2]).square().sum()]
    for losses in (lane_losses(net, batch), whole_losses(net, batch)):
        torch.testing.assert_close(losses, torch.stack(errors))


def test_a_run_measures_what_its_models_are(run: RunFolder) -> None:
    frame = run.metrics()
    last = frame[(frame.stage == "personalise") & (frame.module == "")].set_index(["method", "client", "metric"]).value
    over = frame[(frame.stage == "strategy") & frame.metric.str.startswith("test_")]
    assert set(over["round"]) == {2}
    assert set(over.metric) == {"test_loss", "test_distance", "test_rank90"}
    for row in over.itertuples():
        assert row.value == last[row.method, row.client, row.metric.removeprefix("test_")]
    for client, variance, star in zip(
        ("seen/rank3/1", "seen/rank4/2"), VARIANCES, targets("solvable", 42), strict=True
    ):
        assert last["pf2lora", client, "target_loss"] == pytest.approx(10 * variance, rel=0.1)
        assert last["pf2lora", client, "target_rank90"] == int(rank90(torch.linalg.svdvals(torch.tensor(star))))
        assert last["pf2lora", client, "rank_numerical"] <= 6
        # Six steps in: rows are N(0, 1), so that the error on them is about the distance's square.
        distance, loss = (last["pf2lora", client, name] for name in ("distance", "loss"))
        assert loss == pytest.approx(distance**2 + 10 * variance, rel=0.3)


def test_both_tables_are_frozen_and_w_starts_at_zero(run: RunFolder) -> None:
    [folder] = run.storage.local_path("artifacts").glob("model-*")
    model = load_base(folder, "regression")
    assert not model.body.linear.weight.any()
    assert torch.equal(model.body.rows.weight[1:11], torch.eye(10))
    [tokens] = run.storage.local_path("artifacts").glob("tokens-*")
    assert TokenData.open(tokens).examples("seen/rank3/1", "train").input_ids.shape == (700, 1)


def test_full_batches_fall_with_the_rate_as_gradient_descent_does(run: RunFolder) -> None:
    losses = run.metrics("strategy")
    mine: pd.DataFrame = losses[(losses.method == "pf2lora") & (losses.metric == "train_loss")]
    assert (mine.groupby("client").value.apply(lambda v: np.diff(v).max()) < 0).all()


def test_the_report_counts_ranks_and_draws_the_rounds(run: RunFolder, tmp_path: Path) -> None:
    report_of(run, tmp_path / "report")
    table = pd.read_csv(tmp_path / "report/ranks.csv").set_index("method")
    last = run.metrics("personalise").set_index(["method", "client", "metric"]).value
    squares = sum(last["pf2lora", client, "distance"] ** 2 for client in ("seen/rank3/1", "seen/rank4/2"))
    assert table.loc["pf2lora", "sum_of_squares"] == pytest.approx(squares)
    assert table.loc["pf2lora", "bound"] == pytest.approx(0, abs=1e-20)
    assert np.isnan(table.loc["hetlora", "bound"])
    text = (tmp_path / "report/ranks.md").read_text("utf-8")
    assert "P(3, 4)" in text
    assert "pf2lora_synthetic/solvable" in text.replace("\\_", "_")
    page = (tmp_path / "report/report.html").read_text("utf-8")
    assert "Ranks 3 and 4 found" in page
    assert "no tested clients" not in page
    assert (tmp_path / "report/figures/synthetic_ranks.png").stat().st_size > 20_000


def test_the_bound_is_what_the_best_models_of_two_levels_leave() -> None:
    stars = targets("paper", 42)
    values = np.linalg.svd(stars[0] - stars[1], compute_uv=False)
    assert lower_bound(stars, 2) == pytest.approx((values[4:] ** 2).sum() / 2)
    assert lower_bound(stars, 2) > 1 > 1e-9 > lower_bound(targets("solvable", 42), 2)
    # Any common part with own ones of rank 2 stays above it.
    u, s, v = np.linalg.svd(stars[0] - stars[1])
    near = (u[:, :4] * s[:4]) @ v[:4] / 2
    middle = (stars[0] + stars[1]) / 2
    left = sum(np.square(star - middle - sign * near).sum() for star, sign in zip(stars, (1, -1), strict=True))
    assert left == pytest.approx(lower_bound(stars, 2))


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("model=tiny-bert", "'model.name': tiny-bert reads texts.*allowed: linear"),
        ("methods=[majority]", "majority answers with classes.*asks for numbers"),
        ("methods=[prior_shift]", "prior_shift answers with classes.*asks for numbers"),
        ("base.name=fedavg", "'base.name' = fedavg.*allowed: none"),
        (
            "privacy.name=central_dp privacy.noise_multiplier=1 privacy.clip=1",
            "'privacy' = central_dp.*nobody.*allowed: none",
        ),
        ("privacy.secure_aggregation=secagg", "'privacy.secure_aggregation' = secagg.*allowed: none"),
        ("model.weights=bfloat16", "'model.weights' = bfloat16.*allowed: float32"),
        ("engine.dtype=auto", "'engine.dtype' = auto.*allowed: float32"),
        ("model.checkpointing=true", "'model.checkpointing' = True.*allowed: false"),
        ("save_adapters=true", "'save_adapters' = True.*peft"),
        ("scale=0.5", "'scale' = 0.5.*strategy.rounds"),
        ("task.clients_kept=1", "'task.clients_kept' = 1.*both clients"),
        ("task.variant=other", "paper.*solvable"),
    ],
)
def test_what_makes_no_sense_is_refused(given: str, told: str) -> None:
    with pytest.raises(ConfigError, match=rf"(?s){told}"):
        compose(["pf2lora_synthetic"], given.split())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (["model=linear"], "'model.name': linear predicts numbers, and task 'cldr' asks for classes"),
        (["task=cldr_instruct", "model=linear"], "linear predicts numbers, and task 'cldr_instruct' asks for text"),
        (["task.variant=paper"], "'task.variant' is of task=pf2lora_synthetic alone"),
    ],
)
def test_what_is_of_the_task_alone_is_refused_elsewhere(given: list[str], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        compose([], given)


def test_ranks_for_other_clients_are_refused_before_a_run() -> None:
    exp = compose(["pf2lora_synthetic"], ["seeds=[42]", "hetlora.ranks.values=[2,10,4]", "storage=memory://synthetic"])
    with pytest.raises(ConfigError, match="3 values for 2 seen clients"):
        make_plan(exp)


def test_a_plan_knows_sizes_and_names_of_artifacts(tmp_path: Path) -> None:
    plan = make_plan(compose(["pf2lora_synthetic"], ["seeds=[42]", f"storage={tmp_path}"]))
    assert (plan.population.seen, plan.population.train, plan.model.linears) == (
        2,
        (700, 700),
        (("body.linear", 10, 10),),
    )
    assert {row.there for row in plan.stages} == {False}
