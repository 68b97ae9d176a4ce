"""What a caption must say about a run.

What ``run.json`` says about a run, read leniently: what is absent is shown as absent, never invented.

What was done in a run to hide clients, and what it spent, in a sentence for captions.

What a run folder holds besides metrics: who has how many texts, what the model was pretrained on, times.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence, Sized
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from fedtailor.core.errors import DataError
from fedtailor.experiment.config import scaled
from fedtailor.experiment.privacy import NOT_COVERED
from fedtailor.privacy.accounting import default_delta
from fedtailor.report import setting
from fedtailor.report.names import in_method_order, method_name
from fedtailor.report.wording import NOT_RECORDED, at, shown, text
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder
from fedtailor.tasks.store import clients_of


def privacy_sentence(run: Mapping[str, Any], frame: pd.DataFrame | None = None) -> str:
    """What was done to hide clients and what it spent; empty where nothing was.

    Args:
        run: content of ``run.json``.
        frame: checked metric rows.
    """
    config = run.get("config") or {}
    sentences = []
    if at(config, "privacy.name") == "central_dp":
        sentences.append(_dp_sentence(config, frame))
    masking = at(config, "privacy.secure_aggregation")
    if masking not in (None, "none"):
        sentences.append(f"Secure aggregation ({masking}) was simulated, for its cost and drop-outs; it hid nothing.")
    return " ".join(sentences)


def _dp_sentence(config: Mapping[str, Any], frame: pd.DataFrame | None) -> str:
    clip, sampler = at(config, "privacy.clip"), at(config, "privacy.sampler")
    how = f"clip {clip:g}" if isinstance(clip, int | float) else "no clip"
    rows = None if frame is None else frame[(frame["metric"] == "epsilon") & (frame["client"] == "")]
    if rows is None or rows.empty:
        return f"Central DP over clients ({how}) without noise: no guarantee."
    least = rows.groupby(["stage", "method"])["value"].max()
    parts = [
        f"{least[stage, method]:.3g} ({'base alone' if stage == 'base' else method_name(method)})"
        for stage in ("base", "strategy")
        for method in in_method_order(rows.loc[rows["stage"] == stage, "method"])
    ]
    relation = "added or removed" if sampler == "poisson" else "replaced"
    delta = _delta(config)
    at_delta = "" if delta is None else f" at delta = {delta:.2g}"
    return (
        f"Central DP over clients ({how}, {sampler} cohorts, one client {relation}): "
        f"epsilon {', '.join(parts)}{at_delta}, each with its base and per seed. Not covered: {'; '.join(NOT_COVERED)}."
    )


def _delta(config: Mapping[str, Any]) -> float | None:
    """As configured, or the default for the run's seen clients; None where ``run.json`` does not say."""
    given, languages = at(config, "privacy.delta"), at(config, "task.languages")
    full, scale = at(config, "task.clients_per_language"), at(config, "scale")
    if given is not None:
        return float(given)
    if not languages or not isinstance(full, int):
        return None
    kept = at(config, "task.clients_kept") or scaled(full, float(scale or 1))
    return default_delta(len(languages) * kept)


PRETRAIN = "pretrain.json"

_CLIENT_COLUMNS = ("client", "pool", "language", "n_train", "n_test")

_TIME_COLUMNS = ("stage", "round", "client", "seconds")


@dataclass(frozen=True)
class Evidence:
    """Everything is empty or None where the run folder does not say.

    Args:
        clients: client, pool, language, n_train, n_test: one row per client of the data.
        class_counts: client to number of train texts per class, in the order of ``labels``.
        labels: classes of the task, or the groups of a generation task's examples.
        kind: ``classification`` or ``generation``.
        notes: what preparing the data found or dropped, by name.
        pretrain: content of the model folder's ``pretrain.json``.
        times: stage, round, client, seconds: seconds of a worker per client.
        events: lines of ``events.jsonl``.
    """

    clients: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_CLIENT_COLUMNS)))
    class_counts: Mapping[str, Sequence[int]] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    kind: str = "classification"
    notes: Mapping[str, int | str] = field(default_factory=dict)
    pretrain: Mapping[str, Any] | None = None
    times: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_TIME_COLUMNS)))
    events: Sequence[Mapping[str, Any]] = ()


