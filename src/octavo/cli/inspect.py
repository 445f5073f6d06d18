"""`octavo inspect`: what a checkpoint holds."""

import re
from typing import Annotated, Any

import typer

from .options import named


def inspect(
    model: Annotated[
        str,
        named(
            "MODEL",
            "A folder, a file or a Hugging Face id: in Octavo's format, published 8-bit, plain, or GGUF.",
        ),
    ],
    against: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE", help="The original checkpoint: measure each weight's error against it."
        ),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Everything, one entry per parameter, as JSON.")
    ] = False,
) -> None:
    """Show what of MODEL is in 8 bits, its size and its error. The error is that against --against.

    Reads headers only, and data only to measure errors, one parameter at a time. Parameters that differ in
    the number of their layer share a line; --json lists each.

    Examples:

    \b
        octavo inspect ./my-model-8bit
        octavo inspect ./my-model-8bit --against ./my-model
    """
    from .checks import check_against, check_model

    check_model(model)
    check_against(against)

    from octavo.checkpoint.inspection import report

    from .terminal import print_json

    found = report(model, against)
    if as_json:
        print_json(found.to_dict())
        return
    _show(found)


def _show(found: Any) -> None:
    import shlex

    from octavo.checkpoint.inspection import pooled

    from .terminal import say, say_command, show_table, terminal

    out = terminal()
    what = {
        "octavo": f"Octavo, codebook {found.codebook}",
        "published": "published 8-bit checkpoint",
        "gguf": "GGUF, not in Octavo's format yet",
    }.get(found.kind, f"{found.kind}, not quantized")
    say(out, (str(found.model), "bold"), f": {what}", end="\n\n")
    titles = ["parameter", "shape", "stored", "block", "bits", "MB"]
    titles += ["error", "worst"] if found.against else []
    rows = []
    for name, items in _groups(found.items).items():
        first = items[0]
        nbytes = sum(item.nbytes for item in items)
        weights = sum(item.weights for item in items)
        row = [
            f"{name}  ×{len(items)}" if len(items) > 1 else name,
            "×".join(map(str, first.shape)) or "1",
            first.kind,
            str(first.block_size or ""),
            f"{8 * nbytes / weights:.2f}" if weights else "",
            f"{nbytes / 1e6:.2f}",
        ]
        if found.against:
            compared = [item for item in items if item.error is not None]
            worst = max((item.error for item in compared), default=0.0)
            row += [f"{pooled(compared):.2e}", f"{worst:.2e}"] if compared else ["", ""]
        rows.append(row)
    show_table(out, titles, rows, left=(0, 1, 2))
    out.print()
    say(out, f"{found.nbytes / 1e6:.1f} MB in {len(found.items)} parameters")
    if found.quantized:
        scales = " and ".join(sorted({item.scales for item in found.quantized}))
        say(
            out,
            f"{found.bits_per_weight:.3f} bits per quantized weight ({scales} scales); {found.coverage:.1%} of the matrices are "
            "in 8 bits",
        )
    if found.skipped:
        say(out, f"left in float on purpose: {', '.join(found.skipped)}")
    if found.quantized and found.left:
        say(out, ("left in float:", "yellow"), f" {', '.join(found.left)}")
    if found.error is not None:
        say(out, f"weight error ‖w−ŵ‖²/‖w‖² against {found.against}: {found.error:.2e}")
    if not found.quantized:
        say_command(out, "Next: ", f"octavo quantize {shlex.quote(str(found.model))} OUT")


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
