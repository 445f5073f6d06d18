"""Weights in floating point, kept from a forward pass that a checkpoint recomputes until the backward pass that follows.

A checkpointed layer de-quantizes each matrix three times a step: forward, forward again when its backward pass comes, and
backward. The last two are moments apart. So a product that runs inside a backward pass keeps what it de-quantized, `panels`
takes it up again, and nothing is kept when the backward pass is over. At most `LIMIT` bytes are kept at once, which are
those of one layer: what was kept first goes first.

Example:
    >>> import torch
    >>> from octavo.ops.gpu import recomputed
    >>> recomputed.wanted(), recomputed.take(torch.zeros(4, 4, dtype=torch.uint8), torch.float16)
    (False, None)
"""

import threading
from collections import OrderedDict
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

# A layer of GPT-J-6B has 403 MB of weights in 16 bits.
LIMIT = 512 << 20

_engine: Any = torch.autograd.Variable._execution_engine  # type: ignore[attr-defined]
_lock = threading.Lock()
# What a matrix is known by → its values, and what keeps the number of its storage from being given to another.
_kept: OrderedDict[tuple, tuple[torch.Tensor, StorageWeakRef]] = OrderedDict()


def wanted() -> bool:
    """Whether a backward pass is running in this thread, so that a forward pass now is one that was done before."""
    return torch._C._current_graph_task_id() != -1


def keep(qdata: torch.Tensor, dense: torch.Tensor) -> None:
    """Keep the values of a matrix, if they are within the limit, for `take`, or until this backward pass ends."""
    size = dense.nbytes
    if size > LIMIT:
        return
    with _lock:
        if not _kept:
            _engine.queue_callback(forget)
        _kept.pop(_key(qdata, dense.dtype), None)
        while sum(values.nbytes for values, _ in _kept.values()) + size > LIMIT:
            _kept.popitem(last=False)
        _kept[_key(qdata, dense.dtype)] = dense, StorageWeakRef(qdata.untyped_storage())


def take(qdata: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """The values of a matrix [N, K] in `dtype`, if they were kept; they no longer are then."""
    if not _kept:
        return None
    with _lock:
        dense, _ = _kept.pop(_key(qdata, dtype), (None, None))
    return dense


def forget() -> None:
    """Keep nothing."""
    with _lock:
        _kept.clear()


def _key(qdata: torch.Tensor, dtype: torch.dtype) -> tuple:
    return qdata.untyped_storage()._cdata, qdata.storage_offset(), qdata.shape, dtype
