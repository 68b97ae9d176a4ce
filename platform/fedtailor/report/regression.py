"""PF2LoRA's synthetic task (its section 5): its figure 2, and how often the targets' ranks are found.

A rank is the least number of singular values that make up 0.9 of their sum (`evaluation.regression`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.stats import binomtest

from fedtailor.experiment.config import ExperimentBase, base_seed
from fedtailor.report import names, style
from fedtailor.report.grid import Grid
from fedtailor.report.names import ABSENT
from fedtailor.report.style import Drawing, looks
from fedtailor.tasks.pf2lora_synthetic import RANKS, lower_bound, targets

_PANELS = {
    "train_loss": "Training loss",
    "test_loss": "Test loss",
    "test_distance": "Frobenius distance |W – W*|",
    "test_rank90": "Rank",
}
_LINES = ("-", "--", ":", "-.")
_OWN = "pf2lora"
"""The method whose private rank the bound follows from."""


def figures(frame: pd.DataFrame) -> list[Drawing]:
    """Figure 2; none of a run that measured no distances over its rounds.

    Args:
        frame: checked metric rows.
    """
    rows = frame[(frame["stage"] == "strategy") & frame["metric"].isin(_PANELS)]
    if not (rows["metric"] == "test_distance").any():
        return []
    look, clients = looks(rows["method"]), sorted(set(rows["client"]))
    figure, axes = style.panels(4, 4, 15.0, 3.1)
    for axis, (metric, title) in zip(axes, _PANELS.items(), strict=True):
        for method in look:
            for client, dashes in zip(clients, _LINES, strict=False):
                own = rows[(rows["metric"] == metric) & (rows["method"] == method) & (rows["client"] == client)]
                if own.empty:
                    continue
                table = own.pivot_table(index="round", columns="seed", values="value")
                x, middle = table.index.to_numpy() + 1, table.median(axis=1).to_numpy()
                low, high = (table.quantile(q, axis=1).to_numpy() for q in (0.25, 0.75))
                label = f"{look[method].label}, client {client.rpartition('/')[2]}"
                axis.plot(x, middle, dashes, color=look[method].colour, linewidth=1.5, label=label)
                if table.shape[1] > 1:
                    axis.fill_between(x, low, high, color=look[method].colour, alpha=0.13, linewidth=0)
        axis.set_title(title)
        axis.set_xlabel("round")
        if metric.endswith("_loss"):
            axis.set_yscale("log")
            style.log_ticks(axis.yaxis, numticks=6)
        else:
            axis.set_ylim(bottom=0)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=len(labels))
    caption = "Median over seeds" + (", band: quartiles" if rows["seed"].nunique() > 1 else "") + ". "
    return [
        Drawing(
            "synthetic_ranks",
            "Losses, distance and rank over the rounds",
            caption + "Test loss, distance and rank are of the models that clients would have if the rounds ended "
            f"there. The targets have the ranks {' and '.join(map(str, RANKS))}.",
            figure,
        )
    ]


def seeds_table(frame: pd.DataFrame, exp: ExperimentBase) -> pd.DataFrame:
    """A row per method and seed: what the clients' models are in the end.

    Columns: ``method``, ``seed``, per client k ``rank_k``, ``target_rank_k``, ``loss_k``, ``noise_k`` (the loss of W*),
    ``distance_k``; ``sum_of_squares`` of distances, ``bound`` of it for PF2LoRA's two levels (`lower_bound`, of models
    with one common x; NaN of other methods).

    Args:
        frame: checked metric rows.
        exp: the run's configuration.
    """
    rows = frame[(frame["stage"] == "personalise") & (frame["module"] == "")]
    wide = rows.pivot_table(index=["method", "seed", "client"], columns="metric", values="value")
    if "distance" not in wide:
        return pd.DataFrame()
    records = []
    for (method, seed), own in wide.groupby(level=["method", "seed"], sort=False):
        if len(own) != len(RANKS):
            continue
        at = int(str(seed))
        record: dict[str, Any] = {"method": method, "seed": at}
        kinds = {"rank": "rank90", "target_rank": "target_rank90", "loss": "loss", "noise": "target_loss"}
        for k, (_, values) in enumerate(own.sort_index().iterrows(), start=1):
            record |= {f"{name}_{k}": values[metric] for name, metric in {**kinds, "distance": "distance"}.items()}
        record["sum_of_squares"] = float((own["distance"] ** 2).sum())
        record["bound"] = _bound(str(method), at, exp)
        records.append(record)
    table = pd.DataFrame(records)
    order = names.in_method_order(table["method"]) if len(table) else ()
    return table.sort_values(["method", "seed"], key=lambda c: c.map(order.index) if c.name == "method" else c)


def _bound(method: str, seed: int, exp: ExperimentBase) -> float:
    section: Any = getattr(exp, _OWN)
    if method != _OWN or section.evaluate != "averaged":
        return float("nan")
    return lower_bound(targets(exp.task.variant or "paper", base_seed(exp, seed)), section.private_rank)


def grid(table: pd.DataFrame, exp: ExperimentBase) -> Grid:
    """What `seeds_table` comes to, a row per method.

    Args:
        table: at least one row.
        exp: the run's configuration.
    """
    first, second = RANKS
    return Grid(
        header=[
            "Method", "Seeds", f"P({first}, {second})", "P(targets' ranks)", "Test loss 1", "Test loss 2",
            "Sum of squared distances", "Least above its bound",
        ],
        rows=[list(_row(str(method), own)) for method, own in table.groupby("method", sort=False)],
        caption=[
            f"Ranks and fits of {exp.task.title}.",
            f"P({first}, {second}): seeds whose clients' models have these ranks, the targets' own; P(targets' ranks): "
            "seeds in which both models have the rank that the same rule, nine tenths of the sum of singular values, "
            "gives the targets themselves; in brackets exact (Clopper-Pearson) 95 % intervals.",
            "Test losses: median over seeds, and median of their ratio to the loss of the targets on the same rows.",
            "Sum of both clients' squared distances |W - W*|: mean (SD) over seeds. Bound: what a common LoRA and a "
            "private one per client leave at least; in the last column the least difference of any seed.",
        ],
        title="Ranks that were found",
        label="synthetic-ranks",
    )  # fmt: skip


def _row(method: str, own: pd.DataFrame) -> Iterator[str]:
    clients = range(1, len(RANKS) + 1)
    found = np.array([own[f"rank_{k}"] for k in clients])
    yield names.method_name(method)
    yield str(len(own))
    yield _share((found == np.array(RANKS)[:, None]).all(0))
    yield _share((found == np.array([own[f"target_rank_{k}"] for k in clients])).all(0))
    for k in clients:
        ratio = (own[f"loss_{k}"] / own[f"noise_{k}"]).median()
        yield f"{own[f'loss_{k}'].median():.3g} ({ratio:.2f} x noise)"
    spread = f" ({own['sum_of_squares'].std():.3g})" if len(own) > 1 else ""
    yield f"{own['sum_of_squares'].mean():.3g}{spread}"
    above = (own["sum_of_squares"] - own["bound"]).min()
    yield ABSENT if np.isnan(above) else f"{above:+.3g}"


def _share(hits: npt.NDArray[np.bool_]) -> str:
    interval = binomtest(int(hits.sum()), len(hits)).proportion_ci()
    return f"{hits.mean():.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def sentence(table: pd.DataFrame) -> str:
    """The methods' rates in a sentence, for the head of a page."""
    first, second = RANKS
    rates: Mapping[str, str] = {
        names.method_name(str(method)): _share((own[["rank_1", "rank_2"]].to_numpy() == np.array(RANKS)).all(1))
        for method, own in table.groupby("method", sort=False)
    }
    return f"Ranks {first} and {second} found: " + ", ".join(f"{name} {rate}" for name, rate in rates.items()) + "."
