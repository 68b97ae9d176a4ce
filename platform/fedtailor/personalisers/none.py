"""No personalisation: the client uses the model as it is."""

from __future__ import annotations

from dataclasses import dataclass

from fedtailor.core.context import ClientContext
from fedtailor.core.method import Personalised


@dataclass(frozen=True)
class NoPersonalisation:
    """Whatever is bound to the model answers."""

    budgeted: bool = False

    def __call__(self, ctx: ClientContext) -> Personalised:
        """Changes nothing."""
        return Personalised(ctx.lanes, ctx.net.logits)
