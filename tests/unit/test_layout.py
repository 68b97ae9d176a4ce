"""The tree keeps its promises: names, fences, packages."""

from __future__ import annotations

import ast
import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LIBRARY = ROOT / "platform/fedtailor"
EXCEPTIONS = {f"runs/wandb_{part}.py": {"wandb"} for part in ("extras", "key", "session", "sink")}


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


LAYERS = {
    "core": {"methods", "runs", "personalisers", "updates", "cli"},
    "adapters": {"methods", "runs", "personalisers", "updates", "cli"},
    "aggregation": {"methods", "runs", "cli"},
    "tasks": {"methods", "runs", "cli"},
    "methods": {"runs", "cli"},
    "personalisers": {"methods", "runs", "cli"},
    "updates": {"methods", "runs", "cli"},
}
# The worker is where the table of methods meets the core.
MEETING_POINTS = {"worker/open_stage.py", "federated/pool.py"}


@pytest.mark.parametrize("package", sorted(LAYERS))
def test_imports_point_one_way(package: str) -> None:
    for path in sorted((LIBRARY / package).rglob("*.py")):
        if str(path.relative_to(LIBRARY)) in MEETING_POINTS:
            continue
        targets = set(re.findall(r"^\s*from fedtailor\.(\w+)", path.read_text("utf-8"), re.M))
        assert not targets & LAYERS[package], f"{path} imports {targets & LAYERS[package]}"


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
