"""AdaLoRA's budget of one lane, moved by peft's own RankAllocator (Zhang et al., ICLR 2023, section 3.2)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import LaneParams

if TYPE_CHECKING:
    from peft import AdaLoraConfig as PeftConfig


NAME = "default"
Pattern = dict[str, list[bool]]


@dataclass(frozen=True)
class Schedule:
    """When the budget falls from ``init`` to ``target`` ranks per layer, in steps counted from 0.

    Args:
        init: ranks per layer at first.
        target: ranks per layer on average in the end, below ``init``.
        steps: optimizer steps that the client really makes.
        t_init: share of the steps before the budget falls, rounded down.
        t_final: share of the steps after it has fallen, rounded down.
        delta_t: steps between two masks.
        betas: decay of the importance and of its uncertainty.
    """

    init: int
    target: int
    steps: int
    t_init: float
    t_final: float
    delta_t: int
    betas: tuple[float, float]

    @property
    def last(self) -> int:
        """The step of the final mask; ``steps``, one too late, where t_final is less than one step."""
        return self.steps - int(self.t_final * self.steps + 1e-9)

    def as_peft(self) -> PeftConfig:
        """The same as peft is told."""
        from peft import AdaLoraConfig as PeftConfig

        return PeftConfig(
            init_r=self.init, target_r=self.target, total_step=self.steps, deltaT=self.delta_t,
            tinit=int(self.t_init * self.steps + 1e-9), tfinal=self.steps - self.last,
            beta1=self.betas[0], beta2=self.betas[1],
        )  # fmt: skip


class _PeftNames:
    """The parameters of one lane as the allocator looks for them: in place, under peft's names."""

    def __init__(self, net: LaneNet, params: LaneParams) -> None:
        self._named: list[tuple[str, Tensor]] = []
        self.values: dict[str, Tensor] = {}
        for number, adapted in enumerate(net.adapted):
            for matrix in "AEB":
                leaf = params[f"lora_{matrix}.{adapted.name}"]
                own, grad = leaf.detach()[0], leaf.grad
                assert grad is not None
                column = matrix == "E"  # peft keeps E as (r, 1)
                view = own.unsqueeze(1) if column else own
                view.grad = grad[0].unsqueeze(1) if column else grad[0]
                self._named.append((f"{number}.lora_{matrix}.{NAME}", view))
                if column:
                    self.values[self._named[-1][0]] = view

    def named_parameters(self) -> Sequence[tuple[str, Tensor]]:
        """As `torch.nn.Module.named_parameters`."""
        return self._named


class RankBudget:
    """Masks E of the only lane of ``params`` after every optimizer step.

    The steps are those of peft's ``AdaLoraModel.update_and_allocate``. Two things are added: the final mask comes
    at the latest after the last step (`close`), and it keeps exactly ``target`` ranks per layer on average where
    peft, dropping all ranks that tie with the threshold, would keep fewer.
    """

    def __init__(self, net: LaneNet, params: LaneParams, schedule: Schedule) -> None:
        from peft.tuners.adalora.layer import RankAllocator

        self._model, self._schedule = _PeftNames(net, params), schedule
        self._allocator: Any = RankAllocator(self._model, schedule.as_peft(), NAME)  # type: ignore[no-untyped-call]
        self._pattern: Pattern = {}

    def after_step(self, step: int) -> None:
        """Call after the optimizer moved and before gradients are zeroed."""
        if step < self._schedule.last:
            self._allocator.update_and_allocate(self._model, step)
        elif step == self._schedule.last:
            self._pattern = self._final(step)
            self._allocator.reset_ipt()
        else:
            self._allocator.mask_using_rank_pattern(self._model, self._pattern)

    def close(self) -> None:
        """Call after the last step: applies the final mask where the schedule did not get to it."""
        if not self._pattern:
            self.after_step(self._schedule.last)

    @property
    def kept(self) -> Tensor:
        """Which ranks remain, (L, init) bool: the final mask or, without one, wherever E is not zero."""
        if self._pattern:
            return torch.tensor([self._pattern[name] for name in self._model.values])
        return torch.stack([value.squeeze(1) != 0 for value in self._model.values.values()]).cpu()

    def _final(self, step: int) -> Pattern:
        before = {name: value.clone() for name, value in self._model.values.items()}
        pattern: Pattern = self._allocator.update_and_allocate(self._model, step, force_mask=True)[1]
        wanted = self._schedule.target * len(before)
        if _count(pattern) > wanted:
            raise FloatingPointError(f"AdaLoRA's importance scores are not finite at step {step}")
        if _count(pattern) < wanted:
            pattern = self._with_ties(before, pattern, wanted)
        return pattern

    def _with_ties(self, before: dict[str, Tensor], pattern: Pattern, wanted: int) -> Pattern:
        """Adds ranks that tie with the threshold, by (rank, layer): all equal is rank r in every layer."""

        def mask(budget: int) -> Pattern:
            for name, value in self._model.values.items():
                value.copy_(before[name])
            found: Pattern = self._allocator.mask_to_budget(self._model, budget)
            return found

        every = self._schedule.init * len(before)
        budget = bisect_left(range(every), True, lo=wanted, key=lambda b: _count(mask(b)) > wanted)
        wider = mask(budget) if budget < every else {name: [True] * self._schedule.init for name in pattern}
        tied = [
            (rank, name) for rank in range(self._schedule.init) for name in pattern
            if wider[name][rank] and not pattern[name][rank]
        ]  # fmt: skip
        for rank, name in tied[: wanted - _count(pattern)]:
            pattern[name][rank] = True
        for name, value in self._model.values.items():
            value.copy_(before[name])
        self._allocator.mask_using_rank_pattern(self._model, pattern)
        return pattern


def _count(pattern: Pattern) -> int:
    return sum(sum(kept) for kept in pattern.values())
