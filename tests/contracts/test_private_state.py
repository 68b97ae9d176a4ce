"""PRIVATE parameters stay with their client: kept between rounds, never averaged, resumed, used in the end."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny import run_tiny, tiny

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.errors import Interrupted
from fedtailor.core.scope import Scope
from fedtailor.federated.method import Method
from fedtailor.methods import build_method
from fedtailor.methods.fedp2eft import PsgConfig, StrategyGenerator
from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.digest import digest
from fedtailor.storage.run_folder import RunFolder

OVERRIDES = ("methods=[fedavg]", "base.name=none", "strategy.rounds=4", "fedavg.adapter=lora", "fedavg.lr=1e-2")


@pytest.fixture(autouse=True)
def local_lora(monkeypatch: pytest.MonkeyPatch) -> None:
    """FedAvg whose LoRA stays at home; a generator that nobody uses stands for the SHARED part."""

    def build(name: str, config: Any, r_max: int) -> Method:
        method = build_method(name, config, r_max)
        shared = StrategyGenerator(2, PsgConfig())
        return replace(method, adapter=LoraAdapter(2, 2.0, Scope.PRIVATE), modules=(shared,))

    for module in ("worker.open_stage", "methods.build", "experiment.config"):
        monkeypatch.setattr(f"fedtailor.{module}.build_method", build)


def test_private_rows_are_kept_by_client_and_resumed(tmp_path: Path) -> None:
    clean = run_tiny(tiny(tmp_path / "clean", *OVERRIDES))
    calls = iter(range(1000))
    with pytest.raises(Interrupted):
        run_tiny(tiny(tmp_path / "cut", *OVERRIDES), should_stop=lambda: next(calls) >= 7)
    resumed = run_tiny(tiny(tmp_path / "cut", *OVERRIDES))
    assert digest(resumed.storage, "run") == digest(clean.storage, "run")
    commits = commits_of(clean)
    for before, after in pairwise(commits):
        stays = set(before.record["private_at"]) - set(after.record["cohort"])
        assert all(after.record["private_at"][c] == before.record["private_at"][c] for c in stays)
        assert set(after.tensors("clients/private.safetensors")) == set(after.record["cohort"])


def test_private_state_goes_on_from_the_clients_last_round(tmp_path: Path) -> None:
    commits = commits_of(run_tiny(tiny(tmp_path, *OVERRIDES)))
    seen: dict[str, Any] = {}
    returning = 0
    for commit in commits:
        rows = commit.tensors("clients/private.safetensors")
        for client, row in rows.items():
            if client in seen:
                returning += 1
                assert (row != seen[client]).any()
            seen[client] = row
    assert returning >= 3


def test_the_personal_model_is_the_private_one_and_unsampled_clients_keep_the_initial(tmp_path: Path) -> None:
    run = run_tiny(tiny(tmp_path, *OVERRIDES))
    plain = run_tiny(tiny(tmp_path, "methods=[base]", "base.name=none"), "plain")
    sampled = set(commits_of(run)[-1].record["private_at"])
    losses = [r.metrics().query("metric == 'loss'").set_index("client").value for r in (run, plain)]
    for client in losses[0].index:
        assert (losses[0][client] != losses[1][client]) == (client in sampled), client


def commits_of(run: RunFolder) -> list[Any]:
    [stage] = run.stages("strategy")
    return CommitLog(run.storage, f"artifacts/{stage['artifact']}").all()
