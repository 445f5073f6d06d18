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
) -> None:
    """Write a copy of MODEL with ADAPTER merged into its weights, tensor by tensor: memory never holds the
    model.

    In 8 bits the changed weights are quantized anew, which adds a small error; it is reported.

    Examples:

        octavo merge ./my-model-8bit ./poems ./my-model-poems

        octavo merge ./my-model-8bit ./poems ./my-model-poems-16 --to bfloat16
    """
    from rich.console import Console
    from rich.progress import Progress

    from octavo.training.merge import merge as run

    console = Console(stderr=True, highlight=False, soft_wrap=True)
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("merging", total=None)
        result = run(
            model,
            adapter,
            out,
            to,
            progress=lambda done, total, name: bar.update(
                task, completed=done, total=total, description=name
            ),
        )
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
