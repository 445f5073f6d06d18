"""Campaign: hours of work in one process.

    python -m tests.campaigns.long_run finetune --minutes 120     # and as long again for two halves
    python -m tests.campaigns.long_run generate --minutes 120

Minutes are of the process's own processor time, so that it does not matter what else the machine does, or whether it is
stopped meanwhile. Both work on the model that ships with Octavo, with one thread.

    finetune   trains that long; then the same run is interrupted in the middle (as by Ctrl-C) and gone on with by --resume in a
               process of its own: the losses must be the same numbers, and so must the adapter's bytes
    generate   continues prompts of random lengths over and over; each must always get the tokens it got first

Memory: the resident set after each step, and its slope over all but the first tenth, by least squares over means of twenty
parts (whose errors are nearly independent), with the standard error. More than 16 MB over the run, beyond three errors, is a
fault."""

import gc
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1")

import numpy as np
import psutil
import torch
from transformers import TrainerCallback

import octavo
from octavo import demo
from octavo.checkpoint import convert
from octavo.training.data import tokenize
from octavo.training.finetune import finetune_model
from octavo.training.recipe import Recipe

from . import runner

PARTS = 20
MOST_GROWTH = 16e6
PROMPTS = 16


def memory_of(samples: list[int]) -> dict[str, float]:
    """The slope of memory over steps.

    Args:
        samples: bytes after each step.

    Returns:
        steps, bytes at the end, slope in bytes per step, its standard error, and the growth over all steps.
    """
    kept = np.array(samples[len(samples) // 10 :], dtype=float)
    parts = np.array_split(kept, PARTS)
    x = np.cumsum([len(part) for part in parts]) - np.array([len(part) / 2 for part in parts])
    y = np.array([part.mean() for part in parts])
    spread = x - x.mean()
    slope = float((spread @ y) / (spread @ spread))
    rest = y - y.mean() - slope * spread
    error = float(np.sqrt((rest @ rest) / (PARTS - 2) / (spread @ spread)))
    return {
        "steps": len(samples),
        "bytes": samples[-1],
        "slope": slope,
        "standard_error": error,
        "growth": slope * len(samples),
    }


def grew(memory: dict[str, float]) -> list[str]:
    beyond = memory["slope"] - 3 * memory["standard_error"]
    if beyond * memory["steps"] <= MOST_GROWTH:
        return []
    return [f"memory grew by {memory['growth'] / 1e6:.1f} MB in {memory['steps']} steps"]


class _Every(TrainerCallback):
    """Calls a function after each step, with the number of the step."""

    def __init__(self, do: Callable[[int], None]):
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        self.do(state.global_step)


def finetune(minutes: float, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns (what was measured, the faults)."""
    convert(demo.MODEL, folder / "eight")
    process = psutil.Process()

    def train(name: str, steps: int, resume: bool, do: Callable[[int], None]) -> Any:
        tokenizer = octavo.load_tokenizer(folder / "eight")
        texts = [{"text": path.read_text(encoding="utf-8")} for path in sorted(demo.TEXT.iterdir())]
        recipe = Recipe(max_steps=steps, max_length=128, batch_size=8, packing=True, evaluations=4)
        examples = tokenize(texts, tokenizer, recipe.max_length, recipe.packing).examples
        model = octavo.load(folder / "eight", dtype="float32", device="cpu")
        held, train = examples[::10], [each for at, each in enumerate(examples) if at % 10]
        outcome = finetune_model(
            model, tokenizer, train, held, recipe, folder / name, resume=resume, callbacks=[_Every(do)]
        )
        return [
            {key: entry[key] for key in ("step", "loss", "eval_loss", "grad_norm") if key in entry}
            for entry in outcome.history
        ]

    begun: list[float] = []
    train("speed", 12, False, lambda step: begun.append(time.process_time()))
    steps = max(40, int(60 * minutes / ((begun[-1] - begun[2]) / (len(begun) - 3)) // 4 * 4))
    runner.say(f"{steps} steps")
    samples: list[int] = []

    def sample(step: int) -> None:
        samples.append(process.memory_info().rss)

    def interrupt(step: int) -> None:
        if step == steps // 2:
            os.kill(os.getpid(), signal.SIGINT)

    start = time.process_time()
    whole = train("whole", steps, False, sample)
    took = time.process_time() - start
    memory = memory_of(samples)
    runner.say(f"whole: {memory}")
    _in_a_fork_of_its_own(lambda: train("halves", steps, False, interrupt))
    halves = _in_a_fork_of_its_own(lambda: train("halves", steps, True, lambda step: None))
    faults = grew(memory)
    if whole != halves:
        differing = [(a, b) for a, b in zip(whole, halves, strict=False) if a != b]
        faults.append(f"other losses: {len(whole)} and {len(halves)} entries; {differing[:2]}")
    adapters = [(folder / name / "adapter_model.safetensors").read_bytes() for name in ("whole", "halves")]
    if adapters[0] != adapters[1]:
        faults.append("another adapter")
    losses = [entry["loss"] for entry in whole if "loss" in entry]
    return {
        **memory,
        "processor_seconds": took,
        "losses_compared": len(losses),
        "first_loss": losses[0],
        "last_loss": losses[-1],
    }, faults


def _in_a_fork_of_its_own(work: Callable[[], Any]) -> Any:
    """What a function returns that is run in a fork, as JSON."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        with os.fdopen(writing, "w") as answer:
            json.dump(work(), answer)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        found = answer.read()
    os.waitpid(child, 0)
    return json.loads(found)


def generate(minutes: float, folder: Path) -> tuple[dict[str, Any], list[str]]:
    """Returns (what was measured, the faults)."""
    convert(demo.MODEL, folder / "eight")
    model = octavo.load(folder / "eight", device="cpu")
    process, chance = psutil.Process(), torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 100, (PROMPTS,), generator=chance).tolist()
    prompts = [torch.randint(1, model.config.vocab_size, (1, n), generator=chance) for n in lengths]
    first: dict[int, torch.Tensor] = {}
    samples: list[int] = []
    faults: list[str] = []
    start, tokens = time.process_time(), 0
    while time.process_time() - start < 60 * minutes:
        at = len(samples) % PROMPTS
        ids = prompts[at]
        found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False)
        tokens += found.shape[1] - ids.shape[1]
        if not torch.equal(first.setdefault(at, found), found):
            faults.append(f"prompt {at}, time {len(samples)}: other tokens")
        samples.append(process.memory_info().rss)
    memory = memory_of(samples)
    took = time.process_time() - start
    return {**memory, "tokens": tokens, "processor_seconds": took}, [*faults, *grew(memory)]


def main() -> int:
    parser = runner.parser(__doc__)
    parser.add_argument("what", choices=["finetune", "generate"])
    parser.add_argument("--minutes", type=float, default=2.0, help="of processor time; default: %(default)s")
    options = parser.parse_args()
    torch.set_num_threads(1)
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        work = finetune if options.what == "finetune" else generate
        table, faults = work(options.minutes, Path(folder))
    runner.say(table)
    for fault in faults:
        runner.say(fault)
    return runner.finish(options, table, faults)


if __name__ == "__main__":
    sys.exit(main())
