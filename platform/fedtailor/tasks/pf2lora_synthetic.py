r"""Task ``pf2lora_synthetic``: two clients' linear regressions, whose ranks PF2LoRA is to find (its section 5).

Y_k = X_k W_k* + noise, X_k 1000 x 10 N(0, 1), noise N(0, .1) and N(0, .2), read as variances; the first 700 rows are
for training. ``task.variant`` says what W_k* (10 x 10, ranks 3 and 4) are:
    paper     products of Gaussian factors, each client's own. A common LoRA of rank r and clients' own of rank r~
              cannot reach them: W_1* - W_2* has rank 7, and what their models differ by has rank 2 r~ at most, so
              that the sum of squared distances is at least half the sum of squared singular values of W_1* - W_2*
              from the (2 r~ + 1)-th on.
    solvable  ours: S + P_k, S of rank 2, P_1 of rank 1 and P_2 of rank 2, Gaussian; within reach of r = 4, r~ = 2.

A text is a row, the numbers of x and of y with a bar between, and one token of the model ``linear``, which looks them
up. The manifest keeps W_k*. Results are grouped by the target's rank. The loss is the squared error, summed over the 10
outputs; a mean over them would be a tenth of it, which for SGD is a tenth of all rates.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fedtailor.core.seeding import numpy_rng
from fedtailor.tasks.config import TaskConfig
from fedtailor.tasks.source import Example, NaturalClient, Source, TaskEntry

WIDTH, ROWS, TRAIN = 10, 1000, 700
VARIANCES = (0.1, 0.2)
RANKS = (3, 4)
_SHARED_RANK = 2

Matrix = npt.NDArray[np.float64]


def targets(variant: str, seed: int) -> list[Matrix]:
    """W_1* and W_2*, (10 inputs, 10 outputs) each."""
    if variant == "paper":
        return [_product(rank, seed, str(k)) for k, rank in enumerate(RANKS, start=1)]
    common = _product(_SHARED_RANK, seed, "common")
    return [common + _product(rank - _SHARED_RANK, seed, str(k)) for k, rank in enumerate(RANKS, start=1)]


def lower_bound(stars: list[Matrix], private_rank: int) -> float:
    """Least sum of squared Frobenius distances to W_1*, W_2* of models with a common part and own ones of this rank."""
    values = np.linalg.svd(stars[0] - stars[1], compute_uv=False)
    return float(np.square(values[2 * private_rank :]).sum() / 2)


def load(cfg: TaskConfig, seed: int) -> Source:
    """Both clients' rows, drawn by the seed.

    Args:
        cfg: `variant` is used.
        seed: run seed.
    """
    clients, truth = [], {}
    for k, target in enumerate(targets(cfg.variant or "paper", seed), start=1):
        rng = numpy_rng(seed, "pf2lora_synthetic", "rows", k)
        x = rng.standard_normal((ROWS, WIDTH))
        y = x @ target + np.sqrt(VARIANCES[k - 1]) * rng.standard_normal((ROWS, WIDTH))
        rows = [Example(f"{_written(a)} | {_written(b)}", 0) for a, b in zip(x, y, strict=True)]
        clients.append(NaturalClient(str(k), "seen", f"rank{RANKS[k - 1]}", rows[:TRAIN], rows[TRAIN:]))
        truth[clients[-1].id] = target.tolist()
    return Source(("number",), disjoint=True, kind="regression", natural_clients=tuple(clients), truth=truth)


def _product(rank: int, seed: int, name: str) -> Matrix:
    rng = numpy_rng(seed, "pf2lora_synthetic", "target", name)
    product: Matrix = rng.standard_normal((WIDTH, rank)) @ rng.standard_normal((rank, WIDTH))
    return product


def _written(numbers: Matrix) -> str:
    return " ".join(f"{number:.9g}" for number in numbers.tolist())  # float32 takes them up as they are


ENTRY = TaskEntry(
    load,
    "regression",
    clients="natural",
    label_skew=False,
    embedded=True,
    defaults={"languages": tuple(f"rank{rank}" for rank in RANKS), "variant": "paper", "max_length": 4},
    published_clients=2,
)
