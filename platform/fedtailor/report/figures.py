"""All figures of a report, drawn from checked rows and written as PNG and SVG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from fedtailor.report import curves as plots
from fedtailor.report import heatmaps
from fedtailor.report.curves import curves
from fedtailor.report.facts import RunData
from fedtailor.report.population import population
from fedtailor.report.scores import Block
from fedtailor.report.style import Drawing, Missing, class_label, language_label, save, styled


def draw(
    frame: pd.DataFrame,
    found: Sequence[Block],
    strategies: heatmaps.Strategies,
    modules: Sequence[str],
    data: RunData,
    folder: Path,
) -> list[tuple[Drawing | Missing, tuple[Path, ...]]]:
    """Draws every figure that the data allow and writes it to ``folder``.

    Args:
        frame: checked metric rows.
        found: blocks of the tables.
        strategies: (method, seed) to client to lambda, (L, r_init) float32.
        modules: names of the L adapted modules.
        data: what else the run folder holds.

    Returns:
        each figure with its files (png, svg), or the reason why there is none, in reading order.
    """
    folder.mkdir(parents=True, exist_ok=True)
    codes = {*frame["language"], *data.clients["language"]}
    texts = [language_label(code) for code in codes] + [class_label(x, k) for k, x in enumerate(data.labels)]
    with styled(texts):
        entries = [
            *plots.per_budget(found),
            *plots.per_language(found),
            *heatmaps.rank_structure(frame, modules),
            *heatmaps.lambda_distance(frame, strategies),
            *curves(frame),
            *population(frame, data),
        ]
        return [(e, save(e, folder) if isinstance(e, Drawing) else ()) for e in entries]
