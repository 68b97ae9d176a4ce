"""Jobs on a real head with tokens: what `ray job submit` starts, refuses, resumes, ends, and never tells."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from tiny import TINY, run_tiny, tiny

from fedtailor.storage.commit_log import CommitLog
from fedtailor.storage.digest import digest
from fedtailor.storage.files import Storage
from fedtailor.storage.run_folder import RunFolder

pytestmark = pytest.mark.ray

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
CANARY = "canary-7f3a9c2b5d1e8064"
SMALL = [
    *TINY, "methods=[base,lora]", "budgets=[1]", "base.rounds=4", "base.cohort=4", "engine.keep_rounds=1",
    "engine.backend=ray", "engine.actors=1", "engine.num_cpus=0.5",
]  # fmt: skip


@dataclass(frozen=True)
class Head:
    """A running head."""

    folder: Path
    env: dict[str, str]
    gcs: int
    dashboard: int
    client: int

    @property
    def token(self) -> str:
        return (self.folder / "token").read_text()

    def output(self) -> str:
        """What ``ray start`` said."""
        return (self.folder / "output").read_text()

    def ask(self, path: str, method: str = "GET") -> Any:
        request = urllib.request.Request(f"http://127.0.0.1:{self.dashboard}{path}", method=method)
        request.add_header("Authorization", f"Bearer {self.token}")
        with urllib.request.urlopen(request, timeout=20) as answer:
            return json.load(answer)

    def ray_job(self, *words: str) -> subprocess.CompletedProcess[str]:
        """The real command, as a user with a W&B key in the environment types it in the checkout."""
        command = [str(BIN / "ray"), "job", *words]
        command[3:3] = ["--address", f"http://127.0.0.1:{self.dashboard}"]
        env = {**self.env, "WANDB_API_KEY": CANARY}
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=240)

    def submit(self, name: str, *words: str, wait: bool = False) -> str:
        options = ["--working-dir", ".", "--runtime-env", "cluster/runtime_env.yaml", "--submission-id", name]
        done = self.ray_job("submit", *options, *([] if wait else ["--no-wait"]), "--", *words)
        assert wait or done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def run(self, name: str, storage: Path, *words: str, fault: str | None = None, run_id: str = "run") -> None:
        planted = ["env", f"FEDTAILOR_FAULT={fault}"] if fault else []
        self.submit(
            name, *planted, "python", "-m", "fedtailor", "run", *SMALL, f"storage={storage}", *words, "--run-id", run_id
        )

    def info(self, name: str) -> dict[str, Any]:
        return dict(self.ask(f"/api/jobs/{name}"))

    def log(self, name: str) -> str:
        return str(self.ask(f"/api/jobs/{name}/logs")["logs"])

    def is_live(self, name: str) -> bool:
        return self.info(name)["status"] in ("PENDING", "RUNNING")

    def waits(self, name: str, condition: Callable[[], bool]) -> None:
        """Until a live job has got so far."""
        wait_for(lambda: condition() or not self.is_live(name), lambda: self.log(name))
        assert self.is_live(name), self.log(name)

    def ends(self, name: str, state: str) -> str:
        """Waits for a job's end; its log."""
        wait_for(lambda: not self.is_live(name), lambda: self.log(name))
        log = self.log(name)
        assert self.info(name)["status"] == state, log
        return log


def wait_for(condition: Callable[[], Any], otherwise: Callable[[], str] = lambda: "too slow") -> None:
    deadline = time.monotonic() + 240
    while not condition():
        assert time.monotonic() < deadline, otherwise()
        time.sleep(0.1)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def environment(folder: Path) -> dict[str, str]:
    """What a cluster with a token of its own, kept in ``folder``, and its commands run in."""
    token = folder / "token"
    token.touch(0o600)
    token.write_text(os.urandom(32).hex())
    ours = ("RAY_", "FEDTAILOR_", "WANDB_", "PYTHONPATH")
    return {name: value for name, value in os.environ.items() if not name.startswith(ours)} | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token), "RAY_USAGE_STATS_ENABLED": "0",
        "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1",
    }  # fmt: skip


