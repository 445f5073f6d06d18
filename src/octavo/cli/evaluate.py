"""`octavo evaluate`: perplexity on a text, and whether a model differs from its base."""

from pathlib import Path
from typing import Annotated, Any

import typer

from .checks import check_drawing
from .options import (
    Adapter,
    AsJson,
    BatchSize,
    Device,
    Dtype,
    LimitTokens,
    Stride,
    Texts,
    Window,
    integer,
    named,
)


def evaluate(
    model: Annotated[
        str,
        named(
            "MODEL",
            "A folder, a file or a Hugging Face id; anything `octavo.load` takes. It is measured as it is: a plain model plain, "
            "in its own type.",
        ),
    ],
    text: Texts,
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
    adapter: Adapter = None,
    window: Window = None,
    stride: Stride = None,
    batch_size: BatchSize = None,
    limit_tokens: LimitTokens = None,
    dtype: Dtype = None,
    device: Device = None,
    seed: Annotated[int, integer(help="Of the resampling for intervals and p-value.")] = 0,
    report: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write a page with plots there: index.html, and the plots as PNG."),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Measure MODEL's perplexity on texts, alone or against a base.

    With a base: what differs, and whether chance explains it.

    With --against, BASE runs first, its predictions go into a file, and MODEL is loaded once BASE is gone: memory is needed for
    one of them. docs/EVALUATION.md says how to read the figures.

    Examples:

    \b
        octavo evaluate ./my-model-8bit --text book.txt
        octavo evaluate ./my-model-8bit --adapter ./poems --text poems-unseen.txt
        octavo evaluate ./my-model-8bit --against ./my-model --text book.txt \\
            --report report
        octavo evaluate ./my-model --text wikitext-2 --save-logits base.logits
        octavo evaluate ./my-model-8bit --logits base.logits --text wikitext-2
    """
    from octavo.checkpoint.writing.output_directory import check_new_file

    from .checks import check_against, check_measured
    from .terminal import (
        print_json,
        quiet_libraries,
        quiet_loading,
        say,
        steps_progress,
        terminal,
        warnings_as_lines,
    )

    if against is not None and logits is not None:
        raise ValueError("--against and --logits: give one of them: the base, or its saved predictions")
    if logits is not None and not logits.is_file():
        raise FileNotFoundError(f"--logits {logits}: no such file; make it with --save-logits")
    if save_logits is not None:
        check_new_file(save_logits, f"--save-logits {save_logits}", overwrite=True)
    if report is not None:
        check_drawing(report, "--report")
    check_measured(model, text, window, stride, adapter)
    check_against(against)

    from octavo.evaluation.evaluate import evaluate as measure
    from octavo.training.prompts import CHAT, read_prompts

    quiet_libraries()
    quiet_loading()
    messages = terminal(stderr=True)
    trained = read_prompts(model if adapter is None else adapter)
    if trained is not None and trained.prompts == CHAT:
        say(
            messages,
            "note: the adapter was trained on conversations in a chat template; what is measured here is plain text",
            style="yellow",
        )
    with warnings_as_lines(messages), steps_progress(messages, "tokens") as progress:
        found = measure(
            model,
            text,
            against=against,
            logits=logits,
            save_logits=save_logits,
            adapter=adapter,
            window=window,
            stride=stride,
            batch_size=batch_size,
            limit_tokens=limit_tokens,
            dtype=dtype,
            device=device,
            seed=seed,
            progress=lambda name, done, total: progress(done, total, name),
        )
    if found.comparison is not None and found.comparison.base_dtype != found.measured.dtype:
        say(
            messages,
            f"warning: the base computed in {found.comparison.base_dtype}, the model in {found.measured.dtype}: part of the "
            "difference is rounding; --dtype float32 on both sides leaves it out",
            style="yellow",
        )
    if report is not None:
        from octavo.evaluation.page import write_report

        with messages.status("Measuring each weight, drawing"):
            write_report(found, report, against=against)
    if as_json:
        print_json(found.to_dict())
        return
    _show(found)
    out = terminal()
    if save_logits is not None:
        say(out, f"Predictions kept in {save_logits} ({save_logits.stat().st_size / 1e6:.1f} MB)")
    if report is not None:
        say(out, f"Report: {report / 'index.html'}")


def _show(found: Any) -> None:
    """The figures, and the verdict in a sentence."""
    import math

    from octavo.evaluation.results import exp_interval, percent

    from .terminal import say, show_facts, terminal

    result, comparison = found.measured.perplexity, found.comparison

    def between(pair: Any, digits: int = 3) -> str:
        return f"  (95 % interval {pair[0]:.{digits}f} to {pair[1]:.{digits}f})" if pair else ""

    facts = [
        ("model", f"{found.model}, {found.bits_per_weight:.2f} bits per weight, in {found.measured.dtype}"),
        ("perplexity", f"{result.perplexity:.4f}{between(found.perplexity_interval)}"),
        ("  per word", f"{result.word_perplexity:,.6g}"),
        ("bits per byte", f"{result.bits_per_byte:.4f}"),
    ]
    if comparison is not None:
        difference, divergence = comparison.difference, comparison.divergence
        facts += [
            ("base", f"{comparison.against}, in {comparison.base_dtype}"),
            ("  perplexity", f"{comparison.base.perplexity:.4f}"),
            ("perplexity ÷ base's", f"{math.exp(difference.mean):.6f}{between(exp_interval(difference), 6)}"),
            ("  change", percent(difference.mean)),
        ]
        if difference.p_value is not None:
            facts.append(("p-value", f"{difference.p_value:.4g}"))
        facts += [
            ("KL divergence, nats", f"mean {divergence.kl_mean:.3e}"),
            ("  99th percentile", f"{divergence.kl_p99:.3e}, largest {divergence.kl_max:.3e}"),
            ("same likeliest token", f"{divergence.top1_agreement:.2%}"),
        ]
    out = terminal()
    show_facts(out, facts)
    out.print()
    if comparison is not None:
        say(out, f"{comparison.sentence}\n", style="bold")
    say(out, f"Protocol: {result.protocol}; texts: {', '.join(t.name for t in found.measured.tokens)}.")
    say(
        out,
        f"Intervals and test: {found.interval.units} units (each a {found.interval.unit}), 10,000 resamples, seed {found.seed}.",
    )
