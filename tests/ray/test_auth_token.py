"""A local cluster needs a token since Ray makes it ask for one: there always is one, and nobody else reads it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
PROVIDE = """
import os
from actors.session import provide_token
from fedtailor.core.errors import PlacementError
from ray._raylet import AuthenticationTokenLoader
try:
    provide_token()
    token = AuthenticationTokenLoader.instance().get_raw_token(ignore_auth_mode=True) if {read} else "-"
    print(token, "RAY_AUTH_TOKEN" in os.environ)
except PlacementError as error:
    print(error.exit_code, error)
"""
RUN = """
import ray
from actors.session import ensure_ray
session = ensure_ray()
print("sum", ray.get(ray.remote(lambda: 1 + 1).remote()), session.started)
session.close()
print("still there" if ray.is_initialized() else "closed")
"""


def start(script: str, home: Path, **variables: str) -> subprocess.Popen[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    env |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]), **variables}
    return subprocess.Popen(
        [sys.executable, "-c", script], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def provide(home: Path, read: bool = True, **variables: str) -> str:
    process = start(PROVIDE.replace("{read}", str(read)), home, **variables)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out.strip()


def test_the_first_token_is_a_file_that_only_its_owner_reads(tmp_path: Path) -> None:
    token, in_environment = provide(tmp_path).split()
    path = tmp_path / ".ray/auth_token"
    assert (path.read_text(), in_environment) == (token, "False")
    assert len(token) == 64
    assert (path.stat().st_mode & 0o777, path.parent.stat().st_mode & 0o777) == (0o600, 0o700)
    assert [file.name for file in path.parent.iterdir()] == ["auth_token"]
    assert provide(tmp_path).split()[0] == token


def test_processes_that_start_together_have_the_same_token(tmp_path: Path) -> None:
    processes = [start(PROVIDE.replace("{read}", "True"), tmp_path) for _ in range(3)]
    assert len({process.communicate(timeout=60)[0] for process in processes}) == 1


def test_a_token_that_is_given_is_used_and_no_file_is_made(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("a" * 64)
    assert provide(tmp_path, RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(tmp_path / "mine")).split()[0] == "a" * 64
    assert provide(tmp_path, RAY_AUTH_TOKEN="b" * 64).split()[0] == "b" * 64
    assert provide(tmp_path, read=False, RAY_AUTH_MODE="disabled") == "- False"
    assert not (tmp_path / ".ray").exists()


def test_a_named_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    told = provide(tmp_path, RAY_AUTH_TOKEN_PATH=str(tmp_path / "none"))
    assert told.startswith("4 RAY_AUTH_TOKEN_PATH is set but file cannot be opened or is empty")
    assert str(tmp_path / "none") in told


@pytest.mark.parametrize("case", ["no home folder", "a token in the home folder", "tokens disabled, long $TMPDIR"])
def test_a_local_cluster_works_with_and_without_tokens(tmp_path: Path, case: str) -> None:
    home, variables = tmp_path, {}
    if case == "no home folder":
        home = tmp_path / "file"
        home.touch()
    elif case == "a token in the home folder":
        (home / ".ray").mkdir()
        (home / ".ray/auth_token").write_text("c" * 64)
    else:
        long = tmp_path / ("long" * 15)  # as batch systems make them: too long for a socket's name
        long.mkdir()
        variables = {"RAY_AUTH_MODE": "disabled", "TMPDIR": str(long)}
    process = start(RUN, home, **variables)
    out, err = process.communicate(timeout=120)
    assert out.split("\n")[:2] == ["sum 2 True", "closed"], out + err
