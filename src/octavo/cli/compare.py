"""`octavo compare`: what several formats cost one model on one text."""

from pathlib import Path
from typing import Annotated, Any

import typer

# Those of `octavo.evaluation.formats.USUAL`, which is not imported for `--help` (a test holds them together).
USUAL = "published,fitted-4096,fitted-128,fitted-64,fitted-32,int8-row,q8_0,bfloat16"
TABLE_WIDTH = 124


def compare(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The model in float: a folder, a file or a Hugging Face id; a GGUF file is de-quantized first.",
            show_default=False,
        ),
    ],
    text: Annotated[
        list[str],
        typer.Option(
            metavar="FILE|ID",
            help="A text file, `wikitext-2`, or a data set of the hub: ID[:CONFIGURATION[:SPLIT[:COLUMN]]]. May be repeated.",
            show_default=False,
        ),
    ],
    formats: Annotated[
        str,
        typer.Option(
            metavar="NAME,...",
            help="published, fitted-B, dynamic-B, int8-row, int8-B, q8_0, fp8-row, bfloat16, float16, float32; B: weights that "
            "share a scale.",
        ),
    ] = USUAL,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of context at most. Default: the model's longest, at most 2048.",
            show_default=False,
        ),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens from one window to the next. Default: half the window.", show_default=False
        ),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Windows at once; no figure depends on it. Default: what 512 MiB of logits hold.",
            show_default=False,
        ),
    ] = None,
    limit_tokens: Annotated[
        int | None,
        typer.Option(
            "--limit-tokens",
            "--max-tokens",
            min=2,
            help="Read only so many tokens of the texts.",
            show_default=False,
        ),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Type to compute in: float32 measures the format alone; bfloat16, float16.")
    ] = "float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Also write compare.json and a plot, compare.png, there."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as JSON, and nothing else on stdout.")
    ] = False,
) -> None:
    """Measure what each of several formats costs MODEL on a text, to choose one.

    The same text goes through the same float model, each time with the weights that a format gives back: exactly those that
    `octavo quantize` would quantize. Memory: the model in float, and a copy of its matrices.

    Examples:

        octavo compare ./my-model --text book.txt --output comparison

        octavo compare ./my-model --text book.txt --formats fitted-128,fitted-64,fitted-32 --limit-tokens 20000

        octavo compare model.Q8_0.gguf --text book.txt --json
    """
    import json

    from rich.console import Console

    from octavo.cli.evaluate import tokens_progress
    from octavo.cli.progress import quiet_loading
    from octavo.evaluation.compare import compare as measure

    if output is not None:
        _make_folder(output)
    quiet_loading()
    with tokens_progress(Console(stderr=True)) as progress:
        found = measure(
            model,
            text,
            [name.strip() for name in formats.split(",") if name.strip()],
            window=window,
            stride=stride,
            batch_size=batch_size,
            limit_tokens=limit_tokens,
            dtype=dtype,
            device=device,
            progress=progress,
        )
    if output is not None:
        _write(found, output)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    _show(found)
    if output is not None:
        print(f"Written: {output / 'compare.json'}, {output / 'compare.png'}")


def _make_folder(output: Path) -> None:
    """Before hours of work: the folder is there, and what is to be written can be."""
    import importlib.util
    import tempfile

    if importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--output: the plot needs matplotlib: pip install matplotlib")
    if output.exists() and not output.is_dir():
        raise NotADirectoryError(f"--output {output}: expected a folder, found a file")
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass


def _write(found: Any, output: Path) -> None:
    import json
    import os

    from octavo.evaluation.compare_plot import draw

    figures = found.to_dict()
    partial = output / "compare.json.partial"
    partial.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, output / "compare.json")
    draw(figures, output / "compare.png")


def _show(found: Any) -> None:
    """The table, what it tells, and how it was measured."""
    import math

    from rich.console import Console
    from rich.table import Table

    from octavo.evaluation.evaluate import exp_interval

    console = Console(highlight=False)
    # A figure cut short would be worse than a line that the terminal wraps.
    console.width = max(console.width, TABLE_WIDTH)

    def percent(nats: float) -> str:
        return f"{100 * math.expm1(nats):+.3f}"

    base = found.base.perplexity
    between = exp_interval(found.interval)
    console.print(
        f"[bold]{found.model}[/]: {found.weights / 1e6:,.1f} million weights in matrices. In {found.base.dtype}: perplexity "
        f"{base.perplexity:.4f}"
        + (f" (95 % interval {between[0]:.3f} to {between[1]:.3f})" if between else ""),
        soft_wrap=True,
    )
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("format", no_wrap=True)
    titles = ("bits", "MB", "weight error", "perplexity", "change, % (95 % interval)")
    for title in (*titles, "p", "KL mean", "KL p99", "same top token"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in found.rows:
        difference, divergence = row.comparison.difference, row.comparison.divergence
        change = percent(difference.mean)
        if difference.low is not None:
            change = f"{change} ({percent(difference.low)} to {percent(difference.high)})"
        table.add_row(
            row.format.name,
            f"{row.bits_per_weight:.3f}",
            f"{row.nbytes / 1e6:,.1f}",
            f"{row.weight_error:.2e}",
            f"{row.perplexity.perplexity:.4f}",
            change,
            "" if difference.p_value is None else f"{difference.p_value:.3g}",
            f"{divergence.kl_mean:.2e}",
            f"{divergence.kl_p99:.2e}",
            f"{divergence.top1_agreement:.2%}",
        )
    console.print(table)
    console.print(f"\n{found.sentence}", soft_wrap=True)
    console.print(
        f"Protocol: {base.protocol}; texts: {', '.join(text.name for text in found.base.tokens)}; in "
        f"{found.base.dtype}; paired over {found.interval.units} units (each a {found.interval.unit}).",
        style="dim",
        soft_wrap=True,
    )
