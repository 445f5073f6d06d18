"""What a conversion writes, decided before any data is read: units, their outputs, their sizes.

A unit is what is read, quantized and written at once: usually one parameter. Its outputs are named as in the
model; a quantized one `P` becomes `P_qdata`, `P_absmax`, `P_code`.

Example:
    >>> from octavo.checkpoint.skeleton import build_skeleton
    >>> from octavo.checkpoint.units import plan_units
    >>> from octavo.model import plan_model
    >>> skeleton, config = build_skeleton(source.model_config()), octavo.OctavoConfig()
    >>> units, unexpected = plan_units(skeleton, source, config, plan_model(skeleton, config))
    >>> units[1].outputs[0].pieces(torch.float16)
    [('lm_head.weight_code', torch.float32, (256,)), ('lm_head.weight_absmax', ...), ('lm_head.weight_qdata', ...)]
"""

import math
from dataclasses import dataclass, field
from typing import Any

import torch

from ..config import OctavoConfig
from ..model import Entry, Plan
from ..quantizer import SHORTEST_REPEATED_BLOCK
from ..wording import few
from .errors import CheckpointError
from .names import Group, map_names, stored_names
from .reading.source import Source

Piece = tuple[str, torch.dtype, tuple[int, ...]]


class UntiedError(CheckpointError):
    """config.json ties weights that differ in the checkpoint."""


