"""What README.md, docs/ and the notebooks tell a reader to type: README's commands run as they stand, and every option named
anywhere exists."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
OCTAVO = Path(sys.executable).with_name("octavo")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def commands(text: str) -> list[str]:
    """Indented lines that call octavo, without what is said about them."""
    return [line.split("  #")[0].strip() for line in re.findall(r"^    (octavo .*)$", text, re.MULTILINE)]


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder in which README's names mean something: `your/model` is the demonstration's."""
    from octavo import demo

    (tmp_path / "your").mkdir()
    (tmp_path / "your" / "model").symlink_to(demo.MODEL)
    text = (demo.TEXT / "heldout.txt").read_text()[:8000]
    for name in ("your-texts.txt", "book.txt"):
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.slow
def test_the_commands_run_in_their_order(reader):
    found = commands(README.read_text())
    assert len(found) >= 11
    for command in found:
        arguments = shlex.split(command.removeprefix("octavo "))
        if arguments[0] == "bench":
            arguments.append("--quick")
        if arguments[0] == "finetune":
            arguments += ["--max-steps", "2"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        result = subprocess.run([OCTAVO, *arguments], capture_output=True, text=True, env=environment)
        assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}{result.stderr[-2000:]}"
    written = {path.name for path in reader.iterdir()}
    assert {"your-model-8bit", "adapter", "merged", "out", "comparison", "model.gguf"} <= written


def test_the_python_runs(reader):
    """All blocks in their order, as one program; a published model is a tiny one."""
    from .models.published import publish, tiny_gptj

    (reader / "published").mkdir()
    publish(tiny_gptj(), reader / "published")
    found = blocks(README.read_text(), "python")
    assert len(found) >= 3
    names: dict = {}
    for block in found:
        exec(block.replace("mrm8488/bertin-gpt-j-6B-ES-8bit", "published"), names)
    assert names["model"].peft_config


def test_make_knows_the_targets():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        named = set(re.findall(r"(?:^    |`)make ([a-z-]+)", page.read_text(), re.MULTILINE))
        assert named <= targets, page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_modules_that_are_named_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", text):
        if "://" not in target:
            assert (page.parent / target).exists(), target
    for path in re.findall(r"`((?:src|csrc|tests|docs|benchmarks|examples|scripts)/[\w./*-]+)`", text):
        assert list(ROOT.glob(path.rstrip("/"))), path
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


def options_of(name: str) -> set[str]:
    import typer

    from octavo.cli import app

    command = typer.main.get_command(app)
    found = command.get_command(None, name)
    assert found is not None, f"octavo {name}: no such command"
    return {option for parameter in found.params for option in (*parameter.opts, *parameter.secondary_opts)}


def text_of(page: Path) -> str:
    if page.suffix != ".ipynb":
        return page.read_text()
    return "\n".join("".join(cell["source"]) for cell in json.loads(page.read_text())["cells"])


@pytest.mark.parametrize("page", [*PAGES, *NOTEBOOKS], ids=lambda page: page.name)
def test_options_that_are_named_exist(page):
    for command, rest in re.findall(r"(?:^ {4,}|^!|`)octavo (\w+)([^`\n]*)", text_of(page), re.MULTILINE):
        if command == "doctor" or not rest:
            options_of(command)
        # What follows `--` is another program's.
        own = rest.split("  #")[0].split(" -- ")[0]
        named = set(re.findall(r"(?<![\w-])(--[a-z][\w-]*)", own)) - {"--help"}
        assert named <= options_of(command), f"octavo {command}{rest}"


def test_what_is_wrong_is_seen():
    assert commands("    octavo quantize a b     # c\n") == ["octavo quantize a b"]
    with pytest.raises(AssertionError, match="no such command"):
        options_of("dequantize")
    assert "--against" in options_of("evaluate") and "--agianst" not in options_of("evaluate")
