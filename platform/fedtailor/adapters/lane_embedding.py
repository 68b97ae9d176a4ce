"""An embedding table per client of a group, frozen: what DEPT's clients keep."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedtailor.adapters.lane_linear import LaneState


class LaneEmbedding(nn.Module):
    """Looks ids up in the table of each lane's client; without bound tables it is the frozen table itself.

    Args:
        base: frozen table (V, d).
        state: shared by all lane-wise layers of the model.
    """

    def __init__(self, base: nn.Embedding, state: LaneState) -> None:
        super().__init__()
        self.base, self.state = base, state
        self.tables: Tensor | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen table, for code that asks an embedding for its type."""
        return self.base.weight

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (k*b, T), or (1, T) that stand for all rows (positions), to (k*b, T, d)."""
        rows = self.state.overlay_rows
        if self.tables is None or rows is None:
            out: Tensor = self.base(ids)
            return out
        lanes = len(self.state.shapes)
        table = torch.repeat_interleave(rows[:lanes], self.state.rows)
        return self.tables[table.unsqueeze(1), ids.expand(len(table), -1)]
