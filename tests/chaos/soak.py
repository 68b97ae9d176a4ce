"""The random soak: seeded runs of ten rounds, each hurt one to three times, resumed until complete, then compared.

    python tests/chaos/soak.py --runs 200 --seed 1 --minutes 60

Each run is a real driver process with a real exit code on one Ray cluster that is started once; a run that loses a
node has a cluster of its own. Equal seeds give equal injuries on any machine. Writes ``chaos.json`` and ``chaos.md``;
ends with 1 if anything was violated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path
from statistics import median
from typing import Any

from clusters import ROOT, Nodes, nodes
from inspection import (
    Findings,
    check_complete,
    check_exit,
    check_kept,
    committed,
    fingerprint,
    full_digest,
    rounds_done,
)
from real_process import Process, trace
from scenarios import ROUNDS, STAGE, Injury, Scenario, draw
from tiny import TINY

TRIES = 5
LIMIT_S = 600.0
PARTS = ("data-*", "model-*", "tokens-*")
CONFIG = (*TINY, "methods=[base]", f"base.rounds={ROUNDS}", "fedavg.adapter=lora", "engine.backend=ray",
          "engine.actors=2", "engine.deadline_s=300")  # fmt: skip


@dataclass
class Record:
    """What one run went through."""

    seed: int
    faults: list[str]
    exit_codes: list[int] = field(default_factory=list)
    recovery_s: list[float] = field(default_factory=list)
    seconds: float = 0.0
    lost_rounds: int = 0
    double_counts: int = 0
    wrong_exit_codes: int = 0
    violations: list[str] = field(default_factory=list)


class Soak:
    """Runs scenarios.

    Args:
        out: results, and the folders of runs under way; those that violated something stay.
        address: of the shared cluster.
    """

    def __init__(self, out: Path, address: str) -> None:
        self._out, self._address = out, address
        self._clean: dict[tuple[Injury, ...], tuple[str, str]] = {}
        self._template: Path | None = None

    def run(self, scenario: Scenario) -> Record:
        """Plays a scenario to its end and checks everything."""
        record = Record(scenario.seed, [str(injury) for injury in scenario.injuries])
        fingerprint_, digest_ = self._undisturbed(scenario.undisturbed)
        folder = self._folder(f"seed-{scenario.seed}")
        started = time.monotonic()
        findings = Findings()
        with ExitStack() as stack:
            breakable = stack.enter_context(nodes(1, 1)) if scenario.of("F7") else None
            self._until_complete(scenario, folder, breakable, record, findings)
        if record.exit_codes[-1] == 0:
            check_complete(folder, scenario, findings)
            if fingerprint(folder) != fingerprint_:
                findings.say("I4: the result differs from that of the undisturbed run")
            elif not scenario.of("F15") and full_digest(folder) != digest_:
                findings.say("I4: the digest differs from that of the undisturbed run")
        record.seconds = round(time.monotonic() - started, 1)
        vars(record).update(vars(findings))
        if not record.violations:
            shutil.rmtree(folder)
        return record

    def _until_complete(
        self, scenario: Scenario, folder: Path, breakable: Nodes | None, record: Record, findings: Findings
    ) -> None:
        left = scenario
        address = breakable.address if breakable else self._address
        losses: list[float] = []
        node_loss = left.of("F7")
        for attempt in range(TRIES + 1):
            before = committed(folder)
            done = rounds_done(folder)
            expected = _next_full_disk(left, done)
            words = ["run", *CONFIG, f"engine.address={address}", f"storage={folder}", "--run-id", "run"]
            process = Process(folder, words if attempt == 0 else ["resume", "run", "--storage", str(folder)],
                              left.plan(done))  # fmt: skip
            if breakable and node_loss and node_loss[0].round >= done:
                losses += _lose_node(node_loss[0], folder, breakable, process)
            code = _exit_code(process, findings)
            record.exit_codes.append(code)
            check_exit(folder, code, 5 if expected else 0, findings)
            check_kept(before, committed(folder), findings)
            if code == 0:
                break
            losses.append(time.time())
            if breakable and not breakable.others:
                breakable.add(1)
            if expected:
                left = left.after_full_disk(expected)
        else:
            findings.say(f"not complete after {TRIES} resumptions: {record.exit_codes}")
        record.recovery_s = _recoveries(folder, losses)

    def _undisturbed(self, absent: tuple[Injury, ...]) -> tuple[str, str]:
        """Fingerprint and digest of a run in which nothing breaks and these clients are left out."""
        if absent not in self._clean:
            folder = self._folder("undisturbed")
            words = ["run", *CONFIG, f"engine.address={self._address}", f"storage={folder}", "--run-id", "run"]
            process = Process(folder, words, Scenario(-1, absent).plan(0))
            code = process.wait(LIMIT_S)
            if code:
                raise SystemExit(f"an undisturbed run ended with {code}:\n{process.output()[-3000:]}")
            self.learn(folder, absent)
            shutil.rmtree(folder)
        return self._clean[absent]

    def learn(self, folder: Path, absent: tuple[Injury, ...] = ()) -> None:
        """Takes a finished run for the undisturbed one, and its prepared inputs for all others."""
        self._clean[absent] = fingerprint(folder), full_digest(folder)
        if self._template is None:
            self._template = self._out / "template"
            shutil.rmtree(self._template, ignore_errors=True)
            for pattern in PARTS:
                for part in (folder / "artifacts").glob(pattern):
                    shutil.copytree(part, self._template / part.name)

    def _folder(self, name: str) -> Path:
        """A run's storage, with the prepared inputs that all share."""
        folder = self._out / "work" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        if self._template:
            shutil.copytree(self._template, folder / "artifacts")
        return folder


