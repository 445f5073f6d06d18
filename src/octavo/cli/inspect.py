"""`octavo inspect`: what a checkpoint holds."""

import re
from typing import Annotated

import typer


def inspect(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A folder, a file or a Hugging Face id: in Octavo's format, published 8-bit, plain, or GGUF.",
            show_default=False,
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="The original checkpoint: measure each weight's error against it."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything, one entry a parameter, as JSON.")
    ] = False,
) -> None:
    """Show what of MODEL is in 8 bits, its size, and with --against its error.

    Reads headers only, and data only to measure errors, one parameter at a time. Parameters that differ in
    the number of their layer share a line; --json lists each.

    Examples:

        octavo inspect ./my-model-8bit

        octavo inspect ./my-model-8bit --against ./my-model
    """
    import json

    from octavo.checkpoint.report import report

    found = report(model, against)
    if as_json:
        print(json.dumps(found.to_dict(), indent=2))
        return
    _show(found)


def _show(found) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    what = {
        "octavo": f"Octavo, codebook {found.codebook}",
        "published": "published 8-bit checkpoint",
        "gguf": "GGUF, not in Octavo's format yet",
    }.get(found.kind, f"{found.kind}, not quantized")
    console.print(f"[bold]{found.model}[/]: {what}", soft_wrap=True, highlight=False)
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("parameter", overflow="fold")
    table.add_column("shape")
    table.add_column("stored")
    table.add_column("block", justify="right")
    table.add_column("bits", justify="right")
    table.add_column("MB", justify="right")
    if found.against:
        table.add_column("error", justify="right")
        table.add_column("worst", justify="right")
    for name, items in _groups(found.items).items():
        first = items[0]
        nbytes = sum(item.nbytes for item in items)
        weights = sum(item.weights for item in items)
        row = [
            f"{name}  ×{len(items)}" if len(items) > 1 else name,
            " × ".join(map(str, first.shape)) or "1",
            first.kind,
            str(first.block_size or ""),
            f"{8 * nbytes / weights:.2f}" if weights else "",
            f"{nbytes / 1e6:.2f}",
        ]
        if found.against:
            compared = [item for item in items if item.error is not None]
            power = sum(item.power for item in compared)
            pooled = sum(item.error * item.power for item in compared) / power if power else 0.0
            row += [f"{pooled:.2e}", f"{max(i.error for i in compared):.2e}"] if compared else ["", ""]
        table.add_row(*row)
    console.print(table)
    console.print(f"\n{found.nbytes / 1e6:.1f} MB in {len(found.items)} parameters", highlight=False)
    if found.quantized:
        scales = " and ".join(sorted({item.scales for item in found.quantized}))
        console.print(
            f"{found.bits_per_weight:.3f} bits per quantized weight ({scales} scales); {found.coverage:.1%} "
            "of the matrices are in 8 bits",
            highlight=False,
        )
    if found.skipped:
        console.print(
            f"left in float on purpose: {', '.join(found.skipped)}", soft_wrap=True, highlight=False
        )
    if found.quantized and found.left:
        console.print(f"[yellow]left in float:[/] {', '.join(found.left)}", soft_wrap=True, highlight=False)
    if found.error is not None:
        console.print(
            f"weight error ‖w−ŵ‖²/‖w‖² against {found.against}: {found.error:.2e}",
            soft_wrap=True,
            highlight=False,
        )
    if not found.quantized:
        console.print(f"Next:  octavo quantize {found.model} OUT", soft_wrap=True, highlight=False)


def _groups(items) -> dict[str, list]:
    """Items by name with numbers of layers replaced by `*`, and by how they are stored."""
    groups: dict[tuple, list] = {}
    for item in items:
        name = re.sub(r"(?<=\.)\d+(?=\.)", "*", item.name)
        groups.setdefault((name, item.shape, item.kind, item.block_size, item.scales), []).append(item)
    shown: dict[str, list] = {}
    for (name, *_), group in groups.items():
        # The same name stored in two ways: tell them apart by their first member.
        shown[name if name not in shown else group[0].name] = group
    return shown
