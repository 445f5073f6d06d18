"""What packed a checkpoint's weights: the one place that decides whether its numbers can be taken as they stand.

config.json may say how weights were quantized, or may not, so the tensors decide. A weight of an integer or 8-bit float
type, or one with scales beside it, is never a plain matrix. What can be de-quantized exactly:

    method               weight P                      beside it                            value
    FP8                  P float8 [..., N, K]          P_scale_inv or P_scale, a grid       P · scale of its block
    int8                 P int8 [N, K]                 P_scale [N, 1] or one number         P · scale of its row
    bitsandbytes int8    X.weight int8 [N, K]          X.SCB [N]                            P · SCB / 127
    MXFP4                P_blocks uint8 [E, N, G, 16]  P_scales uint8 [E, N, G]             see `packed_source`

Anything else is one error that names the method.

Example:
    >>> from octavo.checkpoint.reading.packing import find_packed
    >>> find_packed(source)            # of an FP8 model: {'model.layers.0.mlp.up_proj.weight': PackedWeight('FP8', ...)}
    {}
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...json_files import read_object
from ..errors import CheckpointError
from .side_files import SIDECARS
from .source import Source, TensorInfo, read_config

FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
# Keys of config.json, at its top or in a part of it, that say that weights are packed.
CONFIG_KEYS = ("quantization_config", "compression_config", "quantization")
# Ends of names that only one method writes → the method, for the error's sake.
SIGNS = {
    ".qweight": "GPTQ or AWQ",
    ".qzeros": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".W_q": "HQQ",
    ".weight._data": "quanto",
    "_weight_qdata": "torchao",
    ".weight.quant_map": "bitsandbytes 4-bit",
    ".weight_scale_2": "NVFP4",
    ".weight_scales": "EETQ",
    ".q_weight": "EXL2",
    ".trellis": "EXL3",
    ".codebooks": "AQLM",
    ".centroids.weight": "VPTQ",
    ".dense_weights": "SpQR",
    ".biases": "MLX",
    "_qdata": "Octavo, but its config.json has lost quantization_config",
}
# What lies beside a packed weight and changes none of its values: scales of activations, a marker of a layout.
HARMLESS = (
    "input_scale",
    "input_scale_ub",
    "input_scale_inv",
    "activation_scale",
    "output_scale",
    "weight_format",
)


@dataclass(frozen=True)
class PackedWeight:
    """A packed weight that can be de-quantized exactly.

    Attributes:
        method: "FP8", "int8", "bitsandbytes int8" or "MXFP4".
        data: name of the tensor with the packed values.
        scale: name of the tensor with the scales.
    """

    method: str
    data: str
    scale: str


def find_packed(source: Source) -> dict[str, PackedWeight]:
    """Names of weights that another method packed → how; empty for a checkpoint of plain values.

    Raises:
        CheckpointError: naming the method, if it packed weights in a way that Octavo does not de-quantize.
    """
    tensors = source.tensors
    said = _said(source.folder)
    packed: dict[str, PackedWeight] = {}
    for name, info in tensors.items():
        found = _packed(name, info, tensors)
        if found is not None:
            packed[name.removesuffix("_blocks") if found.method == "MXFP4" else name] = found
    known = {part for each in packed.values() for part in (each.data, each.scale)}
    suspect = next((name for name in tensors if name not in known and _is_suspect(name, tensors)), None)
    if suspect is not None:
        info = tensors[suspect]
        what = str(info.dtype).removeprefix("torch.")
        raise CheckpointError(
            f"{source.folder}: its weights are quantized already ({_method(tensors, said)}: {suspect} is {what} "
            f"{list(info.shape)}), in a form that Octavo does not read; give the original 16-bit or 32-bit checkpoint"
        )
    if said and not packed:
        raise CheckpointError(
            f"{source.folder}: its weights are quantized already (quant_method {said!r}), as its configuration says; "
            "give the original 16-bit or 32-bit checkpoint. If the weights are plain after all, take that out of "
            f"config.json or delete {SIDECARS[0]}"
        )
    return packed


def declarations(config: Mapping[str, Any]) -> Iterator[tuple[dict[str, Any], str]]:
    """The dictionaries within a configuration, itself included, and the keys in them that say how weights are packed."""
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in CONFIG_KEYS:
            if part.get(key):
                yield part, key  # type: ignore[misc]


def _said(folder: Path) -> str:
    """The method that config.json or a file beside it names; empty if none does."""
    if (folder / "config.json").exists():
        for part, key in declarations(read_config(folder)):
            value = part[key]
            if not isinstance(value, dict):
                return str(value)
            default = "compressed-tensors" if key == "compression_config" else "not named"
            return str(value.get("quant_method") or value.get("quant_algo") or default)
    for name in SIDECARS:
        if (folder / name).exists():
            try:
                value = read_object(folder / name).get("quant_method")
            except ValueError:
                value = None
            return str(value or f"not named in {name}")
    return ""


def _packed(name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo]) -> PackedWeight | None:
    """How a tensor is packed, if its neighbours say so and it can be de-quantized."""
    base = name.removesuffix(".weight")
    if info.dtype == torch.uint8 and name.endswith("_blocks") and len(info.shape) == 4:
        scales = f"{name.removesuffix('_blocks')}_scales"
        if scales in tensors and tensors[scales].dtype == torch.uint8:
            return PackedWeight("MXFP4", name, scales)
    if len(info.shape) < 2:
        return None
    if info.dtype in FLOAT8:
        # One name for one thing: the reciprocal is that of quantizing; all of them multiply.
        beside = (f"{name}_scale_inv", f"{name}_scale", f"{base}.scale", f"{base}.qscale_weight")
        scale = next((each for each in beside if each in tensors and each != name), None)
        if scale is not None and f"{name}_scale_2" not in tensors:
            return PackedWeight("FP8", name, scale)
    if info.dtype == torch.int8 and len(info.shape) == 2:
        if f"{base}.SCB" in tensors:
            return PackedWeight("bitsandbytes int8", name, f"{base}.SCB")
        if f"{name}_scale" in tensors and f"{name}_zero_point" not in tensors:
            return PackedWeight("int8", name, f"{name}_scale")
    return None


def _is_suspect(name: str, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether a tensor that is not part of a known packed weight shows that weights are packed."""
    info = tensors[name]
    if info.dtype in FLOAT8:
        return True
    whole = not info.dtype.is_floating_point and not info.dtype.is_complex and info.dtype != torch.bool
    if whole and len(info.shape) > 1 and name.endswith(("weight", *SIGNS)):
        return True
    # Scales beside a weight of a plain type: its values are then not the model's.
    beside = (name.removesuffix(end) for end in ("_scale_inv", "_scale") if name.endswith(f".weight{end}"))
    return any(each in tensors for each in beside) or (
        name.endswith(".SCB") and f"{name.removesuffix('SCB')}weight" in tensors
    )


def _method(tensors: Mapping[str, TensorInfo], said: str) -> str:
    """The method's name for an error: what the configuration says, else what only one method writes."""
    if said:
        return f"quant_method {said!r}"
    signs = (method for end, method in SIGNS.items() if any(name.endswith(end) for name in tensors))
    return next(signs, "by a method that its configuration does not name")
