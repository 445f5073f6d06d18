"""Part "finetune": the commands themselves on a checkpoint of GPT-J-6B's shape, in processes limited to 11 GiB.

A checkpoint of random weights is written; then `octavo finetune` (1 x 2048 tokens, the defaults and `--preset model-card`)
and `octavo generate` run on it, each in a process whose share of the device is limited as in part "memory". What each took
at most stands beside what `octavo plan` foretells.

As a program it is one such process: `python -m benchmarks.gpu_finetune OUT.json DEVICE COMMAND...`.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from .gpu_common import GIB, Report
from .gpu_memory import LIMIT_GIB, limit_memory

TOKENS, STEPS, NEW_TOKENS = 2048, 4, 32
MEMORY_DISK = Path("/dev/shm")
PROMPT = "El sentido de la vida es"


def run(report: Report, device: str, tiny: bool) -> None:
    from octavo import demo

    tokens = 32 if tiny else TOKENS
    # Written and read three times: where there is a disk in memory with room for it, that one.
    room = MEMORY_DISK.is_dir() and shutil.disk_usage(MEMORY_DISK).free > 8 * GIB
    with tempfile.TemporaryDirectory(dir=MEMORY_DISK if room else None) as folder:
        model = Path(folder) / "model"
        start = time.monotonic()
        checkpoint(model, device, tiny)
        report.fact(seconds_to_write=round(time.monotonic() - start, 1), limit_gib=LIMIT_GIB)
        common = ["finetune", str(model), "--data", str(demo.TEXT / "proverbios.txt"), "--batch-size", "1"]
        common += ["--max-length", str(tokens), "--max-steps", str(STEPS), "--evaluations", "1"]
        recipes = {
            "finetune, defaults": ({}, []),
            "finetune, model-card": ({"preset": "model-card"}, ["--gradient-accumulation", "2"]),
        }
        # The plans are made on the CPU while the commands run.
        pool = ThreadPoolExecutor(1)
        plans = {
            name: pool.submit(planned, model, device, tokens, preset) for name, (preset, _) in recipes.items()
        }
        for number, (name, (preset, more)) in enumerate(recipes.items()):
            output = Path(folder) / f"adapter-{number}"
            preset_options = [word for key, value in preset.items() for word in (f"--{key}", value)]
            found = limited(
                report, folder, device, [*common, "--output", str(output), *preset_options, *more]
            )
            history = json.loads((output / "training.json").read_text())
            losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
            if not losses[-1] < losses[0]:
                raise AssertionError(f"{name}: the loss does not fall: {losses}")
            add(report, name, found, plans[name].result(), losses)
        command = ["generate", str(model), PROMPT, "--adapter", str(Path(folder) / "adapter-0")]
        found = limited(report, folder, device, [*command, "--max-new-tokens", str(NEW_TOKENS)])
        add(report, f"generate, {NEW_TOKENS} tokens", found, None, None)


def checkpoint(folder: Path, device: str, tiny: bool) -> None:
    """Write a model of GPT-J-6B's shape with the demo model's tokenizer: 6.1 GB."""
    import octavo
    from octavo import demo
    from octavo.integrations.transformers import attach

    from .gpu_models import build, free

    # A tiny model must still know the tokenizer's tokens.
    model = build("octavo", device, tiny, vocabulary=8192 if tiny else None)
    attach(model, octavo.OctavoConfig())
    model.save_pretrained(folder)
    octavo.load_tokenizer(demo.MODEL).save_pretrained(folder)
    del model
    free()


def planned(model: Path, device: str, tokens: int, preset: dict[str, str]) -> int:
    """Bytes that `octavo plan` foretells for training."""
    from octavo.cli.plan import read_config
    from octavo.planning import memory
    from octavo.training.recipe import Recipe

    from .gpu_models import dtype_for

    config, how, _ = read_config(str(model))
    recipe = Recipe.of(**preset, batch_size=1)
    kind = "cpu" if device == "cpu" else "cuda"
    return memory.training(
        config, how, dtype_for(device), max_length=tokens, batch_size=1, recipe=recipe, device=kind
    ).total


def limited(report: Report, folder: str, device: str, command: list[str]) -> dict:
    """Run one octavo command in a limited process of its own; what it took."""
    out = Path(folder) / "took.json"
    out.unlink(missing_ok=True)
    words = [sys.executable, "-m", "benchmarks.gpu_finetune", str(out), device, *command]
    where = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ran = subprocess.run(words, capture_output=True, text=True, check=False, env=where)
    if ran.returncode or not out.exists():
        raise RuntimeError(f"octavo {command[0]}: exit status {ran.returncode}\n{ran.stdout}\n{ran.stderr}")
    print(ran.stdout, ran.stderr, sep="\n", flush=True)
    return json.loads(out.read_text())


def add(report: Report, name: str, found: dict, plan: int | None, losses: list[float] | None) -> None:
    row: dict[str, object] = {"command": name, "seconds": found["seconds"]}
    if losses:
        row |= {"loss before": losses[0], "loss after": losses[-1]}
    if "allocated" in found:
        used, reserved = found["context"] + found["allocated"], found["context"] + found["reserved"]
        row |= {"peak GiB in use": used / GIB, "peak GiB taken": reserved / GIB}
    if plan is not None:
        row["planned GiB"] = plan / GIB
    report.add(**row)


def main(out: str, device: str, *command: str) -> None:
    """One octavo command in this process, limited to 11 GiB on a GPU; its peaks in bytes go into the file `out`."""
    context = limit_memory()[0] if device != "cpu" else 0
    start = time.monotonic()
    from octavo.cli import main as octavo

    sys.argv = ["octavo", *command]
    try:
        octavo()
    except SystemExit as end:
        if end.code:
            raise
    found = {"seconds": round(time.monotonic() - start, 1), "context": context}
    if device != "cpu":
        found["allocated"] = torch.cuda.max_memory_allocated()
        found["reserved"] = torch.cuda.max_memory_reserved()
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
