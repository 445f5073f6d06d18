"""Check every architecture, and write the table of docs/MODELS.md.

    python scripts/architecture_table.py sweep             all of them → benchmarks/results/architectures.json
    python scripts/architecture_table.py sweep mamba t5    only these; their rows are replaced in the file
    python scripts/architecture_table.py table             docs/MODELS.md from the file

A sweep takes a few seconds an architecture. Each runs in a process that is started anew if it hangs or dies.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
PAGE = ROOT / "docs" / "MODELS.md"
SECONDS = 240


def worker(connection) -> None:
    """Check what comes through the connection: (architecture, task) → row."""
    os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="critical")
    import warnings

    warnings.simplefilter("ignore")
    import torch
    import transformers

    from tests.architectures.check import PlainFailsError, check

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    while True:
        try:
            kind, task = connection.recv()
        except EOFError:
            return
        row = {"architecture": kind, "task": task}
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = {**check(kind, task, folder), "outcome": "works"}
            except PlainFailsError as error:
                row |= {"outcome": "plain", "reason": str(error)}
            except Exception as error:
                text = str(error).strip().splitlines() or [""]
                row |= {"outcome": "fails", "reason": f"{type(error).__name__}: {text[0][:300]}"}
                if os.environ.get("TRACE"):
                    import traceback

                    traceback.print_exc()
        connection.send(row)


class Worker:
    """A process that checks architectures one after the other."""

    def __init__(self):
        context = multiprocessing.get_context("spawn")
        self.connection, other = context.Pipe()
        self.process = context.Process(target=worker, args=(other,), daemon=True)
        self.process.start()
        other.close()

    def check(self, kind: str, task: str) -> dict:
        row = {"architecture": kind, "task": task, "outcome": "fails"}
        try:
            self.connection.send((kind, task))
            if self.connection.poll(SECONDS):
                return self.connection.recv()
            row["reason"] = f"took longer than {SECONDS} s"
        except (EOFError, OSError):
            row["reason"] = "its process died"
        self.process.kill()
        return row


def sweep(only: list[str], out: Path, tasks: list[str]) -> None:
    import torch
    import transformers

    from tests.architectures.check import architectures

    old = json.loads(out.read_text())["rows"] if only and out.exists() else []
    rows = {(row["architecture"], row["task"]): row for row in old}
    todo = [(kind, task) for task in tasks for kind in architectures(task) if not only or kind in only]
    running = Worker()
    started = time.monotonic()
    for number, (kind, task) in enumerate(todo, 1):
        row = running.check(kind, task)
        if not running.process.is_alive() or row.get("reason", "").startswith("took longer"):
            running = Worker()
        rows[kind, task] = row
        done = [row.get("generation"), row.get("adapters")]
        told = row.get("reason") or f"coverage {row.get('coverage', 0):.3f} {row['fallbacks'] or ''} {done}"
        took = time.monotonic() - started
        print(f"{number}/{len(todo)} {took:.0f} s  {task} {kind}: {row['outcome']}  {told}", flush=True)
    running.connection.close()
    ordered = [rows[key] for task in tasks_of(rows) for key in sorted(rows) if key[1] == task]
    found = {"transformers": transformers.__version__, "torch": torch.__version__, "rows": ordered}
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    for task in tasks_of(rows):
        print(task, dict(Counter(row["outcome"] for row in ordered if row["task"] == task)))


def tasks_of(rows) -> list[str]:
    return [task for task in ("causal", "seq2seq", "masked") if any(key[1] == task for key in rows)]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("sweep", "table"))
    parser.add_argument("only", nargs="*", help="model types; default: all")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--task", action="append", choices=("causal", "seq2seq", "masked"))
    arguments = parser.parse_args()
    if arguments.what == "sweep":
        sweep(arguments.only, arguments.out, arguments.task or ["causal", "seq2seq", "masked"])
        return
    from tests.architectures.table import render_page

    page = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(render_page(page, json.loads(arguments.out.read_text())), encoding="utf-8")


if __name__ == "__main__":
    main()
