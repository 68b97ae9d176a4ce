"""One hash over everything a run computed: equal digests mean equal results.

It covers, per stage and commit, the record (cohort, weights, counts) and the values of all objects: global
and server state, PRIVATE state, adapters, metrics. Times, hosts, attempts, events, kept answers and file formats are
outside. Values count, not files, and pruned objects count by the hash that their commit keeps, so neither a
retry nor pruning changes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedtailor.core.errors import StorageError
from fedtailor.storage.commit import Commit
from fedtailor.storage.files import Storage
from fedtailor.storage.payloads import canonical_json, sha256
from fedtailor.storage.round_store import PREDICTIONS
from fedtailor.storage.run_folder import RunFolder, committed_stages


def digest(storage: Storage, run_id: str) -> str:
    """Hex sha256 of a finished run.

    Raises:
        StorageError: lists every stage that is unfinished or damaged.
    """
    return sha256(canonical_json(stage_digests(storage, run_id)))


def stage_digests(storage: Storage, run_id: str) -> dict[str, str]:
    """Stage key to hex sha256, in order of keys; tells where two runs part.

    Raises:
        StorageError: lists every stage that is unfinished or damaged.
    """
    run = RunFolder.open(storage, run_id)
    stages = sorted(committed_stages(run), key=lambda stage: str(stage["key"]))
    if not stages:
        raise StorageError(f"run '{run_id}' has no stages yet")
    problems = [f"{stage['key']}: {why}" for stage in stages if (why := _unfinished(run, stage))]
    if problems:
        raise StorageError(f"run '{run_id}' has no digest yet. " + "; ".join(problems))
    return {str(stage["key"]): commits_digest(run.log(stage).all(objects=False)) for stage in stages}


def commits_digest(commits: list[Commit]) -> str:
    """Hex sha256 of the records and values of commits, in their order."""
    content = [
        {
            "index": c.index,
            "record": dict(c.record),
            "objects": {name: c.objects[name].content for name in c.objects if name != PREDICTIONS},
        }
        for c in commits
    ]
    return sha256(canonical_json(content))


def _unfinished(run: RunFolder, stage: Mapping[str, Any]) -> str | None:
    done, rounds = stage["committed"], int(stage.get("rounds") or 0)
    if not stage["done"]:
        return f"unfinished, {done} commits" + (f" of {rounds}" if rounds else "")
    if (why := run.log(stage).damage()) is not None:
        return f"damaged: {why}"
    return f"only {done} of {rounds} rounds are committed" if done < rounds else None
