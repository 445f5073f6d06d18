"""Where there is no memory: one line that says so, and no file is blamed."""

import json
import sys

import pytest
import torch

from octavo import cli, loading
from octavo.checkpoint.errors import CheckpointError, out_of_memory

from .models.checkpoints import save


def real_error() -> Exception:
    """What torch raises where there is no memory: for more than any machine has."""
    with pytest.raises(RuntimeError) as found:
        torch.empty(1 << 60, dtype=torch.uint8)
    return found.value


class PanicException(BaseException):
    """What a library in Rust raises, by its name: each has a class of its own."""


def errors() -> list[BaseException]:
    return [
        PanicException(
            'ThreadPoolBuildError { kind: IOError(Os { code: 11, message: "Resource temporarily unavailable" }) }'
        ),
        real_error(),
        MemoryError(),
        RuntimeError("can't start new thread"),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nadvice"),
        OSError(12, "Cannot allocate memory"),
    ]


@pytest.mark.parametrize("error", errors(), ids=lambda error: type(error).__name__)
def test_a_command_says_so_in_one_line(error, monkeypatch, capsys):
    def fails(**_):
        raise error

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr().err
    assert end.value.code == 1
    assert told.startswith("error: out of memory (") and told.count("\n") == 1 and "octavo plan" in told


def test_other_runtime_errors_keep_their_traceback(monkeypatch):
    def fails(**_):
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(RuntimeError, match="shapes"):
        cli.main()


def test_loading_does_not_blame_the_files(tmp_path, monkeypatch):
    save("llama", tmp_path / "plain")
    error = real_error()

    def fails(*_, **__):
        raise error

    import transformers

    monkeypatch.setattr(transformers.LlamaForCausalLM, "from_pretrained", fails)
    with pytest.raises(RuntimeError) as found:
        loading.load(tmp_path / "plain", device="cpu")
    assert found.value is error and not isinstance(error, CheckpointError) and out_of_memory(error)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_native_kernel_that_gets_no_memory_raises(tmp_path):
    """In a process of its own: what the limit breaks does not come back."""
    import subprocess

    code = """
import resource, torch, octavo
from octavo.checkpoint.errors import out_of_memory
weight = octavo.quantize_model(torch.nn.Sequential(torch.nn.Linear(4096, 4096)))
x = torch.randn(8_000, 4096)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (20 << 20),) * 2)
try:
    weight(x)
except Exception as error:
    print("told" if out_of_memory(error) else repr(error))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "told", done.stderr[-2000:]


@pytest.mark.parametrize("eight_bit", [False, True])
def test_tables_beyond_any_memory_are_the_configurations_fault(eight_bit, tmp_path):
    """GPT-J computes its rotary angles for all positions that config.json names."""
    save("gptj", tmp_path / "plain")
    folder = tmp_path / "plain"
    if eight_bit:
        loading.load(folder, device="cpu").save_pretrained(tmp_path / "eight")
        folder = tmp_path / "eight"
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "n_positions": 2**45}))
    with pytest.raises(CheckpointError, match=r"config\.json asks for a table .*35184372088832 x"):
        loading.load(folder, device="cpu")
