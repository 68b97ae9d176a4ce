"""Ranks of what an adapter adds, without the matrix itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy import toy_context, toy_lanes, toy_net

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.adapters.spectrum import SHARE, entropy_rank, of_product, rank90, singular_values
from fedtailor.core.scope import Scope
from fedtailor.methods import build_method

FEW = {"batch_size": 4, "local_steps": 1, "inner_lr": 0.3, "rank": 3, "private_rank": 2, "scale": 0.5}


def filled(method: str, **how: Any) -> Any:
    """A method's context, its adapters at random values, two lanes."""
    made = build_method(method, how, 4)
    ctx = toy_context(toy_net(), toy_lanes([9, 6]), made.adapter, made.modules)
    draw = torch.Generator().manual_seed(5)
    for spec in made.adapter.specs(ctx.net):
        value = ctx.params[spec.name].detach()
        ctx.params.set(spec.name, torch.randn(value.shape, generator=draw, dtype=value.dtype))
    return made, ctx


def test_singular_values_are_those_of_the_sum_that_is_never_formed() -> None:
    made, ctx = filled("pf2lora", **FEW)
    found = made.personaliser(ctx).spectra
    assert set(found) == {x.name for x in made.adapter.first.layers_of(ctx.net)}
    for name, values in found.items():
        assert values.shape == (2, 5)
        down, up, own_down, own_up = (
            ctx.params[f"{prefix}_{matrix}.{name}"].detach() for prefix in ("common", "own") for matrix in "AB"
        )
        whole = 0.5 * (up @ down + own_up @ own_down)
        torch.testing.assert_close(values, torch.linalg.svdvals(whole)[:, :5], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["homlora", "hetlora", "perfedavg_lora", "centralised_lora"])
def test_methods_of_one_adapter_report_its_own(method: str) -> None:
    how = {"ranks": {"name": "list", "values": [1, 3]}} if method == "hetlora" else {"rank": 3}
    if method == "perfedavg_lora":
        how["inner_lr"] = 0.0
    made, ctx = filled(method, batch_size=4, local_steps=1, **how)
    if made.downlink:
        made.downlink(ctx)
    spectra = made.personaliser(ctx).spectra
    for name, values in spectra.items():
        whole = ctx.params[f"lora_B.{name}"].detach() @ ctx.params[f"lora_A.{name}"].detach()
        torch.testing.assert_close(values, torch.linalg.svdvals(whole)[:, : values.shape[1]], rtol=1e-9, atol=1e-9)
        kept = (values > 1e-9 * values[:, :1]).sum(1).tolist()
        assert kept == ([1, 3] if method == "hetlora" else [3, 3]), "of HETLoRA's, what the client was sent"


def test_layers_of_either_adapter_are_there() -> None:
    ctx = toy_context(toy_net(), toy_lanes([9]), LoraAdapter(2, 1.0, Scope.SHARED, targets=("query",)))
    other = LoraAdapter(1, 1.0, Scope.SHARED, targets=("value",), prefix="other")
    both = toy_context(toy_net(), toy_lanes([9]), other)
    assert all(name.endswith("value") for name in singular_values([other], both.net, both.params))
    query = LoraAdapter(2, 1.0, Scope.SHARED, targets=("query",))
    found = singular_values([query, LoraAdapter(0, 1.0, Scope.PRIVATE, prefix="own")], ctx.net, ctx.params)
    assert found
    assert all(name.endswith("query") and not values.any() for name, values in found.items()), "B is 0"


def test_an_update_that_is_not_finite_has_no_rank_and_spoils_no_other_lane() -> None:
    up, down = torch.randn(2, 6, 3), torch.randn(2, 3, 5)
    up[0, 2, 1] = float("inf")
    values = of_product(up, down)
    assert values[0].isnan().all()
    torch.testing.assert_close(values[1], torch.linalg.svdvals(up[1] @ down[1])[:3], rtol=1e-4, atol=1e-4)


def test_rank90_depends_on_the_spectrum_and_counts_a_share_that_is_met_exactly() -> None:
    assert SHARE == 0.9
    spectra = torch.tensor([[9.0, 1.0, 0.0], [8.9, 1.1, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert rank90(spectra).tolist() == [1, 2, 3, 0]
    ten = torch.ones(10) * 0.1
    assert rank90(ten).item() == 9, ".1 nine times is .9 but for rounding"
    assert entropy_rank(ten).item() == pytest.approx(10)
    assert entropy_rank(spectra).tolist()[2:] == pytest.approx([3.0, 0.0])
    assert 1 < entropy_rank(spectra)[0] < entropy_rank(spectra)[1] < 2
