"""`OctavoTensor`: a frozen weight in 8 bits that passes for the float weight it stands for.

It has the shape, device and compute dtype of that weight and holds three plain tensors:

    qdata   uint8              [..., N, K]             rows are outputs
    absmax  float16 | float32  [..., N, ceil(K / B)]
    code    float32            [256], or [..., 256] for a stack of matrices (experts)

`transposed` says that the weight is the transpose of what is stored (`Conv1D`, some experts), so that rows stay outputs.

How an operation reaches the kernels: by one of two tables, which the other modules of this package fill by `handles`. `FUNCTIONS`
catches the hot ones (`F.linear`, `F.embedding`, matrix products) by function of torch, before autograd; `OPERATIONS` has one
handler for each low-level (aten) operation that keeps a weight in 8 bits. A handler that finds arguments it has no path for
returns NotImplemented. What neither table serves de-quantizes first and runs as usual (`fall_back`); each such fall-back is
counted by name.

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
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from .. import ops
from ..codebook import fit
from ..config import OctavoConfig
from ..quantizer import Packed, quantize_parameter
from . import stored
from .gathering import Gathers

aten = torch.ops.aten
SUFFIXES = ("qdata", "absmax", "code")

FROZEN = (
    "a weight stored in 8 bits is frozen: it cannot require a gradient. Train a small adapter on top of it (PEFT: "
    "get_peft_model(model, LoraConfig(target_modules='all-linear'))), or leave this weight in float with skip=[pattern]"
)

FUNCTIONS: dict[Any, Callable[..., Any]] = {}
OPERATIONS: dict[Any, Callable[..., Any]] = {}
# Handlers of functions that are right as well for a weight with a gradient history (a copy that a trained value was added to);
# its other functions go PyTorch's way, through autograd.
WITH_HISTORY: set[Callable[..., Any]] = set()

_fallbacks: Counter[str] = Counter()


def handles(
    *operations: Any, functions: dict[Any, Callable[..., Any]] = FUNCTIONS, with_history: bool = False
) -> Callable[[Callable], Callable]:
    """Register a handler for functions of torch and for aten operations; None stands for one that this torch has not.

    Handlers name their parameters as the functions of torch do, because users may pass them by name.
    """

    def register(handler: Callable) -> Callable:
        for operation in operations:
            table = OPERATIONS if isinstance(operation, torch._ops.OpOverload) else functions
            table[operation] = handler
        functions.pop(None, None)
        if with_history:
            WITH_HISTORY.add(handler)
        return handler

    return register


def fallbacks() -> dict[str, int]:
    """Operations that had no path of their own and de-quantized a weight first, with how often, most frequent first."""
    return dict(_fallbacks.most_common())


def reset_fallbacks() -> None:
    """Start counting fall-backs anew."""
    _fallbacks.clear()


def count_fallback(name: str) -> None:
    _fallbacks[name] += 1


class OctavoTensor(Gathers, torch.Tensor):
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
            strides = stored.contiguous_strides(shape)
        weight = torch.Tensor._make_wrapper_subclass(
            cls, shape, strides=strides, dtype=dtype, device=qdata.device, requires_grad=False
        )
        weight.qdata, weight.absmax, weight.code = qdata, absmax, code
        weight.block_size, weight.transposed, weight.codebook = block_size, transposed, codebook
        return weight

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
            dtype: compute dtype, float32, float16 or bfloat16. Default: the weight's.

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
        """The plain weight in `dtype` (default: the compute dtype), of this tensor's shape."""
        if torch.is_grad_enabled() and has_history(self):
            return _Dequantized.apply(self, dtype)
        return self.decode(dtype)

    def decode(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """`dequantize` for handlers of aten operations, below which there is no autograd."""
        dtype = dtype or self.dtype
        # The kernels know the compute dtypes; any other (float64, integers) is cast from float32.
        computed = dtype if dtype in ops.schema.COMPUTE_DTYPES else torch.float32
        dense = stored.dequantize(self.qdata, self.absmax, self.code, self.block_size, computed)
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

        A fitted codebook is fitted anew; any other, and that of a slice (whose codebook also serves rows outside it), is kept.

        Args:
            values: float, of this tensor's shape.

        Raises:
            ValueError: if values holds NaN, infinity, or more than float16 scales can hold; nothing is changed.
        """
        if values.shape != self.shape:
            raise ValueError(
                f"a weight in 8 bits cannot change its shape in place: expected {tuple(self.shape)}, found "
                f"{tuple(values.shape)}"
            )
        rows = (values.detach().mT if self.transposed else values.detach()).to(self.device)
        if not rows.numel() or self.qdata.is_meta:
            return self
        if not torch.isfinite(rows).all():
            raise ValueError("an in-place change gave NaN or infinity: the 8-bit weight keeps its old values")
        if self.absmax.dtype == torch.float16 and rows.abs().max() > ops.HALF_LARGEST:
            raise ValueError(
                f"an in-place change gave values beyond {ops.HALF_LARGEST:g}, which this weight's float16 scales cannot "
                "hold; quantize it with scales='float32'"
            )
        for values, qdata, absmax, code in stored.matrices(rows, self.qdata, self.absmax, self.code):
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
        """Become an alias of `other`, whose shape, device and compute dtype this tensor has been given."""
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
        kwargs = kwargs or {}
        handler = FUNCTIONS.get(func)
        # `out=` is rare and wants its own checks: PyTorch's way has them.
        if handler is not None and "out" not in kwargs:
            passed = (
                torch.is_grad_enabled()
                and handler not in WITH_HISTORY
                and has_history(*args, *kwargs.values())
            )
            result = NotImplemented if passed else handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func.is_view and torch.is_inference_mode_enabled():
            # PyTorch gives a view its base's version counter, which tensors made in this mode cannot have.
            with torch.inference_mode(False), torch.no_grad():
                return _operate(func, args, kwargs or {})
        return _operate(func, args, kwargs or {})


def has_history(*values: Any) -> bool:
    """Whether a gradient is to flow back through one of the weights among `values`."""
    with torch._C.DisableTorchFunctionSubclass():
        return any(isinstance(value, OctavoTensor) and value.requires_grad for value in values)


class _Dequantized(torch.autograd.Function):
    """The values of a weight with a history."""

    @staticmethod
    def forward(ctx, weight, dtype):
        return ops.direct.no_view(weight.decode(dtype))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


def _operate(func, args, kwargs):
    handler = OPERATIONS.get(func)
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    # In that mode operations arrive as well that PyTorch itself takes apart otherwise, and of which nothing may be left then:
    # `weight.to(its own type)`.
    result = func.decompose(*args, **kwargs)
    return fall_back(func, args, kwargs) if result is NotImplemented else result


POINTWISE_IN_PLACE = {
    aten.add_.Tensor,
    aten.add_.Scalar,
    aten.sub_.Tensor,
    aten.sub_.Scalar,
    aten.mul_.Tensor,
    aten.mul_.Scalar,
    aten.div_.Tensor,
    aten.div_.Scalar,
}


def _wider(own: torch.dtype, at_least: torch.dtype | None) -> torch.dtype:
    return own if at_least is None else torch.promote_types(own, at_least)


def fall_back(func, args, kwargs):
    """De-quantize every OctavoTensor among the arguments and run `func`; write back what it changed in place."""
    count_fallback(str(func))
    changed: list[tuple[OctavoTensor, torch.Tensor]] = []
    # A change computed in 16 bits would round every weight once more.
    dtype = torch.float32 if func in POINTWISE_IN_PLACE else None
    if func._schema.is_mutable:
        args, kwargs = list(args), dict(kwargs)
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is None or not argument.alias_info.is_write:
                continue
            place, key = (kwargs, argument.name) if argument.name in kwargs else (args, position)
            value = place[key] if key in kwargs or position < len(args) else None
            if isinstance(value, OctavoTensor):
                dense = value.decode(_wider(value.dtype, dtype))
                changed.append((value, dense))
                place[key] = dense
            elif isinstance(value, (list, tuple)) and any(isinstance(item, OctavoTensor) for item in value):
                dense_items = [item.decode() if isinstance(item, OctavoTensor) else item for item in value]
                pairs = zip(value, dense_items, strict=True)
                changed.extend((item, dense) for item, dense in pairs if isinstance(item, OctavoTensor))
                place[key] = dense_items
    args, kwargs = tree_map_only(OctavoTensor, OctavoTensor.decode, (tuple(args), dict(kwargs)))
    result = func(*args, **kwargs)
    for weight, dense in changed:
        weight.rewrite_(dense)
        if result is dense:
            result = weight
    return result


def like(weight: OctavoTensor, qdata, absmax, code=None, **changes) -> OctavoTensor:
    """A tensor with other parts and the same properties, save for those named in `changes`."""
    properties = {
        "block_size": weight.block_size,
        "dtype": weight.dtype,
        "transposed": weight.transposed,
        "codebook": weight.codebook,
    }
    return OctavoTensor(qdata, absmax, weight.code if code is None else code, **{**properties, **changes})


def each(weight: OctavoTensor, function: Callable[[torch.Tensor], torch.Tensor], **changes) -> OctavoTensor:
    """`function` applied to each stored tensor."""
    return like(weight, function(weight.qdata), function(weight.absmax), function(weight.code), **changes)


def pack(name: str, weight: OctavoTensor) -> dict[str, torch.Tensor]:
    """The three tensors of a parameter as a file holds them: `name_qdata`, `name_absmax`, `name_code`."""
    return {f"{name}_{suffix}": getattr(weight, suffix).contiguous() for suffix in SUFFIXES}


# The name that pickles know it by, wherever in the package it lives; those that torch loads with `weights_only=True` as well.
OctavoTensor.__module__ = "octavo.tensor"
torch.serialization.add_safe_globals([OctavoTensor])
