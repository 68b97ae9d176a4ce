"""What was done in a run to hide clients, and what it spent, in a sentence for captions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from fedtailor.privacy.accounting import default_delta
from fedtailor.privacy.coverage import NOT_COVERED
from fedtailor.runs.experiment import scaled
from fedtailor.runs.report.names import in_method_order, method_name
from fedtailor.runs.report.wording import at


def privacy_sentence(run: Mapping[str, Any], frame: pd.DataFrame | None = None) -> str:
    """What was done to hide clients and what it spent; empty where nothing was.

    Args:
        run: content of ``run.json``.
        frame: checked metric rows.
    """
    config = run.get("config") or {}
    sentences = []
    if at(config, "privacy.name") == "central_dp":
        sentences.append(_dp_sentence(config, frame))
    masking = at(config, "privacy.secure_aggregation")
    if masking not in (None, "none"):
        sentences.append(f"Secure aggregation ({masking}) was simulated, for its cost and drop-outs; it hid nothing.")
    return " ".join(sentences)


def _dp_sentence(config: Mapping[str, Any], frame: pd.DataFrame | None) -> str:
    clip, sampler = at(config, "privacy.clip"), at(config, "privacy.sampler")
    how = f"clip {clip:g}" if isinstance(clip, int | float) else "no clip"
    rows = None if frame is None else frame[(frame["metric"] == "epsilon") & (frame["client"] == "")]
    if rows is None or rows.empty:
        return f"Central DP over clients ({how}) without noise: no guarantee."
    least = rows.groupby(["stage", "method"])["value"].max()
    parts = [
        f"{least[stage, method]:.3g} ({'base alone' if stage == 'base' else method_name(method)})"
        for stage in ("base", "strategy")
        for method in in_method_order(rows.loc[rows["stage"] == stage, "method"])
    ]
    relation = "added or removed" if sampler == "poisson" else "replaced"
    delta = _delta(config)
    at_delta = "" if delta is None else f" at delta = {delta:.2g}"
    return (
        f"Central DP over clients ({how}, {sampler} cohorts, one client {relation}): "
        f"epsilon {', '.join(parts)}{at_delta}, each with its base and per seed. Not covered: {'; '.join(NOT_COVERED)}."
    )


def _delta(config: Mapping[str, Any]) -> float | None:
    """As configured, or the default for the run's seen clients; None where ``run.json`` does not say."""
    given, languages = at(config, "privacy.delta"), at(config, "task.languages")
    full, scale = at(config, "task.clients_per_language"), at(config, "scale")
    if given is not None:
        return float(given)
    if not languages or not isinstance(full, int):
        return None
    kept = at(config, "task.clients_kept") or scaled(full, float(scale or 1))
    return default_delta(len(languages) * kept)
