"""Clients that lie on order: who, what they send, and that the configuration says so everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny import run_tiny, tiny

from fedtailor.core.errors import ConfigError
from fedtailor.core.settings import AttackConfig
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import overrides_of, server_side_of
from fedtailor.experiment.plan import make_plan
from fedtailor.experiment.stages import Inputs, plan_stages
from fedtailor.federated.updates import Attack, attack_of

SEEN = [f"seen/amh/{i:02d}" for i in range(20)]
RECEIVED, ROW = np.array([1.0, 1.0, 1.0], np.float32), np.array([2.0, 0.5, 1.0], np.float32)
ROUNDS = ("methods=[base]", "base.rounds=2", "base.cohort=9", "fedavg.adapter=lora", "personalise.pools=[seen]")
LIAR = "attack.clients=[seen/amh/01]"


def attack(**section: Any) -> Attack:
    made = attack_of(AttackConfig(**section), SEEN)
    assert made is not None
    return made


def test_lies_turn_around_what_was_received() -> None:
    def sent(**section: Any) -> np.ndarray:
        return attack(clients=tuple(SEEN[:1]), **section).sent(SEEN[0], ROW, RECEIVED, 1, "base", 0)

    np.testing.assert_array_equal(sent(name="sign_flip"), [0.0, 1.5, 1.0])
    np.testing.assert_array_equal(sent(name="sign_flip", factor=2), [-1.0, 2.0, 1.0])
    np.testing.assert_array_equal(sent(name="scale", factor=10), [11.0, -4.0, 1.0])
    noise = sent(name="noise", factor=3) - RECEIVED
    assert np.linalg.norm(noise) == pytest.approx(3 * np.linalg.norm(ROW - RECEIVED), rel=1e-6)
    assert abs(noise[2]) > 0, "not along the update"
    np.testing.assert_array_equal(ROW, [2.0, 0.5, 1.0])


def test_noise_is_drawn_anew_for_every_client_and_round_and_is_the_same_again() -> None:
    liars = attack(name="noise", share=1.0)
    drawn = [liars.sent(client, ROW, RECEIVED, 1, "base", n)[0] for client in SEEN[:3] for n in range(3)]
    assert len(set(drawn)) == 9
    assert drawn == [liars.sent(client, ROW, RECEIVED, 1, "base", n)[0] for client in SEEN[:3] for n in range(3)]


def test_a_share_is_so_many_of_the_seen_clients_and_the_others_are_honest() -> None:
    some = attack(name="sign_flip", share=0.3)
    assert len(some.liars) == 6
    assert some.liars == attack(name="scale", factor=2, share=0.3).liars
    assert some.liars < attack(name="sign_flip", share=0.5).liars
    honest = next(client for client in SEEN if client not in some.liars)
    assert some.sent(honest, ROW, RECEIVED, 1, "base", 0) is ROW


def test_without_an_attack_nobody_lies_and_no_artifact_has_another_name() -> None:
    assert attack_of(AttackConfig(), SEEN) is None
    plain = compose([], ["base.rounds=1", "methods=[lora]"])
    lying = compose([], ["base.rounds=1", "methods=[lora]", "attack=sign_flip", "attack.share=0.2"])
    assert server_side_of(plain) == {}
    assert set(server_side_of(lying)) == {"attack"}
    names = [[stage.artifact for stage in plan_stages(exp, 42, Inputs("d", "m", "t"), 160)] for exp in (plain, lying)]
    assert not set(names[0]) & set(names[1])
    assert {o["key"]: o["value"] for o in overrides_of(lying)}.items() >= {"attack.share": 0.2}.items()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["attack=flip"], r"'attack.name'.*allowed: none, sign_flip, scale, noise"),
        (["attack=sign_flip"], r"needs one of 'attack.share' and 'attack.clients'"),
        (["attack=sign_flip", "attack.share=0.1", LIAR], r"needs one of 'attack.share' and 'attack.clients'"),
        (["attack=scale", "attack.share=0.1"], r"attack=scale needs 'attack.factor'"),
        (["attack.share=0.1", "attack.factor=2"], r"'attack.share' and 'attack.factor' without attack="),
        (["attack=noise", "attack.share=1.5"], r"'attack.share'"),
        (["attack=noise", "attack.factor=0", "attack.share=0.5"], r"'attack.factor'"),
        (["attack=noise", "attack.clients=[a,a]"], r"'attack.clients': has repeats"),
        (["attack=noise", "attack.share=0.001"], r"'attack.share': 0.001 of \d+ seen clients is nobody"),
        (["attack=noise", "attack.share=0.1", "base=none", "methods=[lora]"], "no stage of this run has rounds"),
    ],
)
def test_bad_settings_are_refused(words: list[str], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        compose([], words)


def test_the_plan_refuses_a_client_that_the_data_does_not_have(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'attack.clients': no seen client 'seen/amh/77'"):
        make_plan(tiny(tmp_path, *ROUNDS, "attack=noise", "attack.clients=[seen/amh/77]"))


def test_a_liar_in_a_run_is_named_and_two_runs_lie_alike(tmp_path: Path) -> None:
    lie = (*ROUNDS, "attack=noise", "attack.factor=1e6", LIAR, "aggregation=krum")
    events: list[dict[str, Any]] = []
    runs = [run_tiny(tiny(tmp_path / name, *lie), events=events) for name in "ab"]
    alarms = [e["what"]["client"] for e in events if e["kind"] == "warning" and e["what"]["kind"] == "norm-alarm"]
    assert set(alarms) == {"seen/amh/01"}
    assert runs[0].metrics().equals(runs[1].metrics())
