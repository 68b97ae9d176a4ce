"""Clients per second by system and regime, in the report's style."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from fedtailor.report.style import INK, MUTED, Drawing, save, styled

OURS, PEERS, PLAIN = "#d55e00", "#0072b2", "#9aa0a8"


def draw(results: Mapping[str, Any], folder: Path) -> str | None:
    """Writes ``bench.png`` and ``bench.svg``; returns the file's name, or None without the peers part."""
    blocks = results.get("peers", {}).get("regimes", [])
    if not blocks:
        return None
    with styled():
        drawing = Drawing("bench", "Clients per second", "", _figure(blocks))
        return save(drawing, folder)[0].name


def _figure(blocks: list[Mapping[str, Any]]) -> Figure:
    labels = [row["label"] for row in blocks[0]["rows"]]
    figure = Figure(figsize=(2.3 + 2.9 * len(blocks), 0.32 * len(labels) + 1.2))
    axes = figure.subplots(1, len(blocks), sharey=True, squeeze=False)[0]
    for axis, block in zip(axes, blocks, strict=True):
        _panel(axis, block)
    axes[0].set_yticks(range(len(labels)), labels)
    axes[0].set_ylim(len(labels) - 0.4, -0.6)
    figure.supxlabel(
        "clients per second (log scale; line: slowest to fastest round; number: ratio to the faster fp32 plain loop)",
        fontsize=9,
        color=INK,
    )
    return figure


def _panel(axis: Axes, block: Mapping[str, Any]) -> None:
    rows = {row["system"]: row for row in block["rows"] if not row["missing"]}
    plain = [row["clients_per_s"] for key, row in rows.items() if key in ("plain", "plain_all")]
    base = max(plain, default=max(row["clients_per_s"] for row in rows.values()))
    least = 0.7 * min(row["slowest"] for row in rows.values())
    axis.axvline(base, color=MUTED, linewidth=1, linestyle=(0, (3, 3)), zorder=1)
    for y, row in enumerate(block["rows"]):
        if row["missing"]:
            axis.text(least * 1.1, y, "not measured", va="center", fontsize=8, color=MUTED)
            continue
        speed, colour = row["clients_per_s"], _colour(row)
        # Points, not bars: a length means nothing on a log scale.
        axis.plot([row["slowest"], row["fastest"]], [y, y], color=colour, linewidth=2, alpha=0.5, zorder=2)
        axis.plot(
            [speed], [y], "o", color=colour, markersize=7.5, markeredgecolor="white", markeredgewidth=0.6, zorder=3
        )
        label = axis.text(
            max(speed, row["fastest"]) * 1.12, y, f"{speed / base:.2g}x", va="center", fontsize=8, color=INK
        )
        label.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.6})
    axis.set_xscale("log")
    axis.set_xlim(least, 2.0 * max(row["fastest"] for row in rows.values()))
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, at: f"{value:g}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.tick_params(axis="y", length=0)
    regime = block["regime"]
    axis.set_title(f"{regime['name'].capitalize()}\n", fontsize=10)
    tokens = f"{regime['tokens'] * regime['batch']:,} tokens a step, hidden {regime['hidden']}"
    axis.text(0, 1.02, tokens, transform=axis.transAxes, fontsize=8.5, color=MUTED)


def _colour(row: Mapping[str, Any]) -> str:
    if row["system"].startswith("plain"):
        return PLAIN
    return PEERS if row["system"] in ("flower", "pfl1", "pfl2") else OURS
