"""Which stages spend one method's privacy together: its base, and its own rounds."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile

from fedtailor.core.release import Spend, unrecorded
from fedtailor.privacy.accounting import Mechanism, Spent
from fedtailor.runs.experiment import ExperimentBase
from fedtailor.runs.privacy_ledger import PrivacyLedger
from fedtailor.runs.privacy_terms import mechanism
from fedtailor.runs.stages import Stage
from fedtailor.runs.storage import Storage, join


def spending(storage: Storage, exp: ExperimentBase, stage: Stage, stages: Sequence[Stage], seen: int) -> Spend:
    """The stage's ledger, on top of what its base and its method's earlier strategies have spent.

    Args:
        storage: where the artifacts are.
        exp: whole configuration.
        stage: the stage that is about to run.
        stages: all stages of the run, in order.
        seen: clients that cohorts are drawn from.
    """
    found = mechanism(exp, seen)
    if found is None:
        return unrecorded
    earlier = takewhile(lambda other: other.key != stage.key, stages)
    before = [_ledger(storage, found, other).spent() for other in earlier if _is_of_one_pipeline(other, stage)]
    return _ledger(storage, found, stage, before).spend


def _ledger(storage: Storage, found: Mechanism, stage: Stage, before: Sequence[Spent] = ()) -> PrivacyLedger:
    folder, cohorts = join("artifacts", stage.artifact), f"{stage.kind}/seed{stage.seed}"
    return PrivacyLedger(storage, folder, found, cohorts, stage.cohort, before)


def _is_of_one_pipeline(earlier: Stage, stage: Stage) -> bool:
    same = (earlier.kind, earlier.method, earlier.seed) == (stage.kind, stage.method, stage.seed)
    return earlier.artifact == stage.parent or (same and earlier.rounds > 0)
