"""How much memory loading, generating and training take, from a model's configuration alone.

Weights are counted. What a step computes is not guessed by a formula: the very model, with its adapters,
checkpointing and chunked loss, runs forward and backward on tensors that have shapes but no contents, and
every allocation is followed. No weight is read, and any architecture that transformers builds can be asked.

Example:
    >>> from transformers import GPTJConfig
    >>> estimate = training(GPTJConfig(), batch_size=1, max_length=2048)
    >>> round(estimate.total / 2**30, 1)
    8.5
"""

import contextlib
import copy
import re
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..checkpoint.skeleton import build_skeleton
from ..config import OctavoConfig
from ..model import plan_model, set_parameter
from ..ops import blocks_per_row
from ..tensor import OctavoTensor
from ..training.adapters import add_adapters
from ..training.loss import language_model_loss
from ..training.prepare import prepare_for_training
from ..training.recipe import Recipe
from . import even_experts as experts

# What a process takes before the model: the CUDA context with the libraries' kernels and cuBLAS's workspace
# on a GPU. A rule of thumb: it varies with the driver and the GPU by some hundred MiB.
CUDA_CONTEXT = 600 * 2**20
# bitsandbytes keeps states of smaller tensors in 32 bits, and one float32 scale for each block of 256.
SMALLEST_8BIT_STATE = 4096
STATE_BLOCK = 256


class DependsOnValues(ValueError):
    """What a model computes depends on values, which a plan has not."""


@contextlib.contextmanager
def _values_are_not_needed() -> Iterator[None]:
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise DependsOnValues(
            f"what this model computes depends on the values of its inputs ({error}), so only its weights can be planned"
        ) from error


