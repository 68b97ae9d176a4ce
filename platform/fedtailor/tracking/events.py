"""Every kind of event of a run: its keys, and how it reads as a sentence.

``events.jsonl`` and ``--json-log`` hold the same objects. All have `COMMON`: ``time`` (UTC), ``seq`` (number of kept
events up to this one: the order, whatever clocks did; an event that is shown but not kept repeats the number of the
one before), ``run`` and ``kind``. Where a kind has several forms, ``event`` tells which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from fedtailor.federated.rounds import RoundOutcome


Event = Mapping[str, Any]
COMMON = ("time", "seq", "run", "kind")
QUIET = frozenset({"segment", "progress", "note"})
"""Events that are shown but not kept: timings and commits say the same."""

_JOB = "stage round segment clients attempt actor host reason how"


class EventKind(NamedTuple):
    """One row of `KINDS`.

    Args:
        keys: keys beside `COMMON` and ``event``; one with a question mark is there sometimes.
        text: the sentence, with keys in braces; by default the event's own ``text``, or its fields.
    """

    keys: str
    text: str = ""


KINDS: Mapping[str, EventKind] = {
    # state: checking, preparing, running, done or reused.
    "stage": EventKind("stage state artifact? number? of?", "{stage} {state}"),
    # The result of a segment was taken; clients: how many of it are valid.
    "segment": EventKind("stage clients pid? node? hostname? peak_rss_mb?"),
    # A round or chunk was committed, done of total.
    "progress": EventKind("stage done total clients"),
    # A client has no valid result; failure: exception or rejected.
    "failure": EventKind("client stage round failure reason", "{client} ({stage}, round {round}) {failure}: {reason}"),
    # what: the kind of the warning, its client(s) and reason.
    "warning": EventKind("stage round what", "{stage}, round {round}: {what}"),
    # A round was released under a ledger; epsilon: spent so far, null without a guarantee.
    "privacy": EventKind("stage round epsilon delta text"),
    # Another run has what this one needs.
    "waiting": EventKind("text"),
    # For whoever watches, e.g. about Ctrl-C.
    "note": EventKind("text"),
    # state: synced or failed.
    "wandb": EventKind("state text? place?", "W&B: {state} {text} {place}"),
    # how: death, oom, node, hang or unreachable; here and in the other forms.
    "pool/actor_lost": EventKind(
        "actor how cause host node during stack", "actor {actor} ({host}) lost in {during}: {how}: {cause}"
    ),
    "pool/actor_replaced": EventKind("actor how", "actor {actor} is replaced after: {how}"),
    "pool/actor_waiting": EventKind("actor how free", "Ray has no place for actor {actor} yet; free: {free}"),
    "pool/pool_shrunk": EventKind(
        "actor how actors", "actor {actor} ran out of memory and is done without; {actors} left"
    ),
    "pool/job_retried": EventKind(
        _JOB, "{stage}, round {round}: segment {segment} goes out again (attempt {attempt}) after: {reason}"
    ),
    "pool/result_dropped": EventKind(_JOB, "{stage}, round {round}: segment {segment}: {reason} is dropped"),
    "storage/lock-taken-over": EventKind("lock from by reason", "took over {lock} of {from}: {reason}"),
    "storage/quarantined": EventKind("log round reason place", "{log}, round {round} moved to {place}: {reason}"),
    "storage/lost": EventKind("log round reason", "{log}, round {round} lost: {reason}"),
    # An attempt that never committed.
    "storage/leftover-removed": EventKind("log round reason", "{log}, round {round} removed: {reason}"),
}
"""Name (``kind`` or ``kind/event``) to what such an event says."""


def name_of(event: Event) -> str:
    """Its row in `KINDS`.

    >>> name_of({"kind": "pool", "event": "actor_lost"})
    'pool/actor_lost'
    """
    return f"{event['kind']}/{event['event']}" if "event" in event else str(event["kind"])


def describe(event: Event) -> str:
    """An event in one line: its sentence, its text, or its fields."""
    kind = KINDS.get(name_of(event))
    if kind is not None and kind.text:
        return " ".join(kind.text.format_map(defaultdict(str, event)).split())
    if "text" in event:
        return str(event["text"])
    return "  ".join([str(event["kind"]), *(f"{key}={value}" for key, value in event.items() if key not in COMMON)])


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


def notices(events: Sequence[Event]) -> list[str]:
    """What a run was warned of as a whole, once each; warnings of clients are not sentences.

    >>> notices([{"kind": "warning", "what": "no adapter for x"}, {"kind": "warning", "what": {"reason": "late"}}])
    ['No adapter for x.']
    """
    said = [event["what"] for event in events if event.get("kind") == "warning"]
    return [f"{what[:1].upper()}{what[1:]}." for what in dict.fromkeys(what for what in said if isinstance(what, str))]
