"""What the commands print on a terminal of 80 columns: no line wider, no name cut, examples that can be copied and run."""

import re
import shlex
import subprocess
import sys

import pytest
from rich.console import Console
from typer.main import get_command

from octavo import demo
from octavo.cli import app
from octavo.cli.terminal import broken, say, show_facts, show_table

from .command import run

COMMANDS = sorted(get_command(app).commands)


@pytest.fixture(autouse=True)
def eighty(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("NO_COLOR", "1")


def printed(monkeypatch, capsys, *arguments):
    status, out, err = run(monkeypatch, capsys, *arguments)
    assert status == 0, err
    return out


def examples(text):
    """The commands under "Examples:" in a help text, each as it would be typed, its continued lines joined."""
    block = text.partition("Examples:")[2].partition("Arguments:")[0].partition("Options:")[0]
    return [line.strip() for line in re.sub(r"\\\n\s*", "", block).splitlines() if line.strip()]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_fits_and_its_examples_are_commands(name, monkeypatch, capsys):
    shown = printed(monkeypatch, capsys, name, "--help")
    assert max(map(len, shown.splitlines())) <= 80
    for typed in examples(shown):
        program, *words = shlex.split(typed)
        if program != "octavo":
            continue
        command = get_command(app).commands[words[0]]
        known = {
            option for parameter in command.params for option in parameter.opts + parameter.secondary_opts
        }
        # What follows `--` is another program's.
        own = words[: words.index("--")] if "--" in words else words
        assert {word for word in own if word.startswith("--")} <= known
        # Parsed as when it is run: every argument is there, every value is one that the option takes.
        command.make_context(words[0], words[1:])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained_and_says_what_it_takes(name, monkeypatch, capsys):
    for parameter in get_command(app).commands[name].params:
        assert parameter.help, parameter.name
    # A type's name says nothing of what is meant: N, DIR, TEXT or the choices do.
    shown = printed(monkeypatch, capsys, name, "--help")
    assert not re.findall(
        r"^ +--.* (?:<(?:str|int|float|path)>|INTEGER|FLOAT|PATH)(?: |$)", shown, re.MULTILINE
    )


def test_inspect_and_compare_and_the_others(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("El temor de Jehová es el principio de la sabiduría.\n" * 40)
    out = tmp_path / "8"
    few = ("--text", text, "--limit-tokens", 60, "--window", 32)
    shown = {
        "quantize": printed(monkeypatch, capsys, "quantize", demo.MODEL, out),
        "inspect": printed(monkeypatch, capsys, "inspect", out, "--against", demo.MODEL),
        "compare": printed(
            monkeypatch, capsys, "compare", demo.MODEL, *few, "--formats", "fitted-64,bitsandbytes"
        ),
        "evaluate": printed(monkeypatch, capsys, "evaluate", out, "--against", demo.MODEL, *few),
        "plan": printed(monkeypatch, capsys, "plan", out, "--memory", "1MB"),
        "doctor": printed(monkeypatch, capsys, "doctor"),
    }
    for command, text in shown.items():
        for line in text.splitlines():
            # But for a path or a command that is longer by itself.
            assert len(line.rstrip()) <= 80 or str(tmp_path) in line or str(demo.MODEL) in line, (
                command,
                line,
            )
    for name in ("transformer.h.*.attn.out_proj.weight", "transformer.wte.weight"):
        assert name in shown["inspect"]
    # All that is measured of a format stands in one line.
    header = next(line for line in shown["compare"].splitlines() if line.startswith("format"))
    assert header.split() == [
        "format",
        "bits",
        "MB",
        "error",
        "perplexity",
        "KL",
        "mean",
        "KL",
        "p99",
        "top-1",
    ]


def test_a_name_wider_than_the_terminal_is_cut_after_a_dot(capsys):
    name = "model.language_model.layers.*.mlp.experts.gate_up_proj_of_a_very_long_name.weight"
    show_table(Console(width=60), ("parameter", "a", "b"), [[name, "1" * 20, "2" * 20]])
    lines = capsys.readouterr().out.splitlines()
    for piece in re.split(r"(?<=\.)", name):
        assert any(piece in line for line in lines), piece
    assert broken("a.bb.ccc", 5).split("\n") == ["a.bb.", "  ccc"]


def test_sentences_are_wrapped_between_words(capsys):
    path = "/models/" + "x" * 50
    say(
        Console(width=40),
        ("bold", "bold"),
        f" words before {path} and words after it, as many as fill a line\n\nend",
    )
    lines = capsys.readouterr().out.splitlines()
    assert path in lines
    assert max(len(line) for line in lines if line != path) <= 40
    assert lines[-2:] == ["", "end"]
    assert " ".join(" ".join(lines).split()).startswith(f"bold words before {path} and words")


def test_values_go_on_below_themselves_and_names_stay_whole(capsys):
    path = "/models/" + "x" * 50
    show_facts(
        Console(width=40),
        [
            ("base", f"{path}, in float32"),
            ("kernel", "one two three four five six seven eight"),
            ("none", ""),
        ],
    )
    assert capsys.readouterr().out.splitlines() == [
        f"base    {path},",
        "        in float32",
        "kernel  one two three four five six",
        "        seven eight",
        "none    ",
    ]


def test_the_installed_command_prints_the_same_help(monkeypatch, capsys):
    done = subprocess.run([sys.executable, "-m", "octavo", "--help"], capture_output=True, text=True)
    assert done.stdout == printed(monkeypatch, capsys, "--help")
