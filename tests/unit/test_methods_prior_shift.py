"""Prior shift: the common model where priors are equal, and elsewhere its logits plus the difference of two logs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from toy import CLASSES, toy_context, toy_examples, toy_lanes, toy_net

from fedtailor.core.errors import ConfigError
from fedtailor.core.scope import Scope
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import experiment_of, method_section, to_json
from fedtailor.federated.context import ClientContext, Federation
from fedtailor.lanes.batches import make_batch
from fedtailor.methods import METHODS, build_method
from fedtailor.personalise.trained import no_adapter


def context(labels: list[list[int]], every: tuple[int, ...]) -> ClientContext:
    lanes = [
        replace(lane, train=replace(lane.train, labels=torch.tensor(own).numpy()))
        for lane, own in zip(toy_lanes([len(own) for own in labels]), labels, strict=True)
    ]
    return replace(toy_context(toy_net(), lanes), federation=Federation((), every, 2))


def logits(ctx: ClientContext, **cfg: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the base and of prior shift, (K, b, C)."""
    made = build_method("prior_shift", cfg, 4).personaliser(ctx)
    batch = make_batch([toy_examples(lane.client.id, 3) for lane in ctx.lanes], [torch.arange(3).numpy()] * 2, 0)
    return ctx.net.logits(batch), made.logits(batch)


def test_where_all_priors_are_uniform_it_is_the_base() -> None:
    base, shifted = logits(context([[0, 1, 2, 3] * 2, [3, 2, 1, 0]], (50,) * CLASSES))
    assert torch.equal(base, shifted)


def test_the_shift_is_the_client_s_log_share_minus_everybody_s() -> None:
    base, shifted = logits(context([[0, 0, 0, 1, 2, 3], [3, 3]], (10, 20, 30, 40)), smoothing=0.5)
    own = torch.tensor([[3.5, 1.5, 1.5, 1.5], [0.5, 0.5, 0.5, 2.5]], dtype=torch.float64)
    every = torch.tensor([10.5, 20.5, 30.5, 40.5], dtype=torch.float64)
    expected = (own / own.sum(1, keepdim=True)).log() - (every / every.sum()).log()
    torch.testing.assert_close(shifted - base, expected.unsqueeze(1).expand_as(base), rtol=1e-9, atol=1e-12)


def test_on_homlora_the_rounds_are_homlora_s() -> None:
    rows = []
    how = {"local_steps": 2, "targets": ("query",)}
    for name, cfg in (("prior_shift", {"model": "homlora", "homlora": how}), ("homlora", how)):
        method = build_method(name, cfg, 4)
        ctx = toy_context(toy_net(), toy_lanes([5]), method.adapter, method.modules)
        assert method.local_update is not None
        method.local_update(ctx)
        rows.append(ctx.params.flat(Scope.SHARED).clone())
    assert torch.equal(*rows)
    assert build_method("prior_shift", {}, 4).local_update is None


def test_its_smoothing_is_positive_and_printed() -> None:
    with pytest.raises(ConfigError, match=r"'prior_shift\.smoothing': .* greater than 0"):
        compose([], ["methods=[prior_shift]", "prior_shift.smoothing=0"])
    entry = METHODS["prior_shift"]
    assert entry.note(entry.config(smoothing=0.5)).endswith(
        "the base's logits; 0.5 is added to every count of a class."
    )


def test_it_trains_homlora_as_the_section_of_homlora_says_and_is_no_adapter() -> None:
    words = ["methods=[prior_shift]", "prior_shift.model=homlora", "homlora.lr=0.5"]
    exp = compose([], words)
    section = method_section(exp, "prior_shift")
    assert section.homlora.lr == 0.5
    again = experiment_of(to_json(exp))
    assert method_section(again, "prior_shift") == section
    own = compose([], [*words, "prior_shift.homlora.lr=0.25"])
    assert method_section(own, "prior_shift").homlora.lr == 0.25
    assert no_adapter(exp, "prior_shift") == "changes more than an adapter can hold"
