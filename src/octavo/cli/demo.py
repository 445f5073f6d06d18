"""`octavo demo`: quantize the model that ships with Octavo, measure what that cost, and let it write."""

from pathlib import Path
from typing import Annotated, Any

import typer


def demo(
    out: Annotated[
        Path, typer.Option(help="Folder to write the 8-bit model to; replaced if it is there.")
    ] = Path("demo-output/model-8bit"),
    seed: Annotated[int, typer.Option(help="Of the sampled text.")] = 1,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the text.", min=1)] = 80,
    finetune: Annotated[
        bool,
        typer.Option("--finetune/--no-finetune", help="Also fine-tune the 8-bit model, for about a minute."),
    ] = True,
) -> None:
    """Show the whole path on a small Spanish model that ships with Octavo.

    Quantizes the model to a folder, shows its size, error and perplexity on text it never saw, before and after, loads it, and
    writes what follows "El sentido de la vida es": seconds. Then fine-tunes it on four fifths of a book, about a minute on two
    cores, and measures it on the chapters left out.
    """
    from rich.console import Console

    from octavo import demo as shipped
    from octavo.cli.progress import quiet_loading

    if not (shipped.MODEL / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{shipped.MODEL} holds no model: this installation lacks its data files. Install Octavo again, or make the model "
            "with scripts/demo_model/train.py"
        )
    console = Console(soft_wrap=True)
    console.print(
        "[bold]Octavo[/bold], shown on a Spanish GPT-J of 7 million parameters in 16 bits, trained on"
    )
    console.print("the Reina-Valera 1909 Bible and the Debian handbook.\n")
    quiet_loading()
    result = _quantize(console, shipped.MODEL, out)
    before, after = _measure(console, shipped.MODEL, out, shipped.TEXT / "proverbios.txt")
    _table(console, result, before, after)
    _write(console, out, shipped.PROMPT, seed, max_new_tokens)
    if finetune:
        _finetune(console, out, shipped.TEXT / "proverbios.txt")
    console.print(
        "\nNext: `octavo quantize SOURCE OUT` with a model of your own; `octavo generate --help`; `octavo doctor`."
    )


def _quantize(console, source: Path, out: Path):
    """The same conversion as `octavo quantize`."""
    from octavo.checkpoint import convert
    from octavo.cli.progress import bytes_progress

    console.print(f"[bold]1.[/bold] Quantize to 8 bits: octavo quantize {source.name} {out}")
    with bytes_progress(console) as progress:
        return convert(source, out, overwrite=True, progress=progress)


def _measure(console, source: Path, out: Path, text: Path):
    """Perplexity on the held-out text of the 16-bit model and of the quantized one."""
    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from transformers import AutoModelForCausalLM

    from octavo import load, load_tokenizer
    from octavo.evaluation.perplexity import perplexity

    console.print(f"\n[bold]2.[/bold] Perplexity on {text.name}, a book the model never saw")
    words = text.read_text(encoding="utf-8")
    tokenizer = load_tokenizer(source)
    found = []
    columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        for name in ("16 bits", "8 bits"):
            if name == "16 bits":
                # The same arithmetic on both sides: stored in 16 bits, computed in float32.
                model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
            else:
                model = load(out, dtype=torch.float32, device="cpu")
            task = bar.add_task(name)

            def show(done: int, total: int, task=task) -> None:
                bar.update(task, completed=done, total=total)

            found.append(perplexity(model, tokenizer, words, progress=show))
    return found


def _table(console, result, before, after) -> None:
    from rich.table import Table

    table = Table()
    for title in ("", "16 bits", "8 bits"):
        table.add_column(title, justify="left" if not title else "right")
    table.add_row("Size", f"{result.source_bytes / 1e6:.2f} MB", f"{result.bytes / 1e6:.2f} MB")
    table.add_row("Bits per weight", "16", f"{result.bits_per_weight:.2f}")
    table.add_row("Squared error of the weights", "0", f"{result.error:.2e}")
    table.add_row("Perplexity", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}")
    console.print(table)
    console.print(f"   {after.protocol}")


def _write(console, out: Path, prompt: str, seed: int, max_new_tokens: int) -> None:
    import torch

    from octavo import load, load_tokenizer
    from octavo.serving.generation import stream

    console.print(f'\n[bold]3.[/bold] Load and write: octavo generate {out} "{prompt}" --seed {seed}\n')
    model, tokenizer = load(out), load_tokenizer(out)
    torch.manual_seed(seed)
    console.print(prompt, end="", style="bold", highlight=False)
    made = stream(
        model,
        tokenizer,
        prompt,
        write=lambda piece: console.print(piece, end="", highlight=False, markup=False, soft_wrap=True),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    console.print(f"\n\n   {made.tokens} tokens, {made.tokens_per_second:.0f} tokens/s on {model.device}")


def _finetune(console, out: Path, text: Path) -> None:
    """LoRA adapters on the 8-bit model learn four fifths of the book; the other chapters are measured."""
    import warnings

    import torch
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    from octavo import load, load_tokenizer
    from octavo.training.demo import EVERY, finetune_demo
    from octavo.training.report import write_curve, write_log

    adapter = out.parent / "adapter"
    console.print(
        f"\n[bold]4.[/bold] Fine-tune on four fifths of {text.name}, as octavo finetune {out} --data FILE does; every {EVERY}th "
        "chapter is held out\n"
    )
    model = load(out, dtype=torch.float32, device="cpu")
    columns = (TextColumn("measuring {task.description}"), BarColumn(), TimeRemainingColumn())
    bar = Progress(*columns, console=console, transient=True)
    tasks: dict[str, Any] = {}

    def show(when: str, done: int, total: int) -> None:
        if when not in tasks:
            bar.start()
            tasks[when] = bar.add_task(when, total=total)
        bar.update(tasks[when], completed=done)
        if done == total:
            bar.remove_task(tasks[when])
            bar.stop()

    with warnings.catch_warnings():
        # PEFT's and transformers' notes to programmers.
        warnings.simplefilter("ignore")
        result = finetune_demo(model, load_tokenizer(out), text, adapter, progress=show)
    write_log(result.outcome.history, str(adapter / "training.json"))
    title = f"{text.name}, every {EVERY}th chapter held out"
    drawn = write_curve(result.outcome.history, str(adapter / "loss.png"), title=title)
    table = Table()
    for title in ("", "before", "after"):
        table.add_column(title, overflow="fold")
    before, after = result.before.perplexity, result.after.perplexity
    table.add_row(
        "Perplexity, held-out chapters", f"{before:.1f}", f"{after:.1f} ({after / before - 1:+.0%})"
    )
    table.add_row("It writes", result.text_before, result.text_after)
    console.print(table)
    numbers = ", ".join(map(str, result.held_out))
    console.print(f"   Held out: chapters {numbers} of {result.chapters}; {result.after.protocol}.")
    console.print(
        f"   Of their {result.verses} verses {result.repeated} occur word for word in what was learned."
    )
    same = "unchanged, byte for byte" if result.frozen_unchanged else "CHANGED: please report this"
    curve = ", with its loss curve, loss.png" if drawn else ""
    console.print(f"   8-bit weights: {same}. Adapter: {adapter}{curve}")
