"""The numbers to reach, and whether this run reached them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from real_work import LABELS, WORK, gain, goal

Results = Mapping[str, Any]


@dataclass(frozen=True)
class Target:
    """A line of the table: ``measured`` is None where this run does not say."""

    text: str
    goal: float
    measure: Callable[[Results], float | None]
    unit: str = "x"
    most: bool = False
    """The goal is an upper bound."""

    def line(self, results: Results) -> list[str]:
        found = self.measure(results)
        if found is None:
            return [self.text, self._goal(), "not measured", ""]
        met = found <= self.goal if self.most else found >= self.goal
        return [self.text, self._goal(), f"{found:.2f}{self.unit}", "met" if met else "**missed**"]

    def _goal(self) -> str:
        return f"{'≤' if self.most else '≥'} {self.goal:g}{self.unit}"


def speed(results: Results, regime: str, *systems: str) -> float | None:
    """The best clients/s of some systems in a regime."""
    blocks = [b for b in results.get("peers", {}).get("regimes", []) if b["regime"]["name"] == regime]
    found = [r["clients_per_s"] for b in blocks for r in b["rows"] if r["system"] in systems and not r["missing"]]
    return max(found, default=None)


def _ratio(regime: str, ours: tuple[str, ...], theirs: tuple[str, ...]) -> Callable[[Results], float | None]:
    def measured(results: Results) -> float | None:
        a, b = speed(results, regime, *ours), speed(results, regime, *theirs)
        return None if a is None or b is None else a / b

    return measured


def _null(results: Results) -> float | None:
    rows = [r for r in results.get("null", {}).get("rows", []) if r["system"] == "ray" and not r["missing"]]
    return rows[0]["cohorts"]["100"]["ms_per_client"] if rows else None


def _growth(part: str, key: str, small: int, large: int, value: str) -> Callable[[Results], float | None]:
    def measured(results: Results) -> float | None:
        rows = {r[key]: r for r in results.get("scale", {}).get(part, []) if "missing" not in r}
        return rows[large][value] / rows[small][value] if small in rows and large in rows else None

    return measured


def _real(model: str, work: str) -> Callable[[Results], float | None]:
    return lambda results: gain(results.get("real", {}).get("rows", []), model, work)


PLAIN, PFL, OURS, BF16 = ("plain", "plain_all"), ("pfl1", "pfl2"), ("lanes", "serial"), ("lanes16",)
TARGETS = (
    Target("overhead-bound: ours against the best pfl", 2, _ratio("overhead-bound", OURS, PFL)),
    Target("overhead-bound: ours against Flower", 5, _ratio("overhead-bound", OURS, ("flower",))),
    Target("mixed: ours in fp32 against the best plain loop in fp32", 1.3, _ratio("mixed", OURS, PLAIN)),
    Target("mixed: ours in bf16 against the best plain loop in fp32", 2, _ratio("mixed", BF16, PLAIN)),
    Target("compute-bound: ours in fp32 against the best pfl", 1, _ratio("compute-bound", OURS, PFL)),
    Target("null round of 100 clients on Ray, metrics and commit included, per client", 0.3, _null, " ms", most=True),
    Target(
        "time per client in a cohort of 1,000 against one of 100 (population 10,000)",
        1,
        _growth("cohort", "cohort", 100, 1000, "ms_per_client"),
        most=True,
    ),
    Target(
        "time per client in a population of 10,000 against one of 100 (cohort 50)",
        1.1,
        _growth("population", "population", 100, 10_000, "ms_per_client"),
        most=True,
    ),
    Target(
        "driver's memory in a cohort of 1,000 against one of 10 (population 10,000)",
        1.5,
        _growth("cohort", "cohort", 10, 1000, "driver_mb"),
        most=True,
    ),
    *[
        Target(f"{model}: {LABELS[work]}: ours against peft and a plain loop", goal(model, work), _real(model, work))
        for model, work in WORK
    ],
)
