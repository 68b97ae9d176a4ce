"""Methods in whole runs: killed again and again they end as if undisturbed, and Ray gives the bytes of one process.

`make test` runs one method for each pattern of ownership, `make contracts` all of them.
"""

from __future__ import annotations

import multiprocessing
import signal
from pathlib import Path

import pytest
from contract_kit import BUDGETS, SMALL, scopes_of, tiny_section
from tiny import FORKED, run_tiny, run_with_fault, tiny

from fedtailor.methods import METHODS, build_method
from fedtailor.storage.digest import digest
from fedtailor.storage.run_folder import RunFolder


def patterns() -> list[str]:
    """The first method of each pattern: who owns what it declares, whether budgets change its models, who takes part,
    and whether all are sent the same."""
    found = {}
    for name, entry in METHODS.items():
        method = build_method(name, entry.tiny or {}, max(BUDGETS))
        pattern = (scopes_of(method), method.personaliser.budgeted, method.pooled, method.downlink is None)
        found.setdefault(pattern, name)
    return list(found.values())


WHOLE = {"patterns": patterns(), "all": list(METHODS)}
RUNS = [pytest.param("patterns"), pytest.param("all", marks=pytest.mark.contracts_all)]


def overrides(which: str) -> tuple[str, ...]:
    names = WHOLE[which]
    sections = [word for name in names for word in tiny_section(name, METHODS[name].tiny or {})]
    return (*SMALL, "personalise.chunk=8", f"methods=[{','.join(names)}]", *sections)


@pytest.fixture(scope="module")
def serial() -> dict[str, RunFolder]:
    return {}


@pytest.fixture
def clean(which: str, serial: dict[str, RunFolder], tmp_path_factory: pytest.TempPathFactory) -> str:
    if which not in serial:
        serial[which] = run_tiny(tiny(tmp_path_factory.mktemp("clean"), *overrides(which)))
    return digest(serial[which].storage, "run")


def in_process(storage: Path, words: tuple[str, ...], fault: str) -> int:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(FORKED)
    process = context.Process(target=run_with_fault, args=(storage, words, fault))
    process.start()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@pytest.mark.parametrize("which", RUNS)
def test_killed_after_every_third_commit_a_run_ends_as_if_undisturbed(which: str, clean: str, tmp_path: Path) -> None:
    codes = []
    while not codes or codes[-1]:
        codes.append(in_process(tmp_path, overrides(which), "commit:after-record@3"))
        assert codes[-1] in (0, -signal.SIGKILL)
    assert len(codes) > 3
    assert digest(run_tiny(tiny(tmp_path, *overrides(which))).storage, "run") == clean


@pytest.mark.ray
@pytest.mark.parametrize("which", RUNS)
def test_ray_gives_the_bytes_of_one_process(which: str, clean: str, cluster: None, tmp_path: Path) -> None:
    from actors.ray_pool import RayPool

    exp = tiny(tmp_path, *overrides(which), "engine.backend=ray", "engine.actors=2", "engine.num_cpus=0.5")
    run = run_tiny(exp, pool=lambda on_event: RayPool(exp.engine, on_event))
    assert digest(run.storage, "run") == clean
