"""Quantize one unit of a conversion and write it, matrix by matrix.

The numbers are those of `octavo.quantizer.quantize_parameter` on the whole parameter; a stack of experts is
only cut up so that one expert at a time is in memory.

Example:
    >>> from octavo.checkpoint.writing.unit_writer import write_unit
    >>> from octavo.checkpoint.writing.shards import ShardFile, header_room
    >>> from octavo.checkpoint.skeleton import build_skeleton
    >>> from octavo.checkpoint.units import plan_units
    >>> from octavo.model import plan_model
    >>> skeleton, config = build_skeleton(source.model_config()), octavo.OctavoConfig()
    >>> unit = plan_units(skeleton, source, config, plan_model(skeleton, config))[0][1]
    >>> shard = ShardFile(Path("model.safetensors"), header_room(unit.outputs[0].pieces(torch.float32)))
    >>> row = write_unit(unit, shard, source, skeleton)[0]
    >>> row.name, f"{row.error / row.power:.1e}"
    ('lm_head.weight', '2.6e-05')
"""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ... import ops
from ...quantizer import Packed, quantize_parameter, scale_dtype
from ..errors import CheckpointError
from ..reading.source import Source
from ..units import Output, Unit
from .calibrator import Calibrator
from .shards import ShardFile

# Weights compared at a time when the error is measured: both panels, 1 MB each in float32, stay in a core's cache.
PANEL_WEIGHTS = 1 << 18
NOT_FINITE = (
    "{0} holds NaN or infinity, nothing was written: the checkpoint is damaged; or leave this parameter as it is "
    "with --skip {0}"
)


