"""The commands `octavo quantize` and `octavo inspect`."""

import json
import os
import signal
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from octavo.cli.inspect import inspect
from octavo.cli.options import size as parse_size
from octavo.cli.quantize import quantize

from .command import stop_midway
from .models.checkpoints import CONFIGS, build, save
from .models.published import publish, tiny_gptj

RUNNER = CliRunner()


@pytest.fixture
def app():
    made = typer.Typer(pretty_exceptions_enable=False)
    made.command()(quantize)
    made.command()(inspect)
    return made


def run(app, *arguments, code=0):
    result = RUNNER.invoke(app, [str(each) for each in arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result.output


def test_quantize_then_inspect(app, tmp_path):
    save("llama", tmp_path / "plain")
    shown = run(
        app, "quantize", tmp_path / "plain", tmp_path / "out", "--skip", "lm_head", "--block-size", 32
    )
    assert "bits per weight" in shown and "weight error" in shown and "octavo generate" in shown
    found = json.loads(run(app, "inspect", tmp_path / "out", "--against", tmp_path / "plain", "--json"))
    assert found["kind"] == "octavo" and found["codebook"] == "fitted"
    assert found["skipped"] == {"lm_head.weight": 160 * 64}
    assert 0 < found["error"] < 1e-3
    rows = {row["name"]: row for row in found["parameters"]}
    assert rows["model.layers.0.mlp.up_proj.weight"]["block_size"] == 32
    assert rows["lm_head.weight"]["kind"] == "float32"
    table = run(app, "inspect", tmp_path / "out", "--against", tmp_path / "plain")
    assert "×2" in table and "left in float on purpose: lm_head.weight" in table


def test_inspect_of_what_is_not_octavo(app, tmp_path):
    save("mixtral", tmp_path / "plain")
    assert "not quantized" in run(app, "inspect", tmp_path / "plain")
    (tmp_path / "published").mkdir()
    publish(tiny_gptj(), tmp_path / "published")
    found = json.loads(run(app, "inspect", tmp_path / "published", "--json"))
    assert found["kind"] == "published" and found["coverage"] == 1.0
    run(app, "quantize", tmp_path / "published", tmp_path / "out")
    against = json.loads(run(app, "inspect", tmp_path / "out", "--against", tmp_path / "published", "--json"))
    assert against["error"] == 0


@pytest.mark.parametrize("kind", ["gpt2", "mixtral", "gpt_oss", "llama-tied"])
def test_errors_are_measured_for_every_layout(app, kind, tmp_path):
    """Transposed, stacked and tied weights are compared with what they stand for."""
    save(kind, tmp_path / "plain")
    run(app, "quantize", tmp_path / "plain", tmp_path / "out")
    found = json.loads(run(app, "inspect", tmp_path / "out", "--against", tmp_path / "plain", "--json"))
    errors = [row["error"] for row in found["parameters"] if row["kind"] == "8-bit"]
    assert all(0 < error < 1e-4 for error in errors)


@pytest.mark.parametrize(
    ("text", "size"),
    [("5GB", 5 * 10**9), ("500mb", 5 * 10**8), ("1.5 GiB", 3 * 2**29), ("5000000", 5_000_000)],
)
def test_sizes(text, size):
    assert parse_size(text, "--max-shard-size") == size


@pytest.mark.parametrize("text", ["", "5XB", "-1GB", "0", "5", "many"])
def test_sizes_that_are_none(text, app, tmp_path):
    with pytest.raises(typer.BadParameter, match="expected a size") as raised:
        parse_size(text, "--max-shard-size")
    assert "--max-shard-size" in raised.value.format_message()


def test_usage_errors_end_with_2(app, tmp_path):
    run(app, "quantize", tmp_path, code=2)
    run(app, "quantize", tmp_path, tmp_path / "out", "--codebook", "nice", code=2)
    run(app, "quantize", tmp_path, tmp_path / "out", "--block-size", "0", code=2)
    run(app, "quantize", tmp_path, tmp_path / "out", "--max-shard-size", "5XB", code=2)


def test_ctrl_c_says_how_to_go_on(app, tmp_path):
    """The command line is stopped as a user would; the same command then finishes."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 8, 256, 1024
    build(config).save_pretrained(tmp_path / "plain")
    code = (
        "import sys, time; from octavo.cli import main; from octavo.checkpoint.writing import writer; "
        "writer.SYNC_EVERY = 1;"
        "unit = writer.write_unit\n"
        "def slow(*args):\n    time.sleep(0.05); return unit(*args)\n"
        "writer.write_unit = slow\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "quantize", str(tmp_path / "plain"), str(tmp_path / "out")]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ
    )
    stop_midway(process, tmp_path / "out", signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130, errors
    assert "same command goes on" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()
    assert "resumed" in run(app, *command[3:])
