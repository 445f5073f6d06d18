"""What quantizing did to each weight: errors by layer, and where a codebook's entries sit among the weights they stand for.

Everything is read tensor by tensor; no model is in memory.

Example:
    >>> from octavo.checkpoint.inspection import report
    >>> found = report("model-8bit", against="model")
    >>> f"{by_layer(found.quantized)[0].error:.1e}"
    '2.6e-05'
    >>> codebooks("model-8bit", "model", choose(found.quantized))[0].code[0]
    np.float32(-1.0)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import open_source
from ..checkpoint.inspection import Item, Originals, pooled
from ..checkpoint.reading.source import Source
from ..checkpoint.skeleton import build_skeleton
from ..config import OctavoConfig

# Weights of a matrix that a histogram is made of: rows spread evenly over it.
SAMPLED_WEIGHTS = 1 << 21
BINS = 256
LAYER = re.compile(r"(?:^|\.)(\d+)\.")


@dataclass(frozen=True)
class LayerError:
    """Pooled error of a layer's matrices, Σ(w - ŵ)² / Σw²; `layer` is None for those outside the layers."""

    layer: int | None
    name: str
    error: float
    matrices: int


@dataclass(frozen=True)
class Codebook:
    """A matrix's codebook and its weights.

    Attributes:
        name: the parameter.
        code: its 256 entries, ascending.
        edges, density: histogram of the weights divided by their block's scale; None without the original weights.
        used: share of the weights that each entry stands for, [256].
        error: Σ(w - ŵ)² / Σw² of the matrix; None if not measured.
    """

    name: str
    code: np.ndarray
    edges: np.ndarray | None
    density: np.ndarray | None
    used: np.ndarray
    error: float | None


def layer_of(name: str) -> int | None:
    """The number of a parameter's layer: the first number in its name."""
    found = LAYER.search(name)
    return int(found[1]) if found else None


def kind_of(name: str) -> str:
    """A parameter's name without what differs from layer to layer."""
    short = LAYER.sub(".*.", name, count=1).removesuffix(".weight")
    return short.rpartition("*.")[2] or short


def by_layer(items: Sequence[Item]) -> list[LayerError]:
    """Pooled errors: of parameters outside the layers one by one, then layer by layer."""
    groups: dict[tuple[int, str], list[Item]] = {}
    for item in items:
        if item.error is not None:
            layer = layer_of(item.name)
            key = (-1, kind_of(item.name)) if layer is None else (layer, f"layer {layer}")
            groups.setdefault(key, []).append(item)
    return [
        LayerError(None if layer < 0 else layer, name, pooled(group), len(group))
        for (layer, name), group in sorted(groups.items())
    ]


def choose(items: Sequence[Item], count: int = 4) -> list[Item]:
    """Matrices worth a look: the largest (usually the embedding), and those of the least, the median and the largest error."""
    ordered = sorted(items, key=lambda item: item.error or 0.0)
    picked = [max(items, key=lambda item: item.weights), ordered[-1], ordered[len(ordered) // 2], ordered[0]]
    picked += ordered[:: max(1, len(ordered) // count)]
    return list({item.stored: item for item in picked}.values())[:count]


def codebooks(model: str | Path, against: str | Path | None, items: Sequence[Item]) -> list[Codebook]:
    """Codebooks of a checkpoint's matrices, with histograms of the original weights if there is a base.

    Args:
        model: a checkpoint in Octavo's format, or a published one.
        against: the checkpoint it was made from.
        items: of `octavo.checkpoint.inspection.report(model)`.
    """
    with open_source(model) as source:
        if against is None:
            return [_codebook(item, source, None) for item in items]
        with open_source(against) as other:
            originals = Originals(other, build_skeleton(source.model_config()), OctavoConfig())
            found = []
            for item in items:
                with originals.weight(item.name) as weight:
                    found.append(_codebook(item, source, weight))
            return found


def _codebook(item: Item, source: Source, weight: torch.Tensor | None) -> Codebook:
    """One matrix (of a stack of experts the first)."""
    packed = source.read_packed(item.stored)
    if packed is None:
        raise ValueError(f"{item.name}: its blocks cross rows in a way that is not kept; no codebook to show")
    qdata, absmax, code, size = packed
    qdata, absmax = (part.reshape(-1, *part.shape[-2:])[0] for part in (qdata, absmax))
    code = code.reshape(-1, 256)[0]
    rows = slice(None, None, max(1, -(-qdata.numel() // SAMPLED_WEIGHTS)))
    counts = torch.bincount(qdata[rows].reshape(-1).int(), minlength=256).double()
    used = (counts / counts.sum()).numpy()
    if weight is None:
        return Codebook(item.name, code.numpy().copy(), None, None, used, item.error)
    scale = absmax[rows].float().repeat_interleave(size, 1)[:, : qdata.shape[1]]
    normal = weight.reshape(-1, *weight.shape[-2:])[0][rows].float() / scale
    density, edges = np.histogram(normal[scale > 0].numpy(), BINS, (-1.0, 1.0), density=True)
    return Codebook(item.name, code.numpy().copy(), edges, density, used, item.error)
