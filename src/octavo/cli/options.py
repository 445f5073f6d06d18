"""Options that several commands have, each written once, and what their values may be.

Example:
    >>> def command(model: Model, device: Device = None) -> None: ...
"""

import re
from functools import partial
from typing import Annotated, Any, Literal

import typer

UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
    "TIB": 2**40,
}
SMALLEST_BARE_SIZE = 10**6

DtypeName = Literal["float32", "float16", "bfloat16"]


def size(text: str, option: str, bare: str = "") -> int:
    """Bytes of "5GB" (10⁹), "2GiB" (2³⁰), "500MB", or of a plain number where it can only mean bytes.

    Args:
        bare: the unit of a plain number that is too small to mean bytes; none: it is refused.

    Raises:
        typer.BadParameter: for anything else, naming the option.
    """
    match = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?|\.[0-9]+)\s*([A-Za-z]*)\s*", text)
    unit = match[2].upper() if match else ""
    unit = unit if unit in UNITS or not unit else f"{unit}B"
    if not match or float(match[1]) <= 0 or (unit and unit not in UNITS):
        raise typer.BadParameter(
            f"expected a size such as 11GB, 24GiB or 500MB, found {text!r}", param_hint=f"'{option}'"
        )
    if not unit and float(match[1]) < SMALLEST_BARE_SIZE:
        if not bare:
            raise typer.BadParameter(
                f"expected a size with its unit, found {text!r}: {match[1]}GB?", param_hint=f"'{option}'"
            )
        unit = bare.upper()
    return max(1, int(float(match[1]) * UNITS[unit or "B"]))


def device_name(text: str) -> str:
    """Raises typer.BadParameter for what is no device of these kernels."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise typer.BadParameter(f"expected cpu, cuda, or cuda:1 and so on, found {text!r}")
    return text


def not_blank(text: str) -> str:
    """Raises typer.BadParameter for an empty name: a variable of the shell that was not set."""
    if not text.strip():
        raise typer.BadParameter("expected a name, found an empty one")
    return text


# Options whose values are a whole number, and any number.
integer: Any = partial(typer.Option, metavar="N")
number: Any = partial(typer.Option, metavar="X")


def named(metavar: str, help_: str) -> Any:
    """An argument that is a name: not blank, and without a default."""
    return typer.Argument(metavar=metavar, help=help_, show_default=False, callback=not_blank)


Model = Annotated[str, named("MODEL", "A folder, a file or a Hugging Face id; anything `octavo.load` takes.")]
Adapter = Annotated[
    str | None,
    typer.Option(
        metavar="DIR",
        help="A PEFT adapter to put on top: a folder, as `octavo finetune` writes it, or a Hugging Face id.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", parser=device_name, help="cpu, cuda, cuda:1, ... Default: a GPU if there is one."
    ),
]
Dtype = Annotated[
    DtypeName | None, typer.Option(help="Type to compute in. Default: the model's own.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="The result as JSON, and nothing else on stdout.")]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace OUT once the new one is whole; unfinished work that differs is discarded.",
    ),
]

# How a text is scored: `octavo evaluate` and `octavo compare`.
Texts = Annotated[
    list[str],
    typer.Option(
        metavar="FILE|ID",
        help="A text file, `wikitext-2`, or a data set of the hub: ID[:CONFIGURATION[:SPLIT[:COLUMN]]]. May be repeated.",
        show_default=False,
    ),
]
Window = Annotated[
    int | None,
    integer(
        min=2,
        help="Tokens of context at most. Default: the model's longest, at most 2048.",
        show_default=False,
    ),
]
Stride = Annotated[
    int | None,
    integer(min=1, help="Tokens from one window to the next. Default: half the window.", show_default=False),
]
BatchSize = Annotated[
    int | None,
    integer(
        min=1,
        help="Windows at once; no figure depends on it. Default: what 512 MiB of logits hold.",
        show_default=False,
    ),
]
LimitTokens = Annotated[
    int | None,
    typer.Option(
        "--limit-tokens",
        metavar="N",
        min=2,
        help="Read only so many tokens of the texts.",
        show_default=False,
    ),
]
