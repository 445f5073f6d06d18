"""The codes of one matrix, chosen by the error of its output: error feedback along each row.

Rounding the weights of a row to their nearest codes gives the least error of the weights, not of the output. Inputs go up
and down together; what one weight's rounding does to the output, the weights after it can partly undo. This is GPTQ
(Frantar et al., 2023, arXiv:2210.17323; the rule is Optimal Brain Surgeon's): one column after the other is rounded, and
its error is taken out, in the least-squares sense, by shifting the columns not rounded yet. Codebook and scales are those of
plain quantization, fixed beforehand, so columns may be taken in any order: those with the most input power first.

Example:
    >>> import torch
    >>> from octavo.calibration.feedback import recode
    >>> from octavo.config import OctavoConfig
    >>> from octavo.quantizer import quantize_parameter
    >>> weight, x = torch.randn(64, 128), torch.randn(1000, 32) @ torch.randn(32, 128)
    >>> plain = quantize_parameter(weight, OctavoConfig())
    >>> calibrated = recode(weight, plain, x.T @ x)
"""

import torch

from ..ops.reference import expand_scales
from ..quantizer import Packed

# Share of each input's own power added to its power, as if it came with independent noise: with none, errors are moved into
# directions that the calibration text happens not to use, and another text does. docs/CALIBRATION.md has the figures.
DAMPING = 0.1
# A head that is also the embedding: more, since feedback makes the weights themselves, which the embedding gives out, less
# exact. At 2 SmolLM2's head keeps 9/10 of the gain, and its embedding's error grows by two fifths instead of more than
# doubling.
TIED_DAMPING = 2.0
# Columns whose shifts are applied one by one; later columns get those of a whole batch in one product.
BATCH = 128


def recode(weight: torch.Tensor, plain: Packed, gram: torch.Tensor, damping: float = DAMPING) -> Packed:
    """Choose the codes of a quantized matrix anew, so that its output's error is small on given inputs.

    Args:
        weight: float [N, K], finite: what was quantized.
        plain: its plain quantization; codebook and scales are kept.
        gram: float [K, K], sum over calibration tokens of x xᵀ, x being the matrix's input; any scale.
        damping: see DAMPING.

    Returns:
        Packed with other `qdata`.

    Raises:
        ValueError: if `gram` is not finite or of another size.
    """
    rows, columns = weight.shape
    if gram.shape != (columns, columns):
        raise ValueError(f"gram: expected [{columns}, {columns}], found {list(gram.shape)}")
    order, factor = _feedback_factor(gram, damping)
    scale = expand_scales(plain.absmax, plain.block_size, columns).T[order]
    work = weight.detach().T[order].to(torch.float32).contiguous()
    codes = torch.empty_like(work, dtype=torch.uint8)
    boundaries = (plain.code[:-1] + plain.code[1:]) * 0.5
    for start in range(0, columns, BATCH):
        stop = min(start + BATCH, columns)
        errors = work.new_empty(stop - start, rows)
        for i in range(start, stop):
            # A block of zeros has scale 0, and any code stands for 0 in it.
            value = torch.where(scale[i] > 0, work[i] / scale[i], 0.0)
            index = torch.searchsorted(boundaries, value)
            codes[i] = index.to(torch.uint8)
            error = (work[i] - plain.code[index] * scale[i]) / factor[i, i]
            work[i + 1 : stop].addr_(factor[i, i + 1 : stop], error, alpha=-1)
            errors[i - start] = error
        work[stop:].addmm_(factor[start:stop, stop:].T, errors, alpha=-1)
    qdata = torch.empty_like(plain.qdata)
    qdata[:, order] = codes.T
    return plain._replace(qdata=qdata)


def _feedback_factor(gram: torch.Tensor, damping: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The order of the columns, and the upper Cholesky factor U of the inverse of the damped gram matrix in that order.

    The error of column i, divided by U[i, i], is taken out of column j > i with weight U[i, j].
    """
    if not torch.isfinite(gram).all():
        raise ValueError("the layer's inputs hold NaN or infinity on the calibration text")
    gram = gram.to(torch.float64)
    power = gram.diagonal().clone()
    # An input that is always 0 says nothing about its weights: their rounding is plain.
    power[power <= 0] = 1.0
    order = power.argsort(descending=True, stable=True)
    damped = gram[order][:, order]
    damped.diagonal().copy_(power[order] * (1 + damping))
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return order, torch.linalg.cholesky(inverse, upper=True).to(torch.float32)


def output_error(weight: torch.Tensor, packed: Packed, gram: torch.Tensor) -> tuple[float, float]:
    """Squared error of a matrix's output on the inputs behind `gram`, and the squared output itself.

    Args:
        weight: float [N, K].
        packed: its quantization.
        gram: float [K, K], sum of x xᵀ.
    """
    from .. import ops

    weight = weight.to(torch.float32)
    kept = ops.dequantize(packed.qdata, packed.absmax, packed.code, packed.block_size, torch.float32)
    return _power(weight - kept, gram), _power(weight, gram)


def _power(matrix: torch.Tensor, gram: torch.Tensor) -> float:
    gram = gram.to(torch.float32)
    return torch.einsum("nk,nk->", (matrix @ gram).double(), matrix.double()).item()
