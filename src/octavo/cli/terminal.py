"""What the commands write to a terminal: lines that keep paths and commands whole, tables that fit, bars, warnings.

What a user named (a path, a model, a text) is printed as it is: rich would take `[bold]` in a folder's name for markup, and
`:cat:` for a picture.

Example:
    >>> out = terminal()
    >>> say(out, ("Ready.", "bold"), " The model is in ", "models/a[b]")
    Ready. The model is in models/a[b]
"""

import json
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

# Between two columns of a table.
GAP = 2
# A name is cut into lines no shorter than this.
NARROWEST_NAME = 24


def terminal(stderr: bool = False, quiet: bool = False) -> Console:
    """A console that prints text as it is given."""
    return Console(stderr=stderr, quiet=quiet, markup=False, highlight=False, emoji=False)


def say(console: Console, *parts: str | tuple[str, str], style: str = "", end: str = "\n") -> None:
    """Print a sentence, wrapped between words: a name longer than the terminal stays whole, to be copied."""
    text = Text.assemble(*parts, style=style)
    lines = text.divide(_line_starts(text.plain, console.width))
    for line in lines[:-1]:
        line.rstrip()
    console.print(Text("\n").join(lines), soft_wrap=True, end=end)


def _line_starts(text: str, width: int) -> list[int]:
    """Where in a text new lines begin, so that none is wider than `width` but those of one word."""
    starts, begin, end = [], 0, 0
    for word in re.finditer(r"\n|[^\s]+", text):
        if word[0] == "\n":
            begin = word.end()
        elif word.end() - begin > width and end > begin:
            begin = word.start()
            starts.append(begin)
        end = word.end()
    return starts


def say_command(console: Console, label: str, command: str) -> None:
    """Print a command to copy, in one line whatever its length."""
    say(console, label, end=" ")
    console.print(Text(command), soft_wrap=True)


def show_table(
    console: Console,
    titles: Sequence[str],
    rows: Sequence[Sequence[str]],
    title: str = "",
    left: Sequence[int] = (0,),
) -> None:
    """Print a table. Where it is wider than the terminal, the columns that do not fit follow in further tables, the first
    column before them; names in it that are wider than the terminal are cut after a dot or a slash.

    Args:
        titles: one per column.
        rows: as many cells each.
        title: above the table.
        left: numbers of the columns of words; the others are figures.
    """
    wide = [
        max(len(line) for row in (titles, *rows) for line in row[at].split("\n")) for at in range(len(titles))
    ]
    rest = sum(GAP + width for width in wide[1:])
    if wide[0] + rest > console.width:
        room = max(NARROWEST_NAME, console.width - min(rest, console.width // 2))
        rows = [[broken(row[0], room), *row[1:]] for row in rows]
        wide[0] = max(len(line) for row in (titles, *rows) for line in row[0].split("\n"))
    groups: list[list[int]] = [[0]]
    for at in range(1, len(titles)):
        group = groups[-1]
        if len(group) > 1 and sum(GAP + wide[each] for each in (*group, at)) - GAP > console.width:
            groups.append(group := [0])
        group.append(at)
    for group in groups:
        table = Table(
            title=title or None, title_justify="left", box=None, pad_edge=False, padding=(0, GAP, 0, 0)
        )
        for at in group:
            table.add_column(titles[at], justify="left" if at in left else "right", no_wrap=True)
        for row in rows:
            table.add_row(*(row[at] for at in group))
        console.print(table, crop=False)
        if group is not groups[-1]:
            console.print()
        title = ""


def print_json(value: Any) -> None:
    """The result as JSON, for programs."""
    print(json.dumps(value, indent=2))


def show_facts(console: Console, facts: Sequence[tuple[str, str]]) -> None:
    """Print names and values, one pair a line; a value wider than the terminal goes on below itself, cut between words."""
    wide = max((len(name) for name, _ in facts), default=0)
    for name, value in facts:
        starts = [0, *_line_starts(value, console.width - wide - GAP), len(value)]
        for first, last in pairwise(starts):
            label = name if first == 0 else ""
            line = value[first:last].rstrip()
            console.print(Text.assemble((label.ljust(wide + GAP), "dim"), line), soft_wrap=True)


def broken(name: str, width: int) -> str:
    """A name in lines of at most `width`, cut after dots and slashes; a part that is longer stays whole."""
    lines = [""]
    for part in name.replace(".", ".\0").replace("/", "/\0").split("\0"):
        if lines[-1] and len(lines[-1]) + len(part) > width:
            lines.append("  ")
        lines[-1] += part
    return "\n".join(lines)


@contextmanager
def warnings_as_lines(console: Console) -> Iterator[None]:
    """Show warnings as they are meant for the user: a line each, without the file and line of code they come from."""
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(console, f"warning: {message}", style="yellow")
        yield


@contextmanager
def going_on_later(console: Console) -> Iterator[None]:
    """Ctrl-C, in work that the same command goes on with: say so, and leave as a program does that was interrupted."""
    try:
        yield
    except KeyboardInterrupt:
        say(console, "Stopped. The same command goes on where it stopped.")
        raise typer.Exit(130) from None


@contextmanager
def bytes_progress(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of bytes done, of how many, at what speed, and the time left. It appears with the first step, so that an error
    before it is not told below an empty bar.

    Yields:
        A function of bytes done, bytes in all, and what is at hand.
    """
    columns = (
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
    )
    yield from _bars(columns, console)


@contextmanager
def steps_progress(console: Console, what: str) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of steps done of how many, and the time left.

    Args:
        what: the steps: "tokens".

    Yields:
        A function of steps done, steps in all, and a name: each new one has a bar of its own.
    """
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(what),
        TimeRemainingColumn(),
    )
    yield from _bars(columns, console, one_a_name=True)


def _bars(
    columns: Sequence[Any], console: Console, one_a_name: bool = False
) -> Iterator[Callable[[int, int, str], None]]:
    bar = Progress(*columns, console=console, transient=True)
    tasks: dict[str, Any] = {}

    def show(done: int, total: int, name: str) -> None:
        key = name if one_a_name else ""
        if not tasks:
            bar.start()
        if key not in tasks:
            tasks[key] = bar.add_task(name, total=total)
        bar.update(tasks[key], completed=done, total=total, description=name)

    try:
        yield show
    finally:
        if tasks:
            bar.stop()


def quiet_libraries() -> None:
    """Keep libraries' notes to programmers (what a later version will rename, what PEFT saves beside an adapter) and, where
    nobody watches, transformers' bar of loaded tensors from a command's output."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
    if not sys.stderr.isatty():
        quiet_loading()


def quiet_loading() -> None:
    """Switch off transformers' bar of loaded tensors."""
    from transformers.utils import logging

    logging.disable_progress_bar()
