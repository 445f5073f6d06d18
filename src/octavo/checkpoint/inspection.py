"""What is in a checkpoint: which parameters are in 8 bits, their size, and their error against another
checkpoint.

Works from headers; data is read only where errors are asked for, one parameter at a time.

Example:
    >>> from octavo.checkpoint.inspection import report
    >>> found = report("model-8bit", against="model")
    >>> f"{found.bits_per_weight:.2f} bits, error {found.error:.1e}, of {found.coverage:.0%} of all weights"
    '8.30 bits, error 2.7e-05, of 100% of all weights'
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..config import OctavoConfig
from ..model import plan_model
from .errors import CheckpointError
from .names import map_names
from .reading.octavo_source import OctavoSource, rows_of
from .reading.open import open_source
from .reading.source import Source
from .skeleton import build_skeleton
from .writing.unit_writer import PANEL_WEIGHTS


@dataclass
class Item:
    """One parameter as it is stored.

    Attributes:
        name: its name in the model.
        stored: its name in the file.
        shape: as stored; rows are outputs.
        kind: "8-bit", or the type it has in float.
        nbytes: bytes it takes, scales and codebook included.
        block_size: weights that share a scale; None in float.
        scales: type of the scales; None in float.
        error: relative squared error against the other checkpoint, Σ(w - ŵ)² / Σw²; None if not compared.
        power: Σw², what errors are pooled with.
    """

    stored: str
    shape: tuple[int, ...]
    kind: str
    nbytes: int
    block_size: int | None = None
    scales: str | None = None
    error: float | None = None
    power: float = 0.0
    name: str = ""

    @property
    def weights(self) -> int:
        return math.prod(self.shape)

    @property
    def bits(self) -> float:
        """Stored bits per weight."""
        return 8 * self.nbytes / self.weights if self.weights else 0.0


@dataclass
class Report:
    """A checkpoint's contents.

    Attributes:
        kind: what it is, as `Source.kind`.
        codebook: "fitted" or "dynamic", for 8-bit checkpoints.
        coverage: share of the weights in matrices, but for those skipped on purpose, that is in 8 bits.
        skipped: matrices the config's patterns leave in float: name → weights.
        left: other matrices in float: name → why.
    """

    model: str
    kind: str
    items: list[Item]
    codebook: str | None = None
    coverage: float = 0.0
    skipped: dict[str, int] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    against: str | None = None

    @property
    def quantized(self) -> list[Item]:
        return [item for item in self.items if item.kind == "8-bit"]

    @property
    def nbytes(self) -> int:
        return sum(item.nbytes for item in self.items)

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per quantized weight, scales and codebooks included."""
        weights = sum(item.weights for item in self.quantized)
        return 8 * sum(item.nbytes for item in self.quantized) / weights if weights else 0.0

    @property
    def error(self) -> float | None:
        """Pooled relative squared error of the quantized weights; None if they were not compared."""
        compared = [item for item in self.quantized if item.error is not None]
        return pooled(compared) if compared else None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        keys = ("model", "kind", "codebook", "nbytes", "bits_per_weight", "coverage", "against", "error")
        summary = {key: getattr(self, key) for key in (*keys, "skipped", "left")}
        rows = [{**asdict(item), "bits": item.bits} for item in self.items]
        return {**summary, "parameters": rows}


def pooled(items: Iterable[Item]) -> float:
    """Σ(w - ŵ)² / Σw² over some parameters together."""
    items = list(items)
    power = sum(item.power for item in items)
    return sum((item.error or 0.0) * item.power for item in items) / power if power else 0.0


def report(model: str | Path, against: str | Path | None = None) -> Report:
    """Look into a checkpoint.

    Args:
        model: anything `open_source` takes; one in Octavo's format is checked against the format's rules.
        against: another checkpoint of the same model, to measure errors against.

    Raises:
        CheckpointError: if files are damaged, or break the format.
        ValueError: on a `format_version` this code does not know.
    """
    with open_source(model) as source:
        skeleton = build_skeleton(source.model_config())
        found = Report(str(model), source.kind, _items(source), source.codebook)
        _name(found.items, source, skeleton)
        _add_coverage(found, source, skeleton)
        if against is not None:
            found.against = str(against)
            with open_source(against) as other:
                _compare(found, source, other, skeleton)
        return found