@dataclass
class Row:
    """One line of a conversion's table.

    Attributes:
        name: the parameter.
        shape: its shape.
        kind: "8-bit", "exact" (published bytes kept) or "float".
        before, after: bytes in the source and in the output.
        error: sum of squared differences to the source's weights; 0 for what is not quantized.
        power: sum of the squared weights.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    before: int
    after: int
    error: float = 0.0
    power: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def write_unit(
    unit: Unit, shard: ShardFile, source: Source, model: Any, calibration: Calibrator | None = None
) -> list[Row]:
    """Read, quantize and write what belongs to a unit.

    Args:
        calibration: an open one, which chooses the codes of the matrices it can.

    Raises:
        CheckpointError: if a weight holds NaN or infinity, or cannot be read.
        OSError: if the disk is full.
    """
    group = unit.group
    total = sum(math.prod(output.shape) for output in unit.outputs) or 1
    rows = []
    try:
        if group.experts and unit.outputs[0].entry is not None:
            rows.append(_write_experts(unit, shard, source))
        else:
            made = group.realize(model, source.read) if not unit.outputs[0].exact else {}
            for output in unit.outputs:
                tensor = made.get(output.made)
                rows.append(_write_output(output, tensor, unit, shard, source, calibration))
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        name = unit.outputs[len(rows)].name
        if "NaN" in str(error):
            raise CheckpointError(f"{source.folder}: {NOT_FINITE.format(name)}") from error
        raise CheckpointError(f"{source.folder}: {name}: {error}") from error
    finally:
        for name in group.source_names:
            source.release(name)
    for row in rows:
        row.before = unit.source_bytes * math.prod(row.shape) // total
    return rows


def _require_shape(output: Output, tensor: torch.Tensor) -> None:
    # The place in the file was chosen from this shape: another would overwrite what follows.
    if tuple(tensor.shape) != tuple(output.shape):
        raise CheckpointError(
            f"{output.name}: expected shape {list(output.shape)}, found {list(tensor.shape)} when it was read"
        )


def _write_output(
    output: Output,
    tensor: torch.Tensor | None,
    unit: Unit,
    shard: ShardFile,
    source: Source,
    calibration: Calibrator | None = None,
) -> Row:
    if output.entry is None:
        assert tensor is not None
        _require_shape(output, tensor)
        if output.check and tensor.is_floating_point() and not torch.isfinite(tensor.to(torch.float32)).all():
            raise CheckpointError(f"{source.folder}: {NOT_FINITE.format(output.name)}")
        shard.write(shard.reserve(output.stored, output.dtype, output.shape), tensor.to(output.dtype))
        return Row(output.name, output.shape, "float", 0, output.nbytes())
    if output.exact:
        return _write_published(output, unit, shard, source)
    assert tensor is not None
    _require_shape(output, tensor)
    stored = tensor.mT if output.entry.transposed else tensor
    matrices = stored.reshape(-1, *stored.shape[-2:])
    return _write_matrices(output, len(matrices), matrices.__getitem__, shard, calibration)


def _write_experts(unit: Unit, shard: ShardFile, source: Source) -> Row:
    """A stack whose matrices lie in the checkpoint one by one: one at a time."""
    output, group = unit.outputs[0], unit.group

    def read(index: int) -> torch.Tensor:
        if index:
            for names in group.sources.values():
                source.release(names[index - 1])
        matrix = group.read_expert(index, source.read)
        return matrix.mT if output.entry is not None and output.entry.transposed else matrix

    assert group.experts is not None
    return _write_matrices(output, group.experts, read, shard)


def _write_published(output: Output, unit: Unit, shard: ShardFile, source: Any) -> Row:
    """A published 8-bit weight, its own numbers; quantized anew only if they cannot be kept."""
    name = unit.group.source_names[0]
    packed = source.read_packed(name)
    if packed is None:
        return _write_matrices(output, 1, lambda _: source.read(name), shard)
    _write_packed(output, [packed], shard, packed.absmax.dtype)
    return Row(output.name, output.shape, "exact", 0, output.nbytes(packed.absmax.dtype))


def _write_matrices(
    output: Output,
    count: int,
    read: Callable[[int], torch.Tensor],
    shard: ShardFile,
    calibration: Calibrator | None = None,
) -> Row:
    """Quantize `count` matrices [N, K], each with its own codebook and all with one type of scales."""
    scales = scale_dtype((_computable(read(index)) for index in range(count)), output.config)
    fixed = replace(output.config, scales="float16" if scales == torch.float16 else "float32")
    row = Row(output.name, output.shape, "8-bit", 0, output.nbytes(scales))

    def quantized():
        for index in range(count):
            matrix = _computable(read(index))
            packed = quantize_parameter(matrix, fixed, output.name)
            if calibration is not None and count == 1:
                packed = calibration.quantize(output.name, matrix, packed)
            error, power = _squared_error(matrix, packed)
            row.error += error
            row.power += power
            yield packed

    _write_packed(output, quantized(), shard, scales)
    return row


def _write_packed(output: Output, parts: Any, shard: ShardFile, scales: torch.dtype) -> None:
    positions = {piece[0]: shard.reserve(*piece) for piece in output.pieces(scales)}
    for packed in parts:
        for suffix in ("code", "absmax", "qdata"):
            key = f"{output.stored}_{suffix}"
            positions[key] = shard.write(positions[key], getattr(packed, suffix))


def _computable(matrix: torch.Tensor) -> torch.Tensor:
    """In a type the operations take, rows contiguous (a transposed one is walked row by row several times)."""
    if matrix.dtype not in ops.schema.COMPUTE_DTYPES and matrix.is_floating_point():
        matrix = matrix.to(torch.float32)
    return matrix.contiguous()


def _squared_error(matrix: torch.Tensor, packed: Packed) -> tuple[float, float]:
    """Sum of (w - ŵ)² and of w²: pairwise in float32 within a panel, in float64 from panel to panel."""
    if ops.cpu.AVAILABLE and matrix.device.type == "cpu":
        # One pass and no copies; otherwise this would take several times as long as quantizing.
        return ops.cpu.squared_error(matrix, packed.qdata, packed.absmax, packed.code, packed.block_size)
    rows, columns = matrix.shape
    step = max(1, PANEL_WEIGHTS // max(columns, 1))
    error = power = 0.0
    for start in range(0, rows, step):
        panel = matrix[start : start + step].to(torch.float32)
        qdata, absmax = packed.qdata[start : start + step], packed.absmax[start : start + step]
        kept = ops.dequantize(qdata, absmax, packed.code, packed.block_size, torch.float32)
        error += kept.sub_(panel).square_().sum().item()
        power += panel.square().sum().item()
    return error, power
