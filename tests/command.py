"""The command line in this process, and processes that are stopped while they write."""

import subprocess
import sys
import time
from pathlib import Path

import pytest


def run(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """`octavo ARGUMENTS` on a terminal of 80 columns: exit status, what it printed, and its errors."""
    from octavo.cli import main

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys, "argv", ["octavo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    said = capsys.readouterr()
    return stopped.value.code or 0, said.out, said.err


def stop_midway(process: subprocess.Popen, out: Path, signal: int, done: int = 4) -> None:
    """Send `signal` once the journal of what will be `out` has more than `done` lines."""
    journal = out.with_name(f"{out.name}.partial") / "octavo-journal.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if journal.exists() and journal.read_bytes().count(b"\n") > done:
            break
        time.sleep(0.005)
    process.send_signal(signal)
