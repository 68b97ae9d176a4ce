"""What ``run.json`` says about a run, read leniently: what is absent is shown as absent, never invented."""

from __future__ import annotations

from collections.abc import Mapping, Sized
from dataclasses import dataclass, field
from typing import Any

import pandas as pd

from fedtailor.runs.report import setting
from fedtailor.runs.report.evidence import Evidence
from fedtailor.runs.report.privacy import privacy_sentence
from fedtailor.runs.report.wording import NOT_RECORDED, at, shown, text


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
