"""The command that has open-ended answers scored by a language model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtailor import cli_models
from fedtailor.core.errors import JudgeError


def judge(
    run_id: Annotated[str, typer.Argument(metavar="RUN_ID", help="A run with personalise.save_predictions=true.")],
    endpoint: Annotated[str, typer.Option(help="Address that speaks OpenAI's API: http://localhost:8000/v1.")],
    model: Annotated[str, typer.Option(help="Name of the judge at that address.")],
    repeats: Annotated[int, typer.Option(help="Judgements of an answer, averaged.")] = 3,
    scale: Annotated[int, typer.Option(help="Highest score; the lowest is 0.")] = 10,
    method: Annotated[list[str] | None, typer.Option(help="Whose answers; repeatable; default: all.")] = None,
    limit: Annotated[
        int | None, typer.Option("--max", help="Judge so many questions at most, the same for all methods.")
    ] = None,
    order: Annotated[int, typer.Option(help="Seed of the order of answers and of the choice of --max.")] = 0,
    tries: Annotated[int, typer.Option(help="Replies to ask for until one holds a score.")] = 3,
    at_once: Annotated[int, typer.Option(help="Requests at the same time.")] = 4,
    timeout: Annotated[float, typer.Option(help="Seconds that the endpoint may be silent.")] = 60.0,
    retries: Annotated[int, typer.Option(help="Of a request that meets 429, 5xx or no connection.")] = 5,
    key_env: Annotated[
        str, typer.Option(help="Variable that holds the key; without it no key is sent.")
    ] = "OPENAI_API_KEY",
    out: Annotated[Path | None, typer.Option(help="Folder; default: STORAGE/RUN_ID/judge/MODEL-HASH.")] = None,
    storage: cli_models.Storage = "./runs",
) -> None:
    """Have a language model score the answers of a run; repeated, it asks only for what is missing."""
    from fedtailor.runs.console import terminal
    from fedtailor.runs.job_folder import refuse_job_folder
    from fedtailor.runs.judge import Request
    from fedtailor.runs.judge import judge as have_judged
    from fedtailor.runs.judge_view import bar, show
    from fedtailor.runs.run_folder import RunFolder
    from fedtailor.runs.storage import Storage

    refuse_job_folder("--storage", storage)
    if out is not None:
        refuse_job_folder("--out", out)
    asked = Request(
        url=endpoint, model=model, repeats=repeats, scale=scale, methods=tuple(method or ()), limit=limit, order=order,
        tries=tries, at_once=at_once, timeout_s=timeout, retries=retries, key_env=key_env, out=out,
    )  # fmt: skip
    console = terminal()
    with bar(console) as tell:
        judged = have_judged(RunFolder.open(Storage(storage), run_id), asked, tell)
    show(console, judged, model, scale)
    if judged.gaps:
        error = JudgeError(f"{judged.counts['missing']} of {judged.counts['wanted']} judgements are missing")
        for gap in judged.gaps:
            error.add_note(gap)
        error.add_note("All others are kept; the same command asks for these again")
        raise error
