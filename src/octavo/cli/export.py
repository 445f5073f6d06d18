"""`octavo export`: a model as a GGUF file, for llama.cpp and what is built on it."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Overwrite, named


def export(
    model: Annotated[
        str,
        named(
            "MODEL",
            "The model: a folder, a file or a Hugging Face id; quantized by Octavo, plain, or published in 8 bits.",
        ),
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The file to write.", show_default=False)],
    to: Annotated[
        Literal["f16", "q8_0", "bf16", "f32"],
        typer.Option(
            help="f16: the weights as they are, to float16's rounding; q8_0: 8.5 bits per weight, rounded once more; "
            "bf16, f32: for weights beyond float16's range."
        ),
    ] = "f16",
    name: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The model's name in the file. Default: that of its folder or repository.",
            show_default=False,
        ),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Write MODEL as a GGUF file, which llama.cpp runs. Weights, tokenizer and chat template are in the one file.

    Weights are read, de-quantized and written some rows at a time, so memory never holds the model. Merge an
    adapter first, with octavo merge.

    It knows the architectures of Llama, Mistral, Mixtral, Qwen 2 and 3, Gemma, GPT-2, GPT-NeoX, Phi, and GPT-J.

    Examples:

    \b
        octavo export ./my-model-8bit my-model.gguf
        octavo export ./my-model-8bit my-model-q8.gguf --to q8_0 --name "My model"
        llama-cli -m my-model.gguf -p "El sentido de la vida es"
    """
    from octavo.checkpoint.writing.output_directory import check_new_file

    from .checks import check_model
    from .terminal import bytes_progress, say, terminal, warnings_as_lines

    check_new_file(out, out, overwrite)
    check_model(model)

    from octavo.export import export_gguf
    from octavo.wording import few

    messages = terminal(stderr=True)
    with warnings_as_lines(messages), bytes_progress(messages) as progress:
        result = export_gguf(model, out, to, name=name, overwrite=overwrite, progress=progress)
    kinds = ", ".join(f"{count} in {kind}" for kind, count in result.types.items())
    console = terminal()
    say(
        console,
        f"{result.out}: {result.nbytes / 1e6:,.1f} MB, architecture {result.architecture}, tensors: {kinds}; "
        f"{result.vocabulary.tokens:,} tokens, pre-tokenizer {result.vocabulary.pre}",
    )
    if result.narrow:
        say(
            console,
            f"{len(result.narrow)} matrices are in F16: their rows are no multiple of Q8_0's 32 ({few(result.narrow)})",
        )
