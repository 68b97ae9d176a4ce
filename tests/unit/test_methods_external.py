"""Methods of the user's own packages: found, named, run, and not imported because a run folder says so."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
from outside import METHOD, REFERENCE, write_package
from tiny import run_tiny, tiny
from typer.testing import CliRunner

from fedtailor.cli import app
from fedtailor.core import outside
from fedtailor.core.errors import ConfigError
from fedtailor.experiment import launch
from fedtailor.experiment.compose import compose
from fedtailor.experiment.config import experiment_of, method_section, to_json
from fedtailor.methods import METHODS, external
from fedtailor.report import report_of
from fedtailor.report.style import looks
from fedtailor.storage.digest import digest
from fedtailor.storage.run_folder import RunFolder
from fedtailor.worker.worker import SerialPool

ONE = ("base.name=none", "budgets=[1]", "personalise.pools=[unseen]")
MINE = (*ONE, f"methods=[base,{REFERENCE}]", "mine.lr=5e-3", "mine.batch_size=64", "mine.epochs=1")


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every test is a process that has imported nothing from outside yet."""
    monkeypatch.setattr(external, "_allowed", set())
    monkeypatch.setattr(outside, "_packages", {})
    forget()
    yield
    forget()


def forget() -> None:
    """As another process would find it."""
    for name in [name for name in METHODS if name not in external.FILES]:
        del METHODS[name]
    for name in [name for name in sys.modules if name.split(".")[0] in ("mypkg", "notes")]:
        del sys.modules[name]
    external._allowed.clear()


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_package(tmp_path_factory.mktemp("src"))


@pytest.fixture
def package(source: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(source))
    return source


