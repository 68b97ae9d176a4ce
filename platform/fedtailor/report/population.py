"""Who the clients are: how many per language, how many texts they have, of which classes (FedP2EFT Fig. 3)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from fedtailor.report.facts import RunData
from fedtailor.report.heatmaps import client_homes
from fedtailor.report.names import in_pool_order, pool_name
from fedtailor.report.style import GRID, MUTED, Drawing, Missing, class_label, language_label

CLIENTS, CLASSES = "Clients and texts per language", "Classes per language"

SAMPLES = "What the clients' examples are in"

_POOL_COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")

_MOST_CLASSES = 14

_BAR = 0.36


def population_figures(frame: pd.DataFrame, data: RunData) -> list[Drawing | Missing]:
    """Clients and texts per language and pool, and the classes of the train texts, where the data tell.

    Args:
        frame: checked metric rows; they name the clients where there is no record of the data.
        data: what the run folder holds of the data.
    """
    clients = data.clients if len(data.clients) else _named(frame)
    if not len(clients):
        return [Missing(CLIENTS, "no client is recorded")]
    return [_clients_figure(clients), _classes_figure(data)]


def _named(frame: pd.DataFrame) -> pd.DataFrame:
    rows = [(client, pool, language) for client, (pool, language) in sorted(client_homes(frame).items())]
    return pd.DataFrame(rows, columns=["client", "pool", "language"])


def _clients_figure(clients: pd.DataFrame) -> Drawing:
    pools = in_pool_order(clients["pool"])
    codes = sorted(set(clients["language"]), reverse=True)
    sizes = {"n_train": "train texts", "n_test": "test texts"}
    texts = {name: title for name, title in sizes.items() if name in clients}
    figure = Figure(figsize=(3.6 + 3.0 * len(texts) + 1.0, 1.1 + max(0.3 * len(codes), 0.8)))
    axes = figure.subplots(1, 1 + len(texts), squeeze=False, sharey=True)[0]
    grouped = clients.groupby(["pool", "language"])
    _bars(axes[0], grouped.size().astype(float), pools, codes)
    axes[0].set_title("Clients")
    for axis, (name, title) in zip(axes[1:], texts.items(), strict=True):
        _bars(axis, grouped[name].sum().astype(float), pools, codes)
        axis.set_title(f"{title.capitalize()} of all clients")
    axes[0].set_yticks(range(len(codes)), [language_label(code) for code in codes])
    axes[0].set_ylim(-0.6, len(codes) - 0.4)
    handles = [axes[0].containers[k] for k in range(len(pools))]
    figure.legend(
        handles=handles, labels=[pool_name(pool) for pool in pools], loc="outside upper left", ncols=len(pools)
    )
    caption = "Clients of each language and pool" + (
        ", and the train and test texts that they hold together (first seed)." if texts else "."
    )
    return Drawing("clients_per_language", CLIENTS, caption, figure)


def _bars(axis: Axes, values: pd.Series[float], pools: Sequence[str], codes: Sequence[str]) -> None:
    height = _BAR if len(pools) > 1 else 0.6
    for k, pool in enumerate(pools):
        widths = [float(values.get((pool, code), 0.0)) for code in codes]
        at = np.arange(len(codes)) + (0.5 * (len(pools) - 1) - k) * height * 1.05
        bars = axis.barh(at, widths, height=height, color=_POOL_COLOURS[k % len(_POOL_COLOURS)])
        axis.bar_label(bars, [f"{width:.0f}" for width in widths], padding=2, fontsize=7, color=MUTED)
    axis.margins(x=0.12)
    axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axis.tick_params(axis="y", length=0)
    axis.grid(False, axis="y")
    axis.spines["left"].set_visible(False)


def _classes_figure(data: RunData) -> Drawing | Missing:
    labels = data.labels
    title, said, name = _classes_words(data)
    if not labels or not data.class_counts:
        return Missing(title, "the run folder does not say which data it used")
    if len(labels) > _MOST_CLASSES:
        what = "groups" if data.kind == "generation" else "classes"
        return Missing(title, f"{len(labels)} {what} are too many to show (at most {_MOST_CLASSES})")
    homes = data.clients.set_index("client")
    counts = pd.DataFrame.from_dict(dict(data.class_counts), orient="index").loc[list(homes.index)]
    pools = in_pool_order(homes["pool"])
    codes = sorted(set(homes["language"]), reverse=True)
    grouped = counts.groupby([homes["pool"], homes["language"]]).sum()
    totals = {pool: grouped[grouped.index.get_level_values(0) == pool].droplevel(0) for pool in pools}
    colours = sns.color_palette("colorblind" if len(labels) <= 10 else "husl", len(labels)).as_hex()
    figure = Figure(figsize=(2.2 + 3.9 * len(pools), 1.3 + max(0.25 * len(codes), 0.8)))
    axes = figure.subplots(1, len(pools), squeeze=False, sharey=True)[0]
    for axis, pool in zip(axes, pools, strict=True):
        _shares(axis, totals[pool].reindex(codes).fillna(0.0), colours)
        axis.set_title(pool_name(pool))
    axes[0].set_yticks(range(len(codes)), [language_label(code) for code in codes])
    axes[0].set_ylim(-0.6, len(codes) - 0.4)
    figure.legend(
        handles=[axes[0].containers[k] for k in range(len(labels))],
        labels=[name(label, k) for k, label in enumerate(labels)],
        loc="outside upper left", ncols=-(-len(labels) // -(-len(labels) // 7)), fontsize=8.5, columnspacing=1.1,
        handlelength=1.1,
    )  # fmt: skip
    return Drawing(
        "classes_per_language",
        title,
        f"{said} Single clients are more uneven.",
        figure,
    )


def _classes_words(data: RunData) -> tuple[str, str, Callable[[str, int], str]]:
    """Title, sentence and names of the parts."""
    if data.kind != "generation":
        return CLASSES, "Classes of the train texts of a language's clients, as shares (first seed).", class_label
    said = (
        "Languages or groups of the train examples of clients by their predominant one, as shares (first seed). Scores "
        "count an example for its own, not for the client's."
    )
    return SAMPLES, said, lambda label, _: language_label(label)


def _shares(axis: Axes, totals: pd.DataFrame, colours: Sequence[str]) -> None:
    shares = totals.div(totals.sum(axis=1).where(lambda n: n > 0, 1.0), axis=0).to_numpy(np.float64)
    left = np.zeros(len(shares))
    for k, colour in enumerate(colours):
        axis.barh(np.arange(len(shares)), shares[:, k], left=left, height=0.72, color=colour)
        left += shares[:, k]
    axis.set_xlim(0, 1)
    axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    axis.tick_params(axis="y", length=0)
    axis.grid(False)
    axis.spines["left"].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
