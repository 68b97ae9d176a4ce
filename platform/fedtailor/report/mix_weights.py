"""The w-map of methods that mix a client's own LoRA with the common one (pFedGPT and its rivals), and what it cost.

Shen et al. (EMNLP 2025) explain their method by these weights and draw none of them. Every round commits them: metrics
``mix_weight.PROJECTION.BLOCK``, the client's own share at each layer, and what `COST` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize

from fedtailor.report import style
from fedtailor.report.grid import Grid
from fedtailor.report.names import ABSENT, in_method_order, method_name, shortened
from fedtailor.report.style import GRID, SEQUENTIAL, Drawing, drawable

TITLE: Final = "Mixing weights"
WEIGHT: Final = "mix_weight."
COST: Final = ("mix_evaluations", "mix_tokens", "mix_gain")
"""Of a client's round: mixes that were scored, tokens of the rows that they were scored on, and the loss of the common
LoRA less that of the mix on the rows that decided."""
_FORMS: Final[Sequence[str]] = (".1f", ",.0f", ".2f", ".0%", ".4f", ".2f")
_KEYS: Final = ["method", "seed", "client", "round"]
_HEADER: Final = ("Mixes scored", "Tokens scored", "Seconds", "Of the round", "Loss gained", "Mean w")
_MOST_ROWS: Final = 25
"""Clients of a panel that have a row of full height."""
_STAGE: Final = r"^strategy/(?P<method>[^/]+)/(?:.*/)?seed(?P<seed>\d+)$"


def mix_rounds(frame: pd.DataFrame) -> pd.DataFrame:
    """A row per method, seed, client, round and layer that was mixed: projection, block (-1: none), own share ``w``.

    Args:
        frame: checked metric rows.
    """
    rows = frame[(frame["stage"] == "strategy") & frame["metric"].str.startswith(WEIGHT)]
    asked = frame[(frame["stage"] == "strategy") & (frame["metric"] == "mix_evaluations") & (frame["value"] > 0)]
    rows = rows.merge(asked[_KEYS].drop_duplicates(), on=_KEYS)
    label = rows["metric"].str.removeprefix(WEIGHT).str.extract(r"^(?P<projection>.*?)(?:\.(?P<block>\d+))?$")
    found = rows[_KEYS].assign(projection=label["projection"], block=label["block"].fillna(-1).astype(int))
    found = found.assign(w=rows["value"].to_numpy())
    return found.sort_values([*_KEYS, "projection", "block"], ignore_index=True)


def mix_figures(table: pd.DataFrame) -> list[Drawing]:
    """A figure per method, of the first seed: a column of panels per projection.

    Args:
        table: of `mix_rounds`.
    """
    own = table[table["seed"] == table["seed"].min()]
    return [_figure(method, own[own["method"] == method]) for method in in_method_order(own["method"])]


def _figure(method: str, rows: pd.DataFrame) -> Drawing:
    projections, clients = sorted(set(rows["projection"])), sorted(set(rows["client"]))
    rounds = range(1, int(rows["round"].max()) + 2)
    n = len(projections)
    figure, axes = style.panels(2 * n, n, 1.6 + 3.6 * n, 0.9 + 0.26 * min(len(clients), _MOST_ROWS))
    for k, projection in enumerate(projections):
        here = rows[rows["projection"] == projection]
        over = here.pivot_table(index="client", columns="round", values="w").rename(columns=lambda r: r + 1)
        _panel(axes[k], over.reindex(index=clients, columns=rounds), first=k == 0)
        axes[k].set(title=projection, xlabel="round")
        deep = here.pivot_table(index="client", columns="block", values="w")
        _panel(axes[n + k], deep.reindex(index=clients), first=k == 0)
        axes[n + k].set(xlabel="layer")
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), SEQUENTIAL), ax=axes, shrink=0.7, pad=0.02)
    bar.set_ticks([0.0, 0.5, 1.0], labels=["0 common", "0.5", "1 own"])
    bar.outline.set_visible(False)
    return Drawing(
        f"mix_weights_{method}",
        f"{TITLE}: {method_name(method)}",
        "The share w of a client's own LoRA in what its round began at. Above: mean over layers, round by round; grey: "
        "nothing was mixed (a first round, or slow start). Below: layer by layer, mean over the rounds that began at a "
        "mix.",
        figure,
    )


def _panel(axis: Axes, table: pd.DataFrame, first: bool) -> None:
    axis.set_facecolor(GRID)
    # A name for every row, or for every so many where rows become thin.
    sns.heatmap(
        table.rename(index=lambda client: shortened(drawable(str(client)), 24)), ax=axis, vmin=0, vmax=1,
        cmap=SEQUENTIAL, cbar=False, linewidths=0.4, linecolor="white",
        yticklabels=-(-len(table) // _MOST_ROWS) if first else False,
    )  # fmt: skip
    axis.grid(False)
    axis.set_ylabel("")
    axis.tick_params(length=0, labelrotation=0)


def mix_costs(frame: pd.DataFrame, times: pd.DataFrame | None = None) -> pd.DataFrame:
    """Per method: ``calls`` (rounds of clients that began at a mix), ``rounds`` of clients in all, mean and total of
    `COST`, ``search_seconds`` of a call and their ``share`` of the seconds of these rounds, and the mean ``w``.

    Args:
        frame: checked metric rows.
        times: `round_store.TIMING_COLUMNS`; seconds that are not known are NaN.
    """
    rows = frame[(frame["stage"] == "strategy") & frame["metric"].isin(COST)]
    wide = rows.pivot_table(index=_KEYS, columns="metric", values="value")
    if not len(wide):
        return pd.DataFrame()
    asked = wide[wide["mix_evaluations"] > 0].reset_index().merge(_seconds(times), "left", _KEYS)
    weights = mix_rounds(frame).groupby("method")["w"].mean()
    found = []
    for method in in_method_order(wide.index.get_level_values("method")):
        own = asked[asked["method"] == method]
        sums = {f"{name}_sum": own[name].sum() for name in COST[:2]}
        means = {name: own[name].mean() if len(own) else np.nan for name in (*COST, "search_seconds")}
        means["share"] = own["search_seconds"].sum(min_count=1) / own["seconds"].sum(min_count=1)
        calls = {"calls": len(own), "rounds": len(wide.loc[[method]])}
        found.append({"method": method, **calls, **means, **sums, "w": weights.get(method, np.nan)})
    return pd.DataFrame(found)


def _seconds(times: pd.DataFrame | None) -> pd.DataFrame:
    """Of each client's round, ``seconds`` and ``search_seconds``; no row where a run did not note the latter."""
    columns = ["stage", "client", "round", "seconds", "search_seconds"]
    noted = (pd.DataFrame() if times is None else times).reindex(columns=columns).dropna()
    named = noted["stage"].astype(str).str.extract(_STAGE)
    return noted.assign(method=named["method"], seed=named["seed"].astype(float)).drop(columns="stage")


def mix_grid(costs: pd.DataFrame) -> Grid:
    """``mixing``: a row per method.

    Args:
        costs: of `mix_costs`, at least one row.
    """
    rows = []
    for row in costs.to_dict("records"):
        numbers = [float(row[name]) for name in (*COST[:2], "search_seconds", "share", COST[2], "w")]
        shown = [ABSENT if np.isnan(x) else f"{x:{form}}" for x, form in zip(numbers, _FORMS, strict=True)]
        rows.append([method_name(str(row["method"])), f"{row['calls']} of {row['rounds']}", *shown])
    return Grid(
        header=["Method", "Rounds that mixed", *_HEADER],
        rows=rows,
        caption=[
            "Rounds of clients, all seeds; the other columns are means of those that began at a mix. Tokens of a call: "
            "those of the rows that its mixes were scored on, a forward pass each. Seconds: wall time of a search, "
            "which clients side by side share, and its part of the round, training and all. Loss gained: of the common "
            "LoRA less of the mix, on the rows that decided. w: the share of the client's own LoRA, mean over layers."
        ],
        title=TITLE,
        label="mixing",
    )
