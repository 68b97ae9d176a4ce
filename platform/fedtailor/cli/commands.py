"""The commands that read the folder of a run, or make a model; the options that commands share.

Heavy imports are inside the commands, so that help and errors come at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedtailor.cli.terminal import console
from fedtailor.core.errors import ConfigError, Interrupted, JudgeError

if TYPE_CHECKING:
    from fedtailor.storage.run_folder import RunFolder

RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="Name of a run's folder in the storage.")]
StorageUrl = Annotated[str, typer.Option(help="Where runs are kept; the key 'storage' of the configuration.")]


def _allow(modules: list[str] | None) -> list[str] | None:
    if modules:
        from fedtailor.methods.external import allow

        allow(modules)
    return modules


AllowCode = Annotated[
    list[str] | None,
    typer.Option(
        "--allow-code",
        metavar="MODULE",
        callback=_allow,
        help="Module from outside that the run may import; repeatable.",
    ),
]


def open_run(run_id: str, storage: str) -> RunFolder:
    """The folder of a run.

    Raises:
        StorageError: there is none of this name.
    """
    from fedtailor.storage.files import Storage
    from fedtailor.storage.run_folder import RunFolder

    return RunFolder.open(Storage(storage), run_id)


def status(
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN_ID]", help="Default: the states of all runs.")] = None,
    storage: StorageUrl = "./runs",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Until the run ends; exit code 0 if it is complete.")] = False,
) -> None:
    """Show how a run stands: stages, speed, losses, who drives it; without RUN_ID all runs."""
    from fedtailor.cli.status_views import show_run, show_runs
    from fedtailor.storage.files import Storage

    if run_id is not None:
        code = show_run(console(), open_run(run_id, storage), as_json, watch)
        raise typer.Exit(code if watch else 0)
    if watch:
        raise ConfigError("status --watch needs a RUN_ID")
    show_runs(console(), Storage(storage), as_json)


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


def personalise(
    run: Annotated[str, typer.Option("--run", "--psg", metavar="RUN_ID", help="A finished run.")],
    data: Annotated[
        str, typer.Option(help="CSV, TSV, JSONL, JSON, Parquet (also .gz), a folder, or owner/name[:config].")
    ],
    out: Annotated[Path, typer.Option(help="New folder.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of the fine-tuning: epochs=5 lr=1e-3 batch_size=8."),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="One of the run's; default: fedp2eft, else the last one that was trained.")
    ] = None,
    budget: Annotated[
        int | None, typer.Option(help="r: r L ranks over the L adapted layers; default: the run's largest.")
    ] = None,
    storage: StorageUrl = "./runs",
    seed: Annotated[int | None, typer.Option(help="Default: the run's first.")] = None,
    test: Annotated[str | None, typer.Option(help="Rows to score on, like --data.")] = None,
    test_fraction: Annotated[float | None, typer.Option(help="Share of --data to score on; default: 0.2.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text; default: text, sentence, premise ...")] = None,
    pair: Annotated[str | None, typer.Option(help="Column of the second text of a pair.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label; default: label, category ...")] = None,
    split: Annotated[str, typer.Option(help="Column that says train or test; none: there is no such.")] = "auto",
    client: Annotated[
        str, typer.Option(help="Id, which names its random streams: that of an unseen client repeats what it got.")
    ] = "unseen/new/newcomer",
    language: Annotated[str, typer.Option(help="Code for the record; changes no number.")] = "",
    limit: Annotated[int | None, typer.Option(help="Use at most so many rows of --data.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the whole model, adapter merged.")] = False,
    base: Annotated[Path | None, typer.Option(help="Another copy of the run's base model.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    allow_code: AllowCode = None,
) -> None:
    """Give a client of your own the adapter that a method of a finished run makes for clients it never saw."""
    from fedtailor.cli.personalise_views import show_ready, show_result
    from fedtailor.personalise.new_client import Request, carry_out, prepared

    asked = Request(
        run_id=run, data=data, out=out, storage=storage, method=method, budget=budget, seed=seed, test=test, base=base,
        test_fraction=test_fraction, text=text, pair=pair, label=label, client=client, language=language, merge=merge,
        split_column=None if split == "none" else split, overrides=tuple(words or ()), limit=limit, device=device,
    )  # fmt: skip
    with prepared(asked) as ready:
        show_ready(console(), ready)
        show_result(console(), ready, *carry_out(ready))


def pretrain(
    task: Annotated[list[str], typer.Option(help="Task whose train texts are read, all languages; repeatable.")],
    out: Annotated[
        Path | None, typer.Option(help="New folder; default: where model=mini-mbert is looked for.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Updates [4000].")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows of an update [32].")] = None,
    block: Annotated[int | None, typer.Option(help="Tokens of a row [128].")] = None,
    shift: Annotated[bool | None, typer.Option(help="Learn positions beyond the block too; default: yes.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak [0.001].")] = None,
    warmup: Annotated[float | None, typer.Option(help="Share of the steps [0.06].")] = None,
    weight_decay: Annotated[float | None, typer.Option(help="Of matrices [0.01].")] = None,
    clip: Annotated[float | None, typer.Option(help="Largest norm of the gradient [1].")] = None,
    mask: Annotated[float | None, typer.Option(help="Share of tokens to predict [0.3].")] = None,
    smoothing: Annotated[float | None, typer.Option(help="Languages are drawn by tokens ** this [0.5].")] = None,
    start: Annotated[str | None, typer.Option(help="Token vectors to begin with: counts (default) or random.")] = None,
    held_out: Annotated[float | None, typer.Option(help="Share only measured on [0.01].")] = None,
    seed: Annotated[int | None, typer.Option(help="Of all draws [42].")] = None,
    layers: Annotated[int | None, typer.Option(help="[4]")] = None,
    hidden_size: Annotated[int | None, typer.Option(help="[256]")] = None,
    heads: Annotated[int | None, typer.Option(help="[4]")] = None,
    intermediate_size: Annotated[int | None, typer.Option(help="[1024]")] = None,
    max_position: Annotated[int | None, typer.Option(help="Longest text that the model can read [256].")] = None,
    vocab_size: Annotated[int | None, typer.Option(help="WordPieces at most [16000].")] = None,
    precision: Annotated[str, typer.Option(help="auto, bfloat16 or float32.")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    checkpoint_every: Annotated[int, typer.Option(help="Steps.", min=1)] = 200,
) -> None:
    """Make a small multilingual base from tasks' train texts, or go on with it: pretrain --task masakhanews."""
    given = {key: value for key, value in locals().items() if value is not None}
    from fedtailor.experiment.prepare import refuse_job_folder
    from fedtailor.models.pretrain_learner import chosen
    from fedtailor.models.source import pretrained_folder

    given["tasks"] = given.pop("task")
    for other in ("out", "checkpoint_every"):
        given.pop(other, None)
    options, folder = chosen(given), out or pretrained_folder()
    refuse_job_folder("--out", folder)
    from fedtailor.cli.views import PretrainView
    from fedtailor.experiment.launch import StopSignals
    from fedtailor.models.pretrain import pretrain

    with PretrainView(console()) as view, StopSignals(lambda text: view({"kind": "note", "text": text})) as stop:

        def show(event: Mapping[str, Any]) -> None:
            stop.graceful = stop.graceful or event["kind"] == "start"
            view(event)

        try:
            made = pretrain(options, folder, checkpoint_every, show, stop)
        except Interrupted as error:
            error.exit_code = stop.exit_code
            raise
    outcome = "made" if made else "there already, made with these options; nothing done"
    console().print(f"[green]{outcome}[/]  model: {folder}", soft_wrap=True)
