"""The three regimes: the same federated job with a small, a middling and a large step."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

RANK, SCALE, VOCAB, CLASSES = 8, 2.0, 200, 4
LEARNING_RATE = 2e-3


@dataclass(frozen=True)
class Regime:
    """A job: FedAvg of LoRA on a BERT classifier, one epoch of Adam per client and round.

    Args:
        name: as in the table.
        hidden: width of the model; its feed-forward layers are four times as wide.
        layers: transformer layers.
        tokens: tokens of every text.
        batch: texts of a step.
        sizes: fewest and most steps of a client.
        cohort: clients of a round.
        population: clients in all.
        rounds: the first of them is shown apart.
        min_segment: ``engine.min_segment`` of ours: fewest clients of a piece of the cohort.
    """

    name: str
    hidden: int
    layers: int
    tokens: int
    batch: int
    sizes: tuple[int, int]
    cohort: int
    population: int
    rounds: int
    min_segment: int

    @property
    def step_tokens(self) -> int:
        """Tokens of one client's step."""
        return self.tokens * self.batch

    def with_cohort(self, cohort: int, rounds: int) -> Regime:
        """The same clients in smaller rounds."""
        return replace(self, cohort=cohort, rounds=rounds, min_segment=1)

    def quick(self) -> Regime:
        """Two rounds of a few clients, to see that everything runs."""
        return replace(self, cohort=8, population=16, sizes=(1, 1), rounds=3, min_segment=min(4, self.min_segment))

    def as_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)


REGIMES = (
    Regime("overhead-bound", 64, 2, 8, 8, (2, 6), 32, 64, 17, 16),
    Regime("mixed", 128, 2, 32, 8, (2, 6), 32, 64, 9, 8),
    Regime("compute-bound", 512, 2, 128, 16, (1, 2), 8, 16, 6, 1),
)


def flops_per_text(regime: Regime) -> float:
    """Floating-point operations of the matrix products for one text, forward and backward, counted from the shapes.

    A frozen weight costs a product forward and one backward for its input; the first layer's query, key and value
    need none backward, since the embeddings below them are frozen. A LoRA pair costs its forward product and twice
    that backward (input and weight), attention's two products likewise. Pooler and classifier see one token.
    """
    h, t = regime.hidden, regime.tokens

    def low_rank(d_in: int, d_out: int) -> float:
        return 3 * 2 * RANK * (d_in + d_out)

    def linear(d_in: int, d_out: int, passes: int = 2) -> float:
        return passes * 2 * d_in * d_out + low_rank(d_in, d_out)

    total = 0.0
    for layer in range(regime.layers):
        projections = 3 * linear(h, h, 1 if layer == 0 else 2)
        total += t * (projections + linear(h, h) + linear(h, 4 * h) + linear(4 * h, h))
        total += 3 * 2 * (2 * t * t * h)
    return total + linear(h, h) + linear(h, CLASSES)
