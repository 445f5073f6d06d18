"""The picture of `octavo compare`: what each format costs a model's predictions, against the bits it takes.

Above, the mean KL divergence from the float model on a log axis; below, the change of perplexity; each with its 95 % interval. A
format of many more bits than the others (bfloat16) is a line across: drawn to scale it would squeeze the others together.

Example:
    >>> draw(found, Path("compare.png"))  # doctest: +SKIP
"""

import math
import os
from pathlib import Path

from .compare import FormatComparison, Row

# Bits beyond the smallest format's within which formats are drawn as points.
POINTS_WITHIN = 2.0
OURS = "fitted-"
COLORS = ("#d1495b", "#30638e", "#8d6a9f", "#b07d2b", "#5b8c5a", "#7a7a7a")
MARKERS = ("s", "^", "D", "v", "P", "X")
SHADES = ("#0b3c2f", "#14634c", "#1f8a6a", "#35b68d", "#6fd3b3", "#a5e6d1")


def draw(found: FormatComparison, path: Path) -> None:
    """Write the picture as a PNG; it appears when it is whole.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the plot needs matplotlib: pip install matplotlib") from error
    figure = Figure(figsize=(8.5, 6.4), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    smallest = min(row.bits_per_weight for row in found.rows)
    points = [row for row in found.rows if row.bits_per_weight <= smallest + POINTS_WITHIN]
    styles = _styles(found.rows)
    ours = sorted(
        (row for row in points if row.format.name.startswith(OURS)), key=lambda row: row.bits_per_weight
    )
    above.plot(
        [row.bits_per_weight for row in ours],
        [row.kl_mean for row in ours],
        color=SHADES[1],
        linewidth=1,
        zorder=1,
    )
    for row in found.rows:
        style = styles[row.format.name]
        if row in points:
            _point(above, row.bits_per_weight, row.kl_mean, row.kl_interval, row.format.title, style)
            _point(below, row.bits_per_weight, *_change(row), None, style)
        elif row.kl_mean > 0:
            label = f"{row.format.title} ({row.bits_per_weight:.0f} bits)"
            above.axhline(row.kl_mean, color=style[0], linestyle="--", linewidth=1.2, label=label)
            below.axhline(_change(row)[0], color=style[0], linestyle="--", linewidth=1.2)
    if any(row.kl_mean > 0 for row in found.rows):
        above.set_yscale("log")
    above.set_ylabel("mean KL divergence\nfrom the float model, nats a token")
    below.axhline(0, color="black", linewidth=0.8, zorder=0)
    below.set_ylabel("change of perplexity, %")
    below.set_xlabel("bits a weight, scales and codebooks included")
    for axes in (above, below):
        axes.grid(True, which="both", axis="y", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    result = found.base.perplexity
    figure.suptitle(
        f"{Path(found.model).name}: {result.tokens:,} tokens, perplexity {result.perplexity:.2f} in {found.base.dtype}",
        fontsize=11,
    )
    partial = path.with_name(path.name + ".partial")
    try:
        figure.savefig(partial, format="png")
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _change(row: Row) -> tuple[float, tuple[float, float] | None]:
    """The change of perplexity in percent, and its interval."""
    difference = row.comparison.difference
    low, high = difference.low, difference.high
    interval = None if low is None or high is None else (100 * math.expm1(low), 100 * math.expm1(high))
    return 100 * math.expm1(difference.mean), interval


def _point(axes, x: float, y: float, interval: tuple[float, float] | None, label: str | None, style) -> None:
    color, marker = style
    # Percentile intervals need not hold the mean itself.
    spread = None if interval is None else [[max(y - interval[0], 0.0)], [max(interval[1] - y, 0.0)]]
    axes.errorbar(
        x, y, yerr=spread, color=color, marker=marker, markersize=7, capsize=3, linewidth=1.2, label=label
    )


def _styles(rows: list[Row]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each format: circles in shades of one colour for Octavo's own, something else for each other."""
    ours = sorted(
        (row for row in rows if row.format.name.startswith(OURS)), key=lambda row: row.bits_per_weight
    )
    styles = {row.format.name: (SHADES[i % len(SHADES)], "o") for i, row in enumerate(ours)}
    others = [row.format.name for row in rows if row.format.name not in styles]
    return styles | {
        name: (COLORS[i % len(COLORS)], MARKERS[i % len(MARKERS)]) for i, name in enumerate(others)
    }
