"""A run on instructions keeps every promise that a run on texts keeps; all methods answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny import TALK, run_tiny, talk

from fedtailor.core.errors import ConfigError, Interrupted
from fedtailor.experiment.compose import compose
from fedtailor.federated.method import Capability
from fedtailor.methods import METHODS, build_method
from fedtailor.storage.digest import digest
from fedtailor.storage.run_folder import RunFolder

MEASURES = {"rouge1", "rouge2", "rougeL", "meteor", "exact_match", "loss"}
ANSWERING = [name for name in METHODS if Capability.CLASSES not in build_method(name, {}, 2).requires]
BASES = ("feddpa", "dept")
"""Methods that train a base of which every client keeps a part."""


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return run_tiny(talk(tmp_path_factory.mktemp("clean")))


def digest_of(run: RunFolder) -> str:
    return digest(run.storage, run.run_id)


def scores(run: RunFolder) -> Any:
    frame = run.metrics()
    return frame[(frame.stage == "personalise") & frame.metric.isin(MEASURES)]


def test_every_client_is_scored_by_every_measure_in_each_of_its_languages(clean: RunFolder) -> None:
    found = scores(clean)
    assert set(found.metric) == MEASURES
    assert not found.duplicated(["method", "client", "budget", "metric", "language"]).any()
    assert found.client.nunique() == 12
    assert found[found.metric != "loss"].value.between(0, 1).all()


def test_a_language_counts_the_samples_in_it(clean: RunFolder) -> None:
    found = scores(clean)
    weights = found[(found.metric == "rougeL") & (found.method == "base")].groupby("client").weight.sum()
    assert (weights == 4).all()  # decoding.max_test


def test_equal_configurations_give_equal_digests(clean: RunFolder, tmp_path: Path) -> None:
    assert digest_of(run_tiny(talk(tmp_path), "other-name")) == digest_of(clean)


@pytest.mark.parametrize("after", [1, 4, 7])
def test_interrupted_and_resumed_is_uninterrupted(clean: RunFolder, tmp_path: Path, after: int) -> None:
    calls = iter(range(10_000))
    exp = talk(tmp_path)
    with pytest.raises(Interrupted):
        run_tiny(exp, should_stop=lambda: next(calls) >= after)
    assert digest_of(run_tiny(exp)) == digest_of(clean)


def test_personal_training_lowers_the_loss(clean: RunFolder) -> None:
    loss = scores(clean).query("metric == 'loss'").groupby("method").value.mean()
    assert loss["lora"] < loss["base"]


@pytest.mark.parametrize("method", [name for name in ANSWERING if name not in ("base", "lora", "fedp2eft", *BASES)])
def test_every_method_that_can_answer_does(clean: RunFolder, method: str) -> None:
    keys = ["fedl2p.outer_steps=1", "fedl2p.hypergradient.pairs=2"] if method == "fedl2p" else []
    keys += [f"{method}.validation=own_holdout"] if build_method(method, {}, 2).validation_pool else []
    exp = talk(Path(clean.storage.url), f"methods=[{method}]", "budgets=[2]", *keys)
    assert set(scores(run_tiny(exp, f"only-{method}")).metric) == MEASURES


@pytest.mark.parametrize("base", BASES)
def test_clients_may_keep_a_part_of_their_language_model(tmp_path: Path, base: str) -> None:
    exp = talk(tmp_path, f"base.name={base}", f"{base}.batch_size=16", "methods=[base,lora]", "budgets=[1]")
    assert set(scores(run_tiny(exp)).metric) == MEASURES


def test_methods_that_answer_with_classes_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"majority answers with classes.*allowed: base"):
        compose([], [*TALK, "methods=[majority,lora]"])


def test_a_task_that_asks_for_text_has_its_own_default_model_and_methods() -> None:
    exp = compose([], ["task=cldr_instruct"])
    assert exp.model.name == "tiny-llama"
    assert "majority" not in exp.methods