@pytest.fixture
def entry_point(package: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    def install(name: str = "mine", value: str = REFERENCE) -> None:
        found = [EntryPoint(name, value, external.GROUP)]
        monkeypatch.setattr(external, "entry_points", lambda group: found if group == external.GROUP else [])

    return install


@pytest.fixture(scope="module")
def stored(source: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(source))
        run = run_tiny(tiny(tmp_path_factory.mktemp("runs"), *MINE))
    return run


@pytest.fixture
def finished(stored: RunFolder, package: Path) -> RunFolder:
    forget()
    return stored


def test_it_has_a_name_a_section_and_a_look(package: Path) -> None:
    exp = compose([], [f"methods=[base,{REFERENCE}]", "mine.bold=true"])
    assert (exp.methods, dict(exp.code)) == (("base", "mine"), {"mine": REFERENCE})
    assert to_json(method_section(exp, "mine"))["bold"] is True
    look = looks(["mine"])["mine"]
    assert (look.colour, look.marker, look.label) == ("#123456", "*", "My method")
    assert experiment_of(to_json(exp)) == exp


def test_without_one_a_configuration_is_what_it_was(package: Path) -> None:
    compose([], [f"methods=[{REFERENCE}]"])
    plain = to_json(compose([], []))
    assert not {"code", "mine"} & set(plain)
    with pytest.raises(ConfigError, match="unknown method 'mine'"):
        compose([], ["methods=[mine]"])


def test_it_runs_like_lora_whose_code_it_uses_under_a_name_of_its_own(finished: RunFolder) -> None:
    lora = run_tiny(tiny(Path(finished.storage.url), *ONE, "methods=[base,lora]"), "lora")
    frames = [
        r.metrics().query("method == @name and metric == 'loss'") for r, name in ((finished, "mine"), (lora, "lora"))
    ]
    assert len(frames[0])
    assert frames[0].value.tolist() == frames[1].value.tolist()


def test_another_reference_is_another_artifact(finished: RunFolder, package: Path) -> None:
    again = package / "mypkg/copy.py"
    again.write_text(METHOD.replace('"mine"', '"theirs"'))
    words = [word.replace("mine.", "theirs.") for word in MINE if "methods" not in word]
    other = run_tiny(tiny(Path(finished.storage.url), *words, "methods=[base,mypkg.copy:ENTRY]"), "other")
    names = [{s["artifact"] for s in run.stages() if s["method"] != "base"} for run in (finished, other)]
    assert not names[0] & names[1]


def test_a_stored_run_may_not_import_it(finished: RunFolder) -> None:
    forget()
    opening = (
        lambda: launch.load_experiment(finished),
        lambda: report_of(finished),
        lambda: launch.execute_on(
            {"storage": finished.storage.url, "run_id": "run", "allow_code": []}, SerialPool, print, lambda: False
        ),
    )
    for use in opening:
        with pytest.raises(ConfigError, match=r"run 'run': its method 'mine'.*add --allow-code mypkg.mine"):
            use()
    assert "mypkg" not in sys.modules


COMMANDS = (
    ["resume", "run"], ["report", "run"], ["sync", "run", "--mode", "offline"],
    ["personalise", "--psg", "run", "--data", "x.csv", "--budget", "1", "--out", "new"],
)  # fmt: skip


@pytest.mark.parametrize("words", COMMANDS, ids=lambda words: words[0])
def test_every_command_that_opens_it_asks(finished: RunFolder, words: list[str]) -> None:
    forget()
    told = CliRunner().invoke(app, [*words, "--storage", finished.storage.url])
    assert told.exit_code == 2
    assert "--allow-code mypkg.mine" in " ".join(told.output.split())
    assert "mypkg" not in sys.modules


def test_whoever_allows_it_gets_the_same_run_and_a_report_with_its_title(finished: RunFolder) -> None:
    before = digest(finished.storage, "run")
    for command in ("resume", "report"):
        forget()
        words = [command, "run", "--storage", finished.storage.url, "--allow-code", "mypkg.mine"]
        told = CliRunner().invoke(app, words)
        assert told.exit_code == 0, told.output
    assert digest(finished.storage, "run") == before
    assert "My method" in Path(finished.storage.url, "run/report/report.html").read_text("utf-8")


def test_what_needs_no_code_opens_without(finished: RunFolder) -> None:
    forget()
    for command in ("status", "digest"):
        assert CliRunner().invoke(app, [command, "run", "--storage", finished.storage.url]).exit_code == 0
    assert "mypkg" not in sys.modules


def test_another_allowed_module_does_not_do(finished: RunFolder) -> None:
    forget()
    external.allow(["mypkg", "mypkg.other"])
    with pytest.raises(ConfigError, match=r"--allow-code mypkg\.mine"):
        launch.load_experiment(finished)


def test_an_installed_method_is_found_by_name_and_trusted(entry_point: Any, tmp_path: Path) -> None:
    entry_point()
    run = run_tiny(tiny(tmp_path / "runs", *(word.replace(REFERENCE, "mine") for word in MINE)))
    forget()
    assert launch.load_experiment(run).code == {"mine": REFERENCE}
    assert dict(compose([], ["mine.bold=true"]).code) == {"mine": REFERENCE}
    listed = CliRunner().invoke(app, ["list", "methods"])
    assert "LoRA under another name" in listed.output


def test_a_run_that_names_other_code_than_the_installed_asks(finished: RunFolder, entry_point: Any) -> None:
    entry_point(value="mypkg.newer:ENTRY")
    forget()
    with pytest.raises(ConfigError, match=r"--allow-code mypkg\.mine"):
        launch.load_experiment(finished)


@pytest.mark.parametrize(("name", "message"), [
    ("lora", "'methods': 'lora' is a method of fedtailor and an installed one, 'mypkg.mine:ENTRY'"),
    ("other", "the entry point 'other' leads to the method 'mine'; it needs that name"),
])  # fmt: skip
def test_an_entry_point_has_the_name_of_its_method_and_no_others(entry_point: Any, name: str, message: str) -> None:
    entry_point(name)
    with pytest.raises(ConfigError, match=message):
        compose([], [f"methods=[{name}]"])


@pytest.mark.parametrize(("word", "message"), [
    ("methods=[nowhere.mine:ENTRY]", "'methods': there is no module 'nowhere' for 'nowhere.mine:ENTRY'; install"),
    ("methods=[mypkg.nine:ENTRY]", "there is no module 'mypkg.nine' for 'mypkg.nine:ENTRY'.*PYTHONPATH"),
    ("methods=[mypkg.mine:ENTRIES]", r"module mypkg.mine has no 'ENTRIES' .*\(it has: ENTRY, NUMBER\)"),
    ("methods=[mypkg.mine:NUMBER]", "'mypkg.mine:NUMBER' is of type int, not a MethodEntry"),
    ("methods=['mypkg.mine:']", "'mypkg.mine:' is no reference; write package.module:NAME"),
    ("base.name=mypkg.mine:ENTRY", r"'base.name': unknown base 'mine' .allowed: fedavg, .*dept, none"),
    ("base=mypkg.none:ENTRY", "'base.name': there is no module 'mypkg.none'"),
])  # fmt: skip
def test_what_cannot_be_imported_is_said_with_key_value_and_way_out(package: Path, word: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        compose([], [word])


@pytest.mark.parametrize(("name", "message"), [
    ("lora", "has the name 'lora', which is another method's"), ("task", "which is a key of the configuration"),
    ("My-Method", "has the name 'My-Method'; write a-z, 0-9 and _ only"),
])  # fmt: skip
def test_a_name_that_is_taken_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, message: str
) -> None:
    monkeypatch.syspath_prepend(str(write_package(tmp_path, METHOD.replace('"mine"', f'"{name}"'))))
    with pytest.raises(ConfigError, match=message):
        compose([], [f"methods=[{REFERENCE}]"])


def test_a_module_that_needs_another_says_which(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(write_package(tmp_path, "import notes\n")))
    with pytest.raises(ConfigError, match=r"'methods': 'mypkg\.mine:ENTRY' needs the module 'notes': install it"):
        compose([], [f"methods=[{REFERENCE}]"])


def test_its_packages_go_to_workers(package: Path) -> None:
    compose([], [f"methods=[{REFERENCE}]"])
    assert outside.packages() == (package / "mypkg",)
