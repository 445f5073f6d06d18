"""The command line, run as a user runs it: as a process."""

import json
import os
import subprocess
import sys
import time

import pytest
from typer.testing import CliRunner

from octavo import demo
from octavo.cli import app

from .models.published import publish, tiny_gptj


def octavo(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "octavo", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1"},
        **options,
    )


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The model that ships with Octavo, in 8 bits."""
    out = tmp_path_factory.mktemp("cli") / "model-8bit"
    run = octavo("quantize", demo.MODEL, out)
    assert run.returncode == 0, run.stderr
    assert "bits per weight" in run.stdout.lower()
    return out


def test_help_teaches_and_imports_neither_torch_nor_transformers():
    run = octavo("--help")
    assert run.returncode == 0
    for command in ("quantize", "generate", "finetune", "merge", "plan", "inspect", "demo", "doctor"):
        assert command in run.stdout
    code = "import octavo.cli, sys; print('torch' in sys.modules, 'transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.split()
        == ["False"] * 2
    )


@pytest.mark.parametrize(
    "command", ["quantize", "generate", "finetune", "merge", "plan", "inspect", "demo", "doctor"]
)
def test_each_command_explains_its_options(command):
    started = time.perf_counter()
    run = octavo(command, "--help")
    assert run.returncode == 0 and "Options" in run.stdout
    # Far below the seconds that importing transformers takes.
    assert time.perf_counter() - started < 10


def test_generate_streams_and_ends_with_its_speed(model):
    run = octavo("generate", model, demo.PROMPT, "--max-new-tokens", 8, "--seed", 3)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "8 tokens" in run.stderr and "tokens/s" in run.stderr
    again = octavo("generate", model, demo.PROMPT, "--max-new-tokens", 8, "--seed", 3)
    assert again.stdout == run.stdout


def test_generate_greedily_from_standard_input(model):
    run = octavo("generate", model, "-", "--greedy", "--max-new-tokens", 4, input="Y dijo Dios:")
    assert run.returncode == 0 and run.stdout.strip(), run.stderr


def test_generate_from_a_published_checkpoint_with_the_shipped_tokenizer(tmp_path):
    publish(tiny_gptj(), tmp_path)
    run = octavo("generate", tmp_path, "Hola", "--max-new-tokens", 3)
    assert run.returncode == 1 and "holds no tokenizer" in run.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("generate", "no/such-model", "Hola"), "no/such-model"),
        (("generate", demo.MODEL, ""), "prompt is empty"),
        (("generate", demo.MODEL, "Hola", "--dtype", "int4"), "is not one of"),
        (("generate", demo.MODEL, "Hola", "--chat"), "no chat template"),
        (("quantize", demo.MODEL, "{out}", "--skip", "nothing"), "matches no parameter"),
        (("quantize", demo.MODEL, "{out}", "--block-size", "0"), "block"),
    ],
)
def test_what_a_user_can_mend_is_one_line(tmp_path, arguments, message):
    arguments = [str(each).replace("{out}", str(tmp_path / "out")) for each in arguments]
    run = octavo(*arguments)
    assert run.returncode in (1, 2)
    assert message in run.stderr and "Traceback" not in run.stderr
    assert not (tmp_path / "out").exists()


def test_unknown_option_is_a_usage_error():
    run = octavo("generate", "model", "prompt", "--frobnicate")
    assert run.returncode == 2 and "frobnicate" in run.stderr


def test_inspect_reports_what_is_quantized_and_its_error(model):
    run = octavo("inspect", model, "--against", demo.MODEL, "--json")
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert 8 < found["bits_per_weight"] < 8.5
    assert 0 < found["error"] < 1e-4


def test_doctor_names_versions_and_active_kernels():
    found = json.loads(octavo("doctor", "--json").stdout)
    assert found["Versions"]["torch"] and ":" in found["Kernels"]["CPU"]
    forced = subprocess.run(
        [sys.executable, "-m", "octavo", "doctor", "--json"],
        capture_output=True,
        text=True,
        env={**os.environ, "OCTAVO_CPU_ISA": "none"},
    )
    forced = json.loads(forced.stdout)["Kernels"]
    assert forced["CPU"] == "reference: OCTAVO_CPU_ISA=none"
    assert forced["segments (fitted)"] == forced["tables (published)"] == "looked up in memory"


@pytest.mark.slow
def test_demo_shows_the_whole_path(tmp_path):
    run = octavo("demo", "--no-finetune", "--out", tmp_path / "eight", "--max-new-tokens", 12)
    assert run.returncode == 0, run.stderr
    for expected in ("Size", "Squared error", "Perplexity", demo.PROMPT, "12 tokens"):
        assert expected in run.stdout
    assert (tmp_path / "eight" / "model.safetensors").exists()


def test_demo_of_a_shorter_text(tmp_path, monkeypatch):
    """The same in this process, on a tenth of the book."""
    text = (demo.TEXT / "proverbios.txt").read_text(encoding="utf-8")
    (tmp_path / "proverbios.txt").write_text(text[: len(text) // 10], encoding="utf-8")
    monkeypatch.setattr(demo, "TEXT", tmp_path)
    options = ["--no-finetune", "--out", str(tmp_path / "eight"), "--max-new-tokens", "12"]
    run = CliRunner().invoke(app, ["demo", *options], catch_exceptions=False)
    assert run.exit_code == 0
    for expected in ("Size", "Squared error", "Perplexity", demo.PROMPT, "12 tokens"):
        assert expected in run.output
    assert (tmp_path / "eight" / "model.safetensors").exists()
