"""`octavo compare`: what several formats cost one model on one text."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .options import AsJson, BatchSize, Device, DtypeName, LimitTokens, Stride, Texts, Window, named

# Those of `octavo.evaluation.formats`, which is not imported for `--help` (tests hold them together).
USUAL = "published,fitted-4096,fitted-128,fitted-64,fitted-32,int8-row,q8_0,bfloat16"
FORMATS = "published, bitsandbytes, fitted-B, dynamic-B, int8-row, int8-B, q8_0, fp8-row, bfloat16, float16, float32"
FORMAT = (
    r"published|bitsandbytes|(fitted|dynamic|int8)-[1-9]\d*|int8-row|q8_0|fp8-row|bfloat16|float16|float32"
)


def compare(
    model: Annotated[
        str,
        named(
            "MODEL",
            "The model in float: a folder, a file or a Hugging Face id; a GGUF file is de-quantized first.",
        ),
    ],
    text: Texts,
    formats: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help=f"Some of {FORMATS}; B: weights that share a scale. Default: {USUAL.replace(',', ', ')}.",
            show_default=False,
        ),
    ] = USUAL,
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = None,
    limit_tokens: LimitTokens = None,
    dtype: Annotated[
        DtypeName, typer.Option(help="Type to compute in: float32 measures the format alone.")
    ] = "float32",
    device: Device = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write compare.json and a plot, compare.png, there."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure what several formats cost MODEL, to choose one of them.

    The same text goes through the same float model, each time with the weights that a format gives back: exactly those that
    `octavo quantize` would quantize. Memory: the model in float, and a copy of its matrices.

    Examples:

    \b
        octavo compare ./my-model --text book.txt --output comparison
        octavo compare ./my-model --text book.txt --limit-tokens 20000 \\
            --formats fitted-128,fitted-64,fitted-32
        octavo compare model.Q8_0.gguf --text book.txt --json
    """
    from .checks import check_drawing, check_measured
    from .terminal import (
        print_json,
        quiet_libraries,
        quiet_loading,
        say,
        steps_progress,
        terminal,
        warnings_as_lines,
    )

    names = check_formats(formats)
    if output is not None:
        check_drawing(output, "--output")
    check_measured(model, text, window, stride)

    from octavo.evaluation.compare import compare as measure

    quiet_libraries()
    quiet_loading()
    messages = terminal(stderr=True)
    with warnings_as_lines(messages), steps_progress(messages, "tokens") as progress:
        found = measure(
            model,
            text,
            names,
            window=window,
            stride=stride,
            batch_size=batch_size,
            limit_tokens=limit_tokens,
            dtype=dtype,
            device=device,
            progress=lambda name, done, total: progress(done, total, name),
        )
    if output is not None:
        _write(found, output)
    if as_json:
        print_json(found.to_dict())
        return
    _show(found)
    if output is not None:
        say(terminal(), f"Written: {output / 'compare.json'}, {output / 'compare.png'}")


def check_formats(formats: str) -> list[str]:
    """The names in a list. Raises ValueError for one that is of no format."""
    import re

    names = [name.strip() for name in formats.split(",") if name.strip()]
    if not names:
        raise ValueError(f"--formats: expected at least one of {FORMATS}, found none")
    for name in names:
        if not re.fullmatch(FORMAT, name):
            raise ValueError(f"--formats: expected some of {FORMATS}, found {name!r}")
    return names


def _write(found: Any, output: Path) -> None:
    from octavo.checkpoint.writing.durable import write_json
    from octavo.evaluation.compare_plot import draw

    figures = found.to_dict()
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "compare.json", figures)
    draw(figures, output / "compare.png")


def _show(found: Any) -> None:
    """The table, what it tells, and how it was measured."""
    import math

    from octavo.evaluation.results import exp_interval

    from .terminal import say, show_table, terminal

    out = terminal()

    def percent(nats: float) -> str:
        return f"{100 * math.expm1(nats):+.3f}"

    base = found.base.perplexity
    between = exp_interval(found.interval)
    say(
        out,
        (str(found.model), "bold"),
        f": {found.weights / 1e6:,.1f} million weights in matrices. In {found.base.dtype}: perplexity {base.perplexity:.4f}"
        + (f" (95 % interval {between[0]:.3f} to {between[1]:.3f})" if between else ""),
        end="\n\n",
    )
    titles = ("format", "bits", "MB", "error", "perplexity", "KL mean", "KL p99", "top-1")
    rows, changes = [], []
    for row in found.rows:
        difference, divergence = row.comparison.difference, row.comparison.divergence
        rows.append(
            (
                row.format.name,
                f"{row.bits_per_weight:.2f}",
                f"{row.nbytes / 1e6:,.1f}",
                f"{row.weight_error:.2e}",
                f"{row.perplexity.perplexity:.4f}",
                f"{divergence.kl_mean:.2e}",
                f"{divergence.kl_p99:.2e}",
                f"{divergence.top1_agreement:.2%}",
            )
        )
        interval = (
            "" if difference.low is None else f"{percent(difference.low)} to {percent(difference.high)}"
        )
        p_value = "" if difference.p_value is None else f"{difference.p_value:.3g}"
        changes.append((row.format.name, percent(difference.mean), interval, p_value))
    show_table(out, titles, rows)
    out.print()
    show_table(out, ("format", "perplexity, change in %", "95 % interval", "p"), changes)
    out.print()
    say(out, found.sentence)
    say(
        out,
        "The columns: error of the weights, ‖w−ŵ‖²/‖w‖²; KL: divergence from the float model's predictions, nats per token, and "
        "its 99th percentile; top-1: how often both find the same token likeliest.",
        style="dim",
    )
    say(
        out,
        f"Protocol: {base.protocol}; texts: {', '.join(text.name for text in found.base.tokens)}; in {found.base.dtype}; paired "
        f"over {found.interval.units} units (each a {found.interval.unit}).",
        style="dim",
    )
