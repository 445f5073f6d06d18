"""The `octavo` command: one file a subcommand, each importing what it needs only when it runs.

Example:
    $ octavo --help
    $ octavo generate some/model "El sentido de la vida es"
"""

import logging
import os
import sys

import typer

from .bench import bench
from .compare import compare
from .demo import demo
from .doctor import doctor
from .evaluate import evaluate
from .export import export
from .finetune import finetune
from .generate import generate
from .inspect import inspect
from .merge import merge
from .plan import plan
from .quantize import quantize

app = typer.Typer(
    name="octavo",
    help="Run and fine-tune large language models in 8 bits, on the hardware you own.",
    epilog="Start with `octavo demo`. MODEL is always a folder, a file or a Hugging Face id: plain, quantized by Octavo, "
    "one of the published 8-bit checkpoints, or a GGUF file.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    # Tables would cut the names of long options at 80 columns.
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    quantize,
    generate,
    finetune,
    merge,
    plan,
    inspect,
    evaluate,
    compare,
    demo,
    export,
    doctor,
    bench,
):
    app.command()(command)


@app.callback(invoke_without_command=True)
def _root(
    context: typer.Context,
    show_version: bool = typer.Option(False, "--version", help="Print the version and exit."),
) -> None:
    if show_version:
        from octavo import __version__

        typer.echo(f"octavo {__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


def main() -> None:
    """Run the command line. What the user can mend (a file, an option) is one line on stderr and exit status 1."""
    # bitsandbytes warns that it lacks an optional 4-bit kernel, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, ImportError) as error:
        # A bug deserves its traceback: OCTAVO_DEBUG=1 shows it for these errors as well.
        if os.environ.get("OCTAVO_DEBUG"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
