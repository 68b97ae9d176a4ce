"""What a client function gets: its clients as lanes, the model, their parameters and named random streams.

What each client received is there by name, as nobody may change it: a proximal term or a difference reads it after
training. Without a downlink of the method's own all lanes received one and the same row, which is kept once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from fedtailor.core.errors import MethodError
from fedtailor.core.messages import Client
from fedtailor.core.scope import ParamSpec
from fedtailor.core.seeding import numpy_rng, torch_rng
from fedtailor.lanes.batches import Examples, IntArray, LaneBatch, lane_batches, training_indices
from fedtailor.lanes.net import LaneNet
from fedtailor.lanes.params import Adapter, LaneParams, Parameters


class ReadOnly(Tensor):
    """A tensor that may be computed with and not written to, and neither may its views; `clone` is an ordinary one."""

    _plain: Tensor

    @staticmethod
    def __new__(cls, plain: Tensor) -> ReadOnly:
        """A view of ``plain``, which itself stays as it is."""
        made: ReadOnly = Tensor._make_subclass(cls, plain)
        made._plain = plain
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch types it as the function that is there by default
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        written, aliases = _effects(func)
        kwargs = kwargs or {}
        for index, name in written:
            target = args[index] if index < len(args) else kwargs.get(name)
            if any(isinstance(part, cls) for part in (target if isinstance(target, (list, tuple)) else (target,))):
                raise MethodError("'ctx.received' is what the server sent and read-only: clone() it to change a copy")
        found = func(*map(_plain, args), **{name: _plain(value) for name, value in kwargs.items()})
        if not aliases:
            return found
        return [cls(part) for part in found] if isinstance(found, (list, tuple)) else cls(found)


class Received(Mapping[str, Tensor]):
    """SHARED parameters as they came, (K, *shape) each, `ReadOnly`.

    Args:
        specs: SHARED parameters in flat order.
        rows: what was sent, (n, P).
        lanes: the row that each of the K lanes received.
        numbers: how many of its numbers each row's client was sent; None: all.
    """

    def __init__(
        self, specs: Sequence[ParamSpec], rows: Tensor, lanes: Sequence[int], numbers: Sequence[int] | None = None
    ) -> None:
        self._specs, self._rows, self._lanes, self._numbers = specs, rows, list(lanes), numbers
        self._where, start = {}, 0
        for spec in specs:
            self._where[spec.name] = (start, start + spec.size, spec.shape)
            start += spec.size

    def __getitem__(self, name: str) -> Tensor:
        start, stop, shape = self._where[name]
        sent = self._rows[:, start:stop].view(-1, *shape)
        return ReadOnly(sent.expand(len(self._lanes), *shape) if len(sent) == 1 else sent[self._lanes])

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def row(self, lane: int) -> Tensor:
        """All that a lane received, (P,), in flat order."""
        return self._rows[self._lanes[lane]]

    def numbers(self, lane: int) -> int:
        """How many numbers a lane was sent."""
        return self._rows.shape[1] if self._numbers is None else self._numbers[self._lanes[lane]]

    def of(self, lanes: Sequence[int]) -> Received:
        """What these of the K lanes received; one may occur more than once."""
        return Received(self._specs, self._rows, [self._lanes[lane] for lane in lanes], self._numbers)


def _plain(value: Any) -> Any:
    if isinstance(value, ReadOnly):
        return value._plain
    return [_plain(part) for part in value] if isinstance(value, (list, tuple)) else value


@cache
def _effects(func: Any) -> tuple[tuple[tuple[int, str], ...], bool]:
    """Arguments that an operator writes to, by position and name; and whether it returns a view of another."""
    schema = func._schema
    written = tuple((k, argument.name) for k, argument in enumerate(schema.arguments) if argument.is_write)
    return written, not written and any(value.alias_info for value in schema.returns)


@dataclass(frozen=True)
class Lane:
    """One client (at one budget, in a personaliser) inside a fused call."""

    client: Client
    train: Examples
    budget: int | None = None

    @property
    def size(self) -> int:
        """Number of training examples, N in the papers."""
        return len(self.train.labels)


@dataclass(frozen=True)
class Federation:
    """What a server knows of the clients that take part.

    Args:
        seen: ids of the seen clients, in their order.
        class_counts: their training texts of each class, added up, (C,).
        cohort: clients of a round.
    """

    seen: tuple[str, ...]
    class_counts: tuple[int, ...]
    cohort: int


@dataclass(frozen=True)
class ClientContext:
    """K clients of one group.

    Args:
        net: resident base model.
        lanes: clients, ordered by falling training size.
        params: their parameters, K lanes.
        seed: run seed.
        stage: ``base``, ``strategy`` or ``personalise``; a coordinate of every random stream.
        round: round index; 0 when personalising, so that chunks do not change a draw.
        num_labels: C.
        pad_id: padding token.
        feature_source: (lanes, pad_to) to base-model features of their training texts, (`feature_size`,) float32 each.
        federation: what the server knows of all clients.
        budgets: of a personaliser.
        r_max: largest budget of the run.
        rounds: of the stage, for schedules over rounds.
        received: SHARED parameters as each client got them, by name, (K, *shape); read-only, empty without any.
        fresh: which clients have no committed PRIVATE state yet, (K,) bool: their PRIVATE parameters are initial.
        warn: records a warning about a lane.
        micro_batch: most rows per lane of one forward pass; a larger step is cut and its gradients are added up.
        validation: the validation pool, by class and then by row, of methods that ask for it: the same for all clients,
            and none of it is in their ``train``. Else None.
        token_budget: tokens of one forward pass over all lanes, where lanes are made that the group does not count.
        trained: client to the real tokens that its training steps have read, over all its lanes; see `batches`.
        searched: client to the seconds that it searched, before it trained; clients side by side share them equally.
    """

    net: LaneNet
    lanes: tuple[Lane, ...]
    params: LaneParams
    seed: int
    stage: str
    round: int
    num_labels: int
    pad_id: int
    feature_source: Callable[[Sequence[Lane], int | None], Sequence[Tensor]]
    warn: Callable[[Lane, str], None]
    received: Received
    fresh: Tensor
    federation: Federation
    budgets: tuple[int, ...] = ()
    r_max: int = 0
    rounds: int = 0
    micro_batch: int | None = None
    validation: Examples | None = None
    token_budget: int = 4096
    trained: Counter[str] = field(default_factory=Counter)
    searched: dict[str, float] = field(default_factory=dict)

    @property
    def sizes(self) -> Tensor:
        """N of each lane, (K,), in the base's type."""
        return torch.tensor([lane.size for lane in self.lanes], device=self.net.device, dtype=self.net.param_dtype)

    def client_features(self, pad_to: int | None, count_output: bool = False, eps: float = 0.0) -> Tensor:
        """The clients' features, (K, 2L) in the base's type: E(h), SD(h) of FedP2EFT Eq. 6.

        Args:
            pad_to: see `lanes.features.client_features`.
            count_output: the input of a language model's output embedding is a feature pair too, (K, 2(L + 1)); a
                classifier has no linear layer beside the L.
            eps: SD(h) is sqrt(variance + eps). Added here, in float64, so that what is cached serves every eps.
        """
        found = torch.stack(list(self.feature_source(self.lanes, pad_to))).double()
        found[:, 1::2] = (found[:, 1::2].square() + eps).sqrt()
        found = found.to(self.sizes)
        return found if count_output else found[:, : 2 * len(self.net.adapted)]

    def training_order(self, epochs: int, batch_size: int, purpose: str) -> list[list[IntArray]]:
        """Rows of every step of every lane.

        The streams are named (seed, stage, round, client, purpose, epoch): two budgets of a client, and two
        methods, see the same order.
        """
        indices = []
        for lane in self.lanes:
            coordinates = (self.seed, self.stage, self.round, lane.client.id, f"order/{purpose}")
            rngs = [numpy_rng(*coordinates, epoch) for epoch in range(epochs)]
            indices.append(training_indices(lane.size, epochs, batch_size, rngs))
        return indices

    def batches(self, indices: Sequence[Sequence[IntArray]]) -> Iterator[LaneBatch]:
        """Iterates over the batches of ``indices``, the rows of every step of every lane; adds them to ``trained``."""
        made = lane_batches([lane.train for lane in self.lanes], indices, self.pad_id, self.net.device)
        for step, batch in enumerate(made):
            for lane, rows in zip(self.lanes[: batch.lanes], indices, strict=False):
                self.trained[lane.client.id] += int(lane.train.lengths[rows[step]].sum())
            yield batch

    def use_dropout(self, probability: float, purpose: str) -> None:
        """Gives every lane its own generator for adapter dropout."""
        self.net.state.dropout = probability
        # Ranks have other rows of a step: they must not drop the same of them.
        rank = f"/{self.net.ranks.index}" if self.net.ranks and self.net.ranks.index else ""
        self.net.state.generators = [
            torch_rng(self.seed, self.stage, self.round, lane.client.id, f"dropout/{purpose}{rank}")
            for lane in self.lanes
        ]

    def with_lanes(self, lanes: Sequence[Lane]) -> ClientContext:
        """The same parameters, seen by other lanes of the same clients: ``received`` and ``fresh`` are those of each
        lane's client."""
        row = {lane.client.id: k for k, lane in reversed(list(enumerate(self.lanes)))}
        rows = [row[lane.client.id] for lane in lanes]
        return replace(self, lanes=tuple(lanes), received=self.received.of(rows), fresh=self.fresh[rows])

    def fork(self, lanes: Sequence[Lane], adapter: Adapter | None, modules: Sequence[Parameters] = ()) -> ClientContext:
        """The same surroundings with other lanes and fresh parameters, bound to the model."""
        params = open_params(self.net, len(lanes), adapter, modules, self.seed)
        self.net.place([lane.client.id for lane in lanes])
        return replace(self.with_lanes(lanes), params=params)


def open_params(
    net: LaneNet, lanes: int, adapter: Adapter | None, modules: Sequence[Parameters], seed: int
) -> LaneParams:
    """Parameters of an adapter and its auxiliary modules at their initial values, bound to the model."""
    parts: list[Parameters] = [*([adapter] if adapter else []), *modules]
    specs = [spec for part in parts for spec in part.specs(net)]
    params = LaneParams(specs, lanes, net.device, net.param_dtype)
    params.optimizer_ranks = net.ranks if net.shares_optimizer else None
    for part in parts:
        for name, value in part.initial(net, seed).items():
            params.set(name, value.to(net.device, net.param_dtype))
    net.unbind()
    if adapter:
        adapter.bind(net, params)
    return params
