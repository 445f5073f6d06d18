"""`octavo merge`: write an adapter into its model for good."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from .options import Overwrite, named


def merge(
    model: Annotated[str, named("MODEL", "The model in 8 bits that the adapter was trained on.")],
    adapter: Annotated[str, named("ADAPTER", "The adapter's folder, as `octavo finetune` writes it.")],
    out: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder to write the merged model to.", show_default=False)
    ],
    to: Annotated[
        Literal["8bit", "float16", "bfloat16"],
        typer.Option(help="8 bits, or 16 bits for tools that know no 8 bits."),
    ] = "8bit",
    overwrite: Overwrite = False,
) -> None:
    """Write a copy of MODEL with ADAPTER merged into its weights. It goes tensor by tensor: memory never holds the model.

    Interrupted, by Ctrl-C, a crash or a full disk, the same command goes on where it stopped and ends in the same
    bytes. In 8 bits the changed weights are quantized anew, which adds a small error; it is reported.

    Examples:

    \b
        octavo merge ./my-model-8bit ./poems ./my-model-poems
        octavo merge ./my-model-8bit ./poems ./my-model-poems-16 --to bfloat16
    """
    import shlex

    from octavo.checkpoint.writing.output_directory import choose_output_directory

    from .checks import check_model
    from .terminal import bytes_progress, going_on_later, say, say_command, terminal

    choose_output_directory(Path(out), check_model(model, adapter=adapter), overwrite)

    from octavo.merging.merge import merge as run

    messages = terminal(stderr=True)
    with going_on_later(messages), bytes_progress(messages) as progress:
        result = run(model, adapter, out, to, overwrite=overwrite, progress=progress)
    say(
        messages,
        f"{out}: {result.nbytes / 1e6:,.1f} MB, {len(result.changed)} tensors changed by the adapter",
    )
    if to == "8bit":
        say(
            messages,
            f"storing them in 8 bits added an error of {result.added_error:.2g} of their squared size "
            f"({100 * result.added_error**0.5:.2f} % of their size)",
        )
    if result.untied:
        say(
            messages,
            f"{' and '.join(result.untied)} shared one tensor; the adapter changes it for one of them, so the copy holds both, "
            "and its config.json says so",
        )
    say_command(messages, "Next: ", f'octavo generate {shlex.quote(out)} "..."')
