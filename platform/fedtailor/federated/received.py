"""What each client received, by name, as nobody may change it: a proximal term or a difference reads it after training.

Without a downlink of the method's own all lanes received one and the same row, which is kept once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from torch import Tensor

from fedtailor.core.errors import MethodError
from fedtailor.core.scope import ParamSpec


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
    """

    def __init__(self, specs: Sequence[ParamSpec], rows: Tensor, lanes: Sequence[int]) -> None:
        self._specs, self._rows, self._lanes = specs, rows, list(lanes)
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

    def of(self, lanes: Sequence[int]) -> Received:
        """What these of the K lanes received; one may occur more than once."""
        return Received(self._specs, self._rows, [self._lanes[lane] for lane in lanes])


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
