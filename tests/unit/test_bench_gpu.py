"""`make bench-gpu`: a part that fails or hangs does not stop the others, everything is on the page, nothing is left."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
OWN_PARTS = """
import subprocess, sys, time

def works(bench):
    bench.row("figures", {"type": "float32", "TFLOP/s": 12.5})
    bench.answer("12.5 TFLOP/s")

def fails(bench):
    bench.row("figures", {"type": "bfloat16", "TFLOP/s": 0.5})
    raise ValueError("no such kernel")

def hangs(bench):
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
    bench.row("processes", {"pid": child.pid})
    time.sleep(600)

def goes_on(bench):
    with bench.attempt("figures", {"lanes": 1}, "note"):
        raise RuntimeError("first")
    bench.row("figures", {"lanes": 2})
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Any]:
    """The program, with parts of our own beside its own; gone from the modules afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    (tmp_path / "own_parts.py").write_text(OWN_PARTS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    import gpu

    yield gpu
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(BENCHMARKS)):
            del sys.modules[name]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(text) for text in (folder / "gpu.jsonl").read_text("utf-8").splitlines()]


def ends(folder: Path) -> dict[str, str]:
    return {line["part"]: line["status"] for line in lines_of(folder)[1:] if "status" in line}


def test_one_part_fails_and_one_hangs_and_the_others_are_on_the_page(
    bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [
        bench.Part("hangs", "own_parts:hangs", 15, "Does it end?"),
        bench.Part("fails", "own_parts:fails", 60, "Is there a kernel?"),
        bench.Part("card", "own_parts:fails", 60, "Is there a card?", needs_card=True),
        bench.Part("peak", "gpu_speed:peak", 120, "What can it do?"),
    ]
    began = time.monotonic()
    assert bench.main(["--device", "cpu", "--quick", "--minutes", "10", "--out", str(tmp_path / "out")], parts) == 1
    assert ends(tmp_path / "out") == {"hangs": "deadline", "fails": "failed", "card": "does not apply", "peak": "ok"}
    assert "without success: hangs, fails" in capsys.readouterr().out
    lines = lines_of(tmp_path / "out")
    [left] = [line["cells"]["pid"] for line in lines[1:] if line.get("table") == "processes"]
    assert not psutil.pid_exists(left) or psutil.Process(left).status() == psutil.STATUS_ZOMBIE
    assert time.monotonic() - began < 300
    [failed] = [line for line in lines[1:] if line.get("status") == "failed"]
    assert failed["error"] == "ValueError: no such kernel"
    assert "raise ValueError" in failed["traceback"]
    page = (tmp_path / "out/gpu.md").read_text("utf-8")
    assert "| hangs | **deadline** | 15 | not finished after 15 s, killed |" in page
    assert "| card | does not apply | 0 | needs a card |" in page
    assert "| bfloat16 | 0.500 |" in page, "what a part measured before it failed is kept"
    assert page.index("## hangs") < page.index("## fails") < page.index("## peak")
    assert "| float32 |" in page[page.index("## peak") :]


def test_a_part_that_is_measured_again_keeps_the_others(bench: Any, tmp_path: Path) -> None:
    parts = [bench.Part(name, f"own_parts:{name}", 60, "?") for name in ("works", "fails", "goes_on")]
    words = ["--device", "cpu", "--quick", "--out", str(tmp_path)]
    assert bench.main([*words, "--only", "works,goes_on"], parts) == 1
    assert ends(tmp_path) == {"works": "ok", "goes_on": "failed"}
    assert bench.main([*words, "--skip", "goes_on,fails"], parts) == 0
    assert ends(tmp_path) == {"works": "ok", "goes_on": "failed"}
    page = (tmp_path / "gpu.md").read_text("utf-8")
    assert page.count("| works | ok |") == 1
    assert "RuntimeError: first" in page
    assert "| 2 | – |" in page, "after an attempt that failed the part goes on"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "peek"], "no part peek; parts: peak, equal"),
        (["--only", "peak", "--skip", "peak"], "--only and --skip leave no part"),
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--device", "tpu"], "invalid choice: 'tpu'"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(
    bench: Any, words: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        bench.main(words)
    assert stop.value.code == 2
    assert says in capsys.readouterr().err


def test_a_card_that_is_not_there_is_refused_before_anything_is_measured(
    bench: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "look", lambda device: {"cards": [], "cuda": None, "error": ""})
    assert bench.main(["--out", str(tmp_path)]) == 2
    assert "sees no card; --device cpu runs what does not need one" in capsys.readouterr().err
    assert not (tmp_path / "gpu.jsonl").exists()


def test_every_part_has_a_function_and_they_fit_in_ten_minutes(bench: Any) -> None:
    assert sum(part.seconds for part in bench.PARTS) <= 600
    for part in bench.PARTS:
        module, _, function = part.target.partition(":")
        assert f"def {function}(bench: Bench" in (BENCHMARKS / f"{module}.py").read_text("utf-8")
