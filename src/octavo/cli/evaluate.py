"""`octavo evaluate`: perplexity on a text, and whether a model differs from its base."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a file or a Hugging Face id; anything `octavo.load` takes. It is measured as it is: a plain "
            "model plain, in its own type.",
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
    against: Annotated[
        str | None,
        typer.Option(
            metavar="BASE", help="The model to compare with, usually the one that MODEL was made from."
        ),
    ] = None,
    logits: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="The base's predictions from --save-logits, in place of --against."
        ),
    ] = None,
    save_logits: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep predictions for later runs: those of BASE, or without it those of MODEL.",
        ),
    ] = None,
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
        str | None,
        typer.Option(help="Type to compute in: float32, float16, bfloat16. Default: each model's own."),
    ] = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... Default: a GPU if there is one.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the resampling for intervals and p-value.")] = 0,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a page with plots there: index.html, and the plots as PNG."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as JSON, and nothing else on stdout.")
    ] = False,
) -> None:
    """Measure MODEL's perplexity on texts, and with a base, what differs and whether chance explains it.

    With --against, BASE runs first, its predictions go into a file, and MODEL is loaded once BASE is gone: memory is needed for
    one of them. docs/EVALUATION.md says how to read the figures.

    Examples:

        octavo evaluate ./my-model-8bit --text book.txt

        octavo evaluate ./my-model-8bit --against ./my-model --text book.txt --report report

        octavo evaluate ./my-model --text wikitext-2 --save-logits base.logits

        octavo evaluate ./my-model-8bit --logits base.logits --text wikitext-2 --json
    """
    import json

    from rich.console import Console

    from octavo.cli.progress import quiet_loading
    from octavo.evaluation.evaluate import evaluate as measure

    if report is not None:
        from octavo.evaluation.report import check_report

        check_report(report)
    quiet_loading()
    messages = Console(stderr=True)
    with tokens_progress(messages) as progress:
        found = measure(
            model,
            text,
            against=against,
            logits=logits,
            save_logits=save_logits,
            window=window,
            stride=stride,
            batch_size=batch_size,
            limit_tokens=limit_tokens,
            dtype=dtype,
            device=device,
            seed=seed,
            progress=progress,
        )
    if found.comparison is not None and found.comparison.base_dtype != found.measured.dtype:
        messages.print(
            f"warning: the base computed in {found.comparison.base_dtype}, the model in {found.measured.dtype}: part of the "
            "difference is rounding; --dtype float32 on both sides leaves it out",
            style="yellow",
            soft_wrap=True,
        )
    if report is not None:
        from octavo.evaluation.report import write_report

        with messages.status("Measuring each weight, drawing"):
            write_report(found, report, against=against)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    _show(found)
    if save_logits is not None:
        print(f"Predictions kept in {save_logits} ({save_logits.stat().st_size / 1e6:.1f} MB)")
    if report is not None:
        print(f"Report: {report / 'index.html'}")


@contextmanager
def tokens_progress(console: Any) -> Iterator[Callable[[str, int, int], None]]:
    """A bar of tokens scored, one a model.

    Yields:
        A function of the model's name, tokens scored so far, and in all.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeRemainingColumn(),
    )
    tasks: dict[str, Any] = {}
    with Progress(*columns, console=console, transient=True) as bar:

        def show(name: str, done: int, total: int) -> None:
            # The same model may run twice (as base and quantized): its bar starts again.
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done)

        yield show


def _show(found: Any) -> None:
    """The table, and the verdict in a sentence."""
    from rich.console import Console
    from rich.table import Table

    from octavo.evaluation.evaluate import exp_interval, percent

    console = Console(soft_wrap=True, highlight=False)
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column()
    result = found.measured.perplexity

    def between(pair: Any, digits: int = 3) -> str:
        return f"  (95 % interval {pair[0]:.{digits}f} to {pair[1]:.{digits}f})" if pair else ""

    table.add_row(
        "model", f"{found.model}, {found.bits_per_weight:.2f} bits a weight, in {found.measured.dtype}"
    )
    table.add_row("perplexity", f"{result.perplexity:.4f}{between(found.perplexity_interval)}")
    table.add_row("  per word", f"{result.word_perplexity:,.6g}")
    table.add_row("bits per byte", f"{result.bits_per_byte:.4f}")
    comparison = found.comparison
    if comparison is not None:
        difference, divergence = comparison.difference, comparison.divergence
        table.add_row("base", f"{comparison.against}, in {comparison.base_dtype}")
        table.add_row("  perplexity", f"{comparison.base.perplexity:.4f}")
        table.add_row(
            "perplexity ÷ base's", f"{1 + _ratio(difference.mean):.6f}{between(exp_interval(difference), 6)}"
        )
        table.add_row("  change", percent(difference.mean))
        if difference.p_value is not None:
            table.add_row("p-value", f"{difference.p_value:.4g}")
        table.add_row(
            "KL divergence, nats",
            f"mean {divergence.kl_mean:.3e}, 99th percentile {divergence.kl_p99:.3e}, largest {divergence.kl_max:.3e}",
        )
        table.add_row("same likeliest token", f"{divergence.top1_agreement:.2%}")
    console.print(table)
    if comparison is not None:
        console.print(f"\n{comparison.sentence}", style="bold")
    console.print(
        f"\nProtocol: {result.protocol}; texts: {', '.join(t.name for t in found.measured.tokens)}."
    )
    console.print(
        f"Intervals and test: {found.interval.units} units (each a {found.interval.unit}), 10,000 resamples, seed {found.seed}."
    )


def _ratio(nats: float) -> float:
    import math

    return math.expm1(nats)
