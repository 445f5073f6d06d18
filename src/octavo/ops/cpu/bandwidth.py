"""How fast this machine's memory is read: the limit of a product of one token, which reads every weight once.

Example:
    >>> from octavo.ops.cpu import read_bandwidth
    >>> read_bandwidth(size=1 << 20, repeats=1) > 0
    True
"""

import time

import torch

from . import native

# More than the caches of a desktop's processor; pass a larger size for a server's.
DEFAULT_SIZE = 1 << 28


def read_bandwidth(size: int = DEFAULT_SIZE, repeats: int = 5) -> float:
    """Bytes per second that the memory delivers to all of torch's threads together: the best of some passes over `size` bytes.

    By the native kernels' own way of reading; without them by PyTorch's sum of integers, which a processor may not be able to
    do at the memory's speed.
    """
    memory = torch.ones(size // 8, dtype=torch.int64)
    threads, best = torch.get_num_threads(), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        if native.AVAILABLE:
            native.library.read_through(memory.data_ptr(), size, threads)
        else:
            memory.sum()
        best = min(best, time.perf_counter() - start)
    return size / best
