"""What a caption must say about a run.

What a caption and a page header say about a run.

What was done in a run to hide clients, and what it spent, in a sentence for captions.

What a run folder holds besides metrics: who has how many texts, what the model was pretrained on, times.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fedtailor.core.errors import DataError
from fedtailor.experiment.config import ExperimentBase
from fedtailor.experiment.launch import load_experiment
from fedtailor.experiment.privacy import NOT_COVERED, seen_clients
from fedtailor.privacy.accounting import default_delta
from fedtailor.report import setting
from fedtailor.report.names import in_method_order, method_name
from fedtailor.report.wording import NOT_RECORDED, format_value, text
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.store import clients_of


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
    cfg = exp.privacy
    how = "no clip" if cfg.clip is None else f"clip {cfg.clip:g}"
    rows = frame[(frame["metric"] == "epsilon") & (frame["client"] == "")]
    if rows.empty:
        return f"Central DP over clients ({how}) without noise: no guarantee."
    least = rows.groupby(["stage", "method"])["value"].max()
    parts = [
        f"{least[stage, method]:.3g} ({'base alone' if stage == 'base' else method_name(method)})"
        for stage in ("base", "strategy")
        for method in in_method_order(rows.loc[rows["stage"] == stage, "method"])
    ]
    relation = "added or removed" if cfg.sampler == "poisson" else "replaced"
    return (
        f"Central DP over clients ({how}, {cfg.sampler} cohorts, one client {relation}): epsilon {', '.join(parts)} "
        f"at delta = {cfg.delta or default_delta(seen):.2g}, each with its base and per seed. "
        f"Not covered: {'; '.join(NOT_COVERED)}."
    )


PRETRAIN = "pretrain.json"

_CLIENT_COLUMNS = ("client", "pool", "language", "n_train", "n_test")

_TIME_COLUMNS = ("stage", "round", "client", "seconds")


@dataclass(frozen=True)
class RunData:
    """Everything is empty or None where the run folder does not say.

    Args:
        experiment: configuration of the run; keys that are newer than it have their defaults.
        clients: client, pool, language, n_train, n_test: one row per client of the data.
        class_counts: client to number of train texts per class, in the order of ``labels``.
        labels: classes of the task, or the groups of a generation task's examples.
        kind: ``classification`` or ``generation``.
        notes: what preparing the data found or dropped, by name.
        pretrain: content of the model folder's ``pretrain.json``.
        times: stage, round, client, seconds: seconds of a worker per client.
        events: lines of ``events.jsonl``.
    """

    experiment: ExperimentBase
    clients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_CLIENT_COLUMNS)))
    class_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    kind: str = "classification"
    notes: Mapping[str, int | str] = field(default_factory=dict)
    pretrain: Mapping[str, Any] | None = None
    times: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_TIME_COLUMNS)))
    events: Sequence[Mapping[str, Any]] = ()


def gather(run: RunFolder) -> RunData:
    """Reads what the folder holds; the data set is that of the run's first seed.

    Args:
        run: the run.

    Raises:
        ConfigError: a configuration that this version does not read.
        DataError: a pretrain.json that is not a JSON mapping.
    """
    exp = load_experiment(run)
    manifest = run.manifest(exp.seeds[0]) or {}
    clients = clients_of(manifest) if manifest else ()
    rows = [(c.id, c.pool, c.language, c.n_train, c.n_test) for c in clients]
    return RunData(
        experiment=exp,
        clients=pd.DataFrame(rows, columns=list(_CLIENT_COLUMNS)),
        class_counts={str(c["id"]): tuple(c["train_classes"]) for c in manifest.get("clients", ())},
        labels=tuple(str(label) for label in manifest.get("labels", ())),
        kind=str(manifest.get("kind", "classification")),
        notes=dict(manifest.get("notes", {})),
        pretrain=_pretrain(run, exp.model.path),
        times=run.timings(),
        events=run.events(),
    )


def _pretrain(run: RunFolder, folder: str | None) -> Mapping[str, Any] | None:
    for parent in sorted({str(stage.get("parent")) for stage in run.stages()}):
        path = f"artifacts/{parent}/{PRETRAIN}"
        if parent.startswith("model-") and run.storage.exists(path):
            return dict(run.storage.read_json(path))
    file = Path(folder) / PRETRAIN if folder else None
    if file is None or not file.is_file():
        return None
    try:
        return dict(json.loads(file.read_text("utf-8")))
    except (TypeError, ValueError) as error:
        raise DataError(f"{file}: no JSON mapping of keys: {error}") from error


@dataclass(frozen=True)
class RunFacts:
    """The facts that a caption and a page header need, as text.

    Args:
        base_line: base method, its rounds, whose seed; ``strategy_line``: rounds of the strategies.
        n_modules: L, the number of adapted linear layers.
        overrides: choices that depart from the default: key, default, value.
        scale: a sentence on a run that was made smaller, empty at scale 1.
        privacy: a sentence on what was done to hide clients, empty without.
        pretrained: a sentence on what the model was pretrained on, empty where it does not say.
        duplicates: a sentence on repeated texts, empty where the data do not say.
        fallbacks: pool to a sentence on clients that have nothing of their own of the base.
    """

    experiment: ExperimentBase
    run_id: str
    status: str
    base_line: str
    strategy_line: str
    n_modules: int
    overrides: tuple[tuple[str, str, str], ...]
    versions: tuple[tuple[str, str], ...]
    scale: str
    privacy: str
    pretrained: str
    duplicates: str
    fallbacks: Mapping[str, str]

    @property
    def version_line(self) -> str:
        """``fedtailor 0.1.0, torch 2.13.0``."""
        return ", ".join(f"{name} {version}" for name, version in self.versions) or NOT_RECORDED


def read_facts(run: Mapping[str, Any], n_modules: int, frame: pd.DataFrame, found: RunData) -> RunFacts:
    """RunFacts of a run.

    Args:
        run: content of ``run.json`` and the run's ``status``.
        n_modules: number of adapted linear layers.
        frame: checked metric rows.
        found: what else the run folder holds.
    """
    exp, seen = found.experiment, sum(found.clients["pool"] == "seen")
    return RunFacts(
        experiment=exp,
        run_id=text(run.get("run_id")),
        status=text(run.get("status")),
        base_line=setting.base_line(exp, frame),
        strategy_line=setting.strategy_line(exp, frame),
        n_modules=n_modules,
        overrides=tuple(
            (o["key"], format_value(o["default"]), format_value(o["value"])) for o in run.get("overrides", ())
        ),
        versions=tuple(sorted(run.get("versions", {}).items())),
        scale=setting.scale_sentence(exp),
        privacy=privacy_sentence(exp, frame, seen or None),
        pretrained=setting.pretrain_sentence(found.pretrain),
        duplicates=setting.duplicates_sentence(found.notes),
        fallbacks=setting.fallback_sentences(frame),
    )
