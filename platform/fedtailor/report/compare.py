"""Several runs side by side: what differs between them, their results, and tests on the clients that they share.

Rows of a run go through the averages and paired tests of its report. A client's score is averaged over the seeds for
which two runs have the same clients, which their contents decide.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, groupby
from typing import Any

import pandas as pd

from fedtailor.core.errors import ConfigError, StorageError, did_you_mean
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.launch import load_experiment
from fedtailor.experiment.stages import NUMERIC_ENGINE_KEYS
from fedtailor.methods import METHODS
from fedtailor.models.source import model_title
from fedtailor.report.curves import round_means
from fedtailor.report.facts import base_line, strategy_line
from fedtailor.report.measures import Measure
from fedtailor.report.names import NOT_RECORDED, in_method_order, in_pool_order, leaves
from fedtailor.report.scores import AVERAGE, checked, client_scores, in_table_order, primary, results_table, scored_rows
from fedtailor.report.significance import NOT_COMPARED, Pair, corrected, paired
from fedtailor.storage.digest import digest
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder, committed_stages, run_ids

Rows = tuple[tuple[str, tuple[str, ...]], ...]
"""Name or key, and a text per run."""

COLUMNS = ("pool", "run", "method", "budget", "mean", "sd", "n_clients", "n_examples", "n_seeds")
_NEUTRAL = ("storage", "save_adapters", "wandb.")
_ENGINE = ("micro_batch", "zero.ranks", "on_client_failure", "quorum", "num_gpus", "memory_gb", *NUMERIC_ENGINE_KEYS)
"""Keys of the engine that can change a number; GPU keys choose the device."""

_ORIGINS = ("versions.fedtailor", "versions.torch", "git.sha")
_CLIENT = ["pool", "method", "budget", "seed", "client"]


@dataclass(frozen=True)
class ComparedRun:
    """One run of a comparison.

    Args:
        folder: the run; ``info``: content of its ``run.json``; ``exp``: its configuration.
        state: as its status says; ``stages``: how many are finished, of how many.
        digest: hex sha256 over what it computed; None while a stage is unfinished.
        measure: what its clients are scored by; ``values``: those rows of `scores.scored_rows`.
        rounds: of `curves.round_means`, of all that has been committed.
        clients: seed to client to the sha256 of its texts and labels, for seeds whose data the storage still has.
        labels: names of its classes or groups, empty where unknown.
    """

    folder: RunFolder
    info: Mapping[str, Any]
    exp: ExperimentBase
    state: str
    stages: tuple[int, int]
    digest: str | None
    measure: Measure
    values: pd.DataFrame
    rounds: pd.DataFrame
    clients: Mapping[int, Mapping[str, str]]
    labels: tuple[str, ...]

    @property
    def run_id(self) -> str:
        """Name of the run."""
        return self.folder.run_id


@dataclass(frozen=True)
class RunPair(Pair):
    """One method at one budget in a run against an earlier run; ``method`` and ``other`` are the method.

    Args:
        run: the later run; ``earlier``: the run that is subtracted.
        seeds: for which both runs have the same clients.
        same: both runs took their results from the same stages, so there is nothing to test.
    """

    run: str = ""
    earlier: str = ""
    seeds: tuple[int, ...] = ()
    same: bool = False


@dataclass(frozen=True)
class Comparison:
    """What is shown of several runs.

    Args:
        runs: the runs, in the order given.
        facts: state and setting of each run.
        changed: configuration keys that differ and can change a number; ``neutral``: those that cannot.
        results: `COLUMNS`, mean over languages; budget -1 for methods without, NaN SD with one seed.
        pairs: by pool, budget (methods without come first), runs and method.
        notes: what makes averages unlike, and why runs have no paired test.
        wandb: sentences on where the runs are on W&B, empty where they are not.
    """

    runs: tuple[ComparedRun, ...]
    facts: Rows
    changed: Rows
    neutral: tuple[str, ...]
    results: pd.DataFrame
    pairs: tuple[RunPair, ...]
    notes: tuple[str, ...]
    wandb: tuple[str, ...] = ()

    @property
    def measure(self) -> Measure:
        """What the runs' clients are scored by."""
        return self.runs[0].measure

    @property
    def run_ids(self) -> list[str]:
        """Names of the runs."""
        return [run.run_id for run in self.runs]


def compare(storage: Storage, names: Sequence[str]) -> Comparison:
    """Compares runs.

    Args:
        storage: where they are.
        names: run ids, two or more; a difference is a later one minus an earlier one.

    Raises:
        ConfigError: fewer than two, one named twice, or runs of different tasks or label sets.
        StorageError: no such run (names the nearest), one without results, or one whose files are damaged.
    """
    runs = _open(storage, names)
    pairs, reasons = _paired_runs(runs)
    columns = [_facts(run) for run in runs]
    facts = tuple((name, tuple(column[name] for column in columns)) for name in columns[0])
    return Comparison(runs, facts, *_differences(runs), _results(runs), pairs, (*_notes(runs), *reasons))


