"""What the choice of a kernel asks of a machine: the GPU's generation and size, and whether Triton is there.

Example:
    >>> import torch
    >>> from octavo.ops.gpu import device
    >>> device.capability_of(torch.device("cpu"))     # Triton's interpreter stands for the newest GPU
    (9, 0)
"""

import functools
import importlib.util
import os

import torch


def have_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, and so on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def capability(index: int) -> tuple[int, int]:
    """Compute capability of a CUDA device."""
    return torch.cuda.get_device_capability(index)


@functools.cache
def multiprocessors(index: int) -> int:
    """Number of multiprocessors of a CUDA device."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def capability_of(device: torch.device) -> tuple[int, int]:
    """Compute capability of a device; of the CPU, where Triton's interpreter runs, the newest."""
    return capability(device.index) if device.type == "cuda" else (9, 0)


def multiprocessors_of(device: torch.device) -> int:
    """Number of multiprocessors of a device; of the CPU, where Triton's interpreter runs, an H100's."""
    return multiprocessors(device.index) if device.type == "cuda" else 132