def _next_full_disk(scenario: Scenario, done: int) -> Injury | None:
    return next((injury for injury in scenario.of("F13") if injury.round >= done), None)


def _exit_code(process: Process, findings: Findings) -> int:
    try:
        return process.wait(LIMIT_S)
    except TimeoutError as error:
        findings.say(f"I10: {error}")
        return -9


def _lose_node(injury: Injury, folder: Path, breakable: Nodes, process: Process) -> list[float]:
    """Kills the second node while the round is under way: its workers are told to be slow in it."""
    commit = f"artifacts/{STAGE}-*/rounds/{injury.round - 1:06d}/COMMIT.json"
    while process.running():
        if list(folder.glob(commit)):
            time.sleep(1.0)
            breakable.lose()
            return [time.time()]
        time.sleep(0.02)
    return []


def _recoveries(folder: Path, losses: list[float]) -> list[float]:
    """Seconds from each loss (of an actor, a node or the driver) to the next commit."""
    events = trace(folder)
    lost = [e["at"] for e in events if (e.get("event"), e.get("during")) == ("actor_lost", "run")]
    commits = [e["at"] for e in events if e["kind"] == "progress"]
    found = [min((at for at in commits if at > loss), default=None) for loss in (*lost, *losses)]
    return [round(at - loss, 2) for at, loss in zip(found, (*lost, *losses), strict=True) if at is not None]


def summary(records: list[Record], seconds: float) -> dict[str, Any]:
    """Counts over all runs."""
    recoveries = sorted(s for record in records for s in record.recovery_s)
    kinds = [fault.split()[0] for record in records for fault in record.faults]
    return {
        "runs": len(records),
        "rounds": ROUNDS * len(records),
        "injected": {kind: kinds.count(kind) for kind in sorted(set(kinds), key=lambda k: int(k[1:]))},
        "resumptions": sum(len(record.exit_codes) - 1 for record in records),
        "violations": sum(len(record.violations) for record in records),
        "lost_rounds": sum(record.lost_rounds for record in records),
        "double_counts": sum(record.double_counts for record in records),
        "wrong_exit_codes": sum(record.wrong_exit_codes for record in records),
        "median_recovery_s": round(median(recoveries), 2) if recoveries else None,
        "p95_recovery_s": recoveries[ceil(0.95 * len(recoveries)) - 1] if recoveries else None,
        "seconds": round(seconds, 1),
        "seconds_per_run": round(seconds / max(1, len(records)), 1),
        "violation_rate_below": round(1 - 0.05 ** (1 / len(records)), 4) if records else None,
    }


def write(out: Path, seed: int, records: list[Record], seconds: float) -> dict[str, Any]:
    """``chaos.json`` and ``chaos.md``."""
    told = summary(records, seconds)
    content = {"first_seed": seed, "summary": told, "runs": [asdict(record) for record in records]}
    (out / "chaos.json").write_text(json.dumps(content, indent=1) + "\n")
    injected = ", ".join(f"{kind} {count}" for kind, count in told["injected"].items())
    bad = [f"- seed {r.seed} ({'; '.join(r.faults)}): {'; '.join(r.violations)}" for r in records if r.violations]
    lines = [
        f"# Chaos: {told['runs']} seeded runs from seed {seed}", "",
        "| | |", "|---|--:|",
        f"| rounds | {told['rounds']} |",
        f"| injected faults | {injected} |",
        f"| runs ended by a fault and resumed | {told['resumptions']} |",
        f"| lost rounds | {told['lost_rounds']} |",
        f"| double counts | {told['double_counts']} |",
        f"| wrong exit codes | {told['wrong_exit_codes']} |",
        f"| violations of any kind | {told['violations']} |",
        f"| recovery, median / 95th percentile | {told['median_recovery_s']} s / {told['p95_recovery_s']} s |",
        f"| wall time | {told['seconds']} s, {told['seconds_per_run']} s a run |", "",
        *([f"With no violation, their rate is below {told['violation_rate_below']:.2%} (95 % confidence)."]
          if records and not bad else []),
        *bad,
    ]  # fmt: skip
    (out / "chaos.md").write_text("\n".join(lines) + "\n")
    return told


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1, help="of the first run; the others follow")
    parser.add_argument("--minutes", type=float, default=60.0, help="no run is started after this")
    parser.add_argument("--out", type=Path, default=ROOT / "runs/chaos")
    options = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    records: list[Record] = []
    started = time.monotonic()
    with nodes(2) as shared:
        soak = Soak(out, shared.address)
        for seed in range(options.seed, options.seed + options.runs):
            if time.monotonic() - started > 60 * options.minutes:
                print(f"time is up after {len(records)} of {options.runs} runs")
                break
            record = soak.run(draw(seed))
            records.append(record)
            told = write(out, options.seed, records, time.monotonic() - started)
            verdict = "; ".join(record.violations) or "ok"
            print(f"seed {seed}: {', '.join(record.faults)}: exits {record.exit_codes}, {record.seconds} s, {verdict}",
                  flush=True)  # fmt: skip
    print(json.dumps(told | {"out": str(out / "chaos.json")}))
    return 1 if told["violations"] or len(records) == 0 else 0


if __name__ == "__main__":
    sys.exit(main())
