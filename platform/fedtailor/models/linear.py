"""The embedded model ``linear``: one linear layer without bias, zero at first, over numbers that it looks up by row.

A text of a regression task ("0.1 -0.2 | 0.3", inputs and wanted outputs) is one token, and the token's number a row of
two frozen tables. So whatever handles tokens, batches and lanes handles numbers, and W of a model is what it answers
to the unit vectors, which have tokens of their own. `embedded.build_linear` writes it.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel


class LinearConfig(PretrainedConfig):  # type: ignore[no-untyped-call]
    """Sizes: ``inputs`` and ``outputs`` numbers of a row, ``vocab_size`` rows."""

    model_type = "fedtailor-linear"

    def __init__(self, inputs: int = 10, outputs: int = 10, vocab_size: int = 1, **rest: Any) -> None:
        self.inputs, self.outputs, self.vocab_size = inputs, outputs, vocab_size
        super().__init__(**{"pad_token_id": 0, **rest})

    @property
    def unit_tokens(self) -> range:
        """Tokens of the unit vectors."""
        return range(1, self.inputs + 1)


class _Body(nn.Module):
    """Rows of inputs, and the layer that carries the adapters."""

    def __init__(self, config: LinearConfig) -> None:
        super().__init__()
        self.rows = nn.Embedding(config.vocab_size, config.inputs)
        self.linear = nn.Linear(config.inputs, config.outputs, bias=False)


class LinearRegressor(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Outputs (b, outputs) as ``logits``, of the row that each text's first token names.

    Attributes:
        wanted: what outputs are compared with, by row; see `lanes.loss`.
    """

    config_class = LinearConfig
    base_model_prefix = "body"

    def __init__(self, config: LinearConfig) -> None:
        super().__init__(config)
        self.body = _Body(config)
        self.wanted = nn.Embedding(config.vocab_size, config.outputs)
        self.post_init()  # type: ignore[no-untyped-call]

    def get_input_embeddings(self) -> nn.Module:
        """Rows of inputs."""
        return self.body.rows

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> SimpleNamespace:
        """Tokens (b, T)."""
        return SimpleNamespace(logits=self.body.linear(self.body.rows(input_ids[:, 0])))
