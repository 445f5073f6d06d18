"""The `octavo` command: one file per subcommand, each importing what it needs only when it runs.

Example:
    $ octavo --help
    $ octavo generate some/model "El sentido de la vida es"
"""

import io
import logging
import os
import sys
from typing import Any, NoReturn

import typer

from octavo.checkpoint.errors import out_of_memory

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
from .serve import serve

# Of click, which typer builds on, or of its own copy of it.
UsageError: Any = next(base for base in typer.BadParameter.__mro__ if base.__name__ == "UsageError")

app = typer.Typer(
    name="octavo",
    help="Run and fine-tune large language models in 8 bits, on the hardware you own.",
    epilog="Start with `octavo demo`. MODEL is always a folder, a file or a Hugging Face id: plain, quantized by Octavo, "
    "one of the published 8-bit checkpoints, or a GGUF file.",
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
# What follows `--` is vLLM's.
app.command(context_settings={"allow_extra_args": True})(serve)


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
    """Run the command line. What the user can mend is one line on stderr; exit status 1, or 2 for an option."""
    # bitsandbytes warns that it lacks an optional 4-bit kernel, which nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    for stream in (sys.stdout, sys.stderr):
        # A terminal that lacks a character, or a file's name that is no text, is no reason to lose what was computed.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    # A bug deserves its traceback: OCTAVO_DEBUG=1 shows it for these errors as well.
    debug = bool(os.environ.get("OCTAVO_DEBUG"))
    try:
        status = app(prog_name="octavo", standalone_mode=False)
    except UsageError as error:
        names = {command.callback.__name__ for command in app.registered_commands if command.callback}
        # The error of an option without its value does not know its command.
        command = next((f" {word}" for word in sys.argv[1:] if word in names), "")
        error.message = _plain(error)
        _fail(f"{error.format_message().rstrip('.')} (see octavo{command} --help)", 2)
    except (ValueError, OSError, ImportError) as error:
        if debug:
            raise
        _fail(_short_of_memory(error) if out_of_memory(error) else str(error) or type(error).__name__, 1)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BaseException as error:  # libraries in Rust raise what is no Exception
        if debug or not out_of_memory(error):
            raise
        _fail(_short_of_memory(error), 1)
    sys.exit(status if isinstance(status, int) else 0)


# What pydantic, which typer checks values with, calls a mistake → what was expected, of its bounds.
EXPECTED = {
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "greater_than_equal": "at least {ge}",
    "greater_than": "more than {gt}",
    "less_than_equal": "at most {le}",
    "less_than": "less than {lt}",
}


def _plain(error: Any) -> str:
    """What is wrong with an option's value, without a validator's words."""
    found = error.__cause__.errors()[0] if hasattr(error.__cause__, "errors") else {}
    if found.get("type") in EXPECTED:
        expected = EXPECTED[found["type"]].format(**found.get("ctx", {}))
        return f"expected {expected}, found {found['input'] if 'ctx' in found else repr(found['input'])}"
    message = error.message.removeprefix("Value error, ")
    if "extra argument" in message:
        return f"{message.rstrip('.')}: a text or a name with spaces goes into quotes"
    return message


def _short_of_memory(error: BaseException) -> str:
    # The first line says how much was asked for; torch's advice on its own settings follows.
    said = (str(error) or type(error).__name__).strip().splitlines()[0]
    return (
        f"out of memory ({said}): `octavo plan MODEL` tells what a model takes; shorter texts, smaller batches "
        "and other programs that are ended leave more"
    )


def _fail(message: str, status: int) -> NoReturn:
    # One line, whatever a library put into its message.
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(status)
