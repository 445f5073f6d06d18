"""Names that a terminal library, a plot or a shell would take for something else are printed as they are, by every command.

`[/bold]` is rich's markup, `:cat:` its picture, `$x$` matplotlib's formula, `%` and a space a shell's and a format's.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from octavo import demo
from octavo.cli import main

ODD = "m[/bold] :cat: $x$ {a} 100%"


def run(monkeypatch, *arguments):
    """The command in this process; raises what it raises."""
    monkeypatch.setattr(sys, "argv", ["octavo", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 0


def shown_command(text, start):
    """The arguments of a command that was printed to be copied."""
    line = next(line for line in text.splitlines() if start in line)
    return shlex.split(line[line.index("octavo") :])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model and a text, each with an odd name, and the model in 8 bits."""
    folder = tmp_path_factory.mktemp("names")
    shutil.copytree(demo.MODEL, folder / ODD)
    (folder / f"{ODD}.txt").write_text("El temor de Jehová es el principio de la sabiduría.\n" * 40)
    return folder


@pytest.fixture
def odd(folder, monkeypatch):
    monkeypatch.chdir(folder)
    return ODD


def test_quantize_and_the_command_that_it_prints(odd, folder, monkeypatch, capsys):
    out = f"8 bits {ODD}"
    run(monkeypatch, "quantize", odd, out)
    assert (folder / out / "config.json").exists()
    assert shown_command(capsys.readouterr().out, "Next:") == ["octavo", "generate", out, "..."]
    run(monkeypatch, "generate", out, "Y [/x] dijo :cat:", "--max-new-tokens", 2, "--greedy")


def test_inspect_and_plan(odd, monkeypatch, capsys):
    for command in ("inspect", "plan"):
        run(monkeypatch, command, odd)
        assert ODD in capsys.readouterr().out


def test_finetune_merge_and_the_commands_that_they_print(odd, folder, monkeypatch, capsys):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    options = ("--max-steps", 1, "--max-length", 32, "--lora-r", 2, "--evaluations", 1)
    run(monkeypatch, "finetune", odd, "--data", f"{ODD}.txt", "--output", f"ft {ODD}", *options)
    said = capsys.readouterr().err
    assert shown_command(said, "Try it:") == ["octavo", "generate", odd, "...", "--adapter", f"ft {ODD}"]
    assert (folder / f"ft {ODD}" / "loss.png").stat().st_size > 1000
    run(monkeypatch, "quantize", odd, "eight")
    capsys.readouterr()
    run(monkeypatch, "merge", "eight", f"ft {ODD}", f"merged {ODD}")
    assert shown_command(capsys.readouterr().err, "Next:") == ["octavo", "generate", f"merged {ODD}", "..."]


def test_evaluate_and_compare(odd, folder, monkeypatch, capsys):
    few = ("--text", f"{ODD}.txt", "--limit-tokens", 60, "--window", 32)
    run(monkeypatch, "evaluate", odd, *few, "--report", f"report {ODD}")
    said = capsys.readouterr().out
    assert ODD in said and f"{ODD}.txt" in said
    assert "m[/bold] :cat: $x$ {a} 100%" in (folder / f"report {ODD}" / "index.html").read_text()
    run(monkeypatch, "compare", odd, *few, "--formats", "fitted-64", "--output", f"compared {ODD}")
    assert ODD in capsys.readouterr().out
    assert (folder / f"compared {ODD}" / "compare.png").stat().st_size > 1000


def test_export(odd, folder, monkeypatch, capsys):
    run(monkeypatch, "export", odd, f"{ODD}.gguf")
    assert f"{ODD}.gguf" in " ".join(capsys.readouterr().out.split())


def test_errors(odd, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["octavo", "inspect", f"./none {ODD}"])
    with pytest.raises(SystemExit):
        main()
    assert capsys.readouterr().err.startswith(f"error: ./none {ODD}: no such file or folder")


@pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any bytes")
def test_a_name_that_is_no_text_and_a_terminal_without_our_characters(tmp_path):
    """The result is there, so the exit status says so, whatever the terminal can show."""
    name = os.fsencode(tmp_path) + b"/ocho \xff bits"
    done = subprocess.run(
        [sys.executable, "-m", "octavo", "quantize", str(demo.MODEL), name],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )
    assert done.returncode == 0, done.stderr
    assert b"weight error" in done.stdout
    config = json.loads((tmp_path / os.fsdecode(b"ocho \xff bits") / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "octavo"
