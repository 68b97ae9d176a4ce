"""``local_steps`` is the number of steps of a round in every method that trains by epochs."""

from __future__ import annotations

from typing import Any

import pytest
from toy import toy_context, toy_lanes, toy_net

from fedtailor.core.errors import ConfigError
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import method_section, stored_experiment, to_json
from fedtailor.experiment.stages import named_by
from fedtailor.lanes.adam import LaneAdam
from fedtailor.methods import METHODS, build_method

PHASES = {"fedprox": 1, "fedbabu": 1, "ditto": 2, "feddpa": 2, "homlora": 1}
"""Method to how often a round trains by so many steps."""


@pytest.mark.parametrize("name", PHASES)
def test_a_round_has_so_many_steps_whatever_the_client_s_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lanes, step = [], LaneAdam.step
    monkeypatch.setattr(LaneAdam, "step", lambda self, k: (lanes.append(k), step(self, k)))
    method = build_method(name, {"local_steps": 3, "batch_size": 4}, 2)
    ctx = toy_context(toy_net(), toy_lanes([9, 2]), method.adapter, method.modules)
    method.local_update(ctx)
    assert lanes == [2] * 3 * PHASES[name]
    assert method.steps == 3 * PHASES[name]


@pytest.mark.parametrize("name", ["fedprox", "feddpa", "ditto"])
def test_without_the_key_names_and_stored_runs_are_what_they_were(name: str) -> None:
    exp = compose([], [f"methods=[{name}]"])
    stored: dict[str, Any] = to_json(exp)
    assert "local_steps" not in named_by(method_section(exp, name))
    del stored[name]["local_steps"], stored["strategy"]["evaluate_every"]
    assert stored_experiment(stored) == exp
    assert METHODS[name].config().local_steps is None  # type: ignore[attr-defined]


def test_fedl2p_s_inner_loop_is_in_epochs() -> None:
    with pytest.raises(ConfigError, match=r"'fedl2p.finetune.local_steps' = 3: FedL2P's inner loop runs in epochs"):
        compose([], ["methods=[fedl2p]", "fedl2p.finetune.local_steps=3"])
