"""A few test inputs of every client with their references and what each method's model answered: ``samples.md``.

As PF2LoRA's Tables 18 to 21, of runs with ``personalise.save_predictions=true``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pandas as pd

from fedtailor.report.names import budget_title, in_method_order, method_name
from fedtailor.storage.round_store import PREDICTIONS
from fedtailor.storage.run_folder import RunFolder

FILE = "samples.md"
INPUTS = 3
"""Of each client, its first test examples, of the run's first seed."""


def committed_answers(run: RunFolder, methods: Sequence[str] = ()) -> pd.DataFrame:
    """Rows of `PREDICTION_SCHEMA` and ``seed``, of all stages that kept answers; empty where none did.

    Args:
        run: its personalising stages may be under way.
        methods: whose; empty: of all.
    """
    frames = [
        commit.table(PREDICTIONS).to_pandas().assign(seed=int(stage["seed"]))
        for stage in run.stages("personalise")
        if not methods or stage["method"] in methods
        for commit in run.log(stage).all(objects=False)
        if PREDICTIONS in commit.objects
    ]
    return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()


def samples(answers: pd.DataFrame, inputs: int = INPUTS) -> str:
    """The page as Markdown.

    Args:
        answers: of `committed_answers`, at least one.
        inputs: of each client.
    """
    first = answers[(answers["seed"] == answers["seed"].min()) & (answers["row"] < inputs)]
    lines = ["# Samples", "", f"The first {inputs} test inputs of every client, seed {first['seed'].iloc[0]}.", ""]
    for client, own in first.groupby("client"):
        lines += [f"## {client}", ""]
        for row, here in own.groupby("row"):
            lines += [*_input(int(str(row)) + 1, here), ""]
    return "\n".join(lines)


def _input(number: int, here: pd.DataFrame) -> Iterator[str]:
    one = here.iloc[0]
    others = one.get("others")
    references = [one["reference"], *(others if others is not None and not isinstance(others, float) else ())]
    yield f"**{number}.** {_plain(one['prompt'])}"
    yield ""
    yield from (f"- Reference: {_plain(reference)}" for reference in references)
    for method in in_method_order(here["method"]):
        own = here[here["method"] == method].sort_values("budget")
        for budget, answer in zip(own["budget"], own["prediction"], strict=True):
            at = "" if budget == -1 else f", {budget_title(int(budget))}"
            yield f"- **{method_name(method)}{at}**: {_plain(answer) or '(nothing)'}"


def _plain(text: str) -> str:
    """One line, in which Markdown sees no marks of its own."""
    return "".join(f"\\{letter}" if letter in "\\`*_[]<>#|" else letter for letter in " ".join(text.split()))
