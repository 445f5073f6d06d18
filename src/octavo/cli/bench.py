"""`octavo bench`: how fast this machine is with Octavo: kernels against its memory, a model against the same in float."""

from typing import Annotated, Any

import typer

from .options import AsJson, Device, DtypeName, integer


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a file or a Hugging Face id; anything `octavo.load` takes. Default: the small model that ships with "
            "Octavo.",
            show_default=False,
        ),
    ] = None,
    device: Device = None,
    dtype: Annotated[
        DtypeName | None,
        typer.Option(help="Type to compute in. Default: the model's own, where the device is good at it."),
    ] = None,
    threads: Annotated[int | None, integer(help="Of the CPU. Default: one per core.", min=1)] = None,
    tokens: Annotated[int, integer(help="Tokens to decode one by one.", min=1)] = 32,
    prefill: Annotated[int, integer(help="Tokens of the prompt that is read in one pass.", min=1)] = 256,
    quick: Annotated[
        bool, typer.Option("--quick", help="One matrix, two rounds, no second float type.")
    ] = False,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="Measure matrices, and no model.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Measure kernels and a model on this machine, in about a minute.

    Kernels: one token through one matrix, in billions of weights per second, against what the memory delivers and
    against PyTorch. Model: tokens per second, memory and time to start, in 8 bits and with the same weights in float,
    each in a process of its own. What is compared takes turns; the tables give medians, and ranges in brackets.

    Examples:

    \b
        octavo bench
        octavo bench ./my-model-8bit --tokens 64 --prefill 512
    """
    from .checks import check_model
    from .terminal import print_json, quiet_loading, terminal

    if model is not None:
        check_model(model, "measure")

    from rich.text import Text

    from octavo.bench.measure import Options, measure

    from .doctor import processor_name

    messages = terminal(stderr=True)
    options = Options(model, device or "auto", dtype, threads, tokens, prefill, quick, kernels_only)
    quiet_loading()
    with messages.status("Starting") as status:
        found = measure(options, processor_name(), lambda text: status.update(Text(text)))
    if as_json:
        print_json(found)
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from octavo.bench.load import warning

    from .terminal import say, terminal

    out = terminal()
    machine = found["machine"]
    say(
        out,
        (machine["device"], "bold"),
        f", {machine['memory_bytes'] / 2**30:.1f} GiB; kernels: {machine['kernels']}, {machine['threads']} threads of "
        f"{machine['cores']} cores; torch {machine['versions']['torch']}",
    )
    if machine["kernels"] == "reference":
        say(out, ("Plain PyTorch, slow", "yellow"), f": {machine['kernels_reason']}")
    busy = warning(found["load_before"])
    if busy:
        say(out, ("warning:", "yellow"), f" {busy}.")
    out.print()
    _show_kernels(out, found["kernels"])
    if "model" in found:
        out.print()
        _show_model(out, found["model"])


def _spread(found: dict[str, float], form: str = ".2f") -> str:
    """Median and range: 1.42 (1.37–1.55)."""
    low, high = format(found["low"], form), format(found["high"], form)
    return f"{found['median']:{form}} ({low.removesuffix('%')}–{high})"


def _show_kernels(out: Any, kernels: list[dict[str, Any]]) -> None:
    from .terminal import say, show_table

    if not kernels:
        say(out, "No matrix of this model is in 8 bits.")
        return
    peers = list(kernels[0]["faster_by"])
    rows = [
        (
            f"{each['rows']} x {each['columns']}",
            each["codebook"],
            f"{each['weights_per_second']['octavo']['median'] / 1e9:.1f}",
            _spread(each["share"], ".0%"),
            *(_spread(each["faster_by"][peer]) for peer in peers),
        )
        for each in kernels
    ]
    show_table(
        out,
        ("matrix", "codebook", "G weights/s", "of the memory", *(f"over {peer}" for peer in peers)),
        rows,
        title=f"One token through one matrix, {kernels[0]['dtype']}",
    )
    best = max(each["bandwidth"]["median"] for each in kernels)
    say(
        out,
        "Codebooks of segments, which `octavo quantize` fits, are computed; tables, as in the published format, are looked up. "
        f"The memory delivers {best / 1e9:.1f} GB/s to these threads; Octavo reads at this share of it, and is this much faster "
        "than PyTorch on the same matrix in float.",
    )


def _show_model(out: Any, model: dict[str, Any]) -> None:
    from octavo.bench.timing import ratios, spread

    from .terminal import say, show_table

    say(
        out,
        (str(model["source"]), "bold"),
        f": {model['class']}, {model['parameters'] / 1e6:.1f} million parameters, {model['bytes'] / 1e6:.1f} MB in 8 bits, "
        f"computing in {model['dtype']}",
    )
    turns = model["peers"] or {"": model["alone"]}
    rows = []
    for method, count in model["tokens"].items():
        for name, found in turns.items():
            mine = found[method]["octavo"]
            row = [f"{method} {count}", _spread(spread(mine), ".4g")]
            if name:
                theirs = found[method]["peer"]
                row += [name, _spread(spread(theirs), ".4g"), _spread(ratios(mine, theirs))]
            rows.append(row)
    titles = ["tokens", "8 bits", "in float", "tokens per second", "8 bits faster by"][: len(rows[0])]
    show_table(
        out, titles, rows, title="Tokens per second, and how much faster 8 bits are than float", left=(0, 2)
    )
    engines = {"8 bits": model["octavo"]} | model["peers"]
    for name, found in engines.items():
        say(
            out,
            f"{name}: ready after {found['ready_seconds']:.1f} s, at most "
            f"{(found['device_peak_bytes'] or found['peak_bytes']) / 2**20:.0f} MiB of memory",
        )
    for name, why in model["left_out"].items():
        say(out, f"Left out: {name}: {why}.")
    rounds = [
        ok for found in turns.values() for method in model["tokens"] for ok in found[method]["undisturbed"]
    ]
    if not all(rounds):
        say(
            out,
            ("Other work took part of the machine", "yellow"),
            f" in {rounds.count(False)} of {len(rounds)} rounds.",
        )
    if model["fallbacks"]:
        say(
            out, f"De-quantized whole weights for: {', '.join(model['fallbacks'])}; please report this model."
        )
