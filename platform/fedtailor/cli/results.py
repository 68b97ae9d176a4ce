"""The commands that read the folder of a run: what is in it, what is made of it, what is taken out of it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fedtailor.cli.options import AllowCode, RunId, StorageUrl, console, open_run
from fedtailor.core.errors import ConfigError, JudgeError


def status(
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN_ID]", help="Default: the states of all runs.")] = None,
    storage: StorageUrl = "./runs",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Until the run ends; exit code 0 if it is complete.")] = False,
) -> None:
    """Show how a run stands: stages, speed, losses, who drives it; without RUN_ID all runs."""
    from fedtailor.cli.views import show_run, show_runs, watch_run
    from fedtailor.storage.files import Storage

    if run_id is None:
        if watch:
            raise ConfigError("status --watch needs a RUN_ID")
        show_runs(console(), Storage(storage), as_json)
        return
    folder = open_run(run_id, storage)
    if watch:
        raise typer.Exit(watch_run(console(), folder, as_json))
    show_run(console(), folder, as_json)


def digest(run_id: RunId, storage: StorageUrl = "./runs") -> None:
    """Print the sha256 over everything deterministic that a run committed."""
    from fedtailor.storage.digest import digest
    from fedtailor.storage.files import Storage

    typer.echo(digest(Storage(storage), open_run(run_id, storage).run_id))


def report(
    run_id: RunId,
    storage: StorageUrl = "./runs",
    out: Annotated[Path | None, typer.Option(help="New folder; default: STORAGE/RUN_ID/report, made anew.")] = None,
    allow_code: AllowCode = None,
) -> None:
    """Write the tables and figures of a run again."""
    from fedtailor.report import report_of

    typer.echo(f"report: {report_of(open_run(run_id, storage), out)}")


def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN_ID", help="Two or more, the reference first.")],
    storage: StorageUrl = "./runs",
    out: Annotated[Path | None, typer.Option(help="New folder; default: STORAGE/compare-HASH.")] = None,
) -> None:
    """Put runs side by side: what differs, one table, one figure, paired tests where they share their clients."""
    from fedtailor.cli.views import show_comparison
    from fedtailor.report.compare_files import compare_runs
    from fedtailor.storage.files import Storage

    content, folder = compare_runs(Storage(storage), runs, out)
    show_comparison(console(), content, folder)


def sync(
    run_id: RunId,
    storage: StorageUrl = "./runs",
    mode: Annotated[
        str | None,
        typer.Option(help="online, offline, or auto: online if there is a key; default: wandb.mode, else auto."),
    ] = None,
    allow_code: AllowCode = None,
) -> None:
    """Feed W&B from a run's committed metrics: one W&B run per experiment; repeated, it adds what is missing."""
    from fedtailor.experiment.launch import load_experiment
    from fedtailor.report.wandb import sync_run

    folder = open_run(run_id, storage)
    exp = load_experiment(folder)
    typer.echo(f"W&B: {sync_run(folder, exp.wandb, mode)}")


def export(
    run_id: RunId,
    out: Annotated[Path, typer.Option(help="New folder.")],
    client: Annotated[str | None, typer.Option(help="Client id, e.g. seen/amh/00.")] = None,
    method: Annotated[str, typer.Option(help="Whose adapter.")] = "fedp2eft",
    budget: Annotated[int | None, typer.Option(help="r; default: the largest.")] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model instead of an adapter.")] = False,
    seed: Annotated[int | None, typer.Option(help="Default: the run's first.")] = None,
    storage: StorageUrl = "./runs",
    allow_code: AllowCode = None,
) -> None:
    """Copy a client's peft adapter, or the base model, out of a run."""
    from fedtailor.personalise.export import export_base, export_client

    if base == (client is not None):
        raise ConfigError("export needs exactly one of --client ID and --base")
    folder = open_run(run_id, storage)
    chosen = folder.info()["config"]["seeds"][0] if seed is None else seed
    if client is None:
        export_base(folder, chosen, out)
        typer.echo(f"base model: {out}")
        return
    rank = folder.info()["config"]["budgets"][-1] if budget is None else budget
    belongs = export_client(folder, client, method, rank, chosen, out)
    typer.echo(f"adapter: {out} (peft; belongs to the base model in {belongs})")


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
    storage: StorageUrl = "./runs",
) -> None:
    """Have a language model score the answers of a run; repeated, it asks only for what is missing."""
    from fedtailor.cli.views import bar, show_judged
    from fedtailor.experiment.prepare import refuse_job_folder
    from fedtailor.report.judge import Request, judge_run

    refuse_job_folder("--storage", storage)
    if out is not None:
        refuse_job_folder("--out", out)
    asked = Request(
        url=endpoint, model=model, repeats=repeats, scale=scale, methods=tuple(method or ()), limit=limit, order=order,
        tries=tries, at_once=at_once, timeout_s=timeout, retries=retries, key_env=key_env, out=out,
    )  # fmt: skip
    with bar(console()) as tell:
        judged = judge_run(open_run(run_id, storage), asked, tell)
    show_judged(console(), judged, model, scale)
    if judged.gaps:
        error = JudgeError(f"{judged.counts['missing']} of {judged.counts['wanted']} judgements are missing")
        for gap in judged.gaps:
            error.add_note(gap)
        error.add_note("All others are kept; the same command asks for these again")
        raise error
