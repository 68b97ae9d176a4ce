"""The w-map, its table and the training losses of several methods, from rows made up here."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from fedtailor.core.messages import METRIC_COLUMNS
from fedtailor.core.seeding import numpy_rng
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import Experiment
from fedtailor.report.curves import round_means, training_curves
from fedtailor.report.loss_curves import loss_curves
from fedtailor.report.mix_weights import mix_costs, mix_figures, mix_grid, mix_rounds
from fedtailor.report.names import ABSENT
from fedtailor.report.style import Drawing, Missing, looks, save, styled

CLIENTS, ROUNDS, BLOCKS = 4, 5, 3


def rows(method: str, begins: int, losses: bool = True) -> pd.DataFrame:
    """Rounds of which the first ``begins`` mix nothing; w of q grows with the block, of v with the round."""
    found = []
    for client in range(CLIENTS):
        for round in range(ROUNDS):
            mixes = round >= begins
            values = {
                "mix_evaluations": 23.0 * mixes, "mix_tokens": (1000.0 + client) * mixes,
                "mix_gain": 0.5 * mixes, "slow_start": float(not mixes), "train_loss": 2.0 - 0.1 * round,
            }  # fmt: skip
            values |= {f"mix_weight.q_proj.{b}": b / 2 * mixes for b in range(BLOCKS)}
            values |= {f"mix_weight.v_proj.{b}": round / 4 * mixes for b in range(BLOCKS)}
            for metric, value in values.items():
                if losses or metric != "train_loss":
                    found.append({
                        "stage": "strategy", "round": round, "client": f"seen/all/{client}", "method": method,
                        "metric": metric, "value": value, "weight": 10.0, "seed": 42, "budget": -1, "module": "",
                        "pool": "seen", "language": "all",
                    })  # fmt: skip
    return pd.DataFrame(found, columns=list(METRIC_COLUMNS))


def test_only_rounds_that_mixed_have_weights() -> None:
    table = mix_rounds(rows("pfedgpt", begins=2))
    assert set(table["round"]) == {2, 3, 4}
    assert len(table) == CLIENTS * 3 * 2 * BLOCKS
    assert table[table["projection"] == "q_proj"].groupby("block")["w"].mean().tolist() == [0.0, 0.5, 1.0]
    assert table[table["projection"] == "v_proj"].groupby("round")["w"].mean().tolist() == [0.5, 0.75, 1.0]


def test_costs_are_of_the_rounds_that_mixed() -> None:
    frame = pd.concat([rows("pfedgpt", begins=2), rows("mix_grid", begins=ROUNDS)])
    costs = mix_costs(frame).set_index("method")
    assert costs.loc["pfedgpt", ["calls", "rounds"]].tolist() == [CLIENTS * 3, CLIENTS * ROUNDS]
    assert costs.loc["pfedgpt", "mix_tokens"] == pytest.approx(1001.5)
    assert costs.loc["pfedgpt", "mix_evaluations_sum"] == 23 * CLIENTS * 3
    assert costs.loc["mix_grid", "calls"] == 0
    assert np.isnan(costs.loc["mix_grid", "mix_gain"])
    cells = {row[0]: row[1:] for row in mix_grid(mix_costs(frame)).rows}
    assert cells["pFedGPT"] == ["12 of 20", "23.0", "1,002", ABSENT, ABSENT, "0.5000", "0.62"]
    assert mix_costs(frame[frame["metric"] == "train_loss"]).empty


def test_a_search_takes_its_seconds_of_the_rounds_that_mixed() -> None:
    frame = rows("pfedgpt", begins=2)
    stage = "strategy/pfedgpt/seed42"
    times = pd.DataFrame([
        {"stage": stage, "round": r, "client": f"seen/all/{c}", "seconds": 8.0, "search_seconds": 2.0 * (r >= 2)}
        for r in range(ROUNDS)
        for c in range(CLIENTS)
    ])  # fmt: skip
    costs = mix_costs(frame, times).iloc[0]
    assert costs[["search_seconds", "share"]].tolist() == [2.0, 0.25]
    assert mix_grid(mix_costs(frame, times)).rows[0][4:6] == ["2.00", "25%"]
    earlier = mix_costs(frame, times.drop(columns="search_seconds")).iloc[0]  # a run that did not note it
    assert np.isnan(earlier["share"])
    assert earlier["calls"] == costs["calls"]


def test_the_map_has_its_panels_and_its_numbers_stay_out_of_the_curves(tmp_path: Path) -> None:
    frame = rows("pfedgpt", begins=2)
    with styled():
        [drawing] = mix_figures(mix_rounds(frame))
        png, _ = save(drawing, tmp_path)
        [curve] = training_curves(frame)
    titles = [axis.get_title("left") for axis in drawing.figure.axes]
    assert [title for title in titles if title] == ["q_proj", "v_proj"]
    assert png.stat().st_size > 5000
    assert isinstance(curve, Drawing)
    assert len([axis for axis in curve.figure.axes if axis.get_title("left")]) == 5


def test_training_losses_of_methods_lie_over_local_steps() -> None:
    frame = pd.concat([rows("homlora", 0), rows("pf2lora", 0)])
    exp = Experiment(task={"name": "e2e"}, methods=("homlora", "pf2lora"), base={"name": "none"})
    drawing = loss_curves({"": (round_means(frame), exp)})
    assert isinstance(drawing, Drawing)
    loss, perplexity = drawing.figure.axes
    assert perplexity.get_title() == "Perplexity"
    for axis, expected in ((loss, 1.6), (perplexity, np.exp(1.6))):
        assert [line.get_ydata()[-1] for line in axis.lines] == pytest.approx([expected] * 2)
        assert [line.get_xdata()[-1] for line in axis.lines] == [50, 50]
    two = loss_curves({"a": (round_means(frame), exp), "b": (round_means(frame), exp)})
    assert isinstance(two, Drawing)
    assert len(two.figure.axes[0].lines) == 4
    tested = frame[frame["metric"] == "train_loss"].assign(metric="test_loss", value=1.25)
    three = loss_curves({"": (round_means(pd.concat([frame, tested])), exp)})
    assert isinstance(three, Drawing)
    assert [axis.get_title() for axis in three.figure.axes] == ["Training loss", "Perplexity", "Test loss"]
    assert [line.get_ydata()[-1] for line in three.figure.axes[2].lines] == pytest.approx([1.25] * 2)
    alone = loss_curves({"": (round_means(rows("homlora", 0)), exp)})
    assert isinstance(alone, Missing)


def test_the_order_of_rows_does_not_matter() -> None:
    frame = rows("pfedgpt", begins=1)
    mixed = frame.iloc[numpy_rng("order").permutation(len(frame))]
    pd.testing.assert_frame_equal(mix_costs(frame), mix_costs(mixed))
    pd.testing.assert_frame_equal(mix_rounds(frame), mix_rounds(mixed))


def test_no_two_methods_of_the_papers_tables_look_alike() -> None:
    found = looks(compose(["pfedgpt_dolly"], []).methods)
    assert len(found) == 13
    assert len({look.colour for look in found.values()}) == 13
