"""Pruning keeps exactly r L entries, and says nothing where lambda says nothing."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedtailor.training.pruning import prune, resolved, tied_share

BUDGETS = [1, 2, 4, 8]


@given(seed=st.integers(0, 10_000), layers=st.integers(1, 9), budget=st.sampled_from(BUDGETS))
@settings(max_examples=60, deadline=None)
def test_kept_ranks_are_exactly_the_budget_times_the_layers(seed: int, layers: int, budget: int) -> None:
    lam = torch.rand(3, layers, 8, generator=torch.Generator().manual_seed(seed)).round(decimals=1)
    selection = prune(lam, [budget] * 3)
    assert selection.ranks.sum(1).tolist() == [budget * layers] * 3
    dropped = lam.masked_fill(selection.keep, -torch.inf).flatten(1).amax(1)
    kept = lam.masked_fill(~selection.keep, torch.inf).flatten(1).amin(1)
    assert bool((kept >= dropped - 2e-3).all())
    assert bool((selection.lam == lam * selection.keep).all())


@pytest.mark.parametrize("budget", BUDGETS)
def test_an_all_equal_lambda_gives_rank_r_everywhere(budget: int) -> None:
    selection = prune(torch.full((1, 5, 8), 1e-4), [budget])
    assert selection.ranks.tolist() == [[budget] * 5]
    assert selection.keep[0, :, :budget].all()


def test_the_other_tie_rule_fills_the_first_layers() -> None:
    assert prune(torch.ones(1, 4, 8), [2], ties="layer_then_rank").ranks.tolist() == [[8, 0, 0, 0]]


def test_the_largest_win_across_all_layers_at_once() -> None:
    lam = torch.zeros(1, 2, 4)
    lam[0, 1] = torch.tensor([4.0, 3.0, 2.0, 1.0])
    assert prune(lam, [2]).ranks.tolist() == [[0, 4]]


def test_budgets_differ_by_lane() -> None:
    lam = torch.rand(2, 3, 8, generator=torch.Generator().manual_seed(0))
    assert prune(lam, [1, 8]).ranks.sum(1).tolist() == [3, 24]


def test_differences_below_the_resolution_are_ties() -> None:
    lam = torch.full((1, 3, 4), 0.07)
    lam[0, 2] *= 1.00001
    assert prune(lam, [2]).ranks.tolist() == [[2, 2, 2]]
    assert prune(lam, [2], bits=24).ranks.tolist() == [[1, 1, 4]]
    assert float(tied_share(lam, prune(lam, [2]))) == 1.0


@pytest.mark.parametrize(("dtype", "bits"), [(torch.float32, 24), (torch.float64, 53)])
def test_all_bits_of_a_type_compare_exactly_and_one_less_does_not(dtype: torch.dtype, bits: int) -> None:
    lam = torch.ones(1, 3, 4, dtype=dtype)
    lam[0, 2] += torch.finfo(dtype).eps
    assert torch.equal(resolved(lam, bits), lam)
    assert prune(lam, [2], bits=bits).ranks.tolist() == [[1, 1, 4]]
    assert prune(lam, [2], bits=bits - 1).ranks.tolist() == [[2, 2, 2]]


def test_rounding_keeps_order_and_sign() -> None:
    values = torch.linspace(-2, 2, 4001)
    assert bool((resolved(values, 10).diff() >= 0).all())
    torch.testing.assert_close(resolved(values, 10), values, rtol=2**-10, atol=0)


def test_a_budget_above_r_init_is_refused() -> None:
    with pytest.raises(ValueError, match="above r_init = 4"):
        prune(torch.ones(1, 2, 4), [5])