@contextmanager
def running_head(cpus: int, *more: str) -> Iterator[Head]:
    """A head with tokens, and nothing left of it afterwards.

    Its ports are free when they are chosen and may be taken before it opens them: then it is started again with
    others.
    """
    told = []
    for _ in range(3):
        folder = Path(tempfile.mkdtemp(prefix="rj", dir="/tmp"))  # Ray's socket names must stay short
        made = Head(folder, environment(folder), free_port(), free_port(), free_port())
        process = start_head(made, cpus, more)
        try:
            if comes_up(made, process):
                yield made
                return
            told.append(f"exit code {process.returncode}: {made.output()}")
        finally:
            end(process, folder)
    pytest.fail("\n".join(["`ray start --head` ended by itself three times, each time with other ports:", *told]))


def start_head(made: Head, cpus: int, more: tuple[str, ...]) -> subprocess.Popen[bytes]:
    words = [
        "--head", "--block", "--num-cpus", str(cpus), "--port", str(made.gcs), "--dashboard-host", "127.0.0.1",
        "--dashboard-port", str(made.dashboard), "--ray-client-server-port", str(made.client),
        "--dashboard-agent-listen-port", "0", "--temp-dir", str(made.folder / "ray"),
        "--object-store-memory", "100000000", *more,
    ]  # fmt: skip
    with (made.folder / "output").open("wb") as output:
        return subprocess.Popen([str(BIN / "ray"), "start", *words], env=made.env, stdout=output, stderr=output)


def comes_up(made: Head, process: subprocess.Popen[bytes]) -> bool:
    wait_for(lambda: process.poll() is not None or answers(made), made.output)
    return process.poll() is None


def end(process: subprocess.Popen[bytes], folder: Path) -> None:
    """Ends a head with all that it started, also what outlived it; they have its folder in their command line."""
    family: list[psutil.Process] = []
    if process.poll() is None:
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(5)
    for member in [*family, *processes_with(str(folder))]:
        with suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait(30)
    shutil.rmtree(folder, ignore_errors=True)


def processes_with(text: str) -> list[psutil.Process]:
    """Those that have it in their command line."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess):
            if text in " ".join(process.cmdline()):
                found.append(process)
    return found


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with running_head(2) as made:
        yield made


def answers(head: Head) -> bool:
    try:
        socket.create_connection(("127.0.0.1", head.client), 5).close()
        return bool(head.ask("/api/version"))
    except OSError:
        return False


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The storages of all jobs."""
    return tmp_path_factory.mktemp("jobs")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Digest of the same words in this process, without Ray."""
    folder = tmp_path_factory.mktemp("reference")
    run = run_tiny(tiny(folder, *SMALL[len(TINY) :], "engine.backend=serial"))
    return digest(run.storage, run.run_id)


def committed(storage: Path) -> int:
    found = [f for f in storage.glob("artifacts/base-*") if f.is_dir()]
    return sum(len(CommitLog(Storage(storage), f"artifacts/{f.name}").all(objects=False)) for f in found)


def test_the_code_arrives_with_the_job_and_the_standard_library_s_platform_stays(head: Head) -> None:
    script = "import actors, fedtailor, platform; print(actors.__file__, fedtailor.__file__, platform.python_version())"
    log = head.submit("code-1", "python", "-c", script, wait=True)
    copy = r"\S+/working_dir_files/_ray_pkg_\w+"
    assert re.search(rf"^{copy}/actors/__init__.py {copy}/platform/fedtailor/__init__.py 3\.\d+", log, re.M), log
    assert "Job 'code-1' succeeded" in log


def test_a_job_that_fails_ends_with_the_run_s_exit_code_and_says_why(head: Head, runs: Path) -> None:
    head.run("nan-1", runs / "nan", "methods=[base]", fault="nan attempt=always stage=base", run_id="nan")
    log = head.ends("nan-1", "FAILED")
    assert head.info("nan-1")["driver_exit_code"] == 6, log
    assert re.search(r"seed42, round 0.*\bNaN", log), log
    assert "fedtailor resume nan" in log
    assert RunFolder.open(Storage(runs / "nan"), "nan").status()["state"] == "failed"


def test_a_run_has_one_live_job_goes_on_after_a_kill_and_a_stop_and_gives_table_and_digest_of_a_local_one(
    head: Head, runs: Path, reference: str
) -> None:
    place = runs / "chain"
    storage, state = Storage(place), lambda: RunFolder.open(Storage(place), "run").status()["state"]
    head.run("run-1", place, fault="hang stage=base round=1")
    head.waits("run-1", lambda: committed(place) == 1)

    head.run("run-2", place)
    log = head.ends("run-2", "FAILED")
    assert head.info("run-2")["driver_exit_code"] == 5, log
    assert re.search(r"run/LOCK is held by run 'run' \(process \d+ on \S+\)", log), log
    assert (state(), head.info("run-1")["status"]) == ("running", "RUNNING")

    entrypoints = processes_with(f"storage={place}")
    assert entrypoints
    for process in entrypoints:
        process.send_signal(signal.SIGKILL)
    head.ends("run-1", "FAILED")

    head.run("run-3", place, fault="slow stage=base round=2 seconds=4")
    head.waits("run-3", lambda: committed(place) == 2)
    head.ask("/api/jobs/run-3/stop", "POST")  # as `ray job stop` does
    log = head.ends("run-3", "STOPPED")
    assert "stopping at the next segment" in log
    assert "fedtailor resume run" in log
    assert state() == "interrupted"
    assert not storage.exists("run/LOCK")

    head.run("run-4", place)
    log = head.ends("run-4", "SUCCEEDED")
    assert digest(storage, "run") == reference
    assert "Accuracy in %" in log
    assert re.search(r"seen +Base +\d+\.\d\d", log), log
    assert "personalise/lora/seed42  done in" in log
    assert "\x1b" not in log
    assert "\r" not in log


def test_a_run_can_be_driven_through_ray_client(head: Head, runs: Path, reference: str) -> None:
    words = [*SMALL, f"storage={runs}/client", "--address", f"ray://127.0.0.1:{head.client}", "--run-id", "run"]
    command = [sys.executable, "-m", "fedtailor", "run", *words]
    env = {**head.env, "WANDB_API_KEY": CANARY, "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)])}
    done = subprocess.run(command, cwd=runs, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    assert digest(Storage(runs / "client"), "run") == reference


JOIN = """
import sys
from actors.session import ensure_ray
from fedtailor.core.errors import TailorError
for address in sys.argv[1:]:
    try:
        print("joined", ensure_ray(address).started)
    except TailorError as error:
        print(error.exit_code, error)
