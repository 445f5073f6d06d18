"""The report's plots, as PNG files.

Example:
    >>> points = [Point("fitted/64", 8.25, 20.51, 20.49, 20.53)]
    >>> plot_perplexity(points, "perplexity.png", base=("my-model", 20.50))
"""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.inspection import Item
from .weights import Codebook, LayerError, kind_of, layer_of

BLUE, ORANGE, GREY = "#2563ab", "#d9730d", "#8a8f98"
# Of Okabe and Ito, told apart by people who do not see all colours.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
MARKERS = "osD^vP*X"
ERROR_LABEL = "weight error ‖w − ŵ‖² / ‖w‖²"
DPI = 130


@dataclass(frozen=True)
class Point:
    """A format: its name, stored bits per weight, perplexity, and the interval of 95 % (None if there is none)."""

    name: str
    bits: float
    perplexity: float
    low: float | None = None
    high: float | None = None


def require_matplotlib() -> Any:
    """matplotlib's Figure. Raises ImportError, saying what to do, if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("plots need matplotlib: `pip install matplotlib`") from None
    return Figure


def error_bar(value: float, low: float | None, high: float | None) -> list[list[float]] | None:
    """How far an interval reaches below and above a value; percentile intervals need not hold it."""
    return None if low is None or high is None else [[max(value - low, 0.0)], [max(high - value, 0.0)]]


def _figure(width: float, height: float, **options: Any) -> tuple[Any, Any]:
    figure = require_matplotlib()(figsize=(width, height), layout="constrained")
    axes = figure.subplots(**options)
    for each in np.atleast_1d(axes).flat:
        each.spines[["top", "right"]].set_visible(False)
        each.grid(alpha=0.25, linewidth=0.6)
        each.set_axisbelow(True)
    return figure, axes


def _wrapped(name: str) -> str:
    """A name in lines of a legend's width."""
    return "\n".join(textwrap.wrap(name, 22)) or name


def plot_perplexity(
    points: Sequence[Point],
    path: str | Path,
    base: tuple[str, float] | None = None,
    title: str = "Perplexity against size",
) -> None:
    """Perplexity with intervals against bits per weight.

    Args:
        base: name and perplexity of the model they are compared with: a line across, and a scale of changes in percent. The
            points' intervals should then be those of the difference, paired by window.
    """
    figure, axes = _figure(8.6, 4.6)
    for number, point in enumerate(sorted(points, key=lambda each: each.bits)):
        axes.errorbar(
            [point.bits],
            [point.perplexity],
            yerr=error_bar(point.perplexity, point.low, point.high),
            fmt=MARKERS[number % len(MARKERS)],
            markersize=7,
            capsize=4,
            linewidth=1.6,
            color=COLOURS[number % len(COLOURS)],
            label=f"{_wrapped(point.name)}\n{point.bits:.2f} bits, {point.perplexity:#.5g}",
        )
    if base is not None:
        axes.axhline(
            base[1],
            color=GREY,
            linewidth=1.4,
            linestyle="--",
            label=f"{_wrapped(base[0])}\nbase, {base[1]:#.5g}",
        )
        reference = base[1]
        change = axes.secondary_yaxis(
            "right", functions=(lambda y: 100 * (y / reference - 1), lambda c: reference * (1 + c / 100))
        )
        change.set_ylabel("change against the base, %")
        change.yaxis.set_major_formatter(lambda value, _: f"{value:+.2g}" if abs(value) > 1e-9 else "0")
    axes.margins(x=0.25, y=0.25)
    if len({round(point.bits, 3) for point in points}) == 1:
        axes.set_xlim(points[0].bits - 0.5, points[0].bits + 0.5)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.set(
        xlabel="stored bits per weight, scales and codebooks included",
        ylabel="perplexity per token",
        title=title,
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize=9, labelspacing=0.9)
    figure.savefig(path, dpi=DPI)


