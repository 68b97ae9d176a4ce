"""Who is compared: how each system is started on a job folder."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from environments import Environment, environment, version_of
from measure import HERE, our_path, python
from regimes import Regime

CORES = os.cpu_count() or 1
ACTORS = min(2, CORES)
SILOS = 8
"""Clients of a round in per_client mode, where each has a process of its own."""


@dataclass(frozen=True)
class System:
    """One row.

    Args:
        key: in the JSON.
        label: in the table.
        words: command line; ``{job}`` and ``{out}`` are filled in.
        variables: environment of the process.
        dtype: type of its matrix products.
        silos: plays the job with rounds of `SILOS` clients.
        missing: why it cannot run.
    """

    key: str
    label: str
    words: Sequence[str]
    variables: Mapping[str, str] = field(default_factory=dict)
    dtype: str = "float32"
    silos: bool = False
    missing: str = ""

    def command(self, job: Path) -> list[str]:
        """The command line for a job."""
        return [word.replace("{job}", str(job)) for word in self.words]


def plain(threads: int, dtype: str = "float32") -> System:
    words = [python(), str(HERE / "run_plain.py"), "{job}", "{out}", str(threads), dtype]
    bf16 = dtype == "bfloat16"
    label = f"plain loop, {threads} thread{'s' * (threads > 1)}" + ", bf16" * bf16
    key = "plain_bf16" if bf16 else "plain" if threads == 1 else "plain_all"
    return System(key, label, words, {"OMP_NUM_THREADS": str(threads)}, dtype)


def ours(key: str, label: str, *engine: str, dtype: str = "float32", silos: bool = False) -> System:
    words = [python(), str(HERE / "run_ours.py"), "{job}", "{out}", f"dtype={dtype}", *engine]
    return System(key, label, words, our_path(), dtype, silos)


def flower(env: Environment) -> System:
    words = [env.program("python"), str(HERE / "run_flower.py"), "{job}", "{out}", str(ACTORS)]
    return System("flower", f"Flower {version_of('flwr', 'flower')}, {ACTORS} actors", words, missing=env.missing)


def pfl(env: Environment, processes: int) -> System:
    torchrun = [env.program("torchrun"), "--standalone", "--nproc-per-node", str(processes)]
    start = torchrun if processes > 1 else [env.program("python")]
    label = f"pfl {version_of('pfl', 'pfl')}, {processes} process{'es' * (processes > 1)}"
    return System(f"pfl{processes}", label, [*start, str(HERE / "run_pfl.py"), "{job}", "{out}"], missing=env.missing)


def peers(root: Path) -> tuple[Environment, Environment]:
    """Environments of Flower and pfl below ``root``."""
    return environment("flower", root), environment("pfl", root)


def systems(regime: Regime, root: Path) -> list[System]:
    """All rows of a regime; the first is what the others' parameters are compared to."""
    env_flower, env_pfl = peers(root)
    segment, ray = f"min_segment={regime.min_segment}", f"actors={ACTORS}"
    share = f"num_cpus={CORES / SILOS}"
    return [
        plain(1),
        *([plain(CORES)] if CORES > 1 else []),
        plain(1, "bfloat16"),
        flower(env_flower),
        *[pfl(env_pfl, n) for n in sorted({1, ACTORS})],
        ours("serial", "fedtailor, serial, lanes", "backend=serial", segment),
        ours("single", f"fedtailor, Ray, {ACTORS} actors, no lanes", ray, "max_lanes=1", "min_segment=1"),
        ours("silos", f"fedtailor, Ray, per_client ({SILOS} actors)", "mode=per_client", share, silos=True),
        ours("lanes", f"fedtailor, Ray, {ACTORS} actors, lanes", ray, segment),
        ours("lanes16", f"fedtailor, Ray, {ACTORS} actors, lanes, bf16", ray, segment, dtype="bfloat16"),
    ]
