"""pFedGPT: what its mixes are at their ends, what its search may not do worse than, who mixes, what is reported."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from toy import as_talk, toy_context, toy_examples, toy_lanes, toy_llama, with_prompts

from fedtailor.core.scope import Scope
from fedtailor.federated.context import ClientContext, Received
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams
from fedtailor.methods import METHODS, build_method

SIZES = [13, 9, 3]
POOL = as_talk(toy_examples("pool", 12), "pool")
TINY = dict(METHODS["pfedgpt"].tiny or {}) | {"validation": "global_pool", "targets": ("q_proj", "v_proj")}


def rows(params: LaneParams, prefix: str) -> torch.Tensor:
    """Parameters of this prefix, (K, P)."""
    named = [s.name for s in params.specs if s.name.startswith(prefix)]
    return torch.cat([params[name].detach().flatten(1) for name in named], 1)


def returning(name: str, section: dict[str, Any], lanes: Sequence[Any], net: LaneNet | None = None) -> ClientContext:
    """Clients that come back: everything that they kept, and what they receive, is drawn."""
    method = build_method(name, section, 3)
    ctx = toy_context(net or toy_llama(), lanes, method.adapter, method.modules, validation=POOL)
    rng = torch.Generator().manual_seed(11)
    each = {lane.client.id: torch.Generator().manual_seed(int(lane.client.id[-2:])) for lane in lanes}
    sent = ctx.params.flat(Scope.SHARED)[:1]
    common = 0.3 * torch.randn(sent.shape, generator=rng, dtype=sent.dtype)
    with torch.no_grad():
        ctx.params.flat(Scope.SHARED).copy_(common)
        own = ctx.params.flat(Scope.PRIVATE)
        for k, lane in enumerate(lanes):
            own[k] = common.new_tensor(0.3) * torch.randn(own.shape[1], generator=each[lane.client.id], dtype=own.dtype)
    received = Received(ctx.params.of_scope(Scope.SHARED), common, [0] * len(lanes))
    return replace(ctx, round=1, received=received, fresh=torch.zeros(len(lanes), dtype=torch.bool))


def played(ctx: ClientContext, name: str, section: dict[str, Any]) -> dict[str, torch.Tensor]:
    update = build_method(name, section, 3).local_update
    assert update is not None
    return dict(update(ctx).metrics)


def test_candidates_and_clients_side_by_side_are_one_after_another() -> None:
    lanes = with_prompts(toy_lanes(SIZES))
    together = returning("pfedgpt", TINY, lanes)
    metrics = played(together, "pfedgpt", TINY)
    assert metrics["mix_evaluations"].tolist() == [
        11.0,
        10.0,
        11.0,
    ]  # of these, w = 0 or w = 1 was among the three best
    for k, lane in enumerate(lanes):
        # A token budget of 1: a lane a forward pass, a row a lane.
        alone = replace(returning("pfedgpt", TINY, [lane]), token_budget=1)
        own = played(alone, "pfedgpt", TINY)
        for scope in (Scope.SHARED, Scope.PRIVATE):
            torch.testing.assert_close(
                together.params.flat(scope)[k], alone.params.flat(scope)[0], rtol=1e-9, atol=1e-12
            )
        for name, values in metrics.items():
            torch.testing.assert_close(values[k], own[name][0], rtol=1e-7, atol=1e-10)
