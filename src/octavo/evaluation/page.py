"""An evaluation as a page: one HTML file that needs nothing else, and its plots as PNG beside it.

    DIR/index.html            the page, plots inside
    DIR/evaluation.json       what `octavo evaluate --json` prints
    DIR/perplexity.png        perplexity against bits per weight
    DIR/error-by-layer.png, error-by-tensor.png, codebooks.png        of a quantized model, with a base

Example:
    >>> from octavo.evaluation.evaluate import evaluate
    >>> found = evaluate("model-8bit", ["book.txt"], against="model")
    >>> write_report(found, "report", against="model")
    [PosixPath('report/perplexity.png'), ...]
"""

import base64
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from ..checkpoint.writing.durable import put_in_place, write_json
from ..checkpoint.writing.output_directory import check_writable
from .results import Evaluation, exp_interval, percent

TEMPLATE = Path(__file__).with_name("report.html")
CAPTIONS = {
    "perplexity.png": "The point is the model, the bar the 95 % interval{of}. Lower is better.",
    "error-by-layer.png": "How far the stored weights are from the original ones, each layer's matrices together. A layer that "
    "stands out is a candidate for --skip.",
    "error-by-tensor.png": "One dot a matrix; the colour is the layer's number.",
    "codebooks.png": "Each weight is stored as the nearest of 256 numbers (orange) times the scale of its block. A good codebook "
    "is dense where the weights are; the spikes at ±1 are the largest weight of each block. Among "
    "them are the largest matrix and those with the largest, the median and the least error.",
}


def check_report(folder: str | Path) -> None:
    """Raise CheckpointError or ImportError now, before hours of work, if the report could not be written."""
    from .plots import require_matplotlib

    require_matplotlib()
    check_writable(Path(folder), f"--report {folder}")
    Path(folder).mkdir(parents=True, exist_ok=True)


def write_report(found: Evaluation, folder: str | Path, against: str | Path | None = None) -> list[Path]:
    """Draw the plots and write the page. Each file is written aside and put in place whole.

    Args:
        against: the base's checkpoint, to measure the weights' errors; without it the page has no plots of errors.

    Returns:
        The files written.
    """
    folder = Path(folder)
    check_report(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".report-") as aside:
        drawn = _draw(found, Path(aside), against)
        write_json(Path(aside, "evaluation.json"), found.to_dict())
        Path(aside, "index.html").write_text(_page(found, Path(aside), drawn), encoding="utf-8")
        written = []
        # The page last: it is there when all it goes with is.
        for name in (*drawn, "evaluation.json", "index.html"):
            put_in_place(Path(aside, name), folder / name)
            written.append(folder / name)
    return written


def _draw(found: Evaluation, folder: Path, against: str | Path | None) -> list[str]:
    """Draw what there is something to draw of. Returns the names of the plots."""
    from ..checkpoint.inspection import report
    from . import plots, weights

    plots.plot_perplexity([point_of(found)], folder / "perplexity.png", base_of(found))
    drawn = ["perplexity.png"]
    stored = report(found.model, against)
    if stored.quantized and stored.error is not None:
        plots.plot_layers(weights.by_layer(stored.quantized), folder / "error-by-layer.png")
        plots.plot_tensors(stored.quantized, folder / "error-by-tensor.png")
        drawn += ["error-by-layer.png", "error-by-tensor.png"]
    if stored.quantized and stored.codebook:
        chosen = weights.codebooks(found.model, against, weights.choose(stored.quantized))
        plots.plot_codebooks(chosen, folder / "codebooks.png")
        drawn.append("codebooks.png")
    return drawn


def point_of(found: Evaluation) -> Any:
    """An evaluation as a point of `plots.plot_perplexity`: with the paired interval where there is a base, else its own."""
    from .plots import Point

    bits = found.bits_per_weight or math.nan
    pair = found.perplexity_interval
    if found.comparison is not None:
        ratios = exp_interval(found.comparison.difference)
        base = found.comparison.base.perplexity
        pair = (base * ratios[0], base * ratios[1]) if ratios else None
    low, high = pair or (None, None)
    return Point(Path(found.model).name, bits, found.perplexity, low, high)


def base_of(found: Evaluation) -> tuple[str, float] | None:
    """Name and perplexity of the base, if there was one."""
    if found.comparison is None:
        return None
    return Path(found.comparison.against).name, found.comparison.base.perplexity


def _page(found: Evaluation, folder: Path, drawn: list[str]) -> str:
    from jinja2 import Environment

    of = " of the difference, paired by window" if found.comparison else " of the perplexity"
    images = [
        {
            "name": name,
            "data": base64.b64encode((folder / name).read_bytes()).decode(),
            "caption": CAPTIONS[name].format(of=of),
        }
        for name in drawn
    ]
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        found=found, rows=_rows(found), images=images, everything=json.dumps(found.to_dict(), indent=2)
    )


def _rows(found: Evaluation) -> list[tuple[str, str, str]]:
    """The page's table: what, how much, and what it means."""
    result, comparison = found.measured.perplexity, found.comparison
    own = found.perplexity_interval
    rows = [
        (
            "Perplexity",
            f"{result.perplexity:.4f}",
            f"95 % interval {own[0]:.3f} to {own[1]:.3f}: where other text of this kind may lead"
            if own
            else "a token",
        ),
        ("Perplexity per word", f"{result.word_perplexity:,.6g}", "comparable between tokenizers"),
        ("Bits per byte", f"{result.bits_per_byte:.4f}", "comparable between tokenizers"),
    ]
    if found.bits_per_weight:
        rows.append(
            ("Bits per weight", f"{found.bits_per_weight:.3f}", "stored, scales and codebooks included")
        )
    if comparison is None:
        return rows
    difference, divergence = comparison.difference, comparison.divergence
    low, high = difference.low, difference.high
    span = f"95 % interval {percent(low)} to {percent(high)}" if low is not None and high is not None else ""
    rows += [
        ("Perplexity of the base", f"{comparison.base.perplexity:.4f}", comparison.against),
        ("Change of perplexity", percent(difference.mean), span),
        (
            "p-value",
            "–" if difference.p_value is None else f"{difference.p_value:.4g}",
            "how often chance alone gives a change this large; below 0.05 counts as a difference",
        ),
        (
            "KL divergence, mean",
            f"{divergence.kl_mean:.3e}",
            "nats per token, base to model; 0: the same predictions",
        ),
        ("KL divergence, 99th percentile", f"{divergence.kl_p99:.3e}", "of the tokens"),
        ("KL divergence, largest", f"{divergence.kl_max:.3e}", "of one token"),
        ("Same likeliest token", f"{divergence.top1_agreement:.2%}", "of the tokens"),
    ]
    return rows
