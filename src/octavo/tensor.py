"""`OctavoTensor`: a frozen weight in 8 bits that passes for the float weight it stands for.

It has the shape, device and computing type of that weight and holds three plain tensors:

    qdata   uint8              [..., N, K]             rows are outputs
    absmax  float16 | float32  [..., N, ceil(K / B)]
    code    float32            [256], or [..., 256] for a stack of matrices (experts)

`transposed` says that the weight is the transpose of what is stored (`Conv1D`, some experts), so that rows stay outputs.

How an operation reaches the kernels: `octavo.tensor_functions` catches the hot ones (`F.linear`, `F.embedding`, matrix products)
by function; `octavo.tensor_dispatch` gives what a tensor needs to live in PyTorch (detach, `.to()`, slices, copies, in-place
changes). Any other operation de-quantizes first and runs as usual; each such fall-back is counted by name.

Views run along stored rows (or whole blocks of them) and share storage. Any other view (`weight[:, 3:9]`,
`weight.diagonal()`, `weight.view(-1, 2 * K)`) is a float copy: reading it is right, but a change made in it does not reach
the weight. Assigning does: `weight[:, 3:9] = values`.

Example:
    >>> import torch, octavo
    >>> weight = octavo.OctavoTensor.from_float(torch.randn(16, 128))
    >>> torch.nn.functional.linear(torch.randn(2, 128), weight).shape
    torch.Size([2, 16])
    >>> weight.nbytes_stored
    3136
"""

import sys
from collections import Counter
from typing import Any

import torch

from . import ops
from .config import OctavoConfig
from .quantizer import Packed, quantize_parameter

SUFFIXES = ("qdata", "absmax", "code")

FROZEN = (
    "a weight stored in 8 bits is frozen: it cannot require a gradient. Train a small adapter on top of it (PEFT: "
    "get_peft_model(model, LoraConfig(target_modules='all-linear'))), or leave this weight in float with skip=[pattern]"
)

_fallbacks: Counter[str] = Counter()


def fallbacks() -> dict[str, int]:
    """Operations that had no path of their own and de-quantized a weight first, with how often, most frequent first."""
    return dict(_fallbacks.most_common())


def reset_fallbacks() -> None:
    """Start counting fall-backs anew."""
    _fallbacks.clear()


def count_fallback(name: str) -> None:
    _fallbacks[name] += 1


