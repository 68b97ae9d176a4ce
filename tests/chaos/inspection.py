"""What must hold for a run's folder whatever happened to it: the invariants of the commit protocol, counted."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.compute as pc
from scenarios import ROUNDS, STAGE, Scenario

from fedtailor.storage import payloads
from fedtailor.storage.digest import digest
from fedtailor.storage.files import Storage
from fedtailor.storage.round_store import METRICS
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.tokens import TokenData

KEY = ["stage", "method", "seed", "round", "client", "budget", "module", "metric"]


@dataclass
class Findings:
    """Violations as sentences, and the three counts that must be 0."""

    lost_rounds: int = 0
    double_counts: int = 0
    wrong_exit_codes: int = 0
    violations: list[str] = field(default_factory=list)

    def say(self, sentence: str) -> None:
        self.violations.append(sentence)


def open_run(folder: Path) -> RunFolder:
    return RunFolder.open(Storage(str(folder)), "run")


def committed(folder: Path) -> dict[str, str]:
    """``stage/round`` to the sha256 of its COMMIT.json, for every round that verifies."""
    if not (folder / "run" / "run.json").exists():
        return {}
    run = open_run(folder)
    return {f"{s['key']}/{c.index}": c.sha256 for s in run.stages() for c in run.log(s).all(objects=False)}


def rounds_done(folder: Path) -> int:
    return sum(name.startswith(f"{STAGE}/") for name in committed(folder))


def fingerprint(folder: Path) -> str:
    """The digest without the list of who was rejected and why, and its metric."""
    run, content = open_run(folder), []
    for stage in sorted(run.stages(), key=lambda s: str(s["key"])):
        for commit in run.log(stage).all(objects=False):
            table = commit.table(METRICS)
            kept = table.filter(pc.not_equal(table["metric"], "rejected_clients"))
            values = {name: ref.content for name, ref in commit.objects.items() if name != METRICS}
            values[METRICS] = payloads.inspect(*payloads.encode(METRICS, kept))[0]
            record = {key: value for key, value in commit.record.items() if key != "rejected"}
            content.append([stage["key"], commit.index, record, values])
    return payloads.sha256(payloads.canonical_json(content))


def full_digest(folder: Path) -> str:
    return digest(Storage(str(folder)), "run")


def check_exit(folder: Path, code: int, expected: int, findings: Findings) -> None:
    """I6: the code is the expected one, and the status file agrees."""
    run = open_run(folder)
    state = run.status()["state"]
    if code != expected:
        findings.wrong_exit_codes += 1
        findings.say(f"I6: exit code {code}, expected {expected}")
    if (code == 0) != (state == "complete"):
        findings.wrong_exit_codes += 1
        findings.say(f"I6: exit code {code}, status '{state}'")


def check_kept(before: dict[str, str], after: dict[str, str], findings: Findings) -> None:
    """I1: what was committed before a failure is there, unchanged."""
    for name, sha256 in before.items():
        if after.get(name) != sha256:
            findings.lost_rounds += 1
            findings.say(f"I1: {name} was committed and is {'changed' if name in after else 'gone'}")


def check_complete(folder: Path, scenario: Scenario, findings: Findings) -> None:
    """I2, I5, I8 of a run that has ended with code 0."""
    run = open_run(folder)
    done = rounds_done(folder)
    if done != ROUNDS:
        findings.lost_rounds += ROUNDS - done
        findings.say(f"I6: {done} of {ROUNDS} rounds are committed")
    frame = run.metrics()
    doubles = int(frame.duplicated(KEY).sum())
    if doubles:
        findings.double_counts += doubles
        findings.say(f"I5: {doubles} metric rows occur twice")
    _check_rounds(run, findings)
    _check_losses(run, scenario, findings)
    spoilt = {i.round for i in scenario.of("F15")}
    counted = frame[frame.metric == "rejected_clients"]
    if {int(r): float(v) for r, v in zip(counted["round"], counted["value"], strict=True)} != dict.fromkeys(
        spoilt, 1.0
    ):
        findings.say(
            f"I8: rejected_clients is {counted[['round', 'value']].to_dict('records')}, spoilt rounds {spoilt}"
        )


def _check_rounds(run: RunFolder, findings: Findings) -> None:
    """I2: every client of a cohort is counted once or listed as failed; its rows are there exactly once."""
    (stage,) = run.stages("base")
    sizes = _sizes(run)
    for commit in run.log(stage).all(objects=False):
        record = commit.record
        weights, rejected = record["weights"], [entry["client"] for entry in record["rejected"]]
        doubles = [c for c, n in Counter([*weights, *rejected]).items() if n > 1]
        if doubles:
            findings.double_counts += len(doubles)
            findings.say(f"I2: round {commit.index}: {doubles} counted twice")
        if sorted([*weights, *rejected]) != sorted(record["cohort"]):
            findings.say(f"I2: round {commit.index}: cohort {record['cohort']}, counted {list(weights)}, {rejected}")
        wrong = {client: weight for client, weight in weights.items() if weight != sizes[client]}
        if wrong:
            findings.say(f"I2: round {commit.index}: weights {wrong}")
        rows = commit.table(METRICS).to_pylist()
        told = Counter((row["client"], row["metric"]) for row in rows if row["client"])
        if {client for client, _ in told} != set(weights) or set(told.values()) != {1}:
            findings.double_counts += sum(n - 1 for n in told.values())
            findings.say(f"I5: round {commit.index}: rows {dict(told)}, weights {list(weights)}")


def _sizes(run: RunFolder) -> dict[str, int]:
    (tokens,) = Path(run.storage.url, "artifacts").glob("tokens-*")
    return {client.id: client.n_train for client in TokenData.open(tokens).clients}


def _check_losses(run: RunFolder, scenario: Scenario, findings: Findings) -> None:
    """I8: every loss is an event with a cause and, for a node, its name; every rejected client a failure."""
    events = [event for event in run.events.entries() if event.get("kind") == "pool"]
    lost = [event for event in events if event.get("event") == "actor_lost"]
    retried = {int(event["round"]) for event in events if event.get("event") == "job_retried"}
    # A node may go while its actor is still starting, and then no job was lost with it. A driver whose connection
    # breaks before Ray has declared the node dead can only say that the actor on it cannot be reached.
    nodes = [event for event in lost if event.get("how") in ("node", "unreachable")]
    idle = {injury.round for injury in scenario.of("F7")} if any(e.get("during") != "run" for e in nodes) else set()
    for injury in scenario.of("F1", "F2", "F7"):
        if injury.round not in retried | idle:
            findings.say(f"I8: {injury} left no job_retried event (rounds {sorted(retried)})")
    if scenario.of("F7") and not nodes:
        findings.say("I8: a node was lost, and no event says so")
    if any(not event.get("cause") or not event.get("node") for event in lost if event.get("during") == "run"):
        findings.say(f"I8: a loss without cause or node: {lost}")
    told = {(int(f["round"]), f["kind"]) for f in run.failures.entries()}
    if told != {(injury.round, "rejected") for injury in scenario.of("F15")}:
        findings.say(f"I8: failures.jsonl has {sorted(told)}")
