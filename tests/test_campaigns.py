"""Each campaign (tests/campaigns), a small part of it, by its command; docs/RELIABILITY.md has the whole ones."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Seeds that no whole campaign uses.
SEED = ["--seed", "1000000"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(sys.platform != "linux", reason="forks, and looks into /proc"),
]


def table_of(tmp_path, *arguments: str) -> dict:
    """Run a campaign, in a process of its own: it forks, which one that has computed should not. Returns its table."""
    out = tmp_path / "found.json"
    command = [sys.executable, "-m", f"tests.campaigns.{arguments[0]}", *arguments[1:], "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.exists(), done.stderr[-3000:]
    found = json.loads(out.read_text())
    assert found["faults"] == [] and done.returncode == 0
    return found["table"]


def test_hostile_files(tmp_path):
    table = table_of(tmp_path, "hostile", "--count", "25", *SEED)
    assert len(table) == 6 and all(sum(verdicts.values()) == 25 for verdicts in table.values())


def test_files_that_coverage_guides(tmp_path):
    pytest.importorskip("atheris", reason="pip install atheris")
    table = table_of(tmp_path, "guided", "--count", "1000", "--seed", "1000")
    assert len(table) == 12 and all(found["read"] == 1000 for found in table.values())


def test_silently_wrong(tmp_path):
    assert sum(table_of(tmp_path, "differential", "--count", "12", *SEED).values()) == 12


@pytest.mark.parametrize("what", ["kill", "full", "memory", "cgroup"])
def test_interrupted(what, tmp_path):
    if what == "full" and os.geteuid():
        pytest.skip("needs root for a small file system")
    if what == "cgroup" and not os.access("/sys/fs/cgroup/memory/cgroup.procs", os.W_OK):
        pytest.skip("needs root, and cgroups of the first version")
    seed = SEED if what == "kill" else []
    assert set(table_of(tmp_path, "interrupted", what, "--count", "2", *seed).values()) == {2}


def test_power_loss(tmp_path):
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler, to record what a command does to its files")
    table = table_of(tmp_path, "powerloss", "--count", "2", *SEED)
    assert len(table) == 6 and all(cases["lost"] for cases in table.values())


@pytest.mark.parametrize("kind", ["conversions", "writers", "replaced", "loads", "threads", "forks"])
def test_at_once(kind, tmp_path):
    assert table_of(tmp_path, "at_once", "--only", kind, "--count", "1", *SEED) == {kind: 1}


def test_hostile_requests(tmp_path):
    pytest.importorskip("fastapi")
    assert sum(table_of(tmp_path, "served", "--count", "150", *SEED).values()) == 150


@pytest.mark.parametrize("what", ["finetune", "generate"])
def test_long_runs(what, tmp_path):
    """Short ones: that they give the same numbers again."""
    table = table_of(tmp_path, "long_run", what, "--minutes", "0.3")
    assert table["steps"] >= 40
