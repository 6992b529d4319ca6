"""tutorials/python-api.ipynb, executed from the first cell to the last: on a tiny model, and as it stands."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient
from tiny import save_tiny

ROOT = Path(__file__).parent.parent
BOOK = ROOT / "tutorials" / "python-api.ipynb"


def execute(folder: Path, monkeypatch: pytest.MonkeyPatch, model: str | None = None) -> list[Any]:
    """The code cells with what they have put out; a cell that raises is the test's failure."""
    shutil.copytree(ROOT / "tutorials" / "data", folder / "data")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("IPYTHONDIR", str(folder / "ipython"))
    book = nbformat.read(BOOK, as_version=4)
    if model is not None:
        (named,) = [cell for cell in book.cells if 'MODEL = "' in cell.source]
        named.source = named.source.replace("smollm2-135m-instruct", model)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return [cell for cell in book.cells if cell.cell_type == "code"]


def said(cells: list[Any], beginning: str) -> str:
    """What the cell that begins so has put out."""
    (cell,) = [cell for cell in cells if cell.source.startswith(beginning)]
    return "".join(out.get("text") or out.get("data", {}).get("text/plain", "") for out in cell.outputs)


def test_it_is_committed_clean() -> None:
    book = nbformat.read(BOOK, as_version=4)
    nbformat.validate(book)
    assert all(not cell.outputs and cell.execution_count is None for cell in book.cells if cell.cell_type == "code")
    assert BOOK.stat().st_size < 20_000


@pytest.mark.slow
def test_on_a_tiny_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = save_tiny(tmp_path / "tiny", max_position_embeddings=2048)
    cells = execute(tmp_path, monkeypatch, str(tiny))
    assert "[[" in said(cells, "from litft.data.shown")
    before, after = (float(part) for part in said(cells, "quiet").partition("held-out loss: ")[2].split("->"))
    assert after < before
    assert "README.md" in said(cells, "adapter = ")
    assert "'loss'" in said(cells, "from litft.evaluate")


@pytest.mark.slow
def test_on_the_default_model(default_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cells = execute(tmp_path, monkeypatch)
    before, after = (float(part) for part in said(cells, "quiet").partition("held-out loss: ")[2].split("->"))
    assert after < before - 0.1
    plain, ours = said(cells, "from peft"), said(cells, "from litft.infer")
    assert plain.strip() and ours.strip()
