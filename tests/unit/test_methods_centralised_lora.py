"""Centralised LoRA: HOMLoRA with one client, which has the rows of all."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import run_tiny, tiny
from toy import toy_context, toy_lanes, toy_net

from fedtailor.core.errors import ConfigError
from fedtailor.core.scope import Scope
from fedtailor.experiment.plan import make_plan
from fedtailor.federated.context import Federation
from fedtailor.methods import METHODS, build_method
from fedtailor.storage.artifacts import artifact_path
from fedtailor.storage.commit_log import CommitLog
from fedtailor.tasks.store import POOLED
from fedtailor.tasks.tokens import TokenData

HOW = {"lr": 5e-3, "batch_size": 4, "local_steps": 3, "rank": 3}
RUN = ("methods=[centralised_lora,homlora]", "base.name=none", "task.languages=[eng,yor]", "strategy.rounds=2",
       "strategy.cohort=4", "centralised_lora.local_steps=2", "homlora.local_steps=2")  # fmt: skip


def trained(name: str, cohort: int, **cfg: object) -> torch.Tensor:
    method = build_method(name, HOW | cfg, 4)
    ctx = toy_context(toy_net(), toy_lanes([9]), method.adapter, method.modules)
    method.local_update(replace(ctx, federation=Federation((), (), cohort)))
    return ctx.params.flat(Scope.SHARED).clone()


def test_one_client_is_homlora() -> None:
    assert torch.equal(trained("centralised_lora", 1), trained("homlora", 1))
    assert torch.equal(trained("centralised_lora", 8, examples="client"), trained("homlora", 8))


def test_equal_examples_are_the_steps_of_a_whole_cohort() -> None:
    assert torch.equal(trained("centralised_lora", 3), trained("homlora", 3, local_steps=9))


def test_the_pooled_client_has_every_seen_row_once_and_is_in_no_list(tmp_path: Path) -> None:
    run = run_tiny(tiny(tmp_path, *RUN))
    tokens = next(path.name for path in (tmp_path / "artifacts").glob("tokens-*"))
    data = TokenData.open(tmp_path / artifact_path(tokens))
    client, seen = data.client(POOLED), data.pool("seen")
    assert (client.n_train, client.n_test) == (sum(c.n_train for c in seen), sum(c.n_test for c in seen))
    rows = np.concatenate([data.rows_of(c.id, "train") for c in seen])
    assert np.array_equal(data.rows_of(POOLED, "train"), rows)
    assert data.examples(POOLED, "train").input_ids.shape == (client.n_train, data.longest(POOLED))
    assert sum(data.class_counts()) == client.n_train
    assert POOLED not in {c.id for c in data.clients}
    [log] = [CommitLog(run.storage, f"artifacts/{s['artifact']}") for s in run.stages("strategy")
             if s["method"] == "centralised_lora"]  # fmt: skip
    assert [commit.record["cohort"] for commit in log.all()] == [[POOLED]] * 2
    frame = run.metrics("personalise")
    tested = {method: set(rows.client) for method, rows in frame.groupby("method")}
    assert tested["centralised_lora"] == tested["homlora"] == {c.id for c in data.clients}


def test_a_plan_counts_its_steps_and_sends_nothing(tmp_path: Path) -> None:
    plan = make_plan(tiny(tmp_path, *RUN))
    costs = {row.stage.method: row.estimate for row in plan.stages if row.stage.kind == "strategy"}
    assert costs["centralised_lora"].steps == costs["homlora"].steps == 2 * 2 * 4
    assert (costs["centralised_lora"].updates, costs["centralised_lora"].wire) == (2, 0)
    assert any("all clients' rows in one place" in note for note in plan.notes)


def test_privacy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"centralised_lora trains on the rows of all clients in one place, which"):
        tiny(tmp_path, *RUN, "privacy=central_dp", "privacy.noise_multiplier=1", "privacy.clip=1")


def test_its_note_says_how_much_it_sees() -> None:
    entry = METHODS["centralised_lora"]
    assert "as many examples as a federated round" in entry.note(entry.config())
    assert "10 steps in place of a round" in entry.note(entry.config(examples="client"))
