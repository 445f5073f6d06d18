"""The command line in this process."""

import sys

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
