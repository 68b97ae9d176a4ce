"""Two maps of what a strategy learned: ranks kept per layer, and how far apart languages' strategies are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from scipy.spatial.distance import cdist

from fedtailor.core.messages import FloatArray
from fedtailor.models.families import in_part_order, locate_module
from fedtailor.report.names import in_method_order, in_pool_order, method_name, pool_name, shortened
from fedtailor.report.style import SEQUENTIAL, Drawing, Missing, drawable, language_label, plain

Strategies = Mapping[tuple[str, int], Mapping[str, FloatArray]]

RANKS, DISTANCE = "Learned rank structure", "Strategy distance between languages"

_COLUMNS = 2


def rank_structure(frame: pd.DataFrame, modules: Sequence[str]) -> list[Drawing | Missing]:
    """One figure per rank-selecting method, a panel per budget: mean ranks kept in each module.

    Args:
        frame: checked metric rows.
        modules: names of the L adapted modules.
    """
    rows = frame[(frame["stage"] == "personalise") & (frame["metric"] == "kept_rank") & (frame["module"] != "")]
    rows = rows[rows["module"].isin(list(modules))] if modules else rows
    if not len(rows):
        return [Missing(RANKS, "no method of this run selects ranks")]
    means = rows.groupby(["method", "budget", "module"])["value"].mean()
    return [_rank_figure(method, means.loc[method], modules) for method in in_method_order(rows["method"])]


def _rank_figure(method: str, means: pd.Series[float], modules: Sequence[str]) -> Drawing:
    places = {module: locate_module(module) for module in modules or means.index.unique("module")}
    layers = sorted({layer for layer, _ in places.values() if layer is not None})
    parts = in_part_order(part for layer, part in places.values() if layer is not None) or [""]
    heads = [part for layer, part in places.values() if layer is None]
    budgets = [int(budget) for budget in means.index.unique("budget")]
    rows, columns = -(-len(budgets) // _COLUMNS), min(len(budgets), _COLUMNS)
    size = (1.9 + 0.66 * len(parts), 1.1 + 0.27 * (len(layers) + len(heads)))
    figure = Figure(figsize=(max(size[0], 4.2) * columns, size[1] * rows))
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat[len(budgets) :]:
        axis.remove()
    for axis, budget in zip(axes.flat, budgets, strict=False):
        _rank_panel(
            axis,
            {str(m): float(v) for m, v in means.xs(budget, level="budget").items()},
            places,
            layers,
            parts,
            heads,
        )
        axis.set_title(f"r = {budget}")
    return Drawing(
        f"rank_structure_{method}",
        f"{RANKS}: {method_name(method)}",
        f"Ranks that {method_name(method)} keeps in each adapted module, mean over clients and seeds. "
        "Layer 0 is next to the embeddings; modules outside the layers are on top. Each panel has its own "
        "colour scale: the budget r is the mean over all modules.",
        figure,
    )


def _rank_panel(
    axis: Axes, kept: Mapping[Any, float], places: Mapping[str, tuple[int | None, str]],
    layers: list[int], parts: list[str], heads: list[str],
) -> None:  # fmt: skip
    norm = Normalize(0, max(kept.values()) or 1)
    colours = sns.color_palette(SEQUENTIAL, as_cmap=True)
    for module, (layer, part) in places.items():
        if module not in kept:
            continue
        at = layers.index(layer) if layer is not None else len(layers) + 0.25 + heads.index(part)
        left, width = (parts.index(part), 1) if layer is not None else (0, len(parts))
        tone = norm(kept[module])
        box = Rectangle((left, at), width, 1, facecolor=colours(tone), edgecolor="white", linewidth=0.8)
        axis.add_patch(box)
        axis.text(
            left + width / 2, at + 0.47, f"{kept[module]:.1f}", ha="center", va="center", fontsize=7.5,
            color="#fefefe" if tone < 0.6 else "#000001",
        )  # fmt: skip
    ticks = [k + 0.5 for k in range(len(layers))] + [len(layers) + 0.75 + k for k in range(len(heads))]
    axis.set(xlim=(0, len(parts)), ylim=(0, len(layers) + (len(heads) + 0.25 if heads else 0)))
    axis.set_xticks([k + 0.5 for k in range(len(parts))], parts)
    axis.set_yticks(ticks, [f"Layer {layer}" for layer in layers] + heads)
    axis.grid(False)
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)


def lambda_distance(frame: pd.DataFrame, strategies: Strategies) -> list[Drawing | Missing]:
    """One figure per method with strategies, a panel per pool: how far languages' lambdas are apart.

    Args:
        frame: checked metric rows; they tell the pool and language of a client.
        strategies: (method, seed) to client to lambda, (L, r_init) float32.
    """
    if not any(strategies.values()):
        return [Missing(DISTANCE, "no method of this run has a strategy")]
    homes = client_homes(frame)
    found: list[Drawing | Missing] = []
    for method in in_method_order(method for method, _ in strategies):
        maps = {}
        for pool in in_pool_order(pool for pool, _ in homes.values()):
            per_seed = [
                language_distances(strategies[method, seed], {c: at[1] for c, at in homes.items() if at[0] == pool})
                for seed in sorted(seed for name, seed in strategies if name == method)
            ]
            mean = pd.concat(per_seed).groupby(level=0).mean() if per_seed else pd.DataFrame()
            if len(mean) > 1 and (mean.to_numpy() > 0).any():
                maps[pool] = mean.loc[:, list(mean.index)]
        if maps:
            found.append(_distance_figure(method, maps))
        else:
            reason = f"needs different strategies in two languages; {method_name(method)} has none"
            found.append(Missing(f"{DISTANCE}: {method_name(method)}", reason))
    return found


def client_homes(frame: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Client to (pool, language); a client of several languages belongs to the one with most examples."""
    rows = frame[frame["client"] != ""].drop_duplicates(["pool", "language", "client", "stage", "seed", "metric"])
    sizes = rows.groupby(["client", "pool", "language"])["weight"].max().reset_index()
    sizes = sizes.sort_values(["client", "weight", "language"], ascending=[True, False, True]).drop_duplicates("client")
    homes = zip(sizes["client"], sizes["pool"], sizes["language"], strict=True)
    return {str(client): (str(pool), str(language)) for client, pool, language in homes}


