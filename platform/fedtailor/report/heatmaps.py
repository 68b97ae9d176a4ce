"""What strategies learned, as maps (ranks kept per layer, how far languages are apart), and who the clients are.

The population is drawn as FedP2EFT Fig. 3: clients and texts per language, and of which classes they are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from scipy.spatial.distance import cdist

from fedtailor.core.messages import FloatArray
from fedtailor.models.families import in_part_order, locate_module
from fedtailor.report import style
from fedtailor.report.facts import RunData
from fedtailor.report.names import in_method_order, in_pool_order, method_name, pool_name, shortened
from fedtailor.report.style import GRID, MUTED, SEQUENTIAL, Drawing, Missing, class_label, drawable, language_label

Strategies = Mapping[tuple[str, int], Mapping[str, FloatArray]]
RANKS, DISTANCE = "Learned rank structure", "Strategy distance between languages"
CLIENTS, CLASSES = "Clients and texts per language", "Classes per language"
SAMPLES = "What the clients' examples are in"
_POOL_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
_MOST_CLASSES = 14


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
    columns, height = min(len(budgets), 2), 1.1 + 0.27 * (len(layers) + len(heads))
    figure, axes = style.panels(len(budgets), columns, max(1.9 + 0.66 * len(parts), 4.2) * columns, height)
    for axis, budget in zip(axes, budgets, strict=True):
        _rank_panel(axis, means.xs(budget, level="budget").to_dict(), places, layers, parts, heads)
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
    figures: list[Drawing | Missing] = []
    for method in in_method_order(method for method, _ in strategies):
        own = [strategies[method, seed] for seed in sorted(seed for name, seed in strategies if name == method)]
        maps: dict[str, pd.DataFrame] = {}
        for pool in in_pool_order(homes["pool"]):
            here = homes[homes["pool"] == pool]
            languages = dict(zip(map(str, here["client"]), map(str, here["language"]), strict=True))
            per_seed = [language_distances(clients, languages) for clients in own]
            mean: pd.DataFrame = pd.concat(per_seed).groupby(level=0).mean()
            if len(mean) > 1 and (mean.to_numpy() > 0).any():
                maps[pool] = mean.loc[:, list(mean.index)]
        title = f"{DISTANCE}: {method_name(method)}"
        reason = f"needs different strategies in two languages; {method_name(method)} has none"
        figures.append(_distance_figure(method, title, maps) if maps else Missing(title, reason))
    return figures


def client_homes(frame: pd.DataFrame) -> pd.DataFrame:
    """``client``, ``pool``, ``language``; a client of several languages belongs to the one with most examples."""
    rows = frame[frame["client"] != ""].drop_duplicates(["pool", "language", "client", "stage", "seed", "metric"])
    sizes = rows.groupby(["client", "pool", "language"])["weight"].max().reset_index()
    sizes = sizes.sort_values(["client", "weight", "language"], ascending=[True, False, True])
    return sizes.drop_duplicates("client")[["client", "pool", "language"]]


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


def _distance_figure(method: str, title: str, maps: Mapping[str, pd.DataFrame]) -> Drawing:
    values = np.concatenate([table.to_numpy().ravel() for table in maps.values()])
    values = values[np.isfinite(values) & (values > 0)]
    low, high = float(values.min()), float(values.max())
    # One scale for all pools; a scale of no extent would have no colours.
    norm = LogNorm(low, high if high > low else low * 1.001)
    n = max(6, *(len(table) for table in maps.values()))
    width = (2.1 + 0.26 * n) * len(maps) + 0.6
    figure, axes = style.panels(len(maps), len(maps), width, 1.3 + 0.26 * n)
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
    bar = figure.colorbar(axes[0].collections[0], ax=axes, shrink=0.8, aspect=25, pad=0.02)
    style.log_ticks(bar.ax.yaxis)
    bar.set_label("mean Euclidean distance of λ (log scale)")
    bar.outline.set_visible(False)
    return Drawing(
        f"lambda_distance_{method}",
        title,
        "Mean Euclidean distance between the λ of a client of one language and a different client of the "
        "other, averaged over pairs of clients and over seeds. Colours are normalised on a log scale, from the "
        "smallest distance of all panels to the largest. Darker: more alike.",
        figure,
    )


def population_figures(frame: pd.DataFrame, data: RunData) -> list[Drawing | Missing]:
    """Clients and texts per language and pool, and the classes of the train texts, where the data tell.

    Args:
        frame: checked metric rows; they name the clients where there is no record of the data.
        data: what the run folder holds of the data.
    """
    clients = data.clients if len(data.clients) else client_homes(frame)
    if not len(clients):
        return [Missing(CLIENTS, "no client is recorded")]
    return [_clients_figure(clients), _classes_figure(data)]


def _clients_figure(clients: pd.DataFrame) -> Drawing:
    pools = in_pool_order(clients["pool"])
    codes = sorted(set(clients["language"]), reverse=True)
    sizes = {"n_train": "train texts", "n_test": "test texts"}
    texts = {name: title for name, title in sizes.items() if name in clients}
    columns = 1 + len(texts)
    height = 1.1 + max(0.3 * len(codes), 0.8)
    figure, axes = style.panels(columns, columns, 3.6 + 3.0 * len(texts) + 1.0, height, sharey=True)
    grouped = clients.groupby(["pool", "language"])
    _bars(axes[0], grouped.size().astype(float), pools, codes)
    axes[0].set_title("Clients")
    for axis, (name, title) in zip(axes[1:], texts.items(), strict=True):
        _bars(axis, grouped[name].sum().astype(float), pools, codes)
        axis.set_title(f"{title.capitalize()} of all clients")
    style.language_rows(axes[0], codes)
    labels = [pool_name(pool) for pool in pools]
    figure.legend(handles=axes[0].containers, labels=labels, loc="outside upper left", ncols=len(pools))
    caption = "Clients of each language and pool" + (
        ", and the train and test texts that they hold together (first seed)." if texts else "."
    )
    return Drawing("clients_per_language", CLIENTS, caption, figure)


def _bars(axis: Axes, values: pd.Series[float], pools: Sequence[str], codes: Sequence[str]) -> None:
    height = 0.36 if len(pools) > 1 else 0.6
    for k, pool in enumerate(pools):
        widths = [float(values.get((pool, code), 0.0)) for code in codes]
        at = np.arange(len(codes)) + (0.5 * (len(pools) - 1) - k) * height * 1.05
        bars = axis.barh(at, widths, height=height, color=_POOL_COLOURS[k % len(_POOL_COLOURS)])
        axis.bar_label(bars, [f"{width:.0f}" for width in widths], padding=2, fontsize=7, color=MUTED)
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    style.open_rows(axis)


def _classes_figure(data: RunData) -> Drawing | Missing:
    generation, labels, homes = data.kind == "generation", data.labels, data.clients.set_index("client")
    title, what = (SAMPLES, "groups") if generation else (CLASSES, "classes")
    if data.kind == "regression":
        return Missing(title, "numbers have none")
    of_clients = next(iter(data.class_counts.values()), {})
    if not labels or not of_clients:
        return Missing(title, "the run folder does not say which data it used")
    if len(labels) > _MOST_CLASSES:
        return Missing(title, f"{len(labels)} {what} are too many to show (at most {_MOST_CLASSES})")
    counts = pd.DataFrame.from_dict(dict(of_clients), orient="index").loc[list(homes.index)]
    pools = in_pool_order(homes["pool"])
    codes = sorted(set(homes["language"]), reverse=True)
    totals = counts.groupby([homes["pool"], homes["language"]]).sum()
    colours = sns.color_palette("colorblind" if len(labels) <= 10 else "husl", len(labels)).as_hex()
    height = 1.3 + max(0.25 * len(codes), 0.8)
    figure, axes = style.panels(len(pools), len(pools), 2.2 + 3.9 * len(pools), height, sharey=True)
    for axis, pool in zip(axes, pools, strict=True):
        here = totals[totals.index.get_level_values(0) == pool].droplevel(0)
        _shares(axis, here.reindex(codes).fillna(0.0), colours)
        axis.set_title(pool_name(pool))
    style.language_rows(axes[0], codes)
    figure.legend(
        handles=axes[0].containers,
        labels=[language_label(label) if generation else class_label(label, k) for k, label in enumerate(labels)],
        loc="outside upper left", ncols=-(-len(labels) // -(-len(labels) // 7)), fontsize=8.5, columnspacing=1.1,
        handlelength=1.1,
    )  # fmt: skip
    whose = (
        "Languages or groups of the train examples of clients by their predominant one, as shares (first seed). Scores "
        "count an example for its own, not for the client's."
        if generation
        else "Classes of the train texts of a language's clients, as shares (first seed)."
    )
    return Drawing("classes_per_language", title, f"{whose} Single clients are more uneven.", figure)


def _shares(axis: Axes, totals: pd.DataFrame, colours: Sequence[str]) -> None:
    shares = totals.div(totals.sum(axis=1).where(lambda n: n > 0, 1.0), axis=0).to_numpy(np.float64)
    left = np.zeros(len(shares))
    for k, colour in enumerate(colours):
        axis.barh(np.arange(len(shares)), shares[:, k], left=left, height=0.72, color=colour)
        left += shares[:, k]
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    style.open_rows(axis)
    axis.grid(False)
    axis.spines["bottom"].set_color(GRID)
