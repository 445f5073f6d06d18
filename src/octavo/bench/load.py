"""What other work takes from the machine while something is measured.

A benchmark on a shared machine is disturbed in two ways that a processor's counters show: other processes run (what is busy and
not ours), and the host of a virtual machine gives the cores to others (steal). A third is seen by its effect alone, a
neighbour that uses up the memory's bandwidth: `turns` can read the memory in each round for that.

Example:
    >>> from octavo.bench.load import Meter
    >>> meter = Meter()
    >>> sorted(meter.since())
    ['others', 'steal']
"""

import os
import time

import psutil

# Share of the machine's cores that others may take before a measurement counts as disturbed.
TOLERATED = 0.05
# Seconds by which the system's counters may be off: they tick 100 times a second, each core and process on its own.
RESOLUTION = 0.02


class Meter:
    """Counts what processes other than ours take, in cores, from one call to the next.

    Args:
        processes: ids of the processes that are ours besides this one.
    """

    def __init__(self, *processes: int):
        self.own = [psutil.Process(pid) for pid in (os.getpid(), *processes)]
        self.last = self._read()

    def since(self) -> dict[str, float]:
        """Since the last call: "others", cores taken by other processes; "steal", by the host of a virtual machine."""
        before, self.last = self.last, self._read()
        elapsed, busy, steal, own = (b - a for a, b in zip(before, self.last, strict=True))
        return {
            "others": round(max(0.0, busy - own - RESOLUTION) / elapsed, 3),
            "steal": round(max(0.0, steal - RESOLUTION) / elapsed, 3),
        }

    def _read(self) -> tuple[float, float, float, float]:
        """Now; seconds in which cores were busy, stolen, and busy with us."""
        cores = psutil.cpu_times()
        names = ("user", "nice", "system", "irq", "softirq")
        busy = sum(getattr(cores, name, 0.0) for name in names)
        own = sum(cpu_seconds(process) for process in self.own)
        return time.perf_counter(), busy, getattr(cores, "steal", 0.0), own


def too_much(cores: float) -> bool:
    """Whether others took so many cores that a measurement is not to be trusted."""
    return cores > TOLERATED * (psutil.cpu_count() or 1)


def cpu_seconds(process: psutil.Process) -> float:
    """Processor time that a process has used; 0 once it has ended."""
    try:
        times = process.cpu_times()
    except psutil.NoSuchProcess:
        return 0.0
    return times.user + times.system


def before_measuring(seconds: float = 0.5) -> dict[str, float]:
    """The load as a benchmark finds it: "load_average" of the last minute, and what `Meter` counts in the next moment."""
    meter = Meter()
    time.sleep(seconds)
    return {"load_average": round(psutil.getloadavg()[0], 2), **meter.since()}


def warning(found: dict[str, float]) -> str | None:
    """A sentence for the user if the machine is busy, from what `before_measuring` gave."""
    taken = found["others"] + found["steal"]
    if not too_much(taken):
        return None
    return (
        f"other work takes {taken:.1f} of {psutil.cpu_count()} cores (load average {found['load_average']:.1f}): everything here "
        "will look slower than it is; ratios suffer less. Measure again when the machine is idle"
    )
