"""Mixes: what they are, what they score, what they are called."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from toy import toy_context, toy_lanes, toy_llama, with_prompts

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.scope import Scope
from fedtailor.lanes.batches import make_batch
from fedtailor.lanes.loss import lane_losses
from fedtailor.training.mixing import Mixtures, Rule, layer_labels, projections

RANK = 3


def two_loras(rule: Rule = "factors", targets: tuple[str, ...] = ("query", "value")) -> Mixtures:
    adapter = LoraAdapter(RANK, 2.0, Scope.SHARED, targets=targets)
    ctx = toy_context(toy_llama(), with_prompts(toy_lanes([5, 3])), adapter)
    rng = torch.Generator().manual_seed(0)
    own, received = (
        {
            name: torch.randn(ctx.params[name].shape, generator=rng, dtype=torch.float64)
            for name in adapter.names(ctx.net)
        }
        for _ in range(2)
    )
    return Mixtures(ctx, adapter, own, received, rule)


def shares(w: list[float], mixtures: Mixtures) -> np.ndarray:
    own = np.repeat(np.array(w)[:, np.newaxis], len(mixtures.layers), 1)
    return np.stack([own, 1 - own], 2)


def product(values: dict[str, torch.Tensor], module: str, lane: int = 0) -> torch.Tensor:
    return values[f"lora_B.{module}"][lane] @ values[f"lora_A.{module}"][lane]


def test_factors_are_mixed_by_themselves() -> None:
    mixtures = two_loras()
    found = mixtures.mixed([1, 0], shares([0.25, 1.0], mixtures))
    for name in mixtures.adapter.names(mixtures.ctx.net):
        torch.testing.assert_close(found[name][0], 0.25 * mixtures.own[name][1] + 0.75 * mixtures.received[name][1])
        assert torch.equal(found[name][1], mixtures.own[name][0])


@pytest.mark.parametrize("targets", [("query", "value"), ("key",)])
def test_a_mixed_product_is_the_nearest_of_its_rank(targets: tuple[str, ...]) -> None:
    mixtures = two_loras("product", targets)
    found = mixtures.mixed([0], shares([0.4], mixtures))
    for layer in mixtures.layers:
        parts = [0.4 * product(dict(mixtures.own), layer.name), 0.6 * product(dict(mixtures.received), layer.name)]
        u, s, v = torch.linalg.svd(parts[0] + parts[1])
        nearest = u[:, :RANK] * s[:RANK] @ v[:RANK]
        torch.testing.assert_close(product(found, layer.name), nearest)
        a, b = found[f"lora_A.{layer.name}"][0], found[f"lora_B.{layer.name}"][0]
        torch.testing.assert_close(a.norm(dim=1), b.norm(dim=0))


def test_a_layer_narrower_than_both_ranks_keeps_its_product() -> None:
    mixtures = two_loras("product", ("key",))
    wide = LoraAdapter(12, 2.0, Scope.SHARED, targets=("key",))
    own, received = (
        {
            name: torch.randn(2, *shape, dtype=torch.float64)
            for spec in wide.specs(mixtures.ctx.net)
            for name, shape in [(spec.name, spec.shape)]
        }
        for _ in range(2)
    )
    made = Mixtures(mixtures.ctx, wide, own, received, "product")
    found = made.mixed([1], shares([0.5], made))
    for layer in made.layers:
        expected = 0.5 * product(own, layer.name, 1) + 0.5 * product(received, layer.name, 1)
        assert found[f"lora_A.{layer.name}"].shape == (1, 12, layer.d_in)
        torch.testing.assert_close(product(found, layer.name), expected)


@pytest.mark.parametrize("budget", [1, 40, 4096])
def test_a_mix_s_loss_is_the_mean_over_all_targets_of_its_rows(budget: int) -> None:
    mixtures = two_loras()
    object.__setattr__(mixtures.ctx, "token_budget", budget)
    lanes, w = [0, 0, 1, 1], shares([0.0, 0.5, 0.5, 1.0], mixtures)
    texts = [mixtures.ctx.lanes[k].train for k in lanes]
    found = mixtures.losses(lanes, w, texts)
    for k, text in enumerate(texts):
        mixtures.bound([lanes[k]], w[k : k + 1], trained=False)
        batch = make_batch([text], [np.arange(len(text))], 0)
        assert found[k] == pytest.approx(float(lane_losses(mixtures.ctx.net, batch)[0]), rel=1e-9)


def test_a_projection_is_called_by_as_much_of_its_path_as_tells_it_from_others() -> None:
    block = "bert.encoder.layer.{}.{}"
    modules = [block.format(n, path) for n in (0, 11) for path in ("attention.self.query", "output.dense")]
    assert layer_labels(modules) == ["query.0", "dense.0", "query.11", "dense.11"]
    both = [block.format(0, path) for path in ("attention.output.dense", "output.dense", "intermediate.dense")]
    assert projections(both) == ["attention.output.dense", "output.dense", "intermediate.dense"]
    assert projections(["bert.pooler.dense"]) == ["bert.pooler.dense"]
