"""What a run shows: one example before it starts, the loss curve and the table when it ends.

Example:
    >>> from rich.console import Console
    >>> history = [{"loss": 3.0, "step": 1}, {"loss": 2.5, "step": 2}, {"eval_loss": 2.4, "step": 2}]
    >>> write_curve(history, "loss.png")
    True
    >>> print_table(history, Console(width=60))
    ┏━━━━━━┳━━━━━━━━━━━━━━━┳━━━━━━━━━━━━━━━━━┳━━━━━━━━━━━━┓
    ┃ step ┃ training loss ┃ validation loss ┃ perplexity ┃
    ┡━━━━━━╇━━━━━━━━━━━━━━━╇━━━━━━━━━━━━━━━━━╇━━━━━━━━━━━━┩
    │    2 │         2.750 │           2.400 │      11.02 │
    └──────┴───────────────┴─────────────────┴────────────┘
"""

import math
from itertools import groupby
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from .data import Example
from .loss import IGNORED

SHOWN_TOKENS = 200
HEADINGS = ("step", "training loss", "validation loss", "perplexity")


def show_example(example: Example, tokenizer: Any, console: Console) -> None:
    """Print one training example: what is learned in bold green, what is only read dimmed."""
    text = Text()
    pairs = list(zip(example["input_ids"], example["labels"], strict=True))[:SHOWN_TOKENS]
    for learned, group in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        piece = tokenizer.decode([token for token, _ in group])
        text.append(piece if learned else f"⟦{piece}⟧", style="bold green" if learned else "dim")
    if len(example["input_ids"]) > SHOWN_TOKENS:
        text.append(" …", style="dim")
    count = sum(label != IGNORED for label in example["labels"])
    console.print(
        f"An example of {len(example['input_ids'])} tokens, {count} of them learned; ⟦in brackets⟧ what is only read:"
    )
    console.print(text, soft_wrap=True, highlight=False)


def losses(history: list[dict[str, float]]) -> tuple[list[tuple[int, float]], list[tuple[int, float]]]:
    """(step, loss) of training and of validation, from the Trainer's log."""
    train = [(int(entry["step"]), entry["loss"]) for entry in history if "loss" in entry]
    held = [(int(entry["step"]), entry["eval_loss"]) for entry in history if "eval_loss" in entry]
    return train, held


def write_curve(history: list[dict[str, float]], path: str | Path, title: str = "") -> bool:
    """Draw the losses as a PNG. Returns False, writing nothing, if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    train, held = losses(history)
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    if train:
        steps, values = zip(*train, strict=True)
        axes.plot(steps, values, color="0.75", linewidth=1, label="training")
        axes.plot(steps, smoothed(values), color="tab:blue", linewidth=2, label="training, smoothed")
    if held:
        steps, values = zip(*held, strict=True)
        axes.plot(steps, values, "o-", color="tab:orange", linewidth=2, label="validation")
        for step, value in (held[0], held[-1]):
            axes.annotate(
                f"{value:.2f} (perplexity {math.exp(min(value, 700)):,.1f})",
                (step, value),
                textcoords="offset points",
                xytext=(6 if step == held[0][0] else -6, 8),
                ha="left" if step == held[0][0] else "right",
            )
    axes.set(xlabel="step", ylabel="loss per token (nats)")
    # Two dollars in a file's name are no formula.
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.margins(y=0.15)
    axes.legend()
    figure.savefig(path, dpi=120)
    return True


def smoothed(values: tuple[float, ...] | list[float]) -> list[float]:
    """Means over a window of about a tenth of the values around each."""
    reach = max(1, len(values) // 20)
    return [
        sum(values[max(0, i - reach) : i + reach + 1]) / len(values[max(0, i - reach) : i + reach + 1])
        for i in range(len(values))
    ]


def loss_rows(history: list[dict[str, float]]) -> list[list[str]]:
    """One row an evaluation, under HEADINGS: step, training loss since the last, validation loss, perplexity."""
    train, held = losses(history)
    rows, last = [], -1
    for step, value in held or train[:: max(1, len(train) // 10)]:
        since = [loss for at, loss in train if last < at <= step]
        mean = f"{sum(since) / len(since):.3f}" if since else "–"
        measured = [f"{value:.3f}", f"{math.exp(min(value, 700)):,.2f}"] if held else ["–", "–"]
        rows.append([str(step), mean, *measured])
        last = step
    return rows


def print_table(history: list[dict[str, float]], console: Console) -> None:
    """The rows of `loss_rows`."""
    table = Table(*HEADINGS)
    for row in loss_rows(history):
        table.add_row(*row)
    for column in table.columns:
        column.justify = "right"
    console.print(table)
