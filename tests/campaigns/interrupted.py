"""Campaigns: killed at any point, no room on the disk, and no memory.

    python -m tests.campaigns.interrupted kill --count 50       # of each command; an hour
    python -m tests.campaigns.interrupted full --count 20       # as root: a tmpfs of each size
    python -m tests.campaigns.interrupted memory --count 20
    python -m tests.campaigns.interrupted cgroup --count 20     # as root, where the first version of cgroups is

Killed: `kill -9` at moments spread at random over the command's own time. Afterwards nothing lies under the final name, or
all of it; the inputs are untouched; the same command (finetune: with --resume) ends well and gives the same bytes as a run
that nothing disturbed. (Bytes that differ between two undisturbed runs, such as times, are left out.)

No room: the disk has between nothing and one block less than what the command writes. The command ends with a status other
than 0 and one line that begins with "error:"; nothing lies under the final name, or all of it.

No memory: the process may have between nothing and all of the address space (RLIMIT_AS) that the command takes beyond what a
process has that has imported everything. The same rule; and afterwards the same command, with memory, gives the same bytes. A
cgroup instead limits what is used and kills, as a machine does that has no more: then the rule of those that are killed."""

import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from . import runner
from .commands import COMMANDS, Command, address_space, digests, inputs_in, peak_of, run

CGROUPS = Path("/sys/fs/cgroup/memory")


class Undisturbed:
    """What a command writes and how long it takes, of two runs."""

    def __init__(self, command: Command, inputs: dict[str, Path], room: Path):
        found, times = [], []
        for number in range(2):
            # The same name each time: it is written into some files.
            out = room / "out"
            status, errors, took = run(command.arguments(out, inputs))
            assert status == 0, f"{command.name}: {errors[-2000:]}"
            place = command.final(out)
            found.append(digests(place))
            if number == 0:
                self.bytes = size_of(place)
            times.append(took)
            clear(room)
        self.same = {
            name: digest
            for name, digest in found[0].items()
            if found[1].get(name) == digest and not (command.varies and name.endswith(command.varies))
        }
        self.names = set(found[0])
        self.seconds = min(times)


def size_of(place: Path) -> int:
    return (
        place.stat().st_size
        if place.is_file()
        else sum(p.stat().st_size for p in place.rglob("*") if p.is_file())
    )


def clear(room: Path) -> None:
    for each in room.iterdir():
        shutil.rmtree(each) if each.is_dir() else each.unlink()


def half_written(command: Command, clean: Undisturbed, place: Path) -> str:
    """What is wrong with what lies under the final name; empty if nothing does, or all of it."""
    found = digests(place)
    if not found or command.folder:
        return ""
    wrong = [name for name, digest in clean.same.items() if found.get(name) != digest]
    return f"half-written: {wrong[:3]}" if wrong else ""


def kill(
    command: Command, clean: Undisturbed, inputs: dict[str, Path], room: Path, rng: random.Random
) -> list[str]:
    """One case: its faults."""
    clear(room)
    before = {name: digests(path) for name, path in inputs.items()}
    moment = rng.uniform(0, 1.05 * clean.seconds)
    status, _, _ = run(command.arguments(room / "out", inputs), kill_after=moment)
    return afterwards(command, clean, inputs, before, room, f"a kill at {moment:.2f} s", done=status == 0)


def afterwards(
    command: Command,
    clean: Undisturbed,
    inputs: dict[str, Path],
    before: dict[str, dict[str, str]],
    room: Path,
    what: str,
    done: bool = False,
) -> list[str]:
    """The faults of what a disturbed run has left in `room`, and of the same command run there again.

    Args:
        before: digests of the inputs before that run.
        what: disturbed it.
        done: whether it ended all the same.
    """
    out = room / "out"
    place = command.final(out)
    faults = [wrong] if (wrong := half_written(command, clean, place)) else []
    whole = bool(digests(place)) and not command.folder
    if not whole and not done:
        # It may have been stopped before there was anything to go on with.
        again = bool(command.again) and place.exists() and any(place.iterdir())
        status, errors, _ = run(command.arguments(out, inputs, again=again))
        if status and again and "start without --resume" in errors:
            status, errors, _ = run(command.arguments(out, inputs))
        if status and not (again and "is finished" in errors):
            return [*faults, f"after {what} it ended with {status}: {errors.strip()[-400:]}"]
        found = digests(place)
        differing = [name for name, digest in clean.same.items() if found.get(name) != digest]
        if differing:
            faults.append(f"after {what} other bytes: {differing[:3]}")
    changed = [name for name, path in inputs.items() if digests(path) != before[name]]
    return faults + ([f"inputs changed by {what}: {changed}"] if changed else [])


