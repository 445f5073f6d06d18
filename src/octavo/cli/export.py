"""`octavo export`: a model as a GGUF file, for llama.cpp and what is built on it."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer


class Type(str, Enum):
    """Types of the matrices in the file."""

    f16 = "f16"
    q8_0 = "q8_0"
    bf16 = "bf16"
    f32 = "f32"


def export(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="The model: a folder, a file or a Hugging Face id; quantized by Octavo, plain, or published in 8 bits.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The file to write.", show_default=False)],
    to: Annotated[
        Type,
        typer.Option(
            help="f16: the weights as they are, to float16's rounding; q8_0: 8.5 bits a weight, rounded once more; "
            "bf16, f32: for weights beyond float16's range."
        ),
    ] = Type.f16,
    name: Annotated[
        str | None,
        typer.Option(
            help="The model's name in the file. Default: that of its folder or repository.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT.gguf.")] = False,
) -> None:
    """Write MODEL as a GGUF file that llama.cpp runs: weights, tokenizer, chat template, in one file.

    Weights are read, de-quantized and written some rows at a time, so memory never holds the model. Merge an
    adapter first, with octavo merge.

    It knows the architectures of Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma, GPT-2, GPT-NeoX, Phi, and GPT-J.

    Examples:

        octavo export ./my-model-8bit my-model.gguf

        octavo export ./my-model-8bit my-model-q8.gguf --to q8_0 --name "My model"

        llama-cli -m my-model.gguf -p "El sentido de la vida es"
    """
    import warnings
    from contextlib import ExitStack

    from rich.console import Console

    from octavo.export import export_gguf

    from .progress import bytes_progress

    messages = Console(stderr=True, highlight=False, soft_wrap=True)
    with warnings.catch_warnings(), ExitStack() as stack:
        bar = None

        def progress(done: int, total: int, what: str) -> None:
            # From the first tensor on: before it, errors are told, and a bar would leave an empty line.
            nonlocal bar
            bar = bar or stack.enter_context(bytes_progress(messages))
            bar(done, total, what)

        # Meant for the user as they are, without the file and line they come from.
        warnings.showwarning = lambda message, *_: messages.print(
            f"warning: {message}", style="yellow", markup=False
        )
        result = export_gguf(model, out, to.value, name=name, overwrite=force, progress=progress)
    kinds = ", ".join(f"{count} in {kind}" for kind, count in result.types.items())
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        f"{result.out}: {result.nbytes / 1e6:,.1f} MB, architecture {result.architecture}, tensors: {kinds}; "
        f"{result.vocabulary.tokens:,} tokens, pre-tokenizer {result.vocabulary.pre}"
    )
    if result.narrow:
        more = ", ..." if len(result.narrow) > 3 else ""
        console.print(
            f"{len(result.narrow)} matrices are in F16: their rows are no multiple of Q8_0's 32 "
            f"({', '.join(result.narrow[:3])}{more})"
        )
