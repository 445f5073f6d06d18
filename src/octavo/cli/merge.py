"""`octavo merge`: write an adapter into its model for good."""

from typing import Annotated

import typer


def merge(
    model: Annotated[str, typer.Argument(help="The model in 8 bits that the adapter was trained on.")],
    adapter: Annotated[str, typer.Argument(help="The adapter's folder, as `octavo finetune` writes it.")],
    out: Annotated[str, typer.Argument(help="Folder to write the merged model to.")],
    to: Annotated[
        str, typer.Option(help="8bit, or 16 bits for tools that know no 8 bits: float16, bfloat16.")
    ] = "8bit",
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite", help="Replace OUT once the new one is whole; discard unfinished work that differs."
        ),
    ] = False,
) -> None:
    """Write a copy of MODEL with ADAPTER merged into its weights, tensor by tensor: memory never holds the
    model.

    Interrupted, by Ctrl-C, a crash or a full disk, the same command goes on where it stopped and ends in the same
    bytes. In 8 bits the changed weights are quantized anew, which adds a small error; it is reported.

    Examples:

        octavo merge ./my-model-8bit ./poems ./my-model-poems

        octavo merge ./my-model-8bit ./poems ./my-model-poems-16 --to bfloat16
    """
    from rich.console import Console

    from octavo.training.merge import merge as run

    from .progress import bytes_progress

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    try:
        with bytes_progress(console) as progress:
            result = run(model, adapter, out, to, overwrite=overwrite, progress=progress)
    except KeyboardInterrupt:
        console.print("Stopped. The same command goes on where it stopped.")
        raise typer.Exit(130) from None
    console.print(
        f"{out}: {result.nbytes / 1e6:,.1f} MB, {len(result.changed)} tensors changed by the adapter"
    )
    if to == "8bit":
        console.print(
            f"storing them in 8 bits added an error of {result.added_error:.2g} of their squared size "
            f"({100 * result.added_error**0.5:.2f} % of their size)"
        )
    if result.untied:
        console.print(
            f"{' and '.join(result.untied)} shared one tensor; the adapter changes it for one of them, so the copy "
            "holds both, and its config.json says so"
        )
