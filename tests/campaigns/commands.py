"""The commands that write, each with small inputs and the files that must come out of it, run in forks of a warm process.

A fork of a process that has imported everything runs `octavo.cli.main` as a fresh interpreter does, without the seconds of
imports in which nothing is written. The process that forks must never have computed: its threads would be missing in the
fork."""

import hashlib
import importlib
import mmap
import os
import select
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One thread, no hub: the same bytes each time. Before anything is imported that reads them.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1")

from octavo import demo


@dataclass(frozen=True)
class Command:
    """A command line. `{out}` stands for the output folder or file, `{eight}`, `{adapter}` and `{data}` for inputs.

    Args:
        again: what is added when it is run once more after a crash.
        suffix: of the output's name.
        folder: whether its output is a working folder, which is there before it is whole.
        varies: the end of the names of files that tell how it ran, not what came of it.
    """

    name: str
    line: str
    again: str = ""
    suffix: str = ""
    folder: bool = False
    varies: str = ""

    def arguments(self, out: Path, inputs: dict[str, Path], again: bool = False) -> list[str]:
        text = self.line + (f" {self.again}" if again and self.again else "")
        return [word.format(out=out, **inputs) for word in text.split()]

    def final(self, out: Path) -> Path:
        """Where its output lies at the end."""
        return out.with_name(out.name + self.suffix)


COMMANDS = [
    Command("quantize", "quantize {plain} {out}"),
    Command("quantize --calibrate", "quantize {plain} {out} --calibrate {data} --calibrate-tokens 1024"),
    Command("merge", "merge {eight} {adapter} {out}"),
    Command("export", "export {eight} {out}.gguf", suffix=".gguf"),
    Command("evaluate --save-logits", "evaluate {eight} --text {data} --save-logits {out}"),
    Command(
        "finetune --resume",
        "finetune {eight} --data {data} --output {out} --max-steps 4 --evaluations 4 --max-length 32 --batch-size 2",
        "--resume",
        folder=True,
        # Whether it was begun or gone on with.
        varies="training_args.bin",
    ),
]


# What the commands import as they go.
MODULES = (
    "octavo.cli",
    "octavo.calibration.calibrate",
    "octavo.checkpoint.build",
    "octavo.evaluation.evaluate",
    "octavo.export",
    "octavo.loading",
    "octavo.merging.merge",
    "octavo.training.card",
    "octavo.training.curves",
    "octavo.training.finetune",
    "torch.utils.tensorboard",
    "transformers.models.auto.modeling_auto",
    "transformers.models.gptj.modeling_gptj",
    "transformers.quantizers.auto",
    "matplotlib.figure",
    "matplotlib.backends.backend_agg",
    "peft.tuners.lora",
    "bitsandbytes.optim",
)


def warm() -> None:
    """Import what the commands import. Raises RuntimeError if that, or what was done before, left threads."""
    for name in MODULES:
        importlib.import_module(name)
    for _ in range(20):
        names = [
            Path("/proc/self/task", task, "comm").read_text().strip()
            for task in os.listdir("/proc/self/task")
        ]
        # Arrow's allocator has a thread of its own, and sees to forks.
        if len([name for name in names if name != "jemalloc_bg_thd"]) == 1:
            return
        # Some end by themselves.
        time.sleep(0.1)
    raise RuntimeError(f"this process has threads, which forks of it would lack: {names}")


@dataclass
class Started:
    """A command that runs in a fork; `peak` gets the address space it took at most beyond what it began with, in bytes."""

    process: int
    errors: Any
    begun: float
    peak: Any = None


def start(words: list[str], prepare: Callable[[], None] | None = None) -> Started:
    """Start a command in a fork.

    Args:
        words: of the command line, without "octavo".
        prepare: what the fork does first.
    """
    errors = tempfile.TemporaryFile()  # noqa: SIM115 (`status_of` closes it)
    begun = time.monotonic()
    peak = mmap.mmap(-1, 8)
    child = os.fork()
    if not child:
        _command(words, errors.fileno(), prepare, peak)
    return Started(child, errors, begun, peak)


def status_of(command: Started, kill_after: float | None = None) -> tuple[int, str]:
    """Wait for a command; kill it after so many seconds. Returns (exit status, or minus a signal; stderr)."""
    ended = os.pidfd_open(command.process)
    left = None if kill_after is None else max(0.0, command.begun + kill_after - time.monotonic())
    if not select.select([ended], [], [], left)[0]:
        os.kill(command.process, signal.SIGKILL)
    os.close(ended)
    _, status = os.waitpid(command.process, 0)
    with command.errors as errors:
        errors.seek(0)
        return os.waitstatus_to_exitcode(status), errors.read().decode(errors="replace")


def peak_of(words: list[str]) -> int:
    """Bytes of address space that a command takes, beyond what it begins with."""
    command = start(words)
    status, errors = status_of(command)
    if status:
        raise RuntimeError(f"octavo {' '.join(words)}: {errors}")
    return int.from_bytes(command.peak[:], "little")


def run(
    words: list[str], kill_after: float | None = None, prepare: Callable[[], None] | None = None
) -> tuple[int, str, float]:
    """Run a command in a fork, as `start` and `status_of` do. Returns (exit status, stderr, seconds)."""
    command = start(words, prepare)
    status, errors = status_of(command, kill_after)
    return status, errors, time.monotonic() - command.begun


def address_space(most: bool = False) -> int:
    """Bytes of address space that this process has, or has had at most."""
    name = "VmPeak:" if most else "VmSize:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def _command(words: list[str], errors: int, prepare: Callable[[], None] | None, peak: mmap.mmap) -> None:
    status, before = 1, address_space()
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(errors, 2)
        sys.argv = ["octavo", *words]
        if prepare is not None:
            prepare()
        sys.modules["octavo.cli"].main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        peak[:] = max(0, address_space(most=True) - before).to_bytes(8, "little")
        os._exit(status)


def inputs_in(folder: Path) -> dict[str, Path]:
    """Make the inputs: the shipped model plain and in 8 bits, an adapter of it, some text."""
    warm()
    data = folder / "text.txt"
    data.write_text(
        "\n\n".join(f"La luna número {n} brilla sobre el mar, y nadie la mira dos veces." for n in range(60))
    )
    eight, adapter = folder / "eight", folder / "adapter"
    for line in (
        f"quantize {demo.MODEL} {eight}",
        f"finetune {eight} --data {data} --output {adapter} --max-steps 1",
    ):
        status, errors, _ = run(line.split())
        if status:
            raise RuntimeError(f"octavo {line}: {errors}")
    return {"plain": demo.MODEL, "eight": eight, "adapter": adapter, "data": data}


def digests(place: Path) -> dict[str, str]:
    """Name → digest of each file at a place, hidden ones left out; empty if there is nothing."""
    if place.is_file():
        return {"": hashlib.sha256(place.read_bytes()).hexdigest()}
    files = (p for p in place.rglob("*") if p.is_file()) if place.is_dir() else ()
    found = {str(p.relative_to(place)): p for p in files}
    return {
        name: hashlib.sha256(path.read_bytes()).hexdigest()
        for name, path in sorted(found.items())
        if not any(part.startswith(".") for part in Path(name).parts)
    }