def _open(storage: Storage, names: Sequence[str]) -> tuple[ComparedRun, ...]:
    if len(set(names)) < 2:
        raise ConfigError(f"a comparison needs two different runs or more, got {', '.join(names) or 'none'}")
    twice = [f"run '{name}' is named twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise ConfigError(twice)
    known = run_ids(storage)
    unknown = [f"no run '{name}' in {storage.url}{did_you_mean(name, known)}" for name in names if name not in known]
    if unknown:
        raise StorageError(f"{'; '.join(unknown)} (runs there: {', '.join(known) or 'none'})")
    folders = [RunFolder.open(storage, name) for name in names]
    tasks = {folder.run_id: str(folder.info()["config"]["task"]["name"]) for folder in folders}
    if len(set(tasks.values())) > 1:
        listed = ", ".join(f"'{run_id}': {task}" for run_id, task in tasks.items())
        raise ConfigError(f"runs of different tasks cannot be compared ({listed})")
    runs = tuple(_read_run(folder) for folder in folders)
    labels = {run.run_id: run.labels for run in runs if run.labels}
    if len({frozenset(own) for own in labels.values()}) > 1:
        noun = runs[0].measure.groups if runs[0].measure.own_groups else "classes"
        listed = "; ".join(f"'{run_id}': {', '.join(own)}" for run_id, own in labels.items())
        raise ConfigError(f"runs with different {noun} cannot be compared ({listed})")
    return runs


def _read_run(folder: RunFolder) -> ComparedRun:
    exp, state = load_experiment(folder), str(folder.status()["state"])
    frame = checked(folder.metrics())
    scored, rounds = scored_rows(frame), round_means(frame)
    measure = primary(scored)
    values = scored[scored["metric"] == measure.name]
    if values.empty:
        raise StorageError(
            f"run '{folder.run_id}' ({state}) has committed no score of a personalised client; "
            f"go on with it: fedtailor resume {folder.run_id}"
        )
    stages = committed_stages(folder)
    done = sum(stage["done"] for stage in stages)
    whole = digest(folder.storage, folder.run_id) if done == len(stages) else None
    data = {seed: manifest for seed in exp.seeds if (manifest := folder.manifest(seed)) is not None}
    clients = {seed: {str(c["id"]): str(c["sha256"]) for c in data[seed]["clients"]} for seed in data}
    labels = tuple(next(iter(data.values()))["labels"]) if data else ()
    known = (folder, folder.info(), exp, state, (done, len(stages)), whole)
    return ComparedRun(*known, measure, values, rounds, clients, labels)


def _facts(run: ComparedRun) -> dict[str, str]:
    exp, (done, total) = run.exp, run.stages
    counts = run.values.groupby("pool")["client"].nunique()
    return {
        "State": run.state if done == total else f"{run.state}, {done} of {total} stages",
        "Digest": run.digest[:12] if run.digest else "none yet",
        "Task": exp.task.title,
        "Model": model_title(exp.model),
        "Base": base_line(exp, run.rounds),
        "Strategies": strategy_line(exp, run.rounds),
        "Seeds": ", ".join(map(str, exp.seeds)),
        "Scale": str(exp.scale),
        "Budgets r": ", ".join(map(str, exp.budgets)),
        "Clients tested": " + ".join(f"{counts[pool]} {pool}".strip() for pool in in_pool_order(counts.index)),
    }


def _differences(runs: Sequence[ComparedRun]) -> tuple[Rows, tuple[str, ...]]:
    """Keys whose values are not the same in all runs, in the order of the configuration.

    Returns:
        those that can change a number, and the versions of code and torch; those that cannot: where results are
        computed, kept or sent, and sections of methods that none of the runs uses.
    """
    trees = [dict(leaves(run.info["config"])) for run in runs]
    used = {name for run in runs for name in (*run.exp.methods, run.exp.base.name)}
    neutral = (*_NEUTRAL, *(f"{name}." for name in METHODS if name not in used))
    rows = {key: tuple(tree.get(key, "not set") for tree in trees) for tree in trees for key in tree}
    origins = [dict(leaves(run.info)) for run in runs]
    rows |= {key: tuple(origin.get(key, NOT_RECORDED) for origin in origins) for key in _ORIGINS}
    rows = {key: values for key, values in rows.items() if len(set(values)) > 1}
    engine = {key for key in rows if key.startswith("engine.") and key.removeprefix("engine.") not in _ENGINE}
    idle = [key for key in rows if key in engine or key.startswith(neutral)]
    return tuple((key, values) for key, values in rows.items() if key not in idle), tuple(idle)


def _notes(runs: Sequence[ComparedRun]) -> list[str]:
    """Sentences on what makes the averages of the runs unlike: unfinished runs, other languages or seeds."""
    found = [
        f"{run.run_id} is unfinished ({run.stages[0]} of {run.stages[1]} stages); its numbers are of what is there."
        for run in runs
        if run.stages[0] < run.stages[1]
    ]
    values = pd.concat([run.values.assign(run=run.run_id) for run in runs])
    for pool in in_pool_order(values["pool"]):
        codes = values[values["pool"] == pool].groupby("run", sort=False)["language"].unique()
        if len(set(map(frozenset, codes))) > 1:
            counts = ", ".join(f"{run_id}: {len(own)}" for run_id, own in codes.items())
            found.append(f"The runs average over different {runs[0].measure.groups} of the {pool} pool ({counts}).")
    seeds = [", ".join(map(str, sorted(set(run.values["seed"])))) for run in runs]
    if len(set(seeds)) > 1:
        listed = ", ".join(f"{run.run_id}: {own}" for run, own in zip(runs, seeds, strict=True))
        found.append(f"The runs average over different seeds ({listed}).")
    return found


def _results(runs: Sequence[ComparedRun]) -> pd.DataFrame:
    table = pd.concat([results_table(run.values).assign(run=run.run_id) for run in runs], ignore_index=True)
    table = _without_strays(table[table["language"] == AVERAGE], ["run", "pool", "method"])
    ids = [run.run_id for run in runs]
    return in_table_order(table, ["pool", "run", "method", "budget"], ids)[list(COLUMNS)]


def _without_strays(table: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """As in a report: a method with budgets and a stray row without is taken at its budgets."""
    return table[(table["budget"] >= 0) | (table.groupby(keys)["budget"].transform("max") < 0)]


def _paired_runs(runs: Sequence[ComparedRun]) -> tuple[tuple[RunPair, ...], list[str]]:
    """All pairs of runs, corrected over those of a pool and budget; and why two runs have none."""
    own = {run.run_id: _without_strays(client_scores(run.values), ["pool", "method"]) for run in runs}
    pairs, reasons = list[RunPair](), list[str]()
    for a, b in combinations(runs, 2):
        seeds, why = _shared_seeds(a, b)
        both = own[a.run_id].merge(own[b.run_id], on=_CLIENT, suffixes=("_earlier", ""))
        both = both[both["seed"].isin(seeds) & ~both["method"].isin(NOT_COMPARED)]
        if both.empty:
            other = f"{a.run_id} and {b.run_id} have no method, budget and client in common: no paired test."
            reasons.append(why or other)
        for method in in_method_order(both["method"]):
            same = _origins(a, method, seeds) == _origins(b, method, seeds)
            for (pool, _), rows in both[both["method"] == method].groupby(["pool", "budget"]):
                r = int(rows["budget"].iloc[0])
                gain = (rows["value"] - rows["value_earlier"]).groupby(rows["client"]).mean().to_numpy(float)
                pair = RunPair(
                    str(pool), None if r == -1 else r, method, method, len(gain), 0.0, None, None, None,
                    run=b.run_id, earlier=a.run_id, seeds=seeds, same=same,
                )  # fmt: skip
                pairs.append(pair if same else paired(pair, gain))
    pools = in_pool_order(pair.pool for pair in pairs)
    pairs.sort(key=lambda pair: (pools.index(pair.pool), pair.budget or -1))
    families = groupby(pairs, key=lambda pair: (pair.pool, pair.budget))
    return tuple(pair for _, family in families for pair in corrected(list(family))), reasons


def _shared_seeds(a: ComparedRun, b: ComparedRun) -> tuple[tuple[int, ...], str]:
    """Seeds for which two runs have the same clients, or a sentence on why there are none."""
    names = f"{a.run_id} and {b.run_id}"
    common = sorted({int(s) for s in a.values["seed"]} & {int(s) for s in b.values["seed"]})
    if not common:
        return (), f"{names} have no seed in common: no paired test."
    unknown = " and ".join(run.run_id for run in (a, b) if not any(seed in run.clients for seed in common))
    if unknown:
        return (), f"The clients of {unknown} cannot be told (no data in the storage fits the run): no paired test."
    same = tuple(seed for seed in common if seed in a.clients and a.clients[seed] == b.clients.get(seed))
    return same, "" if same else f"{names} have different clients (the populations differ): no paired test."


def _origins(run: ComparedRun, method: str, seeds: Sequence[int]) -> set[str]:
    """Artifacts that hold a method's results; equal names are equal content."""
    stages = run.folder.stages("personalise")
    return {str(s["artifact"]) for s in stages if s["method"] == method and s["seed"] in seeds}
