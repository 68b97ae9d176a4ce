"""Every kind of event of a run: its keys, its meaning, and how it reads as a sentence.

``events.jsonl`` and ``--json-log`` hold the same objects. All have `COMMON`: ``time`` (UTC), ``seq`` (number of kept
events up to this one: the order, whatever clocks did; an event that is shown but not kept repeats the number of the
one before), ``run`` and ``kind``. Where a kind has several forms, ``event`` tells which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from fedtailor.federated.rounds import RoundOutcome

Event = Mapping[str, Any]

COMMON = ("time", "seq", "run", "kind")

_JOB = ("stage", "round", "segment", "clients", "attempt", "actor", "host", "reason")

_LOG = ("log", "round", "reason")


@dataclass(frozen=True)
class EventKind:
    """One row of `KINDS`.

    Args:
        meaning: when a run has such an event.
        keys: always there, beside `COMMON` and ``event``.
        optional: sometimes there.
        kept: whether ``events.jsonl`` has it; the others are only shown, timings and commits say the same.
        text: the sentence, with keys in braces.
    """

    meaning: str
    keys: tuple[str, ...]
    optional: tuple[str, ...] = ()
    kept: bool = True
    text: str = ""


KINDS: Mapping[str, EventKind] = {
    "stage": EventKind(
        "a stage is checking, preparing, running, done, or reused", ("stage", "state"), ("artifact", "number", "of"),
        text="{stage} {state}",
    ),
    "segment": EventKind(
        "a segment's result was taken", ("stage", "clients"), ("pid", "node", "hostname", "peak_rss_mb"), kept=False
    ),
    "progress": EventKind(
        "a round or chunk was committed: done of total", ("stage", "done", "total", "clients"), kept=False
    ),
    "failure": EventKind(
        "a client has no valid result; failure: exception or rejected",
        ("client", "stage", "round", "failure", "reason"),
        text="{client} ({stage}, round {round}) {failure}: {reason}",
    ),
    "warning": EventKind(
        "something to look at; what: its kind, client(s) and reason", ("stage", "round", "what"),
        text="{stage}, round {round}: {what}",
    ),
    "privacy": EventKind(
        "a round was released under a ledger; epsilon: spent so far, null without a guarantee",
        ("stage", "round", "epsilon", "delta", "text"), text="{text}",
    ),
    "waiting": EventKind("another run has what this one needs", ("text",)),
    "note": EventKind("a word to whoever watches, e.g. about Ctrl-C", ("text",), kept=False),
    "wandb": EventKind(
        "W&B was fed (synced) or could not be (failed)", ("state",), ("text", "place"),
        text="W&B: {state} {text} {place}",
    ),
    "pool/actor_lost": EventKind(
        "an actor will not answer; how: death, oom, node, hang or unreachable",
        ("actor", "how", "cause", "host", "node", "during", "stack"),
        text="actor {actor} ({host}) lost in {during}: {how}: {cause}",
    ),
    "pool/actor_replaced": EventKind(
        "a new actor takes its place", ("actor", "how"), text="actor {actor} is replaced after: {how}"
    ),
    "pool/actor_waiting": EventKind(
        "Ray has not started it yet", ("actor", "how", "free"),
        text="Ray has no place for actor {actor} yet; free: {free}",
    ),
    "pool/pool_shrunk": EventKind(
        "the run does without an actor that ran out of memory", ("actor", "how", "actors"),
        text="actor {actor} ran out of memory and is done without; {actors} left",
    ),
    "pool/job_retried": EventKind(
        "a lost segment goes out again", (*_JOB, "how"),
        text="{stage}, round {round}: segment {segment} goes out again (attempt {attempt}) after: {reason}",
    ),
    "pool/result_dropped": EventKind(
        "a result came twice and counts once", (*_JOB, "how"),
        text="{stage}, round {round}: segment {segment}: {reason} is dropped",
    ),
    "storage/lock-taken-over": EventKind(
        "a lock was abandoned", ("lock", "from", "by", "reason"), text="took over {lock} of {from}: {reason}"
    ),
    "storage/quarantined": EventKind(
        "a damaged round was moved aside", (*_LOG, "place"), text="{log}, round {round} moved to {place}: {reason}"
    ),
    "storage/lost": EventKind("a round that was committed is gone", _LOG, text="{log}, round {round} lost: {reason}"),
    "storage/leftover-removed": EventKind(
        "an attempt that never committed was deleted", _LOG, text="{log}, round {round} removed: {reason}"
    ),
}  # fmt: skip
"""Name (``kind`` or ``kind/event``) to what such an event says."""

QUIET = frozenset(name for name, kind in KINDS.items() if not kind.kept)
"""Events that are shown but not kept."""


def name_of(event: Event) -> str:
    """Its row in `KINDS`.

    >>> name_of({"kind": "pool", "event": "actor_lost"})
    'pool/actor_lost'
    """
    return f"{event['kind']}/{event['event']}" if "event" in event else str(event["kind"])


def problems(event: Event) -> list[str]:
    """What keeps an event from being as `KINDS` says; empty if nothing does.

    >>> problems({"time": "2026-01-01", "seq": 1, "run": "r", "kind": "wandb", "pace": 2})
    ["wandb: no 'state'", "wandb: 'pace' is not documented"]
    """
    missing = [f"event without '{key}'" for key in COMMON if key not in event]
    if missing:
        return missing
    name = name_of(event)
    if name not in KINDS:
        return [f"{name}: not in the table of events"]
    kind = KINDS[name]
    allowed = {*COMMON, "event", *kind.keys, *kind.optional}
    absent = [f"{name}: no '{key}'" for key in kind.keys if key not in event]
    return absent + [f"{name}: '{key}' is not documented" for key in event if key not in allowed]


def describe(event: Event) -> str:
    """An event in one line: its text, its sentence, or its fields."""
    kind = KINDS.get(name_of(event))
    if kind is not None and kind.text:
        return " ".join(kind.text.format_map(defaultdict(str, event)).split())
    if "text" in event:
        return str(event["text"])
    rest = "  ".join(f"{key}={value}" for key, value in event.items() if key not in COMMON)
    return f"{event['kind']}  {rest}"


def spent_event(stage: str, outcome: RoundOutcome) -> dict[str, Any]:
    """The event of a round that was released under a ledger."""
    spent, number = outcome.spent, outcome.state.round - 1
    assert spent is not None, "only rounds with a release have this event"
    measured = {row["metric"]: row["value"] for row in outcome.metrics if not row["client"]}
    known = isfinite(spent.epsilon)
    parts = [f"epsilon {spent.epsilon:.3g} spent at delta {spent.delta:.2g}" if known else "no guarantee"]
    if "noise_to_update" in measured:
        parts.append(f"noise / update {measured['noise_to_update']:.2g}")
    if "clipped_share" in measured:
        parts.append(f"{measured['clipped_share']:.0%} clipped")
    return {
        "kind": "privacy", "stage": stage, "round": number, "epsilon": spent.epsilon if known else None,
        "delta": spent.delta, "text": f"{stage}, round {number}: {', '.join(parts)}",
    }  # fmt: skip
