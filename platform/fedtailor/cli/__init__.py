"""The command line. Heavy imports are inside the commands, so that help and errors come at once."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer
from typer.core import TyperGroup

from fedtailor import __version__
from fedtailor.cli import models as cli_judge
from fedtailor.cli import models as cli_models
from fedtailor.core.errors import ConfigError, Interrupted, TailorError

if TYPE_CHECKING:
    from rich.console import Console

    from fedtailor.experiment.config import ExperimentBase
    from fedtailor.storage.run_folder import RunFolder


BACKENDS: Final[dict[str, str]] = {
    "serial": "fedtailor.experiment.launch:run_serial",
    "ray": "actors.driver_actor:run_on_driver",
}
"""engine.backend to the function that runs a run there; imported by name, so the library needs no Ray."""

SWEEPS: Final[dict[str, str]] = {"run": "tune_spaces.launch:sweep", "list": "tune_spaces.launch:grids_table"}
"""What sweeps can do, also by name: the library needs no Ray Tune."""


class _Commands(TyperGroup):
    """Shows deliberate errors as messages; anything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except TailorError as error:
            from fedtailor.cli.terminal import show_error

            show_error(_console(stderr=True), error)
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt:
            typer.echo("stopped", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    cls=_Commands,
    help="Simulates personalised federated fine-tuning of language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

RunId = Annotated[str, typer.Argument(metavar="RUN_ID", help="Name of a run's folder in the storage.")]

Storage = cli_models.Storage

AllowCode = cli_models.AllowCode

JsonLog = Annotated[bool, typer.Option("--json-log", help="One JSON object per event instead of a bar.")]

Address = Annotated[
    str | None, typer.Option(help="Ray cluster: auto, HOST:PORT, ray://HOST:PORT or local; the same as engine.address.")
]

Words = Annotated[
    list[str],
    typer.Argument(metavar="[PRESET|KEY=VALUE]...", help="Presets (later ones win) and dotted overrides."),
]


class Listing(StrEnum):
    """What ``list`` can show."""

    methods = "methods"
    tasks = "tasks"
    models = "models"
    presets = "presets"
    sweeps = "sweeps"


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedtailor {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None: ...


@app.command()
def run(
    words: Words,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; default: preset and hash.")] = None,
    address: Address = None,
    json_log: JsonLog = False,
) -> None:
    """Run an experiment, or go on with it if it exists: fedtailor run demo strategy.rounds=20."""
    from fedtailor.experiment import launch
    from fedtailor.experiment.launch import prepare

    presets, exp = _compose(words)
    exp = launch.at_address(exp, address)
    name = run_id or launch.default_run_id(presets, exp)
    _conduct(exp, name, lambda emit: prepare(exp, name, emit), json_log)


@app.command()
def resume(
    run_id: RunId,
    storage: Storage = "./runs",
    address: Annotated[str | None, typer.Option(help="Another Ray cluster than before; local: one of its own.")] = None,
    json_log: JsonLog = False,
    allow_code: AllowCode = None,
) -> None:
    """Go on with an interrupted or failed run from its last commit."""
    from fedtailor.experiment import launch
    from fedtailor.experiment.launch import refuse_job_folder

    refuse_job_folder("--storage", storage)
    folder = _open(run_id, storage)
    exp = launch.at_address(launch.load_experiment(folder), address, instead=True)
    _conduct(exp, run_id, lambda _: folder, json_log)


@app.command()
def sweep(
    grid: Annotated[str, typer.Argument(metavar="PAPER/GRID", help="One of: fedtailor list sweeps.")],
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[PRESET|KEY=VALUE]...", help="Presets (later ones win) and dotted overrides."),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="{train,seen,unseen}_{accuracy,loss} or {seen,unseen}_rougeL; default: what the paper judged by."
        ),
    ] = None,
    sweep_id: Annotated[str | None, typer.Option(help="Name of the sweep; default: grid, preset and hash.")] = None,
    asha: Annotated[bool, typer.Option("--asha", help="Stop hopeless trials early.")] = False,
    trials_at_once: Annotated[
        int | None, typer.Option(min=1, help="Default: as many as fit; fixed when a sweep starts first.")
    ] = None,
    json_log: JsonLog = False,
) -> None:
    """Run a published grid with Ray Tune, or what is missing of it: sweep fedp2eft/lambda_lr demo."""
    from fedtailor.core.config import resolve

    log = _console() if json_log else None
    resolve(SWEEPS["run"])(
        _console(stderr=json_log), grid, tuple(words or ()), objective, sweep_id, asha, trials_at_once, log
    )


