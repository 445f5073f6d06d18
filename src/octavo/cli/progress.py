"""Progress bars that the commands share.

Example:
    >>> from rich.console import Console
    >>> with bytes_progress(Console()) as progress:  # doctest: +SKIP
    ...     convert(source, out, progress=progress)
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)


@contextmanager
def bytes_progress(console: Console) -> Iterator[Callable[[int, int, str], None]]:
    """A bar of bytes done, of how many, at what speed, and the time left.

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
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total, what: bar.update(task, completed=done, total=total, description=what)


def quiet_loading(always: bool = True) -> None:
    """Switch off transformers' bar of loaded tensors: always, or where nobody watches (stderr is no terminal)."""
    if always or not sys.stderr.isatty():
        from transformers.utils import logging

        logging.disable_progress_bar()


def quiet_future_warnings() -> None:
    """Keep libraries' notes to programmers (what a later version will rename) from a command's output."""
    import warnings

    warnings.filterwarnings("ignore", category=FutureWarning)


def quiet_peft() -> None:
    """Keep PEFT from saying, at every checkpoint, that it saves adapters on embeddings with (or without) the embeddings."""
    import warnings

    warnings.filterwarnings("ignore", message=".*save_embedding_layers.*")
