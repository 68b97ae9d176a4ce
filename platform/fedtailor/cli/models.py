"""The commands that make models: an adapter for a client of your own, and a base from texts alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from fedtailor.cli.options import AllowCode, StorageUrl, console
from fedtailor.core.errors import Interrupted


def personalise(
    psg: Annotated[str, typer.Option(metavar="RUN_ID", help="Run with a trained strategy generator (fedp2eft).")],
    data: Annotated[str, typer.Option(help="CSV, TSV, JSONL, Parquet, a data set folder or owner/name[:config].")],
    budget: Annotated[int, typer.Option(help="r: r L ranks over the L adapted layers.")],
    out: Annotated[Path, typer.Option(help="New folder.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]...", help="Overrides of fedp2eft.finetune: epochs=5 lr=1e-3 batch_size=8."),
    ] = None,
    storage: StorageUrl = "./runs",
    seed: Annotated[int | None, typer.Option(help="Default: the run's first.")] = None,
    test: Annotated[str | None, typer.Option(help="Rows to score on, like --data.")] = None,
    test_fraction: Annotated[float | None, typer.Option(help="Share of --data to score on; default: 0.2.")] = None,
    text: Annotated[str | None, typer.Option(help="Column of the text; default: text, sentence, premise ...")] = None,
    pair: Annotated[str | None, typer.Option(help="Column of the second text of a pair.")] = None,
    label: Annotated[str | None, typer.Option(help="Column of the label; default: label, category ...")] = None,
    language: Annotated[str, typer.Option(help="Code for the record; changes no number.")] = "",
    limit: Annotated[int | None, typer.Option(help="Use at most so many rows of --data.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="Also write the whole model, adapter merged.")] = False,
    base: Annotated[Path | None, typer.Option(help="Another copy of the run's base model.")] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    allow_code: AllowCode = None,
) -> None:
    """Give a client of your own the adapter that a trained strategy generator chooses for it."""
    from fedtailor.cli.personalise_view import show_ready, show_result
    from fedtailor.personalise.data import Columns
    from fedtailor.personalise.new_client import Request, carry_out, check

    asked = Request(
        run_id=psg, data=data, budget=budget, out=out, storage=storage, seed=seed, test=test,
        test_fraction=test_fraction, columns=Columns(text, pair, label), language=language, merge=merge, limit=limit,
        overrides=tuple(words or ()), base=base, device=device,
    )  # fmt: skip
    ready = check(asked)
    show_ready(console(), ready)
    show_result(console(), ready, carry_out(ready))


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
    from fedtailor.cli.terminal import PretrainView
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
    console().print(f"[green]{outcome}[/]  model: {folder}", highlight=False, soft_wrap=True)
