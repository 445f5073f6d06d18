"""The notebooks in examples/ run from top to bottom on the model that ships with Octavo."""

import os
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = sorted((Path(__file__).parent.parent / "examples").glob("*.ipynb"))


def printed(book) -> str:
    """All text that the cells of an executed notebook gave."""
    parts = []
    for cell in book.cells:
        for output in cell.get("outputs", ()):
            parts.append(output.get("text") or output.get("data", {}).get("text/plain", ""))
    # What is printed piece by piece comes as several outputs.
    return "".join(parts)


def test_there_are_three():
    assert [path.name.split("_")[0] for path in NOTEBOOKS] == ["1", "2", "3"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path):
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in book.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    # Cells call the command as `!octavo`: the one beside this Python.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    book = nbformat.read(path, as_version=4)
    nbclient.NotebookClient(book, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = printed(book)
    if path.stem.startswith("1"):
        assert "El sentido de la vida es" in text and "operations without a path of their own: none" in text
    if path.stem.startswith("2"):
        before, after = (
            float(part.split()[0]) for part in text.split("% less")[0].split("perplexity ")[-1].split(", ")
        )
        assert after < 0.95 * before
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    if path.stem.startswith("3"):
        assert (tmp_path / "model-8bit" / "model.safetensors").exists()
        assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
        assert list((tmp_path / "report").glob("*.png")) and list((tmp_path / "comparison").glob("*.png"))