@app.command()
def status(
    run_id: Annotated[str | None, typer.Argument(metavar="[RUN_ID]", help="Default: the states of all runs.")] = None,
    storage: Storage = "./runs",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Until the run ends; exit code 0 if it is complete.")] = False,
) -> None:
    """Show how a run stands: stages, speed, losses, who drives it; without RUN_ID all runs."""
    from fedtailor.cli import views as status_view
    from fedtailor.storage.files import Storage as Store

    if run_id is None:
        if watch:
            raise ConfigError("status --watch needs a RUN_ID")
        status_view.show_runs(_console(), Store(storage), as_json)
        return
    folder = _open(run_id, storage)
    if watch:
        raise typer.Exit(status_view.watch_run(_console(), folder, as_json))
    status_view.show_run(_console(), folder, as_json)


@app.command()
def digest(run_id: RunId, storage: Storage = "./runs") -> None:
    """Print the sha256 over everything deterministic that a run committed."""
    from fedtailor.storage.digest import digest as compute
    from fedtailor.storage.files import Storage as Store

    typer.echo(compute(Store(storage), _open(run_id, storage).run_id))


@app.command()
def report(
    run_id: RunId,
    storage: Storage = "./runs",
    out: Annotated[Path | None, typer.Option(help="New folder; default: STORAGE/RUN_ID/report, made anew.")] = None,
    allow_code: AllowCode = None,
) -> None:
    """Write the tables and figures of a run again."""
    typer.echo(f"report: {_write_report(_open(run_id, storage), out)}")


@app.command()
def compare(
    runs: Annotated[list[str], typer.Argument(metavar="RUN_ID", help="Two or more, the reference first.")],
    storage: Storage = "./runs",
    out: Annotated[Path | None, typer.Option(help="New folder; default: STORAGE/compare-HASH.")] = None,
) -> None:
    """Put runs side by side: what differs, one table, one figure, paired tests where they share their clients."""
    from fedtailor.cli.views import show_comparison
    from fedtailor.report.compare_files import compare_runs
    from fedtailor.storage.files import Storage as Store

    content, folder = compare_runs(Store(storage), runs, out)
    show_comparison(_console(), content, folder)


@app.command()
def sync(
    run_id: RunId,
    storage: Storage = "./runs",
    mode: Annotated[
        str | None,
        typer.Option(help="online, offline, or auto: online if there is a key; default: wandb.mode, else auto."),
    ] = None,
    allow_code: AllowCode = None,
) -> None:
    """Feed W&B from a run's committed metrics: one W&B run per experiment; repeated, it adds what is missing."""
    from fedtailor.experiment.launch import load_experiment
    from fedtailor.report import wandb as wandb_sink

    folder = _open(run_id, storage)
    exp = load_experiment(folder)
    typer.echo(f"W&B: {wandb_sink.sync(folder, exp.wandb, mode)}")


@app.command()
def plan(
    words: Words,
    memory_gb: Annotated[
        float | None,
        typer.Option(min=0.1, help="Memory in GB of one GPU (or worker) to plan a language model for; default: here."),
    ] = None,
) -> None:
    """Show stages, bytes, memory and work of an experiment without running it; needs no weights."""
    from fedtailor.cli.plan_views import show_plan
    from fedtailor.experiment.plan import make_plan

    _, exp = _compose(words)
    show_plan(_console(), make_plan(exp, memory_gb))


@app.command()
def doctor(
    storage: Storage = "./runs", address: Annotated[str | None, typer.Option(help="Ray address.")] = None
) -> None:
    """Check this machine: versions, memory, storage, data, Ray's exposure, W&B."""
    from fedtailor.cli.doctor import examine, show_findings

    if not show_findings(_console(), examine(storage, address)):
        raise typer.Exit(1)


@app.command("list")
def list_(what: Annotated[Listing, typer.Argument()]) -> None:
    """List what can be named in a configuration."""
    from fedtailor.cli.terminal import listing
    from fedtailor.core.config import resolve

    _console().print(resolve(SWEEPS["list"])() if what is Listing.sweeps else listing(what.value))


