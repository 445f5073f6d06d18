"""The operations of `octavo.ops` on CPUs, by the native kernels of `octavo._native` (sources in csrc/).

| module | its job |
| --- | --- |
| `native` | the native module: loaded or not, which kernels, and why (`status`) |
| `products` | `linear` and its transpose, and from how many tokens on they go which way |
| `decode`, `encode` | `dequantize`, `embedding`; `quantize`, `histogram`, `scale_range`, `squared_error` |
| `bandwidth` | `read_bandwidth`, the measure that products of one token are held against |

Importing this registers the operations. Without native kernels nothing is registered and the plain-PyTorch definitions stay in
charge (`AVAILABLE` is False).

Example:
    >>> import octavo.ops.cpu as cpu
    >>> sorted(cpu.status())
    ['active', 'codebooks', 'pool', 'reason', 'supported', 'threads']
"""

from .. import reference
from ..schema import implementation
from .bandwidth import read_bandwidth
from .decode import dequantize, embedding
from .encode import histogram, quantize, scale_range, squared_error
from .native import AVAILABLE, ISA_VARIABLE, TYPES, status
from .products import linear_fast, linear_transposed_fast

__all__ = [
    "AVAILABLE",
    "ISA_VARIABLE",
    "TYPES",
    "dequantize",
    "embedding",
    "histogram",
    "linear_fast",
    "linear_transposed_fast",
    "quantize",
    "read_bandwidth",
    "scale_range",
    "squared_error",
    "status",
]


def _linear(x, qdata, absmax, code, block_size, bias=None):
    if bias is not None and bias.dtype not in TYPES:
        return reference.linear(x, qdata, absmax, code, block_size, bias)
    return linear_fast(x, qdata, absmax, code, block_size, bias)


if AVAILABLE:
    implementation("linear", "CPU")(_linear)
    implementation("linear_transposed", "CPU")(linear_transposed_fast)
    implementation("dequantize", "CPU")(dequantize)
    implementation("embedding", "CPU")(embedding)
    implementation("quantize", "CPU")(quantize)
    implementation("histogram", "CPU")(histogram)
