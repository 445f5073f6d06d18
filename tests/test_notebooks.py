"""The notebooks in examples/ run from top to bottom on the model that ships with Octavo."""

import os
import re
import sys
from pathlib import Path

import pytest

from octavo import demo

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
def test_is_stored_with_outputs_and_without_warnings(path):
    """As scripts/run_notebooks.py leaves it."""
    book = nbformat.read(path, as_version=4)
    nbformat.validate(book)
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert outputs and not any(
        output.output_type == "error" or output.get("name") == "stderr" for output in outputs
    )
    text = printed(book)
    assert not re.search("warning|error:|\x1b", text, re.IGNORECASE)
    assert "/home/" not in text and "/tmp/" not in text


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_first_cell_says_what_to_do_where_octavo_is_missing(path, monkeypatch):
    """The cell alone, pasted into a notebook without Octavo: the address is asked for, and what is put there goes to pip."""
    source = next(cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code")
    # The cell sets this for the whole process.
    monkeypatch.setenv("TERM", os.environ.get("TERM", ""))
    # The first line of code is the variable.
    assert next(line for line in source.splitlines() if not line.startswith("#")) == 'OCTAVO = ""'

    def paste(address: str) -> list[str]:
        asked: list[str] = []
        cell = source.replace('OCTAVO = ""', f'OCTAVO = "{address}"')
        cell = cell.replace('%pip install --quiet "{wanted}"', "asked.append(wanted)")
        cell = cell.replace('find_spec("octavo")', 'find_spec("no_octavo_here")')
        exec(cell, {"asked": asked})
        return asked

    assert paste("git+https://example.org/octavo") == ["octavo[train] @ git+https://example.org/octavo"]
    assert paste("https://example.org/octavo-0.1.0.whl") == [
        "octavo[train] @ https://example.org/octavo-0.1.0.whl"
    ]
    assert paste("/kaggle/input/octavo") == ["/kaggle/input/octavo[train]"]
    with pytest.raises(ImportError, match="put its address into OCTAVO above"):
        paste("")


# What a reader fills in, smaller than what is stored: a sixth of the book, a third of the steps.
FILLED_IN = {
    'TEXT = demo.TEXT / "proverbios.txt"': 'TEXT = __import__("pathlib").Path("short.txt").absolute()',
    "STEPS = 30": "STEPS = 10",
}


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["short", "whole"])
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs_from_top_to_bottom(path, whole, tmp_path, monkeypatch):
    # Cells call the command as `!octavo`: the one beside this Python.
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    book = nbformat.read(path, as_version=4)
    if not whole:
        text = (demo.TEXT / "proverbios.txt").read_text(encoding="utf-8")
        (tmp_path / "short.txt").write_text(text[: len(text) // 6], encoding="utf-8")
        for cell in book.cells:
            for stored, short in FILLED_IN.items():
                cell.source = cell.source.replace(stored, short)
        filled_in = sum(short in cell.source for cell in book.cells for short in FILLED_IN.values())
        assert filled_in == {"1": 0, "2": 2, "3": 1}[path.stem[0]]
    nbclient.NotebookClient(book, timeout=500, resources={"metadata": {"path": str(tmp_path)}}).execute()
    text = printed(book)
    if path.stem.startswith("1"):
        assert "El sentido de la vida es" in text and "operations without a path of their own: none" in text
    if path.stem.startswith("2"):
        before, after = (
            float(part.split()[0]) for part in text.split("% less")[0].split("perplexity ")[-1].split(", ")
        )
        assert after < (0.95 if whole else 0.99) * before
        assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()
    if path.stem.startswith("3"):
        assert (tmp_path / "model-8bit" / "model.safetensors").exists()
        assert (tmp_path / "model.gguf").read_bytes()[:4] == b"GGUF"
        assert list((tmp_path / "report").glob("*.png")) and list((tmp_path / "comparison").glob("*.png"))
