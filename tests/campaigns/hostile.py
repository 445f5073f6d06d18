"""Campaign: damaged and dangerous files.

    python -m tests.campaigns.hostile --count 10000 --seed 1        # hours
    python -m tests.campaigns.hostile --count 50

`count` mutations of each kind of source. Verdict by rule: the numbers are right, or one clear line; never a crash, a hang
beyond 10 s, memory beyond three times the files (and 256 MB for what is loaded besides), a file outside the output folder,
code of a pickle that runs, other numbers. What breaks a rule is printed with what repeats it, and the exit status is 1."""

import gc
import random
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

from . import mutations, runner
from .sources import SOURCES

SLACK = 256 << 20


def size_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def listing(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def attempt(source, made: Path, expected: torch.Tensor, seed: int, room: Path, worker: runner.Worker):
    """One mutation → (verdict: "right", "refused", "other" (a valid model with other numbers) or "FAULT ...", what, details)."""
    rng = random.Random(f"{source.name} {seed}")
    shutil.rmtree(room, ignore_errors=True)
    (room / "out").mkdir(parents=True)
    folder, mark = room / "in", room / "pwned"
    mutations.copy(made, folder)
    size = size_of(folder)
    what, same = mutations.mutate(folder, source, rng, mark)
    before = listing(room)
    ending = worker.run(folder, room / "out")
    # What a case left is looked at before the numbers.
    strange = [name for name in listing(room) - before if not name.startswith("out/")]
    if mark.exists():
        return "FAULT: code of a pickle ran", what, ""
    if strange:
        return f"FAULT: files outside the output: {strange[:3]}", what, ""
    if ending.how in ("died", "hung", "error"):
        return f"FAULT: {ending.how}", what, f"{ending.value}\n{ending.trace}"
    if ending.peak_bytes > 3 * size + SLACK:
        return f"FAULT: {ending.peak_bytes >> 20} MB of memory", what, str(ending.value)
    if ending.how == "refused":
        # A conversion that was refused leaves nothing; one that is done may still make a folder that cannot be loaded.
        done = (room / "out" / "eight" / "config.json").exists()
        left = [] if done else [name for name in listing(room / "out") if not Path(name).name.startswith(".")]
        return (f"FAULT: refused, and left {left[:3]}" if left else "refused"), what, str(ending.value)
    right = torch.equal(ending.value, expected)
    if not right and same:
        return "FAULT: other numbers", what, ""
    return ("right" if right else "other"), what, ""


def campaign(
    count: int, seed: int, only: str | None = None, seconds: float | None = None, say=print
) -> tuple[dict, list[dict]]:
    """Returns (kind of source → verdict → how many, the faults)."""
    torch.set_num_threads(1)
    table: dict[str, Counter] = {}
    faults = []
    with tempfile.TemporaryDirectory(dir=runner.SCRATCH) as folder:
        for source in SOURCES:
            if only and only.lower() not in source.name.lower():
                continue
            # Made anew, so that it does not matter which kinds came before.
            torch.manual_seed(0)
            made, room = Path(folder) / "made", Path(folder) / "room"
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            source.make(made)
            (room / "out").mkdir(parents=True, exist_ok=True)
            expected = source.use(made, room / "out")
            # What is there now is never collected, so that workers share its memory.
            gc.collect()
            gc.freeze()
            many, one = runner.Worker(source.use), runner.Worker(source.use, lifetime=1)
            found = table[source.name] = Counter()
            for number in runner.numbers(seed, count, seconds):
                verdict, what, details = attempt(source, made, expected, number, room, many)
                if verdict.startswith("FAULT"):
                    # Memory and time are told for certain by a process that has done nothing else.
                    many.close()
                    alone, what, further = attempt(source, made, expected, number, room, one)
                    if alone.startswith("FAULT"):
                        verdict, details = alone, further
                    elif "MB of memory" in verdict or verdict == "FAULT: hung":
                        verdict = alone
                    else:
                        verdict += " (only after other cases)"
                found[verdict.split(":")[0]] += 1
                if verdict.startswith("FAULT"):
                    kind = {"source": source.name, "seed": number, "verdict": verdict}
                    faults.append({**kind, "what": what, "details": details})
                    say(
                        f"{source.name} --seed {number} --count 1: {verdict}: {what}\n    {details.strip()[-600:]}"
                    )
            many.close()
            one.close()
            say(f"{source.name}: {dict(found)}")
    return {name: dict(found) for name, found in table.items()}, faults


def main() -> int:
    parser = runner.parser(__doc__, 50, "mutations of each kind")
    parser.add_argument("--only", help="one kind: part of its name")
    options = parser.parse_args()
    return runner.finish(
        options, *campaign(options.count, options.seed, options.only, options.seconds, runner.say)
    )


if __name__ == "__main__":
    sys.exit(main())