def full(command: Command, clean: Undisturbed, inputs: dict[str, Path], disk: Path, size: int) -> list[str]:
    """One case, on a disk of `size` bytes: its faults."""
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size, 4096)}", "tmpfs", str(disk)], check=True)
    try:
        out = disk / "out"
        status, errors, _ = run(command.arguments(out, inputs))
        faults = [wrong] if (wrong := half_written(command, clean, command.final(out))) else []
        # A status of 0: room for all, after all. What is counted includes names and blocks only by estimate.
        if status and (told := untold(errors)):
            faults.append(f"{size} bytes: {told}")
        return faults
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def memory(
    command: Command, clean: Undisturbed, inputs: dict[str, Path], room: Path, limit: int
) -> list[str]:
    """One case, with `limit` bytes of address space: its faults."""
    clear(room)
    before = {name: digests(path) for name, path in inputs.items()}

    def prepare() -> None:
        most = address_space() + limit
        resource.setrlimit(resource.RLIMIT_AS, (most, most))

    status, errors, _ = run(command.arguments(room / "out", inputs), 60, prepare)
    what = f"{limit >> 10} kB of memory"
    faults = [f"{what}: {told}"] if status and (told := untold(errors)) else []
    if status < 0:
        faults.append(f"{what}: ended by signal {-status}: {errors.strip()[-300:]}")
    return faults + afterwards(command, clean, inputs, before, room, what, done=status == 0)


def cgroup(
    command: Command, clean: Undisturbed, inputs: dict[str, Path], room: Path, limit: int
) -> list[str]:
    """One case, in a cgroup of `limit` bytes of memory: its faults."""
    clear(room)
    before = {name: digests(path) for name, path in inputs.items()}
    group = CGROUPS / f"octavo-{os.getpid()}"
    group.mkdir()
    try:
        (group / "memory.limit_in_bytes").write_text(str(max(limit, 1 << 20)))
        words = command.arguments(room / "out", inputs)
        status, _, _ = run(words, 60, lambda: _enter(group))
    finally:
        group.rmdir()
    return afterwards(command, clean, inputs, before, room, f"{limit >> 10} kB in a cgroup", done=status == 0)


def _enter(group: Path) -> None:
    (group / "cgroup.procs").write_text(str(os.getpid()))


def untold(errors: str) -> str:
    """What is wrong with how a command tells its error; empty if nothing is."""
    lines = [line for line in errors.strip().splitlines() if line.strip()]
    if "Traceback" in errors:
        return f"a traceback: {lines[-1][:300]}"
    if not any("error:" in line.lower() for line in lines[-3:]):
        return f"no error line: {errors.strip()[-300:]!r}"
    return ""


def campaign(
    what: str,
    count: int,
    seed: int,
    only: str | None = None,
    seconds: float | None = None,
    sizes: int | None = None,
    say=print,
) -> tuple[dict, list[str]]:
    """Returns (command → cases), faults."""
    table: Counter = Counter()
    faults = []
    with tempfile.TemporaryDirectory(dir=runner.SCRATCH) as folder:
        inputs = inputs_in(Path(folder))
        for command in COMMANDS:
            if only and only != command.name:
                continue
            room = Path(folder) / "room"
            room.mkdir(exist_ok=True)
            clean = Undisturbed(command, inputs, room)
            words = command.arguments(room / "out", inputs)
            most = peak_of(words) if what in ("memory", "cgroup") else clean.bytes
            clear(room)
            # Sizes are evenly spaced, and the seed is the number of the first.
            for number in runner.numbers(seed, count, seconds):
                share = most * (number - 1) // (sizes or count)
                if what == "kill":
                    rng = random.Random(f"{command.name} {number}")
                    found = kill(command, clean, inputs, room, rng)
                elif what == "full":
                    found = full(command, clean, inputs, Path(folder) / "disk", share)
                else:
                    found = (memory if what == "memory" else cgroup)(command, clean, inputs, room, share)
                table[command.name] += 1
                for fault in found:
                    again = "" if what == "kill" else f" --sizes {sizes or count}"
                    faults.append(f"{command.name} (--seed {number} --count 1{again}): {fault}")
                    say(faults[-1])
            clear(room)
            say(
                f"{command.name}: {table[command.name]} cases, {clean.seconds:.1f} s each; "
                f"{len(clean.same)} of {len(clean.names)} files compared"
            )
    return dict(table), faults


def main() -> int:
    parser = runner.parser(__doc__, 3, "cases of each command")
    parser.add_argument("what", choices=["kill", "full", "memory", "cgroup"])
    parser.add_argument("--only", choices=[command.name for command in COMMANDS], help="one command")
    parser.add_argument(
        "--sizes", type=int, help="of a disk or of memory, of which --count are tried; default: --count"
    )
    options = parser.parse_args()
    found = campaign(
        options.what, options.count, options.seed, options.only, options.seconds, options.sizes, runner.say
    )
    return runner.finish(options, *found)


if __name__ == "__main__":
    sys.exit(main())
