"""The tree keeps its promises: names, fences, packages."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "platform/fedtailor"
EXCEPTIONS = {name: {"wandb"} for name in ("report/wandb.py", "report/compare_wandb.py", "tracking/wandb_key.py")}


def imported(path: Path) -> set[str]:
    roots = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            roots.add(node.module.split(".")[0])
    return roots


def test_the_standard_library_platform_module_wins() -> None:
    assert not (ROOT / "platform/__init__.py").exists()
    import platform

    assert callable(platform.python_version)


@pytest.mark.parametrize("path", sorted(LIBRARY.rglob("*.py")), ids=lambda p: str(p.relative_to(LIBRARY)))
def test_the_library_does_not_know_where_it_runs(path: Path) -> None:
    allowed = EXCEPTIONS.get(str(path.relative_to(LIBRARY)), set())
    assert not (imported(path) & {"ray", "wandb", "actors", "tune_spaces"}) - allowed


def test_deepspeed_is_imported_where_a_base_is_partitioned_and_not_before() -> None:
    users = {str(p.relative_to(ROOT)) for p in (*LIBRARY.rglob("*.py"), *ROOT.glob("actors/*.py")) if uses_deepspeed(p)}
    assert users == {"platform/fedtailor/models/zero.py"}
    tree = ast.parse((LIBRARY / "models/zero.py").read_text("utf-8"))
    assert not [node for node in tree.body if "deepspeed" in ast.unparse(node).split("(")[0] and is_import(node)]


def uses_deepspeed(path: Path) -> bool:
    return "deepspeed" in imported(path)


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, (ast.Import, ast.ImportFrom))


def test_only_the_command_line_names_a_backend_by_string() -> None:
    naming = {
        str(p.relative_to(LIBRARY))
        for p in LIBRARY.rglob("*.py")
        if re.search(r"[\"'](actors|tune_spaces)[.:]", p.read_text("utf-8"))
    }
    assert naming <= {"cli/__init__.py"}


def test_tune_is_imported_by_tune_spaces_only() -> None:
    for path in sorted((ROOT / "actors").rglob("*.py")):
        text = path.read_text("utf-8")
        assert "ray.tune" not in text
        assert "from ray import tune" not in text


ROOMS = (
    "core", "aggregation", "server_optim", "lanes", "tasks", "models", "adapters", "federated", "privacy", "evaluation",
    "training", "methods", "storage", "worker", "tracking", "experiment", "report", "personalise", "cli",
)  # fmt: skip
"""Lowest first: a room imports only rooms before it. `CONTRIBUTING.md` says what is in each."""
RESOURCES = {"presets"}
"""Packages of data."""
MOST_LINES, FLOOR = 300, 60


def modules() -> dict[str, Path]:
    """Dotted name to file, of the library and what stands on it."""
    found = {}
    for path in (*LIBRARY.rglob("*.py"), *ROOT.glob("actors/*.py"), *ROOT.glob("tune_spaces/*.py")):
        parts = path.relative_to(LIBRARY.parent if LIBRARY in path.parents else ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(text: str, known: set[str]) -> set[str]:
    """Our modules that a module imports: at its top, inside functions and under ``TYPE_CHECKING``."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.level, "imports are absolute"
            found |= {name if (name := f"{node.module}.{alias.name}") in known else node.module for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & known


def upward(name: str, imported: set[str]) -> set[str]:
    """What a module of the library imports from its own level or above, its own room excepted."""
    room = name.split(".")[1]
    allowed = {*ROOMS[: ROOMS.index(room) + 1], *RESOURCES}
    return {other for other in imported if "." in other and other.split(".")[1] not in allowed}


def test_the_rooms_are_those_on_the_list() -> None:
    assert {p.parent.name for p in LIBRARY.glob("*/__init__.py")} == {*ROOMS, *RESOURCES}


def test_imports_go_down_the_list_of_rooms() -> None:
    known = modules()
    wrong = {
        name: found
        for name, path in known.items()
        if name.count(".") and name.startswith("fedtailor.") and name.split(".")[1] in ROOMS
        if (found := upward(name, imports_of(path.read_text("utf-8"), set(known))))
    }
    assert not wrong


@pytest.mark.parametrize(
    "text",
    [
        "from fedtailor.experiment.config import Experiment",
        "def late():\n    from fedtailor.methods import METHODS",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fedtailor.cli.doctor",
    ],
)
def test_an_import_against_the_order_is_seen(text: str) -> None:
    assert upward("fedtailor.lanes.net", imports_of(text, set(modules())))


def test_no_module_imports_itself_through_others() -> None:
    known = modules()
    edges = {name: imports_of(path.read_text("utf-8"), set(known)) - {name} for name, path in known.items()}
    assert not circle(edges)
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})


def circle(edges: dict[str, set[str]]) -> list[str]:
    """What is left once everything is taken away that imports nothing left."""
    left = dict(edges)
    while free := [name for name, imported in left.items() if not imported & left.keys()]:
        for name in free:
            del left[name]
    return sorted(left)


def test_files_are_neither_long_nor_crumbs() -> None:
    known = modules()
    lines = {name: len(path.read_text("utf-8").splitlines()) for name, path in known.items()}
    assert not {name: n for name, n in lines.items() if n > MOST_LINES}
    users = dict.fromkeys(known, 0)
    for name, path in known.items():
        for other in imports_of(path.read_text("utf-8"), set(known)) - {name}:
            users[other] += 1
    tables = ("fedtailor.methods.", "fedtailor.server_optim.", "fedtailor.tasks.", "tune_spaces.")
    crumbs = {
        name
        for name, path in known.items()
        if lines[name] < FLOOR and users[name] < 2 and not name.startswith(tables)
        if path.name not in ("__init__.py", "__main__.py")
    }
    assert not crumbs


def test_setup_lists_the_packages_that_exist() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    listed = set(parser["options"]["packages"].split())
    found = {".".join(["fedtailor", *p.parent.relative_to(LIBRARY).parts]) for p in LIBRARY.rglob("__init__.py")} | {
        name for name in ("actors", "tune_spaces") if (ROOT / name / "__init__.py").exists()
    }
    assert listed == found


def test_the_asked_for_packages_are_dependencies() -> None:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    wanted = {"ray[default,tune]", "torch", "deepspeed", "transformers", "peft", "datasets", "wandb"}
    assert wanted <= {re.split("[><=]", line)[0] for line in parser["options"]["install_requires"].split()}
