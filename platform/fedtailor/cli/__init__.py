"""The command line: commands that run experiments, and the table of all commands.

Heavy imports are inside the commands, so that help and errors come at once.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer
from rich.markup import escape
from typer.core import TyperGroup

from fedtailor import __version__
from fedtailor.cli import commands
from fedtailor.cli.commands import AllowCode, RunId, StorageUrl, open_run
from fedtailor.cli.terminal import console, listing, show_error, show_header, summary_table
from fedtailor.core.errors import Interrupted, TailorError

if TYPE_CHECKING:
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
            show_error(console(stderr=True), error)
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

JsonLog = Annotated[bool, typer.Option("--json-log", help="One JSON object per event instead of a bar.")]

Address = Annotated[
    str | None, typer.Option(help="Ray cluster: auto, HOST:PORT, ray://HOST:PORT or local; the same as engine.address.")
]

_WORDS = typer.Argument(metavar="[PRESET|KEY=VALUE]...", help="Presets (later ones win) and dotted overrides.")
Words = Annotated[list[str], _WORDS]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"fedtailor {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Show it.")] = False,
) -> None: ...


def run(
    words: Words,
    run_id: Annotated[str | None, typer.Option(help="Name of the run; default: preset and hash.")] = None,
    address: Address = None,
    json_log: JsonLog = False,
) -> None:
    """Run an experiment, or go on with it if it exists: fedtailor run demo strategy.rounds=20."""
    from fedtailor.experiment.fastest import settled
    from fedtailor.experiment.launch import at_address, default_run_id
    from fedtailor.experiment.prepare import prepare

    presets, exp = _compose(words)
    exp = at_address(exp, address)
    name = run_id or default_run_id(presets, exp)
    exp, _ = settled(exp, name, console(stderr=json_log).print)
    _conduct(exp, name, lambda emit: prepare(exp, name, emit), json_log)


def resume(
    run_id: RunId,
    storage: StorageUrl = "./runs",
    address: Annotated[str | None, typer.Option(help="Another Ray cluster than before; local: one of its own.")] = None,
    json_log: JsonLog = False,
    allow_code: AllowCode = None,
) -> None:
    """Go on with an interrupted or failed run from its last commit."""
    from fedtailor.experiment.launch import at_address, load_experiment
    from fedtailor.experiment.prepare import refuse_job_folder

    refuse_job_folder("--storage", storage)
    folder = open_run(run_id, storage)
    exp = at_address(load_experiment(folder), address, instead=True)
    _conduct(exp, run_id, lambda _: folder, json_log)


def sweep(
    grid: Annotated[str, typer.Argument(metavar="PAPER/GRID", help="One of: fedtailor list sweeps.")],
    words: Annotated[list[str] | None, _WORDS] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="{train,seen,unseen}_{accuracy,loss}, {seen,unseen}_rougeL or seen_mcc; default: the paper's choice."
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

    log = console() if json_log else None
    resolve(SWEEPS["run"])(
        console(stderr=json_log), grid, tuple(words or ()), objective, sweep_id, asha, trials_at_once, log
    )


def plan(
    words: Words,
    memory_gb: Annotated[
        float | None,
        typer.Option(min=0.1, help="Memory in GB of one GPU (or worker) to plan a language model for; default: here."),
    ] = None,
) -> None:
    """Show stages, bytes, memory and work of an experiment without running it; needs no weights."""
    from fedtailor.cli.plan_views import show_plan
    from fedtailor.experiment.fastest import settled, unasked
    from fedtailor.experiment.plan import make_plan

    exp, chosen = settled(_compose(words)[1], notice=console().print)
    made = make_plan(exp, memory_gb)
    show_plan(console(), made)
    if chosen:
        console().print(f"[bold]auto[/]  {chosen}")
    elif better := unasked(exp, made.model.parameters):
        console().print(f"[bold]auto[/]  engine.dtype=auto model.attention=auto would choose {better}")


def doctor_(
    storage: StorageUrl = "./runs", address: Annotated[str | None, typer.Option(help="Ray address.")] = None
) -> None:
    """Check this machine: versions, memory, storage, data, Ray's exposure, W&B."""
    from fedtailor.cli.doctor import examine, show_findings

    if not show_findings(console(), examine(storage, address)):
        raise typer.Exit(1)


def list_(what: Literal["methods", "tasks", "models", "presets", "sweeps"]) -> None:
    """List what can be named in a configuration."""
    from fedtailor.core.config import resolve

    console().print(resolve(SWEEPS["list"])() if what == "sweeps" else listing(what))


COMMANDS: Final[tuple[Callable[..., None], ...]] = (
    run, resume, sweep, commands.status, commands.digest, commands.report, commands.compare, commands.sync, plan,
    doctor_, list_, commands.export, commands.judge, commands.personalise, commands.pretrain,
)  # fmt: skip
"""In the order of ``fedtailor --help``."""
for _command in COMMANDS:
    app.command(_command.__name__.rstrip("_"))(_command)


def main() -> None:
    """Console entry point."""
    # Imports make a million objects that stay; by default they would be looked through again and again, for a second.
    gc.set_threshold(100_000)
    app(prog_name="fedtailor")


def _compose(words: list[str]) -> tuple[list[str], ExperimentBase]:
    from fedtailor.experiment.compose import compose

    presets = [word for word in words if "=" not in word]
    return presets, compose(presets, [word for word in words if "=" in word])


def _conduct(exp: ExperimentBase, run_id: str, make_folder: Callable[[Any], RunFolder], json_log: bool) -> None:
    """Opens, runs, reports; every way out tells what to do next."""
    from fedtailor.core.config import resolve
    from fedtailor.core.faults import planned
    from fedtailor.experiment.launch import StopSignals, launch, modules_of
    from fedtailor.report import report_of
    from fedtailor.report.wandb import sync_wandb
    from fedtailor.tracking.progress import reporter

    planned()
    where = "" if exp.storage == "./runs" else f" --storage {exp.storage}"
    terminal = console(stderr=json_log)
    backend = resolve(BACKENDS[exp.engine.backend])
    show = reporter(console() if json_log else terminal, json_log, run_id)
    with StopSignals(lambda text: show({"kind": "note", "text": text})) as stop:
        folder = None
        try:
            folder = make_folder(show)
            show_header(terminal, run_id, exp)
            stop.graceful = True
            launch(backend, folder, exp, show, stop)
        except TailorError as error:
            if isinstance(error, Interrupted):
                error.exit_code = stop.exit_code
            if folder is not None:
                code = "".join(f" --allow-code {module}" for module in modules_of(exp))
                error.add_note(f"Resume with: fedtailor resume {run_id}{where}{code}")
            raise
        finally:
            show.close()
    path = report_of(folder)
    problem = sync_wandb(folder, exp)
    table = summary_table(folder.metrics("personalise"))
    if table is not None:
        terminal.print(table)
    if problem:
        again = f"The run is complete without it; repeat with: fedtailor sync {run_id}{where}"
        terminal.print("[yellow]W&B:[/]", escape(problem), again, soft_wrap=True, sep="\n     ")
    terminal.print(f"[green]complete[/]  report: {path}", soft_wrap=True)
