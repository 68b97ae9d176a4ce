"""What epsilon says nothing about. Printed with it, wherever it is printed."""

from __future__ import annotations

NOT_COVERED: tuple[str, ...] = (
    "personalised adapters, lambda strategies and PRIVATE parts, which are made from one client's data",
    "metrics of single clients (train losses, accuracies) and each round's norms, which carry no noise",
    "client features that are kept with the run, and which clients took part",
    "a tokenizer or a start model that was made from the task's own texts",
    "choices made by looking at results: search over hyper-parameters, early stopping, picking a seed",
)
COVERED = "the SHARED parameters of one seed's base and of one method's strategy on it, as released round by round"
SEEDED = (
    "The noise is seeded and drawn in floating point: this simulates the accuracy of a private run, it protects nobody."
)
