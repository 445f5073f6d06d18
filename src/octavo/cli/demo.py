"""`octavo demo`: quantize the model that ships with Octavo, measure what that cost, and let it write."""

import shlex
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from .options import integer


def demo(
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Folder to write the 8-bit model to; replaced if it is there.")
    ] = Path("demo-output/model-8bit"),
    seed: Annotated[int, integer(help="Of the sampled text.")] = 1,
    max_new_tokens: Annotated[int, integer(help="Length of the text.", min=1)] = 80,
    finetune: Annotated[
        bool,
        typer.Option("--finetune/--no-finetune", help="Also fine-tune the 8-bit model, for about a minute."),
    ] = True,
) -> None:
    """Show the whole path on a small model that ships with Octavo.

    Quantizes the model to a folder, shows its size, error and perplexity on text it never saw, before and after, loads it, and
    writes what follows "El sentido de la vida es": seconds. Then fine-tunes it on four fifths of a book, about a minute on two
    cores, and measures it on the chapters left out.
    """
    from octavo import demo as shipped
    from octavo.checkpoint.reading.locate import locate
    from octavo.checkpoint.writing.output_directory import choose_output_directory

    from .terminal import quiet_loading, say, terminal

    if not (shipped.MODEL / "model.safetensors").exists():
        raise FileNotFoundError(
            f"{shipped.MODEL} holds no model: this installation lacks its data files. Install Octavo again, or make the model "
            "with scripts/demo_model/train.py"
        )
    choose_output_directory(out, locate(str(shipped.MODEL)), overwrite=True)
    screen = terminal()
    say(
        screen,
        ("Octavo", "bold"),
        ", shown on a Spanish GPT-J of 7 million parameters in 16 bits, trained on the Reina-Valera 1909 Bible and the Debian "
        "handbook.",
    )
    quiet_loading()
    result = _quantize(screen, shipped.MODEL, out)
    before, after = _measure(screen, shipped.MODEL, out, shipped.TEXT / "proverbios.txt")
    _show_cost(screen, result, before, after)
    _write(screen, out, shipped.PROMPT, seed, max_new_tokens)
    if finetune:
        _finetune(screen, out, shipped.TEXT / "proverbios.txt")
    screen.print()
    say(
        screen,
        "Next: `octavo quantize SOURCE OUT` with a model of your own; `octavo generate --help`; `octavo doctor`.",
    )


def _say_step(console: Any, number: int, what: str, command: str = "") -> None:
    from .terminal import say, say_command

    console.print()
    say(console, (f"{number}.", "bold"), f" {what}")
    if command:
        say_command(console, "  ", command)
    console.print()


def _quantize(console: Any, source: Path, out: Path) -> Any:
    """The same conversion as `octavo quantize`."""
    from octavo.checkpoint import convert

    from .terminal import bytes_progress

    _say_step(console, 1, "Quantize to 8 bits", f"octavo quantize {source.name} {shlex.quote(str(out))}")
    with bytes_progress(console) as progress:
        return convert(source, out, overwrite=True, progress=progress)


def _measure(console: Any, source: Path, out: Path, text: Path) -> list[Any]:
    """Perplexity on the held-out text of the 16-bit model and of the quantized one."""
    import torch
    from transformers import AutoModelForCausalLM

    from octavo import load, load_tokenizer
    from octavo.evaluation.perplexity import perplexity

    from .terminal import steps_progress

    _say_step(console, 2, f"Perplexity on {text.name}, a book the model never saw")
    words = text.read_text(encoding="utf-8")
    tokenizer = load_tokenizer(source)
    found = []
    with steps_progress(console, "tokens") as progress:
        for name in ("16 bits", "8 bits"):
            if name == "16 bits":
                # The same arithmetic on both sides: stored in 16 bits, computed in float32.
                model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
            else:
                model = load(out, dtype=torch.float32, device="cpu")
            found.append(perplexity(model, tokenizer, words, progress=partial(_named, progress, name)))
    return found


def _named(progress: Any, name: str, done: int, total: int) -> None:
    progress(done, total, name)


def _show_cost(console: Any, result: Any, before: Any, after: Any) -> None:
    from .terminal import say, show_table

    rows = [
        ("Size", f"{result.source_bytes / 1e6:.2f} MB", f"{result.bytes / 1e6:.2f} MB"),
        ("Bits per weight", "16", f"{result.bits_per_weight:.2f}"),
        ("Squared error of the weights", "0", f"{result.error:.2e}"),
        ("Perplexity", f"{before.perplexity:.3f}", f"{after.perplexity:.3f}"),
    ]
    show_table(console, ("", "16 bits", "8 bits"), rows)
    say(console, f"{after.protocol}", style="dim")


def _write(console: Any, out: Path, prompt: str, seed: int, max_new_tokens: int) -> None:
    import torch

    from octavo import load, load_tokenizer
    from octavo.generation import stream

    from .terminal import say

    command = f'octavo generate {shlex.quote(str(out))} "{prompt}" --seed {seed}'
    _say_step(console, 3, "Load and write", command)
    model, tokenizer = load(out), load_tokenizer(out)
    torch.manual_seed(seed)
    console.print(prompt, end="", style="bold")
    made = stream(
        model,
        tokenizer,
        prompt,
        write=lambda piece: console.print(piece, end="", soft_wrap=True),
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=0.8,
        top_p=0.95,
    )
    console.print("\n")
    say(
        console, f"{made.tokens} tokens, {made.tokens_per_second:.0f} tokens/s on {model.device}", style="dim"
    )


def _finetune(console: Any, out: Path, text: Path) -> None:
    """LoRA adapters on the 8-bit model learn four fifths of the book; the other chapters are measured."""
    import warnings

    import torch

    from octavo import load, load_tokenizer
    from octavo.training.demo import EVERY, finetune_demo

    from .terminal import say, show_facts, steps_progress

    adapter = out.parent / "adapter"
    _say_step(
        console,
        4,
        f"Fine-tune on four fifths of {text.name}; every {EVERY}th chapter is held out",
        f"octavo finetune {shlex.quote(str(out))} --data FILE --output {shlex.quote(str(adapter))}",
    )
    model = load(out, dtype=torch.float32, device="cpu")
    with warnings.catch_warnings(), steps_progress(console, "tokens") as progress:
        # PEFT's and transformers' notes to programmers.
        warnings.simplefilter("ignore")
        result = finetune_demo(
            model,
            load_tokenizer(out),
            text,
            adapter,
            base=str(out),
            progress=lambda when, done, total: progress(done, total, f"measuring {when}"),
        )
    before, after = result.before.perplexity, result.after.perplexity
    change = f"{before:.1f} → {after:.1f} ({after / before - 1:+.0%})"
    facts = [
        ("Perplexity, held-out chapters", change),
        ("It wrote", result.text_before),
        ("It writes", result.text_after),
    ]
    show_facts(console, facts)
    console.print()
    numbers = ", ".join(map(str, result.held_out))
    say(console, f"Held out: chapters {numbers} of {result.chapters}; {result.after.protocol}.")
    say(
        console, f"Of their {result.verses} verses {result.repeated} occur word for word in what was learned."
    )
    same = "unchanged, byte for byte" if result.frozen_unchanged else "CHANGED: please report this"
    curve = ", with its loss curve, loss.png" if (adapter / "loss.png").exists() else ""
    say(console, f"8-bit weights: {same}. Adapter: {adapter}{curve}")
