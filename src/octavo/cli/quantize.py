"""`octavo quantize`: a checkpoint to 8 bits, tensor by tensor."""

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .options import Overwrite, integer, named, size

# A source that holds fewer bits per weight than this has lost more than 8 bits can show.
NARROW = 8.0


def quantize(
    source: Annotated[
        str,
        named(
            "SOURCE",
            "What to convert: a folder or a Hugging Face id (safetensors, or .bin), a published 8-bit checkpoint, "
            "FP8, MXFP4 or int8 weights, or a GGUF file.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Argument(
            metavar="OUT", help="The folder to write. It appears when it is whole.", show_default=False
        ),
    ],
    codebook: Annotated[
        Literal["fitted", "dynamic"] | None,
        typer.Option(
            help="fitted: 256 numbers fitted to each matrix, the least error; dynamic: the table of the published 8-bit "
            "checkpoints. Default: fitted.",
            show_default=False,
        ),
    ] = None,
    block_size: Annotated[
        int | None,
        integer(
            min=1,
            help="Weights that share a scale: smaller is more exact and larger. Default: 64 for fitted (8.25 bits per weight), "
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
    overwrite: Overwrite = False,
    max_shard_size: Annotated[
        str, typer.Option(metavar="SIZE", help="Largest file of weights: 5GB, 500MB, ...")
    ] = "5GB",
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
            metavar="FILE",
            help="Choose codes by the error of each layer's output on this text file, not by the weights alone. Same format "
            "and size, closer predictions; the whole model runs, in 8 bits. May be repeated: the more varied, the better.",
            show_default=False,
        ),
    ] = None,
    calibrate_tokens: Annotated[
        int, integer(min=1024, help="Tokens of text to calibrate on, spread over the files.")
    ] = 16384,
) -> None:
    """Convert SOURCE to 8 bits and write it to OUT.

    Weights are read one at a time in their own precision, so memory holds a few times the largest one, never
    the model. The tokenizer and everything else small in SOURCE come along. Interrupted, by Ctrl-C or a full disk, the
    same command goes on where it stopped and ends in the same bytes.

    A published 8-bit checkpoint keeps its numbers exactly, unless --codebook or --block-size asks for others.

    Examples:

    \b
        octavo quantize ./my-model ./my-model-8bit
        octavo quantize EleutherAI/gpt-j-6b ./gpt-j-8bit --skip lm_head
        octavo quantize model.Q8_0.gguf ./model-8bit --block-size 32
        octavo quantize ./my-model ./my-model-8bit \\
            --calibrate novel.txt --calibrate manual.txt
    """
    from octavo.checkpoint.reading.locate import Hub
    from octavo.checkpoint.writing.output_directory import choose_output_directory

    from .checks import check_model
    from .terminal import bytes_progress, going_on_later, quiet_loading, terminal, warnings_as_lines

    shard_size = size(max_shard_size, "--max-shard-size")
    if calibrate:
        from octavo.text_files import read_text

        for text in calibrate:
            read_text(text, "--calibrate")
    choose_output_directory(out, check_model(source, hub=Hub(trust_remote_code=trust_remote_code)), overwrite)

    from octavo.checkpoint import convert, open_source
    from octavo.config import OctavoConfig

    calibration = None
    if calibrate:
        from octavo.calibration import Calibration

        quiet_loading()
        calibration = Calibration(calibrate, calibrate_tokens)
    messages = terminal(stderr=True)
    config = OctavoConfig(codebook=codebook or "fitted", block_size=block_size, skip=skip or [])
    with going_on_later(messages), warnings_as_lines(messages):
        opened = open_source(source, trust_remote_code=trust_remote_code)
        if opened.kind == "gguf":
            _warn_of_a_narrow_source(opened, messages)
        with opened, bytes_progress(messages) as progress:
            result = convert(
                opened,
                out,
                config,
                overwrite=overwrite,
                max_shard_size=shard_size,
                requantize=codebook is not None or block_size is not None,
                calibration=calibration,
                progress=progress,
            )
    _show(result, opened.kind, calibration)


def _warn_of_a_narrow_source(opened: Any, messages: Any) -> None:
    """Say that 8 bits win nothing back of what a source in 4 bits has lost."""
    import math

    from .terminal import say

    matrices = [info for info in opened.tensors.values() if len(info.shape) > 1]
    weights = sum(math.prod(info.shape) for info in matrices)
    bits = 8 * sum(info.nbytes for info in matrices) / max(weights, 1)
    if bits < NARROW:
        say(
            messages,
            f"note: {opened.files[0].name} holds {bits:.1f} bits per weight. In 8 bits it will be larger, and no better: what "
            "those bits lost is lost. Where the original in 16 bits is to be had, quantize that",
            style="yellow",
        )


def _show(result: Any, kind: str, calibration: Any = None) -> None:
    """The figures, and what to do next."""
    from octavo.wording import few
    from octavo.wording import size as shown_size

    from .terminal import say, show_facts, terminal

    before, after = result.source_bytes, result.bytes
    exact = bool(result.quantized) and all(row.kind == "exact" for row in result.quantized)
    facts = [
        ("size before", shown_size(before)),
        ("size after", f"{shown_size(after)}  ({after / max(before, 1):.0%})"),
        ("bits per weight", f"{result.bits_per_weight:.3f}"),
        (
            "weight error ‖w−ŵ‖²/‖w‖²",
            "none: the published numbers, unchanged" if exact else f"{result.error:.2e}",
        ),
        ("matrices in 8 bits", str(len(result.quantized))),
    ]
    if calibration is not None and calibration.errors:
        count = len(calibration.errors)
        was, now = (sum(pair) / count for pair in zip(*calibration.errors.values(), strict=True))
        facts.append(("calibrated", f"{count} of them"))
        facts.append(("their output error on the text", f"{was:.2e} → {now:.2e}"))
    facts.append(("time", f"{result.seconds:.1f} s" + (", resumed" if result.resumed else "")))
    out = terminal()
    show_facts(out, facts)
    if result.unexpected:
        out.print()
        found = f" {len(result.unexpected)} tensors the model has no place for: {few(result.unexpected)}"
        say(out, ("Left out:", "yellow"), found)
    if result.dropped and kind == "published":
        out.print()
        say(out, f"Left out: {len(result.dropped)} buffers that are constants (attention masks).")
    _show_next(out, result)


def _show_next(out: Any, result: Any) -> None:
    """What a model of this kind is for."""
    from .checks import architecture, continues_text, in_python
    from .terminal import say, say_command

    out.print()
    name = architecture(result.out)
    if name and not continues_text(name):
        say_command(out, "Next, in Python: ", in_python(name, result.out))
        return
    command = f"octavo generate {shlex.quote(str(result.out))}"
    say_command(out, "Next: ", f'{command} "..."')
    if result.adapter:
        say(out, "With the low-rank adapter that came with the weights:")
        say_command(out, "      ", f'{command} "..." --adapter {shlex.quote(str(result.adapter))}')
