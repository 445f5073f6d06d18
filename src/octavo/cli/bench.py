"""`octavo bench`: how fast this machine is with Octavo: kernels against its memory, a model against the same in float."""

from typing import Annotated, Any

import typer


def bench(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="[MODEL]",
            help="A folder, a file or a Hugging Face id; anything `octavo.load` takes. Default: the small model that ships with "
            "Octavo.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, cuda:1, ...; auto: a GPU if there is one, else the CPU.")
    ] = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Type to compute in: float32, float16, bfloat16. Default: the model's own, where the device is good at it."
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(help="Of the CPU. Default: one a core.", min=1)] = None,
    tokens: Annotated[int, typer.Option(help="Tokens to decode one by one.", min=1)] = 32,
    prefill: Annotated[int, typer.Option(help="Tokens of the prompt that is read in one pass.", min=1)] = 256,
    quick: Annotated[
        bool, typer.Option("--quick", help="One matrix, two rounds, no second float type.")
    ] = False,
    kernels_only: Annotated[
        bool, typer.Option("--kernels-only", help="Measure matrices, and no model.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Measure kernels and a model on this machine, in about a minute.

    Kernels: one token through one matrix, in billions of weights a second, against what the memory delivers and
    against PyTorch. Model: tokens a second, memory and time to start, in 8 bits and with the same weights in float,
    each in a process of its own. What is compared takes turns; the tables give medians, and ranges in brackets.

    Examples:

        octavo bench

        octavo bench ./my-model-8bit --tokens 64 --prefill 512
    """
    import json

    from rich.console import Console

    from octavo.benchmark.run import Options, measure

    from .doctor import processor_name
    from .progress import quiet_loading

    messages = Console(stderr=True)
    options = Options(model, device, dtype, threads, tokens, prefill, quick, kernels_only)
    quiet_loading()
    with messages.status("Starting") as status:
        found = measure(options, processor_name(), status.update)
    if as_json:
        typer.echo(json.dumps(found, indent=2))
    else:
        _show(found)


def _show(found: dict[str, Any]) -> None:
    from rich.console import Console

    from octavo.benchmark.load import warning

    console = Console(highlight=False)
    machine = found["machine"]
    console.print(
        f"[bold]{machine['device']}[/], {machine['memory_bytes'] / 2**30:.1f} GiB; kernels: {machine['kernels']}, "
        f"{machine['threads']} threads of {machine['cores']} cores; torch {machine['versions']['torch']}",
        soft_wrap=True,
    )
    if machine["kernels"] == "reference":
        console.print(f"[yellow]Plain PyTorch, slow[/]: {machine['kernels_reason']}", soft_wrap=True)
    busy = warning(found["load_before"])
    if busy:
        console.print(f"[yellow]warning:[/] {busy}.", soft_wrap=True)
    console.print()
    _show_kernels(console, found["kernels"])
    if "model" in found:
        console.print()
        _show_model(console, found["model"])


def _spread(found: dict[str, float], form: str = ".2f") -> str:
    """Median and range: 1.42 (1.37–1.55)."""
    low, high = format(found["low"], form), format(found["high"], form)
    return f"{found['median']:{form}} ({low.removesuffix('%')}–{high})"


def _show_kernels(console: Any, kernels: list[dict[str, Any]]) -> None:
    from rich.table import Table

    if not kernels:
        console.print("No matrix of this model is in 8 bits.")
        return
    first = kernels[0]
    table = Table(
        title=f"One token through one matrix, {first['dtype']}",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("matrix")
    peers = list(first["faster_by"])
    for title in ("G weights/s", "of the memory", *(f"over {peer}" for peer in peers)):
        table.add_column(title, justify="right")
    for each in kernels:
        table.add_row(
            f"{each['rows']} x {each['columns']}",
            f"{each['weights_per_second']['octavo']['median'] / 1e9:.1f}",
            _spread(each["share"], ".0%"),
            *(_spread(each["faster_by"][peer]) for peer in peers),
        )
    console.print(table)
    best = max(each["bandwidth"]["median"] for each in kernels)
    console.print(
        f"The memory delivers {best / 1e9:.1f} GB/s to these threads; Octavo reads at this share of it, and is this much faster "
        "than PyTorch on the same matrix in float.",
        soft_wrap=True,
    )


def _show_model(console: Any, model: dict[str, Any]) -> None:
    from rich.table import Table

    from octavo.benchmark.timing import ratios, spread

    console.print(
        f"[bold]{model['source']}[/]: {model['class']}, {model['parameters'] / 1e6:.1f} million parameters, "
        f"{model['bytes'] / 1e6:.1f} MB in 8 bits, computing in {model['dtype']}",
        soft_wrap=True,
    )
    turns = model["peers"] or {"": model["alone"]}
    table = Table(
        title="Tokens a second, and how much faster 8 bits are than float",
        title_justify="left",
        box=None,
        pad_edge=False,
        padding=(0, 2, 0, 0),
    )
    table.add_column("")
    for method, count in model["tokens"].items():
        table.add_column(f"{method} {count}", justify="right")
        table.add_column("8 bits faster by", justify="right")
    own = [
        [rate for found in turns.values() for rate in found[method]["octavo"]] for method in model["tokens"]
    ]
    table.add_row("8 bits", *(cell for rates in own for cell in (_spread(spread(rates), ".4g"), "")))
    for name, found in model["peers"].items():
        cells = []
        for method in model["tokens"]:
            mine, theirs = found[method]["octavo"], found[method]["peer"]
            cells += [_spread(spread(theirs), ".4g"), _spread(ratios(mine, theirs))]
        table.add_row(name, *cells)
    console.print(table)
    engines = {"8 bits": model["octavo"]} | model["peers"]
    for name, found in engines.items():
        console.print(
            f"{name}: ready after {found['ready_seconds']:.1f} s, at most "
            f"{(found['device_peak_bytes'] or found['peak_bytes']) / 2**20:.0f} MiB of memory"
        )
    for name, why in model["left_out"].items():
        console.print(f"Left out: {name}: {why}.", soft_wrap=True)
    rounds = [
        ok for found in turns.values() for method in model["tokens"] for ok in found[method]["undisturbed"]
    ]
    if not all(rounds):
        console.print(
            f"[yellow]Other work took part of the machine[/] in {rounds.count(False)} of {len(rounds)} rounds.",
            soft_wrap=True,
        )
    if model["fallbacks"]:
        console.print(
            f"De-quantized whole weights for: {', '.join(model['fallbacks'])}; please report this model.",
            soft_wrap=True,
        )
