"""What a seeded run of the soak suffers: one to three faults, each in a round of its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

ROUNDS = 10
SEGMENTS = 2
STAGE = "base"
NODE_LOSS_SHARE = 0.1
"""Of the runs; each needs a cluster of its own."""
FULL_DISK = ("commit:start", "commit:objects-verified", "commit:before-record", "commit:record-temp",
             "commit:after-record", "commit:latest")  # fmt: skip
"""Commit points that are passed once per round."""
SPOILT = [(round, segment) for round in (2, 5, 8) for segment in range(SEGMENTS)]
"""Where a client may send NaN; few, since each set of them needs an undisturbed run to compare with."""


@dataclass(frozen=True, order=True)
class Injury:
    """One fault: ``round`` of the base stage, ``segment`` of the cohort, and a number that the kind explains."""

    round: int
    kind: str
    segment: int = 0
    detail: int = 0

    def worker_plan(self) -> str | None:
        """As a fault plan for the workers; None where it is not theirs."""
        where = f"stage={STAGE} round={self.round} segment={self.segment}"
        return {
            "F1": f"kill {where} step={self.detail}",
            "F2": f"kill-after {where}",
            "F7": f"slow stage={STAGE} round={self.round} seconds=4",
            "F15": f"nan {where} client=#{self.detail}",
            "absent": f"absent {where} client=#{self.detail}",
        }.get(self.kind)

    @property
    def point(self) -> str:
        """Commit point of a full disk."""
        return FULL_DISK[self.detail]

    def __str__(self) -> str:
        what = {"F1": f"step {self.detail}", "F13": self.kind == "F13" and self.point, "F15": f"client #{self.detail}"}
        more = what.get(self.kind)
        return f"{self.kind} in round {self.round}" + (f" ({more})" if more else "")


@dataclass(frozen=True)
class Scenario:
    """A run's seed and its injuries, by round."""

    seed: int
    injuries: tuple[Injury, ...]

    def of(self, *kinds: str) -> list[Injury]:
        return [injury for injury in self.injuries if injury.kind in kinds]

    def plan(self, committed: int) -> str | None:
        """The fault plan of a process that starts when so many rounds are committed.

        What struck before does not strike again: an injury of the past is left out, a full disk counts from here.
        """
        parts = []
        for injury in self.injuries:
            if injury.round < committed:
                continue
            if injury.kind == "F13":
                parts.append(f"enospc:{injury.point}@{injury.round - committed + 1}")
            else:
                parts.append(injury.worker_plan())
        return "; ".join(part for part in parts if part) or None

    def after_full_disk(self, injury: Injury) -> Scenario:
        """Without a full disk that has been survived."""
        return Scenario(self.seed, tuple(other for other in self.injuries if other != injury))

    @property
    def undisturbed(self) -> tuple[Injury, ...]:
        """What an undisturbed run has to leave out to be comparable: clients that send NaN are absent there."""
        return tuple(Injury(i.round, "absent", i.segment, i.detail) for i in self.of("F15"))


def draw(seed: int) -> Scenario:
    """The scenario of a seed; the same on every machine."""
    random = Random(f"soak-{seed}")
    injuries = []
    rounds = list(range(1, ROUNDS - 1))
    if random.random() < NODE_LOSS_SHARE:
        injuries.append(Injury(random.choice(rounds), "F7"))
    wanted = random.randint(1, 3)
    while len(injuries) < wanted:
        taken = {injury.round for injury in injuries}
        kind = random.choice(("F1", "F2", "F13", "F15"))
        if kind == "F15":
            free = [place for place in SPOILT if place[0] not in taken]
            if not free or any(injury.kind == "F15" for injury in injuries):
                continue
            round, segment = random.choice(free)
            injuries.append(Injury(round, kind, segment, random.randrange(2)))
            continue
        round = random.choice([r for r in rounds if r not in taken])
        detail = random.randrange(len(FULL_DISK)) if kind == "F13" else random.randint(0, 2)
        injuries.append(Injury(round, kind, random.randrange(SEGMENTS), detail))
    return Scenario(seed, tuple(sorted(injuries)))


def kinds_once(first_seed: int = 0) -> Sequence[Scenario]:
    """Five scenarios that have every kind once, for a short test."""
    return [
        Scenario(first_seed + 0, (Injury(2, "F1", 0, 1), Injury(5, "F2", 1))),
        Scenario(first_seed + 1, (Injury(3, "F13", 0, 2), Injury(5, "F15", 1, 0), Injury(7, "F13", 0, 4))),
    ]
