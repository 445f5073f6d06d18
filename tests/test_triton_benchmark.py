"""A rehearsal of `python -m benchmarks.gpu` on the CPU: errors in its logic must not cost time on a GPU."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, gpu_common

ROOT = Path(__file__).parent.parent


def test_parts_fit_into_thirteen_minutes():
    assert sum(gpu.PARTS.values()) <= 770


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    assert "--tiny --device cpu" in capsys.readouterr().err


def test_a_part_that_fails_is_reported(tmp_path):
    assert gpu.run_limited([sys.executable, "-c", "print('well')"], tmp_path / "log", 30) is None
    failed = gpu.run_limited([sys.executable, "-c", "print('so'); raise SystemExit(3)"], tmp_path / "log", 30)
    assert failed.startswith("exit status 3\nso")
    late = gpu.run_limited([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log", 1)
    assert late.startswith("stopped after 1 s")


def test_report_keeps_rows_as_they_come(tmp_path):
    report = gpu_common.Report(tmp_path / "rows.json", seconds=0)
    report.add(kernel="a", **{"µs": 1.5})
    report.fact(done=True)
    assert json.loads((tmp_path / "rows.json").read_text()) == {
        "facts": {"done": True},
        "rows": [{"kernel": "a", "µs": 1.5}],
    }
    assert report.late()
    assert "a  1.50" in gpu_common.table([*report.rows, {"kernel": "b", "more": 2}])


def test_random_matrices_have_the_spread_of_weights():
    from octavo.ops import reference

    qdata, absmax, code = gpu_common.matrix(256, 1024, 64, "cpu")
    weight = reference.dequantize(qdata, absmax, code, 64, torch.float32)
    assert 0.018 < weight.std() < 0.022


@pytest.mark.slow
@pytest.mark.parametrize("part", list(gpu.PARTS))
def test_rehearsal(part, tmp_path):
    for package in ("triton", "peft", "transformers"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    out = tmp_path / "results.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--tiny", "--device", "cpu"]
    command += ["--parts", part, "--out", str(out)]
    result = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), timeout=550
    )
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
    found = json.loads(out.read_text())["parts"][part]
    assert found["facts"]["done"] and found["rows"]
