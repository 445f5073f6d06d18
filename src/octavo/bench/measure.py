"""All that `octavo bench` measures, as one JSON object.

Example:
    >>> from octavo.bench.measure import Options, measure
    >>> found = measure(Options(kernels_only=True, quick=True))
    >>> found["kernels"][0]["share"]["median"] > 0     # of the bandwidth of a pure reading loop
    True
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch

from .. import __version__, demo, ops
from ..ops.schema import DTYPES_BY_NAME
from . import load, turns
from .kernels import BLOCK, SHAPES, linear
from .models import PROMPT
from .process import Worker

# Rounds of each measurement, and the seconds after which no further round begins: a default run on a small model takes a
# minute on two cores.
ROUNDS, QUICK_ROUNDS = 6, 2
KERNEL_ROUNDS, QUICK_KERNEL_ROUNDS = 30, 8
KERNEL_SECONDS, MODEL_SECONDS, QUICK_MODEL_SECONDS = 4.0, 10.0, 4.0
# Distinct shapes of a model's matrices that are measured, those with most weights first.
MOST_SHAPES, QUICK_SHAPES = 4, 1
# The published format's block, whose codebook is a table.
PUBLISHED_BLOCK = 4096
# Share of the free memory that a model in float may take.
FITS = 0.8


Say = Callable[[str], object]


@dataclass(frozen=True)
class Options:
    """What to measure; the options of `octavo bench`, explained there."""

    model: str | None = None
    device: str = "auto"
    dtype: str | None = None
    threads: int | None = None
    tokens: int = 32
    prefill: int = 256
    quick: bool = False
    kernels_only: bool = False

    def torch_device(self) -> torch.device:
        """The device. Raises ValueError where there is no such one."""
        if self.device == "auto":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            device = torch.device(self.device)
        except RuntimeError:
            device = None
        if device is None or device.type not in ("cpu", "cuda"):
            raise ValueError(f"--device {self.device}: expected auto, cpu, cuda or cuda:N")
        if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
            raise ValueError(
                f"--device {self.device}: this torch finds {torch.cuda.device_count()} GPUs; leave the option out"
            )
        return device

    def check(self) -> None:
        """Raise ValueError for a type that is not known."""
        if self.dtype is not None and self.dtype not in DTYPES_BY_NAME:
            raise ValueError(f"--dtype {self.dtype}: expected one of {', '.join(DTYPES_BY_NAME)}")


def measure(options: Options, processor: str = "CPU", say: Say = lambda text: None) -> dict[str, Any]:
    """Measure.

    Args:
        processor: the processor's name.
        say: called with what is being done.

    Returns:
        "machine", "load_before", "kernels" (a list, one `kernels.linear` a matrix), and, unless not wanted, "model".

    Raises:
        ValueError, OSError: on a device, type or model that is not there, or a model that does not continue text.
    """
    options.check()
    device = options.torch_device()
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    found: dict[str, Any] = {"machine": machine(device, processor), "load_before": load.before_measuring()}
    if options.kernels_only and options.model is None:
        return found | {"kernels": measure_kernels(None, options.dtype or "bfloat16", options, say)}
    source = options.model or str(demo.MODEL)
    say(f"Loading {source} in 8 bits")
    with _start("Quantized", source, device, options.dtype) as octavo:
        about = octavo.ask("describe")
        if options.model:
            found["kernels"] = measure_kernels(about["matrices"], about["dtype"], options, say)
        else:
            # The shipped model's matrices are too small to say anything about this machine's memory.
            found["kernels"] = measure_kernels(None, options.dtype or "bfloat16", options, say)
        if not options.kernels_only:
            found["model"] = measure_model(octavo, about, source, options, say)
    return found


def machine(device: torch.device, processor: str) -> dict[str, Any]:
    """Where it is measured: device, cores, threads, memory_bytes, kernels (active ones, and why), versions."""
    on_gpu = device.type == "cuda"
    kernels = ops.kernels()["GPU" if on_gpu else "CPU"]
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else processor,
        "cores": psutil.cpu_count(logical=False) or psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": torch.cuda.mem_get_info(device)[1] if on_gpu else psutil.virtual_memory().total,
        "kernels": str(kernels["active"]),
        "kernels_reason": str(kernels["reason"]),
        "versions": {"octavo": __version__, "torch": torch.__version__},
    }


def measure_kernels(
    matrices: list[list[Any]] | None, dtype: str, options: Options, say: Say
) -> list[dict[str, Any]]:
    """One token through some matrices: [rows, columns, block size, kind of codebook, ...] each, or None for SHAPES."""
    device = options.torch_device()
    if matrices is None:
        matrices = [[rows, columns, BLOCK, "segments"] for rows, columns in SHAPES]
        matrices.append([*SHAPES[0], PUBLISHED_BLOCK, "table"])
    found = []
    for rows, columns, block, kind, *_ in matrices[: QUICK_SHAPES if options.quick else MOST_SHAPES]:
        say(f"One token through {rows} x {columns}")
        found.append(
            linear(
                rows,
                columns,
                device,
                dtype=DTYPES_BY_NAME[dtype],
                peers=tuple(DTYPES_BY_NAME[name] for name in _float_types(device)),
                block_size=block,
                kind=kind,
                rounds=QUICK_KERNEL_ROUNDS if options.quick else KERNEL_ROUNDS,
                seconds=KERNEL_SECONDS,
            )
        )
    return found


def measure_model(
    octavo: Worker, about: dict[str, Any], source: str, options: Options, say: Say
) -> dict[str, Any]:
    """A model in 8 bits against the same in float, one float type after the other."""
    device = options.torch_device()
    found: dict[str, Any] = {
        "source": source,
        **{name: about[name] for name in ("class", "device", "dtype", "parameters", "bytes")},
        "tokens": _lengths(about["context"], options),
        "left_out": {},
        "peers": {},
    }
    types = list(dict.fromkeys([about["dtype"], *_float_types(device)]))
    for name in types[: 1 if options.quick else 2]:
        why = _too_large(about["parameters"] * DTYPES_BY_NAME[name].itemsize, device)
        if why:
            found["left_out"][name] = why
            continue
        say(f"Loading {source} in {name}")
        with _start("Dense", source, device, name) as peer:
            workers = {"octavo": octavo, "peer": peer}
            found["peers"][name] = _turns(workers, found["tokens"], options, name, say) | _memory(peer)
    if not found["peers"]:
        found["alone"] = _turns({"octavo": octavo}, found["tokens"], options, "nothing", say)
    found["octavo"] = _memory(octavo)
    found["fallbacks"] = octavo.ask("describe")["fallbacks"]
    return found


def _start(engine: str, source: str, device: torch.device, dtype: str | None) -> Worker:
    factory = f"octavo.bench.models:{engine}"
    return Worker(factory, torch.get_num_threads(), source=source, device=str(device), dtype=dtype)


def _float_types(device: torch.device) -> tuple[str, str]:
    return ("bfloat16", "float32") if device.type == "cpu" else ("bfloat16", "float16")


def _lengths(context: int | None, options: Options) -> dict[str, int]:
    """Tokens to decode and of the prefill, cut to what the model's context holds."""
    if not context:
        return {"decode": options.tokens, "prefill": options.prefill}
    return {"decode": max(1, min(options.tokens, context - PROMPT)), "prefill": min(options.prefill, context)}


def _too_large(needed: int, device: torch.device) -> str | None:
    """Why a model whose weights take so many bytes is not loaded."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    if needed <= FITS * free:
        return None
    return f"its weights would take {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"


def _memory(worker: Worker) -> dict[str, Any]:
    return {
        "ready_seconds": worker.ready,
        "peak_bytes": worker.ask("peak_memory"),
        "device_peak_bytes": worker.ask("device_memory"),
    }


def _turns(
    workers: dict[str, Worker], tokens: dict[str, int], options: Options, peer: str, say: Say
) -> dict[str, Any]:
    """For decoding and prefill, what `take_turns` gives and the rounds that can be trusted."""
    found: dict[str, Any] = {}
    for method, count in tokens.items():
        say(f"{method} of {count} tokens, in turns with {peer}")
        found[method] = turns.take_turns(
            workers,
            method,
            count,
            QUICK_ROUNDS if options.quick else ROUNDS,
            seconds=QUICK_MODEL_SECONDS if options.quick else MODEL_SECONDS,
        )
        found[method]["undisturbed"] = turns.undisturbed(found[method])
    return found
