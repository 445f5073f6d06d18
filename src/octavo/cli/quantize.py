"""`octavo quantize`: a checkpoint to 8 bits, tensor by tensor."""

import re
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


class Codebook(str, Enum):
    """What the 256 numbers of a table are."""

    fitted = "fitted"
    dynamic = "dynamic"


def parse_size(text: str) -> int:
    """Bytes of "5GB", "500MB", "2GiB" or a plain number. Raises typer.BadParameter for anything else."""
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)", text.strip())
    if not match or match[2].upper() not in UNITS or float(match[1]) <= 0:
        raise typer.BadParameter(f"expected a size such as 5GB or 500MB, found {text!r}")
    return max(1, int(float(match[1]) * UNITS[match[2].upper()]))


def quantize(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="What to convert: a folder or a Hugging Face id (safetensors, or .bin), a published 8-bit checkpoint, "
            "FP8, MXFP4 or int8 weights, or a GGUF file.",
            show_default=False,
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The folder to write. It appears when it is whole.", show_default=False
        ),
    ],
    codebook: Annotated[
        Codebook | None,
        typer.Option(
            help="fitted: 256 numbers fitted to each matrix, the least error; dynamic: the table of the published 8-bit "
            "checkpoints. Default: fitted.",
            show_default=False,
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Weights that share a scale: smaller is more exact and larger. Default: 64 for fitted (8.25 bits a weight), "
            "4096 for dynamic.",
            show_default=False,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PATTERN",
            help="Parameters to leave in float, by whole parts of their names: lm_head, 'layers.[0-3].mlp'. May be repeated.",
        ),
    ] = None,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace OUT once the new one is whole; discard unfinished work that differs."
        ),
    ] = False,
    max_shard_size: Annotated[str, typer.Option(help="Largest file of weights: 5GB, 500MB, ...")] = "5GB",
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            help="Let transformers run code (*.py) of SOURCE, and copy it. Only for sources that you trust.",
        ),
    ] = False,
    calibrate: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT",
            help="Choose codes by the error of each layer's output on this text file, not by the weights alone. Same format "
            "and size, closer predictions; the whole model runs, in 8 bits. May be repeated: the more varied, the better.",
            show_default=False,
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int, typer.Option(min=1024, help="Tokens of text to calibrate on, spread over the files.")
    ] = 16384,
) -> None:
    """Convert SOURCE to 8 bits and write it to OUT.

    Weights are read one at a time in their own precision, so memory holds a few times the largest one, never
    the model. The tokenizer and everything else small in SOURCE come along. Interrupted, by Ctrl-C or a full disk, the
    same command goes on where it stopped and ends in the same bytes.

    A published 8-bit checkpoint keeps its numbers exactly, unless --codebook or --block-size asks for others.

    Examples:

        octavo quantize ./my-model ./my-model-8bit

        octavo quantize EleutherAI/gpt-j-6b ./gpt-j-8bit --skip lm_head

        octavo quantize model.Q4_1.gguf ./model-8bit --codebook fitted --block-size 32

        octavo quantize ./my-model ./my-model-8bit --calibrate novel.txt --calibrate manual.txt
    """
    size = parse_size(max_shard_size)

    import warnings

    from rich.console import Console

    from octavo.checkpoint import convert, open_source
    from octavo.config import OctavoConfig

    from .progress import bytes_progress, quiet_loading

    calibration = None
    if calibrate:
        from octavo.calibration import Calibration

        quiet_loading()
        calibration = Calibration(calibrate, calibrate_tokens)
    messages = Console(stderr=True)
    config = OctavoConfig(
        codebook=codebook.value if codebook else "fitted", block_size=block_size, skip=skip or []
    )
    try:
        with warnings.catch_warnings():
            # Meant for the user as they are, without the file and line they come from.
            warnings.showwarning = lambda message, *_: messages.print(
                f"warning: {message}", style="yellow", markup=False, highlight=False, soft_wrap=True
            )
            with messages.status(f"Opening {source}"):
                opened = open_source(source, trust_remote_code=trust_remote_code)
            with opened, bytes_progress(messages) as progress:
                result = convert(
                    opened,
                    out,
                    config,
                    overwrite=overwrite,
                    max_shard_size=size,
                    requantize=codebook is not None or block_size is not None,
                    calibration=calibration,
                    progress=progress,
                )
    except KeyboardInterrupt:
        messages.print("Stopped. The same command goes on where it stopped.")
        raise typer.Exit(130) from None
    _show(result, opened.kind, calibration)


def _show(result, kind: str, calibration=None) -> None:
    """The table at the end, and what to do next."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="dim")
    table.add_column(justify="right")
    before, after = result.source_bytes, result.bytes
    table.add_row("size before", _mb(before))
    table.add_row("size after", f"{_mb(after)}  ({after / max(before, 1):.0%})")
    table.add_row("bits per weight", f"{result.bits_per_weight:.3f}")
    exact = bool(result.quantized) and all(row.kind == "exact" for row in result.quantized)
    error = "none: the published numbers, unchanged" if exact else f"{result.error:.2e}"
    table.add_row("weight error ‖w−ŵ‖²/‖w‖²", error)
    table.add_row("matrices in 8 bits", str(len(result.quantized)))
    if calibration is not None and calibration.errors:
        before, after = (
            sum(pair) / len(calibration.errors) for pair in zip(*calibration.errors.values(), strict=True)
        )
        table.add_row("calibrated", f"{len(calibration.errors)} of them")
        table.add_row("their output error on the text", f"{before:.2e} → {after:.2e}")
    table.add_row("time", f"{result.seconds:.1f} s" + (", resumed" if result.resumed else ""))
    console.print(table)
    if result.unexpected:
        names = ", ".join(result.unexpected[:3])
        more = ", ..." if len(result.unexpected) > 3 else ""
        console.print(
            f"\n[yellow]Left out:[/] {len(result.unexpected)} tensors the model has no place for: "
            f"{names}{more}",
            soft_wrap=True,
        )
    if result.dropped and kind == "published":
        console.print(f"\nLeft out: {len(result.dropped)} buffers that are constants (attention masks).")
    console.print(f'\nNext:  octavo generate {result.out} "..."', soft_wrap=True, highlight=False)
    if result.adapter:
        console.print(
            f"The low-rank adapter that came with the weights is in {result.adapter}: add --adapter "
            f"{result.adapter}",
            soft_wrap=True,
            highlight=False,
        )


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"
