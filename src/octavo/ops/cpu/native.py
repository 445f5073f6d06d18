"""The native module: whether it is there, which kernels of it are used, and how tensors are handed to it.

Without it, or with the environment variable OCTAVO_CPU_ISA=none, the plain-PyTorch definitions stay in charge.
OCTAVO_CPU_ISA=vbmi_bf16, vbmi, avx512, avx2, neon or portable picks kernels, for tests.

Example:
    >>> from octavo.ops.cpu import native
    >>> sorted(native.status())
    ['active', 'codebooks', 'pool', 'reason', 'supported', 'threads']
"""

import os
from pathlib import Path

import torch

try:
    from octavo import _native as library

    _import_error = None
except ImportError as error:
    library = None
    _import_error = str(error)

ISA_VARIABLE = "OCTAVO_CPU_ISA"
# How the native functions number the types.
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}

# How each instruction set gets at the values of a codebook: of segments (docs/FORMAT.md), and of 256 free entries.
_CODEBOOKS = {
    "avx2": ("computed", "the published map computed, others looked up sixteen entries at a time"),
    "avx512": ("computed", "looked up in registers, 64 entries at a time"),
    "vbmi": ("computed, or looked up in registers where that is faster", "looked up in registers"),
    "neon": ("computed", "looked up in registers, 64 entries at a time"),
}
_CODEBOOKS["vbmi_bf16"] = _CODEBOOKS["vbmi"]
_LOOKED_UP = ("looked up in memory", "looked up in memory")

_requested = os.environ.get(ISA_VARIABLE, "").strip().lower()


def _load() -> tuple[bool, str]:
    """Choose the kernels: whether native ones are used, and why."""
    if _requested == "none":
        return False, f"{ISA_VARIABLE}=none"
    if library is None:
        return False, (
            "the native kernels were not built: reinstall where there is a C++17 compiler, with pip -v to see what fails "
            f"({_import_error})"
        )
    if _requested:
        if _requested not in library.supported():
            raise ValueError(
                f"{ISA_VARIABLE}={_requested}: expected none or one of {', '.join(library.supported())} on this processor"
            )
        library.select(_requested)
        why = f"{ISA_VARIABLE}={_requested}"
    else:
        features = library.cpu_features()
        why = (
            f"the processor has {features}"
            if features
            else "no kernels for more than plain C++ on this processor"
        )
    library.share_openmp_of(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    return True, why


def _compute_alone() -> None:
    """In a fork of a process that has computed with several threads: the fork has none of them, and GNU's OpenMP would wait for
    them for ever, in PyTorch's own operations too. One thread waits for nobody. PyTorch's DataLoader does the same."""
    if library.asked_openmp() and "gomp" in library.pool():
        torch.set_num_threads(1)


AVAILABLE, _reason = _load()
if AVAILABLE and hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compute_alone)


def status() -> dict[str, object]:
    """Which kernels run on the CPU, and why.

    Returns:
        active: name of the kernels, "reference" for plain PyTorch; reason; supported: names that could be chosen, best
        first; threads; pool: what runs them; codebooks: how they get at the values of a codebook of "segments" and of a "table".
    """
    segments, table = _CODEBOOKS.get(library.active(), _LOOKED_UP) if AVAILABLE else _LOOKED_UP
    return {
        "active": library.active() if AVAILABLE else "reference",
        "reason": _reason,
        "supported": list(library.supported()) if library is not None else [],
        "threads": torch.get_num_threads(),
        "pool": library.pool() if AVAILABLE else "PyTorch",
        "codebooks": {"segments": segments, "table": table},
    }


def matrix(qdata, absmax, code, block_size):
    """The arguments by which the native functions take a matrix. The tensors must outlive the call and be contiguous."""
    half = absmax.dtype is torch.float16
    return (qdata.data_ptr(), absmax.data_ptr(), half, code.data_ptr(), *qdata.shape, block_size)