@app.command()
def export(
    run_id: RunId,
    out: Annotated[Path, typer.Option(help="New folder.")],
    client: Annotated[str | None, typer.Option(help="Client id, e.g. seen/amh/00.")] = None,
    method: Annotated[str, typer.Option(help="Whose adapter.")] = "fedp2eft",
    budget: Annotated[int | None, typer.Option(help="r; default: the largest.")] = None,
    base: Annotated[bool, typer.Option("--base", help="The base model instead of an adapter.")] = False,
    seed: Annotated[int | None, typer.Option(help="Default: the run's first.")] = None,
    storage: Storage = "./runs",
    allow_code: AllowCode = None,
) -> None:
    """Copy a client's peft adapter, or the base model, out of a run."""
    from fedtailor.personalise import export as takeaway

    if base == (client is not None):
        raise ConfigError("export needs exactly one of --client ID and --base")
    folder = _open(run_id, storage)
    chosen = folder.info()["config"]["seeds"][0] if seed is None else seed
    if client is None:
        takeaway.export_base(folder, chosen, out)
        typer.echo(f"base model: {out}")
        return
    rank = folder.info()["config"]["budgets"][-1] if budget is None else budget
    belongs = takeaway.export_client(folder, client, method, rank, chosen, out)
    typer.echo(f"adapter: {out} (peft; belongs to the base model in {belongs})")


app.command()(cli_judge.judge)

app.command()(cli_models.personalise)

app.command()(cli_models.pretrain)


def main() -> None:
    """Console entry point."""
    app(prog_name="fedtailor")


def _compose(words: list[str]) -> tuple[list[str], ExperimentBase]:
    from fedtailor.experiment.compose import compose

    presets = [word for word in words if "=" not in word]
    return presets, compose(presets, [word for word in words if "=" in word])


def _console(stderr: bool = False) -> Console:
    from fedtailor.cli.terminal import terminal

    return terminal(stderr)


def _open(run_id: str, storage: str) -> RunFolder:
    from fedtailor.storage.files import Storage as Store
    from fedtailor.storage.run_folder import RunFolder

    return RunFolder.open(Store(storage), run_id)


def _write_report(folder: RunFolder, out: Path | None = None) -> Path | str:
    from fedtailor.report import report_of

    return report_of(folder, out)


def _conduct(exp: ExperimentBase, run_id: str, open_run: Callable[[Any], RunFolder], json_log: bool) -> None:
    """Opens, runs, reports; every way out tells what to do next."""
    from fedtailor.cli.terminal import show_header, summary_table
    from fedtailor.core.config import resolve
    from fedtailor.core.faults import planned
    from fedtailor.experiment import launch
    from fedtailor.experiment.stop import StopSignals
    from fedtailor.report.wandb import sync_wandb
    from fedtailor.tracking.progress import reporter

    planned()
    told = _console(stderr=json_log)
    backend = resolve(BACKENDS[exp.engine.backend])
    show = reporter(_console() if json_log else told, json_log, run_id)
    with StopSignals(lambda text: show({"kind": "note", "text": text})) as stop:
        folder = None
        try:
            folder = open_run(show)
            show_header(told, run_id, exp)
            stop.graceful = True
            launch.launch(backend, folder, exp, show, stop)
        except TailorError as error:
            if isinstance(error, Interrupted):
                error.exit_code = stop.exit_code
            if folder is not None:
                where = "" if exp.storage == "./runs" else f" --storage {exp.storage}"
                code = "".join(f" --allow-code {module}" for module in launch.modules_of(exp))
                error.add_note(f"Resume with: fedtailor resume {run_id}{where}{code}")
            raise
        finally:
            show.close()
    path = _write_report(folder)
    problem = sync_wandb(folder, exp)
    table = summary_table(folder.metrics("personalise"))
    if table is not None:
        told.print(table)
    if problem:
        from rich.markup import escape

        where = "" if exp.storage == "./runs" else f" --storage {exp.storage}"
        again = f"The run is complete without it; repeat with: fedtailor sync {run_id}{where}"
        told.print("[yellow]W&B:[/]", escape(problem), again, highlight=False, soft_wrap=True, sep="\n     ")
    told.print(f"[green]complete[/]  report: {path}", highlight=False, soft_wrap=True)