def language_distances(strategies: Mapping[str, FloatArray], languages: Mapping[str, str]) -> pd.DataFrame:
    """Mean Euclidean distance between a client of one language and a different client of another.

    (languages, languages), FedP2EFT Fig. 4 and 5. NaN on the diagonal of a language with one client.

    Args:
        strategies: client to lambda, (L, r_init).
        languages: client to language; clients without strategy are left out.

    >>> two = {"a": np.zeros((1, 2)), "b": np.array([[3.0, 4.0]])}
    >>> float(language_distances(two, {"a": "x", "b": "y"}).loc["x", "y"])
    5.0
    """
    clients = sorted((name for name in languages if name in strategies), key=lambda name: (languages[name], name))
    codes = np.array([languages[name] for name in clients])
    names = sorted(set(codes.tolist()))
    table = pd.DataFrame(np.nan, index=names, columns=names)
    if not clients:
        return table
    points = np.stack([np.asarray(strategies[name], np.float64).ravel() for name in clients])
    distances: npt.NDArray[np.float64] = cdist(points, points)
    for one in names:
        for other in names:
            pairs = distances[np.ix_(codes == one, codes == other)]
            n = pairs.size - (len(pairs) if one == other else 0)
            table.loc[one, other] = pairs.sum() / n if n else np.nan
    return table


def _distance_figure(method: str, maps: Mapping[str, pd.DataFrame]) -> Drawing:
    values = np.concatenate([table.to_numpy().ravel() for table in maps.values()])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    # One scale for all pools; a scale of no extent would have no colours.
    norm = LogNorm(low, high if high > low else low * 1.001)
    n = max(6, *(len(table) for table in maps.values()))
    figure = Figure(figsize=((2.1 + 0.26 * n) * len(maps) + 0.6, 1.3 + 0.26 * n))
    axes = figure.subplots(1, len(maps), squeeze=False)[0]
    for axis, (pool, table) in zip(axes, maps.items(), strict=True):
        sns.heatmap(
            table.mask(table <= 0), ax=axis, norm=norm, cmap=SEQUENTIAL, square=True, cbar=False,
            linewidths=0.6, xticklabels=[shortened(drawable(str(code)), 8) for code in table],
            yticklabels=[language_label(str(code)) for code in table],
        )  # fmt: skip
        axis.set_title(pool_name(pool))
        axis.set(xlabel="", ylabel="")
        axis.tick_params(axis="x", rotation=90, length=0)
        axis.tick_params(axis="y", rotation=0, length=0)
        axis.grid(False)
    bar = figure.colorbar(axes[0].collections[0], ax=list(axes), shrink=0.8, aspect=25, pad=0.02)
    bar.ax.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    bar.ax.yaxis.set_major_formatter(FuncFormatter(plain))
    bar.ax.yaxis.set_minor_formatter(NullFormatter())
    bar.set_label("mean Euclidean distance of λ (log scale)")
    bar.outline.set_visible(False)
    return Drawing(
        f"lambda_distance_{method}",
        f"{DISTANCE}: {method_name(method)}",
        "Mean Euclidean distance between the λ of a client of one language and a different client of the "
        "other, averaged over pairs of clients and over seeds. Colours are normalised on a log scale, from the "
        "smallest distance of all panels to the largest. Darker: more alike.",
        figure,
    )
