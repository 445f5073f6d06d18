"""Products with many tokens: panels of the weight, de-quantized into a bounded workspace, and cuBLAS.

`linear` takes panels of rows, `linear_transposed` panels of columns, so that each element of the result comes
whole out of one product: nothing is summed up over panels, and nothing rounded twice. A bias needs care for that:
only into a result that is contiguous does cuBLAS add it before rounding.

Example:
    >>> from octavo.ops.gpu.kernels import panels
    >>> panels.step_for(8192, other=4096, total=16384, itemsize=2)     # rows of a 16384 x 4096 matrix at a time
    4096
"""

import torch

from .. import recomputed
from ..choose import decode
from ..kernel import Kernel

# Workspace for a panel. A product should have a tile of 128 x 256 for each of an H100's 132 multiprocessors, which for few
# tokens takes a large panel; and there is an end. H100, bfloat16, microseconds with panels of 16 / 32 / 64 / 128 MiB:
#   16384 x 4096,  512 tokens: 201 169 170 167   2048 tokens: 435 422 436 425
#    4096 x 16384, 512 tokens: 280 219 187 166   2048 tokens: 576 441 419 412
PANEL_BYTES = 32 << 20
FULL_PRODUCT = 132 * 128 * 256
LARGEST_PANEL_BYTES = 128 << 20
# Panels are cut at multiples of this, which keeps every part aligned for cuBLAS and for 16-byte loads.
STEP = 256


def step_for(
    tokens: int,
    other: int,
    total: int,
    itemsize: int,
    panel_bytes: int | None = None,
    *,
    bias: bool = False,
) -> int:
    """Rows per panel of `other` columns each, out of `total` (or columns of `other` rows).

    Args:
        panel_bytes: the workspace; by default as large as the constants above want it.
        bias: whether one is added; then one panel, if that is allowed at all.
    """
    each = max(1, other * itemsize)
    if panel_bytes is None and bias and total * each <= LARGEST_PANEL_BYTES:
        return total
    if panel_bytes is None:
        wanted = max(PANEL_BYTES // each, -(-FULL_PRODUCT // max(1, tokens)))
        fit = min(wanted, LARGEST_PANEL_BYTES // each)
    else:
        fit = panel_bytes // each
    fit = min(total, max(STEP, fit // STEP * STEP))
    # As many panels as that takes, but of equal size.
    count = -(-total // fit)
    return min(total, -(-total // (count * STEP)) * STEP)


def linear(x, qdata, absmax, code, block_size, bias, out, panel_bytes=None, *, segments=False) -> None:
    """x [M, K] Wᵀ + bias into out [M, N]."""
    rows, columns = qdata.shape
    step = step_for(x.shape[0], columns, rows, x.element_size(), panel_bytes, bias=bias is not None)
    # All of it where it will be asked for again at once.
    keep = recomputed.wanted() and rows * columns * x.element_size() <= recomputed.LIMIT
    workspace = torch.empty((rows if keep else step, columns), dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        panel = workspace[start:stop] if keep else workspace[: stop - start]
        decode(qdata[start:stop], absmax[start:stop], code, block_size, None, 0, panel, segments)
        if bias is None:
            torch.mm(x, panel.t(), out=out[:, start:stop])
        elif step == rows:
            torch.addmm(bias, x, panel.t(), out=out)
        else:
            out[:, start:stop] = torch.addmm(bias[start:stop], x, panel.t())
    if keep:
        recomputed.keep(qdata, workspace)


def linear_transposed(x, qdata, absmax, code, block_size, out, panel_bytes=None, *, segments=False) -> None:
    """x [M, N] W into out [M, K]."""
    rows, columns = qdata.shape
    dense = recomputed.take(qdata, x.dtype)
    if dense is not None:
        torch.mm(x, dense, out=out)
        return
    step = step_for(x.shape[0], rows, columns, x.element_size(), panel_bytes)
    workspace = torch.empty(rows * step, dtype=x.dtype, device=x.device)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        panel = workspace[: rows * (stop - start)].view(rows, stop - start)
        decode(qdata, absmax, code, block_size, None, start, panel, segments)
        torch.mm(x, panel, out=out[:, start:stop])


KERNEL = Kernel(
    name="panels",
    operation="linear",
    summary="a panel of the matrix is de-quantized into a workspace (32 to 128 MiB) and multiplied by cuBLAS; takes every call",
    run=linear,
    unsupported_reason=lambda call: None,
    place=lambda call: 100,
    segmented=lambda call: True,
)
