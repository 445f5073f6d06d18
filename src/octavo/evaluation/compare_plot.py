"""The picture of `octavo compare`: what each format costs a model's predictions, against the bits it takes.

Above, the mean KL divergence from the float model on a log axis; below, the change of perplexity; each with its 95 % interval. A
format of many more bits than the others (bfloat16) is a line across: drawn to scale it would squeeze the others together.

Example:
    >>> from octavo.evaluation.compare import compare
    >>> found = compare("model", ["book.txt"], formats=["fitted-64", "int8-row"])
    >>> draw(found.to_dict(), Path("compare.png"))
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..checkpoint.writing.durable import written_aside
from .plots import COLOURS, MARKERS, error_bar, require_matplotlib

# Bits beyond the smallest format's within which formats are drawn as points.
POINTS_WITHIN = 2.0
OURS = "fitted-"
LONGEST_NAME = 56
SHADES = ("#0b3c2f", "#14634c", "#1f8a6a", "#35b68d", "#6fd3b3", "#a5e6d1")


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture as a PNG; it appears when it is whole.

    Args:
        found: `FormatComparison.to_dict()`, or what compare.json holds.

    Raises:
        ImportError: if matplotlib is not installed.
    """
    figure = require_matplotlib()(figsize=(8.5, 6.4), dpi=150, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    rows = found["formats"]
    smallest = min(row["bits_per_weight"] for row in rows)
    ours = [row for row in _ours(rows) if _is_point(row, smallest)]
    above.plot(
        [row["bits_per_weight"] for row in ours],
        [row["kl_mean"] for row in ours],
        color=SHADES[1],
        linewidth=1,
        zorder=1,
    )
    styles = _styles(rows)
    for row in rows:
        style, bits = styles[row["format"]], row["bits_per_weight"]
        change, between = _change(row)
        if _is_point(row, smallest):
            _point(above, bits, row["kl_mean"], row["kl_mean_interval"], row["title"], style)
            _point(below, bits, change, between, None, style)
        elif row["kl_mean"] > 0:
            label = f"{row['title']} ({bits:.0f} bits)"
            above.axhline(row["kl_mean"], color=style[0], linestyle="--", linewidth=1.2, label=label)
            below.axhline(change, color=style[0], linestyle="--", linewidth=1.2)
    if any(row["kl_mean"] > 0 for row in rows):
        above.set_yscale("log")
    above.set_ylabel("mean KL divergence\nfrom the float model, nats per token")
    below.axhline(0, color="black", linewidth=0.8, zorder=0)
    below.set_ylabel("change of perplexity, %")
    below.set_xlabel("bits per weight, scales and codebooks included")
    for axes in (above, below):
        axes.grid(True, which="both", axis="y", color="#e4e4e4", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    above.set_title(
        f"{shortened(Path(found['model']).name)}\n{found['tokens']:,} tokens, perplexity {found['perplexity']:.2f} in "
        f"{found['dtype']}",
        fontsize=10,
        loc="left",
        # Two dollars in a model's name are no formula.
        parse_math=False,
    )
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    with written_aside(path) as partial:
        figure.savefig(partial, format="png")


def shortened(name: str) -> str:
    """A name that fits above the plot."""
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _is_point(row: dict[str, Any], smallest: float) -> bool:
    return row["bits_per_weight"] <= smallest + POINTS_WITHIN


def _ours(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Octavo's own fitted formats, smallest first."""
    return sorted(
        (row for row in rows if row["format"].startswith(OURS)), key=lambda row: row["bits_per_weight"]
    )


def _change(row: dict[str, Any]) -> tuple[float, tuple[float, float] | None]:
    """The change of perplexity in percent, and its interval."""
    interval = row["perplexity_ratio_interval"]
    between = None if interval is None else (100 * (interval[0] - 1), 100 * (interval[1] - 1))
    return 100 * (row["perplexity_ratio"] - 1), between


def _point(axes, x: float, y: float, interval: Sequence[float] | None, label: str | None, style) -> None:
    color, marker = style
    spread = error_bar(y, *(interval or (None, None)))
    axes.errorbar(
        x, y, yerr=spread, color=color, marker=marker, markersize=7, capsize=3, linewidth=1.2, label=label
    )


def _styles(rows: list[dict[str, Any]]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each format: circles in shades of one colour for Octavo's own, something else for each other."""
    styles = {row["format"]: (SHADES[i % len(SHADES)], "o") for i, row in enumerate(_ours(rows))}
    others = [row["format"] for row in rows if row["format"] not in styles]
    return styles | {
        name: (COLOURS[i % len(COLOURS)], MARKERS[1 + i % (len(MARKERS) - 1)])
        for i, name in enumerate(others)
    }