def plot_layers(layers: Sequence[LayerError], path: str | Path) -> None:
    """Pooled error of each layer, and of the matrices outside the layers."""
    outside = [each for each in layers if each.layer is None]
    inside = [each for each in layers if each.layer is not None]
    figure, axes = _figure(8.6, 4.2)
    positions = list(range(len(outside))) + [len(outside) + 0.7 + i for i in range(len(inside))]
    colours = [ORANGE] * len(outside) + [BLUE] * len(inside)
    axes.bar(positions, [each.error for each in outside + inside], color=colours, width=0.72)
    # Every layer's number where there is room, else every few.
    step = max(1, -(-len(inside) // 24))
    labels = [each.name.rpartition(".")[2] for each in outside]
    labels += [str(each.layer) if i % step == 0 else "" for i, each in enumerate(inside)]
    axes.set_xticks(positions, labels)
    for label in axes.get_xticklabels()[: len(outside)]:
        label.set(rotation=30, ha="right", rotation_mode="anchor")
    axes.grid(axis="x", visible=False)
    axes.tick_params(axis="x", length=0)
    axes.ticklabel_format(axis="y", scilimits=(0, 0), useMathText=True)
    axes.set(xlabel="layer", ylabel=ERROR_LABEL, title="Error of the weights by layer", ylim=(0, None))
    figure.savefig(path, dpi=DPI)


def plot_tensors(items: Sequence[Item], path: str | Path) -> None:
    """Error of each matrix: one line a kind of matrix, one dot a layer."""
    kinds: dict[str, list[Item]] = {}
    for item in items:
        if item.error is not None:
            kinds.setdefault(kind_of(item.name), []).append(item)
    figure, axes = _figure(8.6, 1.6 + 0.34 * len(kinds))
    deepest = max((layer_of(item.name) or 0 for item in items), default=0)
    shown = None
    for row, group in enumerate(kinds.values()):
        errors = [item.error or 0.0 for item in group]
        layers = [layer_of(item.name) for item in group]
        axes.plot(
            [min(errors), max(errors)],
            [row, row],
            color="0.85",
            linewidth=5,
            zorder=1,
            solid_capstyle="round",
        )
        if None in layers:
            axes.scatter(errors, [row] * len(errors), color=ORANGE, s=34, marker="D", zorder=2)
        else:
            shown = axes.scatter(
                errors,
                [row] * len(errors),
                c=layers,
                cmap="viridis",
                vmin=0,
                vmax=max(deepest, 1),
                s=30,
                zorder=2,
            )
    axes.set_yticks(
        range(len(kinds)), [f"{name}  ×{len(g)}" if len(g) > 1 else name for name, g in kinds.items()]
    )
    axes.set_ylim(len(kinds) - 0.4, -0.6)
    axes.margins(x=0.06)
    axes.ticklabel_format(axis="x", scilimits=(0, 0), useMathText=True)
    axes.set(xlabel=ERROR_LABEL, title="Error of the weights, matrix by matrix")
    if shown is not None:
        from matplotlib.ticker import MaxNLocator

        bar = figure.colorbar(shown, ax=axes, label="layer", fraction=0.04, pad=0.02)
        bar.locator = MaxNLocator(integer=True)
        bar.update_ticks()
    figure.savefig(path, dpi=DPI)


def plot_codebooks(found: Sequence[Codebook], path: str | Path) -> None:
    """For each matrix, the histogram of its weights and a tick for each entry of its codebook."""
    columns = 1 if len(found) == 1 else 2
    rows = -(-len(found) // columns)
    figure, axes = _figure(9.4, 0.6 + 2.9 * rows, nrows=rows, ncols=columns, squeeze=False)
    for panel, each in zip(axes.flat, found, strict=False):
        if each.density is not None and each.edges is not None:
            panel.stairs(each.density, each.edges, fill=True, color=BLUE, alpha=0.45)
            top = float(each.density.max())
            panel.set_ylabel("density of the weights")
        else:
            panel.vlines(each.code, 0, 100 * each.used, color=BLUE, alpha=0.6, linewidth=1.0)
            top = float(100 * each.used.max())
            panel.set_ylabel("weights an entry stands for, %")
        # The ticks stand under the histogram, on ground of their own.
        panel.vlines(each.code, -0.13 * top, -0.03 * top, color=ORANGE, linewidth=0.7)
        panel.set(xlim=(-1.04, 1.04), ylim=(-0.16 * top, 1.08 * top), xlabel="weight ÷ scale of its block")
        panel.set_xticks([-1, -0.5, 0, 0.5, 1])
        panel.set_yticks([tick for tick in panel.get_yticks() if 0 <= tick <= 1.08 * top])
        error = f"\nerror {each.error:.2e}" if each.error is not None else ""
        panel.set_title(each.name.removesuffix(".weight") + error, fontsize=9.5)
    for panel in axes.flat[len(found) :]:
        panel.set_visible(False)
    figure.suptitle("Weights (blue) and the 256 entries of their codebooks (orange ticks)", fontsize=11)
    figure.savefig(path, dpi=DPI)
