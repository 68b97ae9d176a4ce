"""A round's privacy in one line, for whoever watches."""

from __future__ import annotations

from math import isfinite
from typing import Any

from fedtailor.core.rounds import RoundOutcome


def spent_event(stage: str, outcome: RoundOutcome) -> dict[str, Any]:
    """The event of a round that was released under a ledger."""
    spent, number = outcome.spent, outcome.state.round - 1
    assert spent is not None, "only rounds with a release are told"
    told = {row["metric"]: row["value"] for row in outcome.metrics if not row["client"]}
    known = isfinite(spent.epsilon)
    parts = [f"epsilon {spent.epsilon:.3g} spent at delta {spent.delta:.2g}" if known else "no guarantee"]
    if "noise_to_update" in told:
        parts.append(f"noise / update {told['noise_to_update']:.2g}")
    if "clipped_share" in told:
        parts.append(f"{told['clipped_share']:.0%} clipped")
    return {
        "kind": "privacy", "stage": stage, "round": number, "epsilon": spent.epsilon if known else None,
        "delta": spent.delta, "text": f"{stage}, round {number}: {', '.join(parts)}",
    }  # fmt: skip
