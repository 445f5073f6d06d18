"""Which codebooks are segments, known without asking the device.

A kernel for segments is chosen before it is launched, and a codebook's values lie on the device: reading them back for every
call would wait for it. So what was found of a codebook is kept for as long as its memory lives and is not changed: by storage
and PyTorch's version counter of it, which every view shares and every change in place moves on. A copy is other memory, and is
looked at anew, unless the copy's maker carries the answer over (`carry`), as moving a weight to a GPU does.

Example:
    >>> import torch
    >>> from octavo import codebook
    >>> from octavo.ops.gpu import kinds
    >>> kinds.is_segments(codebook.fit(torch.randn(64, 64), 64)), kinds.is_segments(codebook.dynamic())
    (True, False)
"""

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ..segments import segments


class _Known:
    """What was found of the codebooks in one storage: offset → whether it is segments, at a version of the storage."""

    __slots__ = ("found", "storage", "version")

    def __init__(self, storage: torch.UntypedStorage, version: int):
        # As long as this weak reference lives, no other storage gets the number that it is filed under.
        self.storage = StorageWeakRef(storage)
        self.version = version
        self.found: dict[int, bool] = {}


_known: dict[int, _Known] = {}


def recognise(code: torch.Tensor) -> bool:
    """Whether a codebook, float32 [256] in the host's memory, consists of sixteen segments: exactly, from its values."""
    return segments(code) is not None


def is_segments(code: torch.Tensor) -> bool:
    """The same for a contiguous codebook on any device; reads it back once, unless the answer is known.

    While a CUDA graph is captured nothing can be read back: a codebook that is met there for the first time counts as a table,
    which every codebook is.
    """
    known = _of(code)
    offset = int(code.storage_offset())
    answer = known.found.get(offset)
    if answer is None:
        if code.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        answer = known.found[offset] = recognise(code.detach().cpu())
    return answer


def carry(old: torch.Tensor, new: torch.Tensor) -> None:
    """`new` was just made with the values of `old`, codebooks of the same shape [..., 256]: it need not be read back."""
    for one, other in zip(old.detach().view(-1, 256), new.detach().view(-1, 256), strict=True):
        _of(other).found[int(other.storage_offset())] = is_segments(one)


def forget() -> None:
    """Forget all. For changes in place that version counters do not show: FSDP2 keeps those of what it has gathered."""
    _known.clear()


def _of(code: torch.Tensor) -> _Known:
    storage = code.untyped_storage()
    # Tensors of inference mode have no counter; in-place changes of ours forget by themselves.
    version = -1 if code.is_inference() else code._version
    number = storage._cdata
    known = _known.get(number)
    if known is None or known.version != version:
        if len(_known) & (len(_known) - 1) == 0:
            for dead in [key for key, entry in _known.items() if entry.storage.expired()]:
                del _known[dead]
        known = _known[number] = _Known(storage, version)
    return known
