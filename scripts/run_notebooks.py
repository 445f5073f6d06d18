"""Run the notebooks in examples/ from top to bottom and store what they print, for readers who only look.

    python scripts/run_notebooks.py [examples/1_generate.ipynb ...]

It needs an environment with Octavo, nbclient, ipykernel and ipywidgets (as Colab and Kaggle have them). Paths of that environment
are stored, so install Octavo from a wheel there. Warnings are an error: they are mended where they come from.
"""

import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

import nbclient
import nbformat

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(path: Path) -> None:
    """Execute a notebook in an empty folder and write it back with its outputs."""
    book = nbformat.read(path, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        nbclient.NotebookClient(book, timeout=3600, resources={"metadata": {"path": folder}}).execute()
    for cell in book.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = joined(cell.outputs)
            for output in cell.outputs:
                if output.get("name") == "stderr" or re.search(
                    "warning", output.get("text", ""), re.IGNORECASE
                ):
                    raise SystemExit(f"{path.name}: expected no warnings, found: {output['text']}")
    book.metadata.pop("widgets", None)
    nbformat.write(book, path)
    print(path)


def joined(outputs: list[Any]) -> list[Any]:
    """What was printed piece by piece as one output of each stream, overwritten lines as they ended, without progress bars."""
    kept: list[Any] = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if kept and output.output_type == "stream" and kept[-1].get("name") == output.name:
            kept[-1]["text"] += output["text"]
        else:
            kept.append(output)
    for output in kept:
        if output.output_type == "stream":
            text = re.sub(r"[^\r\n]*\r(?!\n)", "", output["text"].replace("\r\n", "\n"))
            output["text"] = re.sub(r"^.*\d%\|.*\n?", "", text, flags=re.MULTILINE)
    return [each for each in kept if each.output_type != "stream" or each["text"].strip()]


if __name__ == "__main__":
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    for each in [Path(name) for name in sys.argv[1:]] or sorted(EXAMPLES.glob("*.ipynb")):
        run(each)