"""


@pytest.mark.parametrize(
    ("variables", "told"),
    [
        ({}, "wants a token, and this process shows none: set RAY_AUTH_MODE=token and RAY_AUTH_TOKEN_PATH=FILE"),
        ({"RAY_AUTH_MODE": "token"}, "couldn't find an authentication token; set RAY_AUTH_TOKEN_PATH=FILE"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}, "refuses the token that is found in $RAY_AUTH_TOKEN:"),
    ],
    ids=["token not sent", "no token", "wrong token"],
)
def test_whoever_has_not_the_token_is_told_so_and_refused(
    head: Head, tmp_path: Path, variables: dict[str, str], told: str
) -> None:
    env = {name: value for name, value in head.env.items() if not name.startswith("RAY_AUTH")}
    env |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join([str(ROOT / "platform"), str(ROOT)]), **variables}
    addresses = [f"127.0.0.1:{head.gcs}", f"ray://127.0.0.1:{head.client}"]
    done = subprocess.run(
        [sys.executable, "-c", JOIN, *addresses], env=env, capture_output=True, text=True, timeout=60, cwd=tmp_path
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stdout + done.stderr
    for line, address in zip(lines, addresses, strict=True):
        assert line.startswith("4 ")
        assert f"engine.address={address}" in line
        assert told in line
    assert list(tmp_path.iterdir()) == []


def test_no_job_tells_the_submitter_s_secrets(head: Head, runs: Path) -> None:
    """After the other tests: their jobs were submitted with a W&B key in the environment."""
    jobs = head.ask("/api/jobs/")
    submitted = [job["submission_id"] for job in jobs if job["type"] == "SUBMISSION"]
    assert "code-1" in submitted
    told = head.ray_job("list").stdout
    assert "code-1" in told
    texts = [told, json.dumps(jobs), *(head.log(name) for name in submitted)]
    assert [text for text in texts if CANARY in text or head.token in text] == []
    names = {file.name for file in files(head, runs)}
    assert {"run.json", "events.jsonl", "job-driver-code-1.log"} <= names
    assert [file for file in files(head, runs) if holds(file, CANARY) or holds(file, head.token)] == []


def files(head: Head, runs: Path) -> list[Path]:
    """Whatever Ray or a run has written."""
    return [file for place in (head.folder / "ray", runs) for file in place.rglob("*") if file.is_file()]


def holds(file: Path, text: str) -> bool:
    with suppress(FileNotFoundError):  # Ray tidies up meanwhile
        return text.encode() in file.read_bytes()
    return False
