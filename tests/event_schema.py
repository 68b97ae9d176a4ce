"""Whether an event is as the table of events says."""

from __future__ import annotations

from fedtailor.tracking.events import COMMON, KINDS, Event, name_of


def problems(event: Event) -> list[str]:
    """What keeps an event from being as `KINDS` says; empty if nothing does."""
    missing = [f"event without '{key}'" for key in COMMON if key not in event]
    if missing:
        return missing
    name = name_of(event)
    if name not in KINDS:
        return [f"{name}: not in the table of events"]
    keys = KINDS[name].keys.split()
    allowed = {*COMMON, "event", *(key.rstrip("?") for key in keys)}
    absent = [f"{name}: no '{key}'" for key in keys if not key.endswith("?") and key not in event]
    return absent + [f"{name}: '{key}' is not documented" for key in event if key not in allowed]