@dataclass
class Estimate:
    """Memory, part by part.

    Attributes:
        parts: name → bytes, in the order to show.
        parameters, trainable: numbers of parameters.
    """

    parts: dict[str, int] = field(default_factory=dict)
    parameters: int = 0
    trainable: int = 0

    @property
    def total(self) -> int:
        return sum(self.parts.values())


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of all tensors made while it is active.

    Attributes:
        live: bytes alive now.
        peak: the most there have been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            # The parts of an OctavoTensor are seen when they are made.
            if isinstance(tensor, torch.Tensor) and not isinstance(tensor, OctavoTensor):
                self._follow(tensor.untyped_storage())
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return

        def gone(_):
            self.live -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def quantized_skeleton(config: Any, octavo_config: OctavoConfig, dtype: torch.dtype) -> nn.Module:
    """The model that a configuration describes, with 8-bit weights, on the meta device."""
    config = copy.deepcopy(config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    experts.use_even(config)
    model = build_skeleton(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    scales = torch.float32 if octavo_config.codebook == "dynamic" else torch.float16
    block_size = octavo_config.row_block
    for entry in plan_model(model, octavo_config).entries.values():
        shape = list(entry.shape)
        if entry.transposed:
            shape[-2:] = shape[-1], shape[-2]
        with torch.device("meta"):
            qdata = torch.empty(shape, dtype=torch.uint8)
            absmax = torch.empty(*shape[:-1], blocks_per_row(shape[-1], block_size), dtype=scales)
            code = torch.empty(*shape[:-2], 256)
        weight = OctavoTensor(
            qdata, absmax, code, block_size, dtype, entry.transposed, octavo_config.codebook
        )
        set_parameter(model, entry, weight)
    return model


def _give_shapes_only(model: nn.Module) -> None:
    """Inside a FakeTensorMode: replace meta tensors by ones that claim to be on the CPU. Aliases stay aliases."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    if id(tensor) not in made:
                        made[id(tensor)] = _shape_only(tensor)
                    table[name] = made[id(tensor)]


def _shape_only(tensor: torch.Tensor) -> torch.Tensor:
    if isinstance(tensor, OctavoTensor):
        parts = (
            torch.empty(part.shape, dtype=part.dtype) for part in (tensor.qdata, tensor.absmax, tensor.code)
        )
        qdata, absmax, code = parts
        options = (tensor.block_size, tensor.dtype, tensor.transposed, tensor.codebook)
        weight = OctavoTensor(qdata, absmax, code, *options)
        return nn.Parameter(weight, requires_grad=False)
    plain = torch.empty(tensor.shape, dtype=tensor.dtype)
    return nn.Parameter(plain, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else plain


def _weights(model: nn.Module, device: str) -> Estimate:
    """The parts that are there whatever is done."""
    parameters = [parameter for parameter in model.parameters()]
    packed = [parameter for parameter in parameters if isinstance(parameter, OctavoTensor)]
    plain = [p for p in parameters if not isinstance(p, OctavoTensor) and not p.requires_grad]
    other = sum(p.nbytes for p in plain) + sum(buffer.nbytes for buffer in model.buffers())
    estimate = Estimate(parameters=sum(p.numel() for p in parameters if not p.requires_grad))
    if device == "cuda":
        estimate.parts["CUDA context, libraries"] = CUDA_CONTEXT
    estimate.parts["weights in 8 bits"] = sum(weight.nbytes_stored for weight in packed)
    estimate.parts["norms, biases, buffers"] = other
    return estimate


def _panel(model: nn.Module, tokens: int, dtype: torch.dtype, device: str) -> int:
    """The kernels' own workspace: the largest panel of a matrix that a product of many tokens de-quantizes."""
    from ..ops.cpu.products import panel_bytes
    from ..ops.gpu.kernels.panels import step_for

    with_bias = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if isinstance(weight, OctavoTensor) and getattr(module, "bias", None) is not None:
            with_bias.add(weight.qdata.shape[-2:])
    found = 0
    for rows, columns in {p.qdata.shape[-2:] for p in model.parameters() if isinstance(p, OctavoTensor)}:
        if device == "cpu":
            found = max(found, panel_bytes(rows, columns, dtype))
            continue
        forward = step_for(tokens, columns, rows, dtype.itemsize, bias=(rows, columns) in with_bias) * columns
        backward = step_for(tokens, rows, columns, dtype.itemsize) * rows
        found = max(found, max(forward, backward) * dtype.itemsize)
    return found


def _kept_of_a_layer(model: nn.Module, dtype: torch.dtype) -> int:
    """What a GPU keeps of a checkpointed layer's weights in floating point until its backward pass (`ops.gpu.recomputed`)."""
    from ..ops.gpu.recomputed import LIMIT

    layers: Counter[str] = Counter()
    for name, weight in model.named_parameters():
        numbered = re.match(r".*?\.\d+\.", name)
        if isinstance(weight, OctavoTensor) and numbered:
            layers[numbered.group()] += weight.numel() * dtype.itemsize
    return min(LIMIT, max(layers.values(), default=0))


def loading(
    config: Any, octavo_config: OctavoConfig, dtype: torch.dtype, *, quantized: bool, device: str = "cuda"
) -> Estimate:
    """Memory while loading.

    Args:
        config: a transformers configuration.
        octavo_config: how the matrices are stored.
        dtype: type to compute in.
        quantized: the checkpoint is in 8 bits already. Else one matrix at a time is quantized from its float values.
    """
    model = quantized_skeleton(config, octavo_config, dtype)
    estimate = _weights(model, device)
    if not quantized:
        largest = max(p.numel() for p in model.parameters() if isinstance(p, OctavoTensor))
        # The matrix as read in float32, and its codes while they are made.
        estimate.parts["largest matrix, in float32"] = 4 * largest + largest
    return estimate


def generating(
    config: Any,
    octavo_config: OctavoConfig,
    dtype: torch.dtype,
    *,
    max_length: int,
    batch_size: int = 1,
    device: str = "cuda",
) -> Estimate:
    """Memory while generating: a prompt of `max_length` tokens, and the keys and values kept of it."""
    model = quantized_skeleton(config, octavo_config, dtype)
    estimate = _weights(model, device)
    with _values_are_not_needed(), FakeTensorMode(allow_non_fake_inputs=True):
        _give_shapes_only(model)
        ids = torch.zeros(batch_size, max_length, dtype=torch.long)
        with LiveBytes() as bytes_, torch.no_grad():
            out = model(input_ids=ids, use_cache=True, logits_to_keep=1)
            del ids
        kept = bytes_.live - out.logits.untyped_storage().nbytes()
    estimate.parts["keys and values"] = kept
    estimate.parts["computing"] = bytes_.peak - kept
    estimate.parts["a panel of weights, in float"] = _panel(model, batch_size * max_length, dtype, device)
    return estimate


def training(
    config: Any,
    octavo_config: OctavoConfig | None = None,
    dtype: torch.dtype = torch.bfloat16,
    *,
    max_length: int,
    batch_size: int = 1,
    recipe: Recipe | None = None,
    device: str = "cuda",
) -> Estimate:
    """Memory while training with `octavo finetune`.

    Args:
        config: a transformers configuration.
        octavo_config: how the matrices are stored. Default: `OctavoConfig()`.
        dtype: type to compute in.
        max_length, batch_size: tokens of an example, and examples at once.
        recipe: which adapters, optimizer and checkpointing. Default: `Recipe()`.
        device: "cuda" or "cpu".

    Raises:
        DependsOnValues: if shapes depend on values: a mixture of experts that transformers does not run as a whole.
    """
    recipe = recipe or Recipe()
    model = quantized_skeleton(config, octavo_config or OctavoConfig(), dtype)
    if any(isinstance(parameter, OctavoTensor) and parameter.dim() == 3 for parameter in model.parameters()):
        # PEFT's adapters on experts know no dropout.
        recipe = replace(recipe, lora_dropout=0.0)
    prepare_for_training(model, gradient_checkpointing=recipe.gradient_checkpointing)
    model = add_adapters(model, recipe).train()
    estimate = _weights(model, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    estimate.trainable = sum(parameter.numel() for parameter in trained)
    with _values_are_not_needed(), FakeTensorMode(allow_non_fake_inputs=True):
        _give_shapes_only(model)
        # The gradients are there already when a second batch is accumulated onto the first.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        ids = torch.zeros(batch_size, max_length, dtype=torch.long)
        autocast = torch.autocast("cpu", dtype) if dtype != torch.float32 else contextlib.nullcontext()
        with LiveBytes() as bytes_:
            with autocast:
                loss, tokens = language_model_loss(model, {"input_ids": ids, "labels": ids}, select=False)
            kept = bytes_.live
            (loss / tokens).backward()
    estimate.parts["adapters"] = sum(parameter.nbytes for parameter in trained)
    estimate.parts["gradients of the adapters"] = sum(parameter.nbytes for parameter in trained)
    estimate.parts["optimizer"] = sum(
        _state_bytes(parameter.numel(), recipe.optimizer) for parameter in trained
    )
    estimate.parts["kept from forward to backward"] = kept
    estimate.parts["computing"] = bytes_.peak - kept
    if device != "cpu" and recipe.gradient_checkpointing:
        estimate.parts["weights of a recomputed layer, in float"] = _kept_of_a_layer(model, dtype)
    estimate.parts["a panel of weights, in float"] = _panel(model, batch_size * max_length, dtype, device)
    return estimate


def _state_bytes(count: int, optimizer: str) -> int:
    """Adam's two states of one tensor."""
    if optimizer == "adamw_8bit" and count >= SMALLEST_8BIT_STATE:
        return 2 * (count + 4 * -(-count // STATE_BLOCK))
    return 2 * 4 * count
