"""Two gloo processes: DDP and FSDP2 (accelerate launch) give one process's losses; FSDP2 shards the frozen bytes."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

from octavo.cli.finetune import finetune
from octavo.training import sharding

from .models import frozen_bytes, llama_tied, quantized
from .models.tokenizers import byte_tokenizer
from .test_training_run import TEXT
from .versions import needs

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

ROOT = Path(__file__).parent.parent
ACCELERATE = ["accelerate.commands.launch", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no"]
DDP = [*ACCELERATE, "--multi_gpu"]
FSDP2 = [*ACCELERATE, "--use_fsdp", "--fsdp_version=2"]
TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2", "--nnodes=1"]


def launch(launcher: list[str], *arguments: str) -> subprocess.CompletedProcess:
    """Run a module's command in two processes (in one, without a launcher)."""
    command = [sys.executable, "-m"]
    if launcher:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        option = "--main_process_port" if "accelerate" in launcher[0] else "--master-port"
        command += [*launcher, f"{option}={port}", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )


def run(kind: str, output: Path, batch_size: int, launcher: list[str] | None = None) -> list[dict]:
    done = launch(launcher or [], "tests.distributed_training", kind, str(output), str(batch_size))
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = range(2 if launcher else 1)
    return [json.loads((output / f"result-{rank}.json").read_text()) for rank in ranks]


def test_data_parallel_through_accelerate(tmp_path):
    (tmp_path / "one").mkdir()
    (alone,) = run("trainer", tmp_path / "one", 4)
    first, second = run("trainer", tmp_path / "two", 2, DDP)
    assert first["losses"] == second["losses"]
    for step, loss in alone["losses"].items():
        assert first["losses"][step] == pytest.approx(loss, rel=2e-4), step
    # Three examples on two processes: each is counted once all the same.
    assert first["after"]["eval_tokens"] == alone["after"]["eval_tokens"] == 3 * 31
    assert first["after"]["eval_loss"] == pytest.approx(alone["after"]["eval_loss"], rel=2e-4)
    assert first["held"] == second["held"] == alone["held"]
    # DDP's first broadcast leaves the frozen weights as they were.
    assert first["stored"] == second["stored"] == alone["stored"]
    assert first["before"]["eval_loss"] == pytest.approx(alone["before"]["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_a_plain_loop_under_fully_shard(tmp_path):
    (alone,) = run("fsdp2", tmp_path, 4)
    first, second = run("fsdp2", tmp_path, 2, TORCHRUN)
    for step, loss in alone["losses"].items():
        assert first["losses"][step] == second["losses"][step] == pytest.approx(loss, rel=2e-5), step
    assert max(first["held"], second["held"]) < 0.6 * alone["held"]


COMMAND = typer.Typer()
COMMAND.command()(finetune)


def options(folder: Path, batch_size: int, output: str) -> list[str]:
    """The command's options: adapters everywhere, norms trained too, two batches a step."""
    given = {"data": folder / "text.txt", "output": folder / output, "batch_size": batch_size}
    given |= {"max_steps": 3, "max_length": 32, "lora_r": 4, "lora_dropout": 0, "optimizer": "adamw"}
    given |= {
        "gradient_accumulation": 2,
        "learning_rate": 5e-3,
        "evaluations": 3,
        "lora_targets": "all",
    }
    words = [str(folder / "model"), "--train-norms"]
    for name, value in given.items():
        words += [f"--{name.replace('_', '-')}", str(value)]
    return words


@pytest.fixture
def folder(tmp_path) -> Path:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    model = quantized(llama_tied)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT + "\n" + TEXT, encoding="utf-8")
    return tmp_path


def entries(output: Path, name: str) -> dict[int, float]:
    log = json.loads((output / "training.json").read_text())
    return {entry["step"]: entry[name] for entry in log if name in entry}


@needs("torch", "2.11", "cannot load the state of an optimizer that lay on cpu:0")
def test_fsdp2_through_accelerate_shards_the_frozen_bytes_and_saves_whole_adapters(folder):
    from safetensors.torch import load_file

    done = CliRunner().invoke(COMMAND, options(folder, 4, "one"), catch_exceptions=False)
    assert done.exit_code == 0
    result = launch(FSDP2, "octavo", "finetune", *options(folder, 2, "two"))
    assert result.returncode == 0, result.stderr[-4000:]
    for name, count in (("loss", 3), ("eval_loss", 4)):
        alone, sharded = entries(folder / "one", name), entries(folder / "two", name)
        assert len(alone) == count and alone.keys() == sharded.keys()
        for step, loss in alone.items():
            assert sharded[step] == pytest.approx(loss, rel=2e-5), (name, step)
    held = re.search(r"this process held ([0-9.]+) MB", result.stderr)
    whole = sum(len(part) for part in frozen_bytes(quantized(llama_tied)).values()) / 1e6
    # Half of the bytes and scales, and each matrix's codebook.
    assert held and float(held[1]) < 0.6 * whole
    one, two = (load_file(folder / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys() and any("norm" in name for name in one)
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, rtol=1e-3, atol=1e-5)

    # Stopped after the second step, as a kill would leave it, and resumed.
    stopped = folder / "stopped"
    shutil.copytree(folder / "two", stopped, ignore=shutil.ignore_patterns("checkpoint-3", "training.json"))
    (stopped / "adapter_model.safetensors").unlink()
    assert sorted(path.name for path in stopped.glob("checkpoint-*")) == ["checkpoint-2"]
    result = launch(FSDP2, "octavo", "finetune", *options(folder, 2, "stopped"), "--resume")
    assert result.returncode == 0, result.stderr[-4000:]
    assert entries(stopped, "loss") == entries(folder / "two", "loss")
    resumed = load_file(stopped / "adapter_model.safetensors")
    assert resumed.keys() == two.keys() and all(torch.equal(resumed[name], two[name]) for name in two)


def test_fsdp_that_cannot_be_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not sharding.sharding_asked()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match=r"--fsdp_version: expected 2, found 1"):
        sharding.sharding_asked()
    monkeypatch.setenv("FSDP_VERSION", "2")
    assert sharding.sharding_asked()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not sharding.sharding_asked()
    monkeypatch.setenv("FSDP_OFFLOAD_PARAMS", "true")
    with pytest.raises(ValueError, match=r"--fsdp_offload_params: expected false"):
        sharding.sharding_asked()


def test_the_layers_are_those_that_transformers_names():
    model = quantized(llama_tied)
    assert [type(layer).__name__ for layer in sharding.layers_of(model)] == ["LlamaDecoderLayer"] * 2
    with pytest.raises(ValueError, match="does not say which of its modules are layers"):
        sharding.shard_frozen(torch.nn.Linear(2, 2), torch.device("cpu"))
