"""Products with many tokens: panels of the weight, de-quantized into a bounded workspace, and cuBLAS.

`linear` takes panels of rows, `linear_transposed` panels of columns, so that each element of the result comes
whole out of one product: nothing is summed up over panels, and nothing rounded twice.

Example:
    >>> linear(x, qdata, absmax, code, 64, None, out, decode)   # doctest: +SKIP
"""

import torch

# Workspace for a panel. Not yet measured: large enough that a product of 2048 tokens fills the GPU several
# times over, small beside a model. `benchmarks.gpu` sweeps it.
PANEL_BYTES = 64 << 20
# Panels are cut at multiples of this, which keeps every part aligned for cuBLAS and for 16-byte loads.
STEP = 256


def _step(other: int, total: int, itemsize: int, panel_bytes: int) -> int:
    """Rows (or columns) a panel, of `other` columns (or rows) each."""
    fit = panel_bytes // max(1, other * itemsize)
    return min(total, max(STEP, fit // STEP * STEP))


def linear(x, qdata, absmax, code, block_size, bias, out, decode, panel_bytes=None) -> None:
    """x [M, K] Wᵀ + bias into out [M, N].

    Args:
        decode: decode(qdata, absmax, code, block_size, ids, first_column, out), as in `decode.py`.
    """
    rows, columns = qdata.shape
    step = _step(columns, rows, x.element_size(), panel_bytes or PANEL_BYTES)
    workspace = torch.empty((step, columns), dtype=x.dtype, device=x.device)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        panel = workspace[: stop - start]
        decode(qdata[start:stop], absmax[start:stop], code, block_size, None, 0, panel)
        if bias is None:
            torch.mm(x, panel.t(), out=out[:, start:stop])
        else:
            torch.addmm(bias[start:stop], x, panel.t(), out=out[:, start:stop])


def linear_transposed(x, qdata, absmax, code, block_size, out, decode, panel_bytes=None) -> None:
    """x [M, N] W into out [M, K]."""
    rows, columns = qdata.shape
    step = _step(rows, columns, x.element_size(), panel_bytes or PANEL_BYTES)
    workspace = torch.empty(rows * step, dtype=x.dtype, device=x.device)
    for start in range(0, columns, step):
        stop = min(start + step, columns)
        panel = workspace[: rows * (stop - start)].view(rows, stop - start)
        decode(qdata, absmax, code, block_size, None, start, panel)
        torch.mm(x, panel, out=out[:, start:stop])