@dataclass
class Output:
    """One parameter or buffer of the model, as it is written.

    Attributes:
        name: its name in the model.
        made: its name among what its group makes; differs from `name` for a tied weight stored under its other name.
        shape: its shape in the model.
        dtype: its type, if it stays in float.
        entry: how it is quantized; None if it is not.
        config: how it is quantized, if it is.
        blocks: scales per row, if quantized.
        exact: the published checkpoint's own bytes are kept (if that fails, `config` holds).
        check: NaN and infinity in it are an error.
        stored: its name in a file (`octavo.checkpoint.names.stored_names`), to which its parts' suffixes come; default: `name`.
    """

    name: str
    made: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    entry: Entry | None = None
    config: OctavoConfig = field(default_factory=OctavoConfig)
    blocks: int = 0
    exact: bool = False
    check: bool = True
    stored: str = ""

    def __post_init__(self) -> None:
        self.stored = self.stored or self.name

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of `qdata`: rows are outputs."""
        if self.entry is not None and self.entry.transposed:
            return (*self.shape[:-2], self.shape[-1], self.shape[-2])
        return self.shape

    def pieces(self, scales: torch.dtype) -> list[Piece]:
        """The tensors written for it, in order: name, type, shape. `scales` is the type of `absmax`."""
        if self.entry is None:
            return [(self.stored, self.dtype, self.shape)]
        *lead, rows, _ = self.stored_shape
        return [
            (f"{self.stored}_code", torch.float32, (*lead, 256)),
            (f"{self.stored}_absmax", scales, (*lead, rows, self.blocks)),
            (f"{self.stored}_qdata", torch.uint8, self.stored_shape),
        ]

    def nbytes(self, scales: torch.dtype = torch.float32) -> int:
        return sum(piece_nbytes(piece) for piece in self.pieces(scales))


@dataclass
class Unit:
    """A group of checkpoint tensors and what is written for it. `source_bytes`: what reading it takes from the files."""

    group: Group
    outputs: list[Output] = field(default_factory=list)
    source_bytes: int = 0

    @property
    def most_bytes(self) -> int:
        """Size with float32 scales: what it takes at most."""
        return sum(output.nbytes() for output in self.outputs)

    @property
    def aligned(self) -> bool:
        """Whether what follows it in a file stays on 8 bytes, with either type of scales."""
        return all(
            output.nbytes(scales) % 8 == 0
            for output in self.outputs
            for scales in (torch.float16, torch.float32)
        )


def piece_nbytes(piece: Piece) -> int:
    _, dtype, shape = piece
    return math.prod(shape) * dtype.itemsize


def blocks_per_row(columns: int, config: OctavoConfig) -> int:
    """Scales that `octavo.quantizer.quantize_parameter` makes for a row of `columns` weights."""
    size = config.row_block
    shared = math.gcd(size, columns)
    if config.codebook == "dynamic" and columns % size and shared >= SHORTEST_REPEATED_BLOCK:
        return columns // shared
    return -(-columns // size)


def plan_units(
    model: Any, source: Source, config: OctavoConfig, plan: Plan, *, requantize: bool = False
) -> tuple[list[Unit], list[str]]:
    """Decide what is written, from names and shapes alone.

    Args:
        model: the model on the meta device.
        source: the checkpoint.
        config: how to quantize.
        plan: which parameters are quantized, `octavo.model.plan_model(model, config)`.
        requantize: quantize the weights of a published 8-bit checkpoint anew instead of keeping their bytes.

    Returns:
        The units, those that keep alignment first; and names in the checkpoint that the model has no place for.

    Raises:
        CheckpointError: if parameters of the model are missing from the checkpoint.
        UntiedError: if the checkpoint holds different values for weights that config.json ties.
    """
    names, stored = map_names(model, source), stored_names(model)
    made = {name for group in names.groups for name in group.outputs}
    tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
    canonical = _canonical_names(tied, made, names.groups, source, model)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    _check_missing(model, parameters, {canonical.get(name, name) for name in made}, tied, source)
    entries, units = plan.named, []
    for group in names.groups:
        unit = Unit(group, source_bytes=sum(source.tensors[name].nbytes for name in group.source_names))
        for name, shape in group.outputs.items():
            target = canonical.get(name, name)
            if target == "":
                continue
            output = Output(target, name, shape, _float_dtype(source, group), entries.get(target))
            if target in parameters:
                _require_float(output, source, group)
            output.check = target in parameters and target not in plan.skipped
            if output.entry is not None:
                output.config = config
                name = group.source_names[0]
                if not requantize and name in source.quantized:
                    output.config = source.refit_config(name)
                    output.exact = group.converter is None and source.keeps(name, output.entry.transposed)
                output.blocks = blocks_per_row(output.stored_shape[-1], output.config)
            output.stored = stored(target, output.entry is not None)
            unit.outputs.append(output)
        if unit.outputs:
            units.append(unit)
    return sorted(units, key=lambda unit: not unit.aligned), names.unexpected


def _float_dtype(source: Source, group: Group) -> torch.dtype:
    return source.tensors[group.source_names[0]].dtype


def _require_float(output: Output, source: Source, group: Group) -> None:
    """A parameter of an integer or 8-bit type is packed by something, whatever its name."""
    if not output.dtype.is_floating_point or output.dtype.itemsize < 2:
        raise CheckpointError(
            f"{source.folder}: {group.source_names[0]}: expected a weight of 16, 32 or 64 bits, found {output.dtype}: its "
            "weights are quantized already, by a method that is not recognized; give the original checkpoint"
        )


def _canonical_names(
    tied: dict[str, str], made: set[str], groups: list[Group], source: Source, model: Any
) -> dict[str, str]:
    """Other name under which a tied weight is written; "" for one that is there twice and is written once."""
    canonical: dict[str, str] = {}
    for target, origin in tied.items():
        if target not in made:
            continue
        if origin not in made and origin not in canonical.values():
            canonical[target] = origin
            continue
        ours, theirs = (next((g for g in groups if name in g.outputs), None) for name in (target, origin))
        if ours and theirs and not _equal(ours, theirs, source, model, target, origin):
            raise UntiedError(
                f"{source.folder}: config.json ties {target} to {origin}, but they differ in the checkpoint"
            )
        canonical[target] = ""
    return canonical


def _equal(ours: Group, theirs: Group, source: Source, model: Any, target: str, origin: str) -> bool:
    a = ours.realize(model, source.read)[target]
    b = theirs.realize(model, source.read)[origin]
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    # A pickle stores a tied weight once under both names.
    same = a.data_ptr() == b.data_ptr() or all(
        torch.equal(x, y) for x, y in zip(a.split(4096), b.split(4096), strict=True)
    )
    for name in (*ours.source_names, *theirs.source_names):
        source.release(name)
    return same


def _check_missing(
    model: Any, parameters: dict[str, Any], made: set[str], tied: dict[str, str], source: Source
) -> None:
    import re

    patterns = [f"({pattern})" for pattern in model._keys_to_ignore_on_load_missing or ()]
    ignored = re.compile("|".join(patterns)) if patterns else None
    missing = [
        name
        for name in parameters
        if name not in made and tied.get(name) not in made and not (ignored and ignored.search(name))
    ]
    if missing:
        raise CheckpointError(
            f"{source.folder}: {len(missing)} of the {len(parameters)} parameters of a {type(model).__name__} are not in the "
            f"checkpoint: {few(missing)}; config.json belongs to another model, or files are missing"
        )