class OctavoTensor(torch.Tensor):
    """A frozen matrix, or stack of matrices, stored in 8 bits.

    Attributes:
        qdata, absmax, code: the stored tensors (see the module).
        block_size: weights of a row that share a scale.
        transposed: whether the weight is the transpose of what is stored.
        codebook: "fitted" or "dynamic": how an in-place change chooses its code ("fitted" fits it anew, any other keeps it).
    """

    qdata: torch.Tensor
    absmax: torch.Tensor
    code: torch.Tensor
    block_size: int
    transposed: bool
    codebook: str

    @staticmethod
    def __new__(
        cls,
        qdata,
        absmax=None,
        code=None,
        block_size=None,
        dtype=torch.float32,
        transposed=False,
        codebook="fitted",
        requires_grad=False,
    ):
        if requires_grad:
            raise RuntimeError(FROZEN)
        if isinstance(qdata, OctavoTensor):
            # accelerate's offloading makes a parameter anew: `type(parameter)(value, requires_grad=...)`.
            return torch.nn.Parameter(qdata, requires_grad=False)
        shape, strides = qdata.shape, qdata.stride()
        if transposed:
            # Contiguous, as the weight is that it stands for (FSDP2 takes no other): strides of floats that do not exist.
            shape = (*shape[:-2], shape[-1], shape[-2])
            strides = _contiguous_strides(shape)
        return torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=qdata.device, requires_grad=False
        )

    def __init__(
        self,
        qdata,
        absmax=None,
        code=None,
        block_size=None,
        dtype=torch.float32,
        transposed=False,
        codebook="fitted",
        requires_grad=False,
    ):
        if isinstance(qdata, OctavoTensor):
            return
        self.qdata = qdata
        self.absmax = absmax
        self.code = code
        self.block_size = block_size
        self.transposed = transposed
        self.codebook = codebook

    @classmethod
    def from_float(
        cls,
        weight: torch.Tensor,
        config: OctavoConfig | None = None,
        *,
        name: str = "weight",
        transposed: bool = False,
        dtype: torch.dtype | None = None,
    ) -> "OctavoTensor":
        """Quantize a weight.

        Args:
            weight: float [..., N, K] with rows as outputs, or [..., K, N] with `transposed`.
            config: codebook, block size, type of the scales. Default: `OctavoConfig()`.
            name: the parameter's name, for errors.
            transposed: the weight holds inputs as rows; its transpose is stored.
            dtype: computing type, float32, float16 or bfloat16. Default: the weight's.

        Raises:
            ValueError: if the weight holds NaN or infinity or is no matrix, naming it.
        """
        config = config or OctavoConfig()
        packed = quantize_parameter(weight.mT if transposed else weight, config, name)
        return cls.from_packed(packed, dtype or weight.dtype, transposed, config.codebook)

    @classmethod
    def from_packed(
        cls, packed: Packed, dtype: torch.dtype, transposed: bool = False, codebook: str = "fitted"
    ) -> "OctavoTensor":
        """Wrap stored parts. Raises ValueError if they do not fit together, saying what was expected and found."""
        qdata, absmax, code, block_size = packed
        lead = qdata.shape[:-2]
        if qdata.dim() < 2 or tuple(absmax.shape[:-2]) != tuple(lead) or tuple(code.shape) != (*lead, 256):
            raise ValueError(
                f"qdata {tuple(qdata.shape)}, absmax {tuple(absmax.shape)} and code {tuple(code.shape)} are not one parameter: "
                f"expected absmax [..., rows, blocks] and code {(*lead, 256)}"
            )
        if qdata.numel():
            first = (0,) * len(lead)
            ops.schema.check_packed("tensor", qdata[first], absmax[first], code[first], block_size)
        return cls(qdata, absmax, code, block_size, dtype, transposed, codebook)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The plain weight in `dtype` (default: the computing type), of this tensor's shape."""
        dtype = dtype or self.dtype
        # The kernels know the computing types; any other (float64, integers) is cast from float32.
        computed = dtype if dtype in ops.schema.COMPUTING_TYPES else torch.float32
        dense = _dequantize_stored(self.qdata, self.absmax, self.code, self.block_size, computed)
        dense = dense.to(dtype)
        return dense.mT if self.transposed else dense

    @property
    def nbytes_stored(self) -> int:
        """Bytes that the stored tensors take."""
        return self.qdata.nbytes + self.absmax.nbytes + self.code.nbytes

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """`nbytes_stored`: PyTorch would count the floats that the weight stands for."""
        return self.nbytes_stored

    def element_size(self) -> int:
        """1: the byte that a weight takes, its scale not counted. transformers' `get_memory_footprint` multiplies by it."""
        return self.qdata.element_size()

    def rewrite_(self, values: torch.Tensor) -> "OctavoTensor":
        """Quantize `values` into this tensor's own storage, so that aliases see the change.

        A fitted codebook is fitted anew; any other, and that of a slice (whose codebook also serves rows outside it),
        is kept.

        Args:
            values: float, of this tensor's shape.

        Raises:
            ValueError: if values holds NaN, infinity, or more than float16 scales can hold; nothing is changed.
        """
        from .codebook import fit

        if values.shape != self.shape:
            raise ValueError(
                f"a weight in 8 bits cannot change its shape in place: expected {tuple(self.shape)}, found "
                f"{tuple(values.shape)}"
            )
        stored = (values.detach().mT if self.transposed else values.detach()).to(self.device)
        if not stored.numel() or self.qdata.is_meta:
            return self
        if not torch.isfinite(stored).all():
            raise ValueError("an in-place change gave NaN or infinity: the 8-bit weight keeps its old values")
        if self.absmax.dtype == torch.float16 and stored.abs().max() > ops.HALF_LARGEST:
            raise ValueError(
                f"an in-place change gave values beyond {ops.HALF_LARGEST:g}, which this weight's float16 scales cannot "
                "hold; quantize it with scales='float32'"
            )
        for values, qdata, absmax, code in _matrices(stored, self.qdata, self.absmax, self.code):
            if self.codebook == "fitted":
                code.copy_(fit(values, self.block_size, absmax.dtype))
            new_qdata, new_absmax = ops.quantize(values, code, self.block_size, absmax.dtype)
            qdata.copy_(new_qdata)
            absmax.copy_(new_absmax)
        return self

    def quantized_alike(self, values: torch.Tensor) -> "OctavoTensor":
        """Plain values of any matrix's shape, quantized with this tensor's codebook kind, block size and layout."""
        codebook = "dynamic" if self.codebook == "dynamic" else "fitted"
        config = OctavoConfig(codebook=codebook, block_size=self.block_size)
        return OctavoTensor.from_float(values.detach(), config, transposed=self.transposed, dtype=self.dtype)

    def take_parts(self, other: "OctavoTensor") -> None:
        """Become an alias of `other`, whose shape, device and computing type this tensor has been given."""
        for name in (*SUFFIXES, "block_size", "transposed", "codebook"):
            setattr(self, name, getattr(other, name))

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]  # torch names it otherwise
        return (
            f"OctavoTensor(shape={tuple(self.shape)}, dtype={self.dtype}, device={self.device}, "
            f"block_size={self.block_size}, codebook={self.codebook!r}"
            + (", transposed=True)" if self.transposed else ")")
        )

    def __tensor_flatten__(self):
        return list(SUFFIXES), (self.block_size, self.dtype, self.transposed, self.codebook)

    @classmethod
    def __tensor_unflatten__(cls, tensors, context, outer_size=None, outer_stride=None):
        return cls(*(tensors[name] for name in SUFFIXES), *context)

    def _stable_hash_for_caching(self) -> str:
        """What `torch.compile` files a compiled graph under: all that the graph depends on, which is not the values."""
        parts = [
            (part.shape, part.stride(), part.dtype, part.device)
            for part in (self.qdata, self.absmax, self.code)
        ]
        return repr((type(self).__name__, self.shape, parts, self.__tensor_flatten__()[1]))

    def requires_grad_(self, requires_grad: bool = True) -> "OctavoTensor":
        # `nn.Parameter(weight)` asks for a gradient only because that is its default (PEFT's DoRA wraps a weight that way to
        # transpose it): the parameter is made, and is frozen.
        if requires_grad and sys._getframe(1).f_code is not torch.nn.Parameter.__new__.__code__:
            raise RuntimeError(FROZEN)
        return self

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        return tensor_functions.call(func, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return tensor_dispatch.dispatch(func, args, kwargs or {})

    def fsdp_pre_all_gather(self, mesh, outer_size, outer_stride, module, mp_policy):
        """What FSDP2 gathers of this shard; see `octavo.integrations.distributed`."""
        from .integrations.distributed import gather_inputs

        return gather_inputs(self, mesh, outer_size)

    def fsdp_post_all_gather(self, outputs, metadata, param_dtype, *, out=None):
        """The whole weight from the gathered parts."""
        from .integrations.distributed import gathered_weight

        return gathered_weight(outputs, metadata, param_dtype, out)


def _contiguous_strides(shape) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _matrices(values, qdata, absmax, code):
    """The matrices of stored parts of any rank, as tuples of views (values, qdata, absmax, code)."""
    if qdata.dim() == 1:
        values, qdata, absmax = values[None], qdata[None], absmax[None]
    if qdata.dim() == 2:
        yield values, qdata, absmax, code
        return
    for index in range(qdata.shape[0]):
        yield from _matrices(
            values[index], qdata[index], absmax[index], code if code.dim() == 1 else code[index]
        )


def _dequantize_stored(qdata, absmax, code, block_size, dtype) -> torch.Tensor:
    """De-quantize stored parts of any rank; one codebook for each leading index that `code` has."""
    columns, blocks = qdata.shape[-1], absmax.shape[-1]
    if code.dim() == 1:
        flat = ops.dequantize(qdata.reshape(-1, columns), absmax.reshape(-1, blocks), code, block_size, dtype)
        return flat.view(qdata.shape)
    parts = [
        _dequantize_stored(qdata[index], absmax[index], code[index], block_size, dtype)
        for index in range(qdata.shape[0])
    ]
    return torch.stack(parts) if parts else torch.empty(qdata.shape, dtype=dtype, device=qdata.device)


def pack(name: str, weight: OctavoTensor) -> dict[str, torch.Tensor]:
    """The three tensors of a parameter as a file holds them: `name_qdata`, `name_absmax`, `name_code`."""
    return {f"{name}_{suffix}": getattr(weight, suffix).contiguous() for suffix in SUFFIXES}


torch.serialization.add_safe_globals([OctavoTensor])

# They import this module in turn, so they come last. (An import statement in the methods above would cost 0.4 µs a call.)
from . import tensor_dispatch, tensor_functions  # noqa: E402
