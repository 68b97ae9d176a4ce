"""What a client received: per lane, by name, through the method's own downlink, and not to be written to."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from toy import toy_context, toy_lanes, toy_net

from fedtailor.adapters.lora import LoraAdapter
from fedtailor.core.errors import MethodError
from fedtailor.core.scope import ParamSpec, Scope
from fedtailor.federated.context import Received

SPECS = (ParamSpec("w", (2, 3), Scope.SHARED), ParamSpec("slope", (), Scope.SHARED))
ROW = torch.arange(7.0)


def received(lanes: int = 3) -> Received:
    return Received(SPECS, ROW.unsqueeze(0), [0] * lanes)


def test_one_row_for_all_is_kept_once_and_seen_by_every_lane() -> None:
    found = received()
    assert list(found) == ["w", "slope"]
    assert found["w"].shape == (3, 2, 3)
    assert found["slope"].clone().tolist() == [6.0] * 3
    assert (found["w"] == ROW[:6].view(2, 3)).all()


def test_rows_of_their_own_follow_their_lane() -> None:
    own = Received(SPECS, torch.stack([ROW, ROW + 10]), [0, 1])
    assert own["slope"].clone().tolist() == [6.0, 16.0]
    assert own.of([1, 1, 0])["slope"].clone().tolist() == [16.0, 16.0, 6.0]


WRITES: dict[str, Callable[[Tensor], object]] = {
    "in place": lambda t: t.add_(1),
    "into a view": lambda t: t[1].zero_(),
    "through data": lambda t: t.data.zero_(),
    "through detach": lambda t: t.detach().zero_(),
    "an element": lambda t: t.__setitem__((0, 0), 1.0),
    "as a result": lambda t: torch.add(torch.ones_like(t), 1, out=t),
    "a part of a list": lambda t: torch._foreach_add_([t], 1),
    "a piece": lambda t: t.unbind(0)[0].copy_(torch.zeros(2, 3)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_raises_and_changes_nothing(write: Callable[[Tensor], object]) -> None:
    row = ROW.clone()
    with pytest.raises(MethodError, match=r"'ctx\.received' is what the server sent and read-only"):
        write(Received(SPECS, row.unsqueeze(0), [0, 0])["w"])
    assert torch.equal(row, ROW)


def test_it_can_be_computed_with_and_copied() -> None:
    weight = torch.ones(3, 2, 3, requires_grad=True)
    sent = received()["w"]
    ((weight - sent).square() + weight * sent).sum().backward()
    assert torch.equal(weight.grad, 2 * (1 - sent) + sent)
    copy = sent.clone()
    assert type(copy) is Tensor
    assert (copy.zero_() == 0).all()


def test_a_fork_sees_what_its_clients_received_and_whether_they_are_new() -> None:
    lanes = toy_lanes([9, 8, 3])
    ctx = toy_context(toy_net(), lanes, LoraAdapter(2, 2.0, Scope.SHARED))
    fresh = torch.tensor([True, False, True])
    rows = torch.stack([torch.full_like(ctx.params.flat(Scope.SHARED)[0], k) for k in range(3)]).detach()
    own = replace(ctx, fresh=fresh, received=Received(ctx.params.of_scope(Scope.SHARED), rows, [0, 1, 2]))
    one = own.fork([lanes[2], lanes[1], lanes[1]], None)
    assert one.fresh.tolist() == [True, False, False]
    assert [float(v.flatten()[0]) for v in one.received["lora_A.classifier"]] == [2.0, 1.0, 1.0]
