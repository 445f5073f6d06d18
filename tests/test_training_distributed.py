"""Two gloo processes: DDP (accelerate launch) and FSDP2 give one process's losses; FSDP2 shards the frozen bytes."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1"]
ACCELERATE += ["--mixed_precision=no", "--dynamo_backend=no"]
TORCHRUN = ["torch.distributed.run", "--nproc-per-node=2", "--nnodes=1"]


def run(kind: str, output: Path, batch_size: int, launcher: list[str] | None = None) -> list[dict]:
    command = [sys.executable, "-m"]
    if launcher:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        option = "--main_process_port" if "accelerate" in launcher[0] else "--master-port"
        command += [*launcher, f"{option}={port}", "-m"]
    command += ["tests.distributed_training", kind, str(output), str(batch_size)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    environment["ACCELERATE_USE_CPU"] = "true"
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = range(2 if launcher else 1)
    return [json.loads((output / f"result-{rank}.json").read_text()) for rank in ranks]


def test_data_parallel_through_accelerate(tmp_path):
    (tmp_path / "one").mkdir()
    (alone,) = run("trainer", tmp_path / "one", 4)
    first, second = run("trainer", tmp_path / "two", 2, ACCELERATE)
    assert first["losses"] == second["losses"]
    for step, loss in alone["losses"].items():
        assert first["losses"][step] == pytest.approx(loss, rel=2e-4), step
    # Three examples on two processes: each is counted once all the same.
    assert first["after"]["eval_tokens"] == alone["after"]["eval_tokens"] == 3 * 31
    assert first["after"]["eval_loss"] == pytest.approx(alone["after"]["eval_loss"], rel=2e-4)
    assert first["held"] == second["held"] == alone["held"]


def test_fsdp2_shards_the_frozen_bytes(tmp_path):
    (alone,) = run("fsdp2", tmp_path, 4)
    first, second = run("fsdp2", tmp_path, 2, TORCHRUN)
    for step, loss in alone["losses"].items():
        assert first["losses"][step] == second["losses"][step] == pytest.approx(loss, rel=2e-5), step
    assert max(first["held"], second["held"]) < 0.6 * alone["held"]
