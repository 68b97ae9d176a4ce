"""No key of the environment is in anything that a run, a crash or W&B writes (F30, I9)."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from tiny import TINY
from wandb_server import WandbServer

pytestmark = pytest.mark.ray

CANARIES = {
    "WANDB_API_KEY": "0123456789abcdefcafe0123456789abcdefcafe",
    "HF_TOKEN": "hf_CanaryCanaryCanaryCanaryCanaryCa",
    "AWS_SECRET_ACCESS_KEY": "canary/secret+0123456789abcdefghijklmnop",
    "CANARY_PASSWORD": "correct horse battery staple",
}
TYPED = "canary-typed-by-mistake"
SMALL = (
    *TINY, "methods=[base]", "base.rounds=1", "task.languages=[eng]", "base.cohort=3", "strategy.cohort=3",
    "personalise.pools=[seen]", "engine.backend=ray", "engine.actors=1",
)  # fmt: skip


@dataclass(frozen=True)
class Ran:
    """A command's end: what it said, and where whatever it wrote lies."""

    code: int
    said: str
    places: tuple[Path, ...]


def fedtailor(*words: str, storage: Path, rays: Path, server: str, **env: str) -> Ran:
    """Runs the command with all canaries in its environment and with folders of its own for all that it may write."""
    home, temp = storage.parent / "home", storage.parent / "t"
    for folder in (home, temp, storage):
        folder.mkdir(exist_ok=True)
    own = {"HOME": str(home), "TMPDIR": str(temp), "RAY_TMPDIR": str(rays), "WANDB_BASE_URL": server}
    everything = {**os.environ, "OMP_NUM_THREADS": "1", **CANARIES, **own, **env}
    command = [sys.executable, "-m", "fedtailor", *words]
    done = subprocess.run(command, env=everything, capture_output=True, text=True, cwd=storage)
    return Ran(done.returncode, done.stdout + done.stderr, (storage, home, temp, rays))


def holding(places: Sequence[Path], secrets: Sequence[str]) -> list[tuple[str, str]]:
    """(file, secret) for every file that holds one, inside compressed Parquet columns too."""
    found = []
    for path in (path for place in places for path in place.rglob("*")):
        if not path.is_file() or path.is_symlink():
            continue
        content = path.read_bytes()
        if path.suffix == ".parquet":
            content += repr(pq.read_table(path).to_pydict()).encode() + repr(pq.read_schema(path).metadata).encode()
        found += [(str(path), secret) for secret in secrets if secret.encode() in content]
    return found


@pytest.fixture(scope="module")
def rays() -> Iterator[Path]:
    """A folder for Ray's sessions; its sockets need a short path."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def server() -> Iterator[WandbServer]:
    with WandbServer() as here:
        yield here


@pytest.fixture(scope="module")
def ran(server: WandbServer, rays: Path, tmp_path_factory: pytest.TempPathFactory) -> Ran:
    """A run on Ray that ends well, with W&B offline."""
    storage = tmp_path_factory.mktemp("leak") / "runs"
    words = (*SMALL, "wandb.mode=offline", f"wandb.group=x {CANARIES['CANARY_PASSWORD']}", f"storage={storage}")
    return fedtailor("run", *words, "--run-id", "run", storage=storage, rays=rays, server=server.url)


def test_a_run_writes_no_secret_anywhere(ran: Ran) -> None:
    assert ran.code == 0, ran.said
    assert [secret for secret in CANARIES.values() if secret in ran.said] == []
    assert any(path.suffix == ".wandb" for path in ran.places[0].rglob("*"))
    assert holding(ran.places, list(CANARIES.values())) == []


def test_the_search_would_find_what_is_there(ran: Ran) -> None:
    """A test that looks in the wrong places cannot fail: a word of the run is in Parquet, in W&B's file, in JSON."""
    found = {Path(path).suffix for path, _ in holding(ran.places, ["train_loss"])}
    assert {".parquet", ".wandb"} <= found
    assert holding(ran.places[3:], ["raylet"]), "no logs of Ray were found"


def test_wandb_variables_start_no_run_in_workers(ran: Ran, server: WandbServer) -> None:
    assert ran.code == 0, ran.said
    assert server.asked == []


def test_a_crash_writes_no_secret(tmp_path: Path, rays: Path, server: WandbServer) -> None:
    storage = tmp_path / "runs"
    words = (*SMALL, "engine.backend=serial", f"storage={storage}", "--run-id", "run")
    fault = {"FEDTAILOR_FAULT": "eio:commit:before-record@1"}
    done = fedtailor("run", *words, storage=storage, rays=rays, server=server.url, **fault)
    assert done.code != 0
    assert [secret for secret in CANARIES.values() if secret in done.said] == []
    assert holding(done.places, list(CANARIES.values())) == []


@pytest.mark.parametrize("words", [
    (f"wandb.api_key={TYPED}", f"wandb.entity={CANARIES['WANDB_API_KEY']}"), (f"storage=s3://id:{TYPED}@bucket/runs",),
])  # fmt: skip
def test_a_key_given_as_a_setting_is_refused_and_not_repeated(
    words: tuple[str, ...], tmp_path: Path, rays: Path, server: WandbServer
) -> None:
    storage = tmp_path / "runs"
    done = fedtailor("run", *SMALL, f"storage={storage}", *words, storage=storage, rays=rays, server=server.url)
    assert done.code in (2, 5), done.said
    assert [secret for secret in (TYPED, *CANARIES.values()) if secret in done.said] == []
    assert holding(done.places, [TYPED, *CANARIES.values()]) == []
