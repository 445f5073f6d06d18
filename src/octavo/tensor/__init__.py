"""A weight that is a tensor: `OctavoTensor`, and what PyTorch may do with it.

| module | its job |
| --- | --- |
| `octavo_tensor` | the class, its two tables of handlers, and the fall-back for what is in neither |
| `stored` | stored parts of any rank: plain tensors |
| `products` | products and look-ups: straight to the kernels |
| `views` | views that stay in 8 bits |
| `copies` | aliases, copies, and new tensors made after the model of a weight |
| `changes` | changes in place |
| `adapted` | LoRA on a stack of experts, multiplied in parts |
| `gathering` | what FSDP2 gathers of a shard |

Importing this registers the handlers; each module imports `octavo_tensor`, which imports none of them.

Example:
    >>> import torch
    >>> from octavo.tensor import OctavoTensor, fallbacks, reset_fallbacks
    >>> weight = OctavoTensor.from_float(torch.randn(16, 64))
    >>> reset_fallbacks()
    >>> weight[:4].shape, (weight * 2).dtype, fallbacks()
    (torch.Size([4, 64]), torch.float32, {'aten.mul.Tensor': 1})
"""

from . import changes, copies, products, views  # noqa: F401  (importing them registers their handlers)
from .adapted import Adapted
from .octavo_tensor import FROZEN, SUFFIXES, OctavoTensor, fallbacks, pack, reset_fallbacks

__all__ = ["FROZEN", "SUFFIXES", "Adapted", "OctavoTensor", "fallbacks", "pack", "reset_fallbacks"]