def _items(source: Source) -> list[Item]:
    items = []
    for name, info in source.tensors.items():
        if name in source.quantized:
            source.read_packed(name)  # the numbers of its codebook are checked as well
            scales = str(source.scale_type(name)).removeprefix("torch.")
            items.append(Item(name, info.shape, "8-bit", info.nbytes, source.quantized[name], scales))
        else:
            kind = info.stored or str(info.dtype).removeprefix("torch.")
            items.append(Item(name, info.shape, kind, info.nbytes))
    return items


def _add_coverage(found: Report, source: Source, skeleton: Any) -> None:
    plan = plan_model(skeleton, source.own_config(OctavoConfig()))
    stored = {item.name for item in found.quantized}
    done = total = 0
    for entry in plan.entries.values():
        weights = math.prod(entry.shape)
        total += weights
        if stored & set(entry.names):
            done += weights
        else:
            found.left[entry.name] = "not quantized"
    for name, (weights, why) in plan.left.items():
        total += weights
        found.left[name] = why
    found.skipped = plan.skipped
    found.coverage = done / total if total else 1.0


def _name(items: list[Item], source: Source, skeleton: Any) -> None:
    """Give items the model's names; `stored` keeps the file's."""
    groups = map_names(skeleton, source).groups
    names = {group.source_names[0]: group.first for group in groups if group.converter is None}
    for item in items:
        item.name = names.get(item.stored, item.stored)


def _compare(found: Report, source: Source, other: Source, skeleton: Any) -> None:
    """Fill in the errors of quantized parameters against another checkpoint of the model."""
    if isinstance(other, OctavoSource):
        raise CheckpointError(f"{other.folder} is quantized too; compare with the original checkpoint")
    originals = Originals(other, skeleton, source.own_config(OctavoConfig()))
    for item in found.quantized:
        with originals.weight(item.name) as weight:
            _compare_item(item, weight, source)


class Originals:
    """The weights that quantized ones were made from, in another checkpoint of the model.

    Args:
        other: that checkpoint.
        skeleton: the model, on the meta device.
        config: how it is quantized.
    """

    def __init__(self, other: Source, skeleton: Any, config: OctavoConfig):
        self.other, self.skeleton = other, skeleton
        self.entries = plan_model(skeleton, config, strict=False).named
        self.groups = {name: group for group in map_names(skeleton, other).groups for name in group.outputs}

    @contextmanager
    def weight(self, name: str) -> Iterator[torch.Tensor]:
        """The weight of a name in the model, rows being outputs; its memory is given back afterwards.

        Raises:
            CheckpointError: if the checkpoint does not have it.
        """
        entry = self.entries.get(name)
        alias = next((each for each in (entry.names if entry else (name,)) if each in self.groups), None)
        if alias is None:
            raise CheckpointError(
                f"{self.other.folder} has no {name}; expected a checkpoint of the same model"
            )
        group = self.groups[alias]
        weight = group.realize(self.skeleton, self.other.read)[alias]
        yield weight.mT if entry and entry.transposed else weight
        for stored in group.source_names:
            self.other.release(stored)


def _compare_item(item: Item, weight: torch.Tensor, source: Source) -> None:
    """Measure one parameter's error against `weight`, rows being outputs, panel by panel."""
    if tuple(weight.shape) != tuple(item.shape):
        raise CheckpointError(f"{item.name}: expected shape {list(item.shape)}, found {list(weight.shape)}")
    dense = _reader(item, source)
    step = max(1, PANEL_WEIGHTS // item.shape[-1])
    error = power = 0.0
    for index, matrix in enumerate(weight.reshape(-1, *item.shape[-2:])):
        for start in range(0, matrix.shape[0], step):
            rows = slice(start, start + step)
            panel = matrix[rows].to(torch.float32)
            error += torch.linalg.vector_norm(panel - dense(index, rows), dtype=torch.float64).item() ** 2
            power += torch.linalg.vector_norm(panel, dtype=torch.float64).item() ** 2
    item.error = error / power if power else 0.0
    item.power = power
    source.release(item.stored)


def _reader(item: Item, source: Source) -> Callable[[int, slice], torch.Tensor]:
    """A function of the number of a matrix and of its rows: these rows, de-quantized."""
    packed = source.read_packed(item.stored)
    if packed is not None:
        return lambda index, rows: rows_of(packed, rows, index)
    whole = source.read(item.stored)
    return lambda index, rows: whole[rows]