def gather(run: RunFolder) -> Evidence:
    """Reads what the folder holds; the data set is that of the run's first seed.

    Args:
        run: the run.

    Raises:
        DataError: a pretrain.json that is not a JSON mapping.
    """
    info = run.info()
    seeds = (info.get("config") or {}).get("seeds") or ()
    manifest = (run.manifest(seeds[0]) if seeds else None) or {}
    clients = clients_of(manifest) if manifest else ()
    rows = [(c.id, c.pool, c.language, c.n_train, c.n_test) for c in clients]
    return Evidence(
        clients=pd.DataFrame(rows, columns=list(_CLIENT_COLUMNS)),
        class_counts={str(c["id"]): tuple(c["train_classes"]) for c in manifest.get("clients", ())},
        labels=tuple(str(label) for label in manifest.get("labels", ())),
        kind=str(manifest.get("kind", "classification")),
        notes=dict(manifest.get("notes", {})),
        pretrain=_pretrain(run.storage, info),
        times=run.timings(),
        events=run.events(),
    )


def _pretrain(storage: Storage, info: Mapping[str, Any]) -> Mapping[str, Any] | None:
    parents = dict.fromkeys(str(stage.get("parent")) for stage in info.get("stages") or ())
    for artifact in (name for name in parents if name.startswith("model-")):
        path = f"artifacts/{artifact}/{PRETRAIN}"
        if storage.exists(path):
            return _mapping(path, storage.read_json(path))
    folder = ((info.get("config") or {}).get("model") or {}).get("path")
    file = Path(folder) / PRETRAIN if folder else None
    if file is None or not file.is_file():
        return None
    try:
        return _mapping(str(file), json.loads(file.read_text("utf-8")))
    except ValueError as error:
        raise DataError(f"{file}: not JSON: {error}") from error


def _mapping(path: str, content: Any) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise DataError(f"{path}: a mapping of keys was expected, found {type(content).__name__}")
    return content


@dataclass(frozen=True)
class Override:
    """A choice that departs from the default; ``default`` and ``value`` as text."""

    key: str
    default: str
    value: str


@dataclass(frozen=True)
class Facts:
    """The facts that a caption and a page header need, as text.

    Args:
        base_line: base method, its rounds, whose seed; ``strategy_line``: rounds of the strategies.
        n_modules: L, the number of adapted linear layers.
        failures: number of failed clients, None if the run did not record it. So are ``warnings``.
        scale: a sentence on a run that was made smaller, empty at scale 1.
        privacy: a sentence on what was done to hide clients, empty without.
        pretrained: a sentence on what the model was pretrained on, empty where it does not say.
        duplicates: a sentence on repeated texts, empty where the data do not say.
        fallbacks: pool to a sentence on clients that have nothing of their own of the base.
    """

    run_id: str
    status: str
    task: str
    model: str
    base_line: str
    strategy_line: str
    n_modules: int
    overrides: tuple[Override, ...]
    versions: tuple[tuple[str, str], ...]
    failures: int | None
    warnings: int | None
    scale: str = ""
    privacy: str = ""
    pretrained: str = ""
    duplicates: str = ""
    fallbacks: Mapping[str, str] = field(default_factory=dict)

    @property
    def version_line(self) -> str:
        """``fedtailor 0.1.0, torch 2.13.0``."""
        return ", ".join(f"{name} {version}" for name, version in self.versions) or NOT_RECORDED


def read_facts(
    run: Mapping[str, Any], n_modules: int, frame: pd.DataFrame | None = None, evidence: Evidence | None = None
) -> Facts:
    """Facts of a run.

    Args:
        run: content of ``run.json``.
        n_modules: number of adapted linear layers.
        frame: checked metric rows.
        evidence: what else the run folder holds.
    """
    config, status = run.get("config") or {}, run.get("status")
    state = status.get("state", status.get("status")) if isinstance(status, Mapping) else status
    found = evidence or Evidence()
    return Facts(
        run_id=text(run.get("run_id")),
        status=text(state),
        task=text(at(config, "task.name")),
        model=text(at(config, "model.name")),
        base_line=setting.base_line(run, frame),
        strategy_line=setting.strategy_line(run, frame),
        n_modules=n_modules,
        overrides=tuple(
            Override(str(o["key"]), shown(o.get("default")), shown(o.get("value"))) for o in run.get("overrides") or ()
        ),
        versions=tuple((str(name), text(v)) for name, v in sorted((run.get("versions") or {}).items())),
        failures=_count(run, status, "failures"),
        warnings=_count(run, status, "warnings"),
        scale=setting.scale_sentence(run),
        privacy=privacy_sentence(run, frame),
        pretrained=setting.pretrain_sentence(found.pretrain),
        duplicates=setting.duplicates_sentence(found.notes),
        fallbacks={} if frame is None else setting.fallback_sentences(frame),
    )


def _count(run: Mapping[str, Any], status: Any, key: str) -> int | None:
    found = run.get(key)
    if found is None and isinstance(status, Mapping):
        found = status.get(key)
    if isinstance(found, bool) or found is None:
        return None
    return len(found) if isinstance(found, Sized) else int(found)
