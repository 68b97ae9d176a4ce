"""What a caption must say about a run: how it was set up, what hides clients, what its model and data were before it.

`gather` reads a run folder into `RunData`; `read_facts` turns that into the sentences of `RunFacts`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fedtailor.core.errors import DataError, reported_as
from fedtailor.experiment.config import ExperimentBase, clients_per_language, scaled, seen_clients
from fedtailor.experiment.launch import load_experiment
from fedtailor.experiment.privacy import NOT_COVERED, mechanism_of
from fedtailor.report import names
from fedtailor.report.unknown_tokens import unknown_counts
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.store import clients_of
from fedtailor.tracking.events import notices

OFF_THE_SHELF = "off the shelf"
"""How a caption calls a base that no federated training has changed."""

ORIGINS = ("pretrain.json", "package.json")
_CLIENT_COLUMNS = ("client", "pool", "language", "n_train", "n_test")
_TIME_COLUMNS = ("stage", "round", "client", "seconds")


def base_line(exp: ExperimentBase, frame: pd.DataFrame) -> str:
    """``FedAvg, 15 rounds, one base of seed 42 for all seeds``."""
    base = exp.base
    if base.name == "none":
        return OFF_THE_SHELF
    planned, done = scaled(base.rounds, exp.scale), _done(frame, "base")
    partly = f"{names.format_range(done)} of " if set(done) - {planned} else ""
    shared = "" if base.seed is None else f", one base of seed {base.seed} for all seeds"
    return f"{names.method_name(base.name)}, {partly}{names.plural(planned, 'round')}{shared}"


def strategy_line(exp: ExperimentBase, frame: pd.DataFrame) -> str:
    """``150 rounds``, and the methods that ended earlier: ``150 rounds (FedL2P: 61 to 88)``; or ``none``."""
    planned = scaled(exp.strategy.rounds, exp.scale)
    methods = names.in_method_order(frame.loc[frame["stage"] == "strategy", "method"])
    ended = {names.method_name(m): _done(frame, "strategy", m) for m in methods}
    early = [f"{name}: {names.format_range(done)}" for name, done in ended.items() if set(done) != {planned}]
    return names.plural(planned, "round") + (f" ({', '.join(early)})" if early else "") if methods else "none"


def scale_sentence(exp: ExperimentBase) -> str:
    """How much smaller than configured the run is; empty at scale 1.

    >>> from fedtailor.experiment.config import Experiment
    >>> scale_sentence(Experiment(scale=0.1, base={"name": "none"}))
    'Scale 0.1: 1 of 10 clients per language and pool, 15 of 150 strategy rounds.'
    """
    if exp.scale == 1:
        return ""
    parts = [f"{clients_per_language(exp)} of {exp.task.clients_per_language} clients per language and pool"]
    for name in ("strategy",) if exp.base.name == "none" else ("base", "strategy"):
        full = getattr(exp, name).rounds
        parts.append(f"{scaled(full, exp.scale)} of {full} {name} rounds")
    return f"Scale {exp.scale:g}: {', '.join(parts)}."


def pretrain_sentence(record: Mapping[str, Any] | None) -> str:
    """Where the model comes from, by its ``pretrain.json`` or ``package.json``; empty where it does not say.

    >>> options = {"tasks": ["cldr"], "steps": 2000}
    >>> pretrain_sentence({"options": options, "tokens_read": 8192000, "final": {"held_out_loss": 3.2149}})
    'The model was pretrained on train texts of cldr, both pools (2,000 steps, 8,192,000 tokens, held-out loss 3.21).'
    """
    if not record:
        return ""
    if "package" in record:
        licences = "; ".join(record["licences"])
        return f"{record['title']} comes in the Python package {record['package']} ({licences}). {record['knows']}"
    options = record.get("options", {})
    tasks, loss = options.get("tasks"), record.get("final", {}).get("held_out_loss")
    sizes = {"steps": options.get("steps"), "tokens": record.get("tokens_read")}
    parts = [f"{n:,} {name}" for name, n in sizes.items() if isinstance(n, int)]
    parts += [f"held-out loss {loss:.2f}"] if isinstance(loss, int | float) else []
    where = f" on train texts of {', '.join(map(str, tasks))}, both pools" if tasks else ""
    size = f" ({', '.join(parts)})" if parts else ""
    return f"The model was pretrained{where}{size}."


def duplicates_sentence(notes: Mapping[str, Any]) -> str:
    """What the data say about repeated texts; empty where they say nothing.

    >>> duplicates_sentence({"found_duplicates": 12, "dropped_duplicates": 0, "leak_seen_unseen": 5})
    'Repeated texts: 12 test texts are also train texts, none dropped; 5 texts are in both pools.'
    """
    found, parts = notes.get("found_duplicates"), []
    if found:
        dropped = notes.get("dropped_duplicates") or 0
        words = {0: "none dropped", found: "all dropped"}.get(dropped, f"{dropped} dropped")
        parts.append(f"{found} test texts are also train texts, {words}")
    leaks = {key: n for key, n in notes.items() if key.startswith("leak_")}
    for key, n in leaks.items():
        where = key.removeprefix("leak_").removesuffix("_train_test")
        words = "both pools" if key == "leak_seen_unseen" else f"train and test of the {where} pool"
        parts += [f"{names.plural(n, 'text')} {'is' if n == 1 else 'are'} in {words}"] if n else []
    if parts:
        return f"Repeated texts: {'; '.join(parts)}."
    return "No text is in two pools, or in train and test." if leaks or found == 0 else ""


def fallback_sentences(frame: pd.DataFrame) -> dict[str, str]:
    """Pool to how many clients were given the initial private state of the base, where any were."""
    tested = frame[frame["stage"] == "personalise"]
    initial = tested[(tested["metric"] == "initial_overlay") & (tested["value"] > 0)]
    sentences = {}
    for pool in names.in_pool_order(initial["pool"]):
        counts = initial[initial["pool"] == pool].groupby("seed")["client"].nunique()
        total = tested.loc[tested["pool"] == pool, "client"].nunique()
        whose = f"{names.format_range(counts)} of {total} {names.pool_name(pool).lower()}"
        sentences[pool] = f"{whose} were never sampled for the base and have its initial private state."
    return sentences


def _done(frame: pd.DataFrame, stage: str, method: str | None = None) -> list[int]:
    """Rounds that each seed (and budget) of a stage has gone through."""
    rows = frame[(frame["stage"] == stage) & ((frame["method"] == method) | (method is None))]
    return [int(n) for n in rows.groupby(["method", "seed", "budget"])["round"].max() + 1]


def privacy_sentence(exp: ExperimentBase, frame: pd.DataFrame, seen: int | None = None) -> str:
    """What was done to hide clients and what it spent; empty where nothing was.

    Args:
        exp: configuration of the run.
        frame: checked metric rows.
        seen: clients of the seen pool; default: as configured.
    """
    masking, sentences = exp.privacy.secure_aggregation, []
    if exp.privacy.name == "central_dp":
        sentences.append(_dp_sentence(exp, frame, seen or seen_clients(exp)))
    if masking != "none":
        sentences.append(f"Secure aggregation ({masking}) was simulated, for its cost and drop-outs; it hid nothing.")
    return " ".join(sentences)


def _dp_sentence(exp: ExperimentBase, frame: pd.DataFrame, seen: int) -> str:
    mechanism = mechanism_of(exp, seen)
    rows = frame[(frame["metric"] == "epsilon") & (frame["client"] == "")]
    if rows.empty:
        return f"Central DP over clients ({mechanism.clipping}) without noise: no guarantee."
    least = rows.groupby(["stage", "method"])["value"].max()
    parts = [
        f"{least[stage, method]:.3g} ({'base alone' if stage == 'base' else names.method_name(method)})"
        for stage in ("base", "strategy")
        for method in names.in_method_order(rows.loc[rows["stage"] == stage, "method"])
    ]
    return (
        f"Central DP over clients ({mechanism.clipping}, {mechanism.sampler} cohorts, {mechanism.relation}): epsilon "
        f"{', '.join(parts)} at delta = {mechanism.delta:.2g}, each with its base and per seed. "
        f"Not covered: {'; '.join(NOT_COVERED)}."
    )


@dataclass(frozen=True)
class RunData:
    """Everything is empty or None where the run folder does not say.

    Args:
        experiment: configuration of the run; keys that are newer than it have their defaults.
        clients: client, pool, language, n_train, n_test: one row per client of the data.
        class_counts: seed to client to number of train texts per class, in the order of ``labels``.
        labels: classes of the task, or the groups of a generation task's examples.
        kind: ``classification`` or ``generation``.
        notes: what preparing the data found or dropped, by name.
        dealt: no column of the user's own table named the clients.
        pretrain: content of the model folder's ``pretrain.json`` or ``package.json``.
        times: stage, round, client, seconds: seconds of a worker per client.
        events: lines of ``events.jsonl``.
    """

    experiment: ExperimentBase
    clients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_CLIENT_COLUMNS)))
    class_counts: Mapping[int, Mapping[str, Sequence[int]]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    kind: str = "classification"
    notes: Mapping[str, int | str] = field(default_factory=dict)
    dealt: bool = True
    pretrain: Mapping[str, Any] | None = None
    times: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_TIME_COLUMNS)))
    events: Sequence[Mapping[str, Any]] = ()


def gather(run: RunFolder) -> RunData:
    """Reads what the folder holds; the data set is that of the run's first seed, class counts are of all.

    Args:
        run: the run.

    Raises:
        ConfigError: a configuration that this version does not read.
        DataError: such a file that is not a JSON mapping.
    """
    exp = load_experiment(run)
    manifests = {seed: run.manifest(seed) or {} for seed in exp.seeds}
    manifest = manifests[exp.seeds[0]]
    counts = {s: {str(c["id"]): tuple(c["train_classes"]) for c in m.get("clients", ())} for s, m in manifests.items()}
    clients = clients_of(manifest) if manifest else ()
    rows = [(c.id, c.pool, c.language, c.n_train, c.n_test) for c in clients]
    return RunData(
        experiment=exp,
        clients=pd.DataFrame(rows, columns=list(_CLIENT_COLUMNS)),
        class_counts=counts,
        labels=tuple(str(label) for label in manifest.get("labels", ())),
        kind=str(manifest.get("kind", "classification")),
        notes=dict(manifest.get("notes", {})),
        dealt="client" not in manifest.get("columns", {}),
        pretrain=_pretrain(run, exp.model.path),
        times=run.timings(),
        events=run.events.entries(),
    )


def _pretrain(run: RunFolder, folder: str | None) -> Mapping[str, Any] | None:
    for parent in sorted({str(stage.get("parent")) for stage in run.stages()}):
        for path in (f"artifacts/{parent}/{name}" for name in ORIGINS):
            if parent.startswith("model-") and run.storage.exists(path):
                return dict(run.storage.read_json(path))
    file = next((file for name in ORIGINS if folder and (file := Path(folder) / name).is_file()), None)
    if file is None:
        return None
    with reported_as(DataError, f"{file}: no JSON mapping of keys", TypeError, ValueError):
        return dict(json.loads(file.read_text("utf-8")))


@dataclass(frozen=True)
class RunFacts:
    """The facts that a caption and a page header need, as text.

    Args:
        base_line: base method, its rounds, whose seed; ``strategy_line``: rounds of the strategies.
        n_modules: L, the number of adapted linear layers.
        overrides: choices that depart from the default: key, default, value.
        version_line: ``fedtailor 0.1.0, torch 2.13.0``.
        scale: a sentence on a run that was made smaller, empty at scale 1.
        privacy: a sentence on what was done to hide clients, empty without.
        pretrained: sentences on where the model comes from and how adapters sit in it, empty where there are none.
        duplicates: a sentence on repeated texts, empty where the data do not say.
        unknown: language to unknown tokens and all tokens of its texts, empty where it was not counted.
        dealt: see `RunData`.
        fallbacks: pool to a sentence on clients that have nothing of their own of the base.
    """

    experiment: ExperimentBase
    run_id: str
    status: str
    base_line: str
    strategy_line: str
    n_modules: int
    overrides: tuple[tuple[str, str, str], ...]
    version_line: str
    scale: str
    privacy: str
    pretrained: str
    duplicates: str
    unknown: Mapping[str, tuple[int, int]]
    dealt: bool
    fallbacks: Mapping[str, str]


def read_facts(run: Mapping[str, Any], n_modules: int, frame: pd.DataFrame, found: RunData) -> RunFacts:
    """RunFacts of a run.

    Args:
        run: content of ``run.json`` and the run's ``status``.
        n_modules: number of adapted linear layers.
        frame: checked metric rows.
        found: what else the run folder holds.
    """
    exp, seen = found.experiment, sum(found.clients["pool"] == "seen")
    shown = names.format_value
    versions = sorted(run.get("versions", {}).items())
    return RunFacts(
        experiment=exp,
        run_id=names.text(run.get("run_id")),
        status=names.text(run.get("status")),
        base_line=base_line(exp, frame),
        strategy_line=strategy_line(exp, frame),
        n_modules=n_modules,
        overrides=tuple((o["key"], shown(o["default"]), shown(o["value"])) for o in run.get("overrides", ())),
        version_line=", ".join(f"{name} {version}" for name, version in versions) or names.NOT_RECORDED,
        scale=scale_sentence(exp),
        privacy=privacy_sentence(exp, frame, seen or None),
        pretrained=" ".join(filter(None, [pretrain_sentence(found.pretrain), *notices(found.events)])),
        duplicates=duplicates_sentence(found.notes),
        dealt=found.dealt,
        unknown=unknown_counts(run.get("unknown_tokens")),
        fallbacks=fallback_sentences(frame),
    )
