"""A virtual environment for each peer, made once from its pinned requirements, kept below ``runs/bench``."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from measure import HERE, last_line

INSTALL_S = 1800.0


@dataclass(frozen=True)
class Environment:
    """A peer's interpreter, or why there is none."""

    name: str
    folder: Path
    missing: str = ""

    def program(self, name: str) -> str:
        """Path of an installed program."""
        return str(self.folder / "bin" / name)


@cache
def environment(name: str, root: Path) -> Environment:
    """Makes or reuses the environment of ``requirements-NAME.txt``; a failure is reported, not raised."""
    pins = HERE / f"requirements-{name}.txt"
    folder = root / name
    ready, wanted = folder / "ready", hashlib.sha256(pins.read_bytes() + sys.version.encode()).hexdigest()
    if ready.exists() and ready.read_text() == wanted:
        return Environment(name, folder)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"making the environment for {name} ...", flush=True)
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    try:
        for words in ([sys.executable, "-m", "venv", str(folder)], [*pip, "-r", str(pins)]):
            subprocess.run(words, check=True, capture_output=True, text=True, timeout=INSTALL_S)
    except subprocess.CalledProcessError as error:
        return Environment(name, folder, f"not installed: {last_line(error.stderr)}")
    except subprocess.TimeoutExpired:
        return Environment(name, folder, f"not installed: pip took more than {INSTALL_S:.0f} s")
    ready.write_text(wanted)
    return Environment(name, folder)


def version_of(requirement: str, name: str) -> str:
    """The pinned version of a package in a peer's requirements."""
    lines = (HERE / f"requirements-{name}.txt").read_text().splitlines()
    return next(line.partition("==")[2] for line in lines if line.startswith(f"{requirement}=="))
