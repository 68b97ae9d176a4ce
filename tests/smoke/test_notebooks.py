"""The notebooks run from nothing, in an empty folder, and are kept without what they print."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbclient
import nbformat
import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def read(path: Path) -> Any:
    return nbformat.read(path, as_version=nbformat.NO_CONVERT)


@pytest.fixture
def quiet_jupyter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keeps the kernel's history, settings and sockets out of the home folder, and the reader's run out of the test."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        folder = tmp_path / ".jupyter" / name.lower()
        folder.mkdir(parents=True)
        monkeypatch.setenv(name, str(folder))
    monkeypatch.delenv("RUN_DIR", raising=False)
    monkeypatch.delenv("DISPLAY", raising=False)


def execute(path: Path, folder: Path) -> Any:
    """The executed notebook; any cell that raises fails the test with its traceback."""
    client = nbclient.NotebookClient(
        read(path), timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def printed(notebook: Any) -> dict[str, str]:
    """Cell id to its plain text."""
    texts = {}
    for cell in notebook.cells:
        outputs = cell.get("outputs", [])
        texts[cell.id] = "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in outputs)
    return texts


def figures(notebook: Any) -> list[str]:
    """Ids of the cells that drew something."""
    return [c.id for c in notebook.cells if any("image/png" in out.get("data", {}) for out in c.get("outputs", []))]


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_jupyter")
@every_notebook
def test_a_notebook_runs_from_nothing_and_draws_its_figures(path: Path, tmp_path: Path) -> None:
    done = execute(path, tmp_path)
    drawing = [cell.id for cell in done.cells if "plt.subplots" in cell.source]
    assert drawing
    assert figures(done) == drawing


@pytest.mark.slow
@pytest.mark.usefixtures("quiet_jupyter")
def test_the_ranks_notebook_reads_a_run_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tiny import run_tiny, tiny

    run = run_tiny(tiny(tmp_path / "store", "methods=[lora,fedp2eft]"), "elsewhere")
    monkeypatch.setenv("RUN_DIR", str(tmp_path / "store" / run.run_id))
    done = execute(ROOT / "notebooks/03_read_the_ranks.ipynb", tmp_path)
    assert printed(done)["load"] == "{'fedp2eft': (18, 8, 4)}"
    assert not (tmp_path / "runs").exists()


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["01_first_run", "02_add_a_method", "03_read_the_ranks"]


@every_notebook
def test_no_output_is_stored(path: Path) -> None:
    stored = [cell.id for cell in read(path).cells if cell.get("outputs") or cell.get("execution_count") is not None]
    assert not stored


@every_notebook
def test_a_notebook_is_valid_and_holds_no_more_than_it_needs(path: Path) -> None:
    notebook = read(path)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert notebook.metadata.kernelspec.name == "python3"
    assert not [cell.id for cell in notebook.cells if cell.metadata]
    assert path.read_text("utf-8") == nbformat.writes(notebook, indent=1).rstrip("\n") + "\n"


@every_notebook
def test_cells_are_short(path: Path) -> None:
    long = [cell.id for cell in read(path).cells if cell.cell_type == "code" and len(cell.source.splitlines()) > 25]
    assert not long
