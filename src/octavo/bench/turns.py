"""Two engines, each in a process of its own, take turns; every round carries what disturbed it.

Example:
    >>> from octavo.bench.turns import take_turns
    >>> with Worker("octavo.bench.models:Quantized", threads=1, source="model", device="cpu") as worker:
    ...     found = take_turns({"octavo": worker}, "decode", 8, rounds=2)
    >>> len(found["octavo"])           # tokens per second, by round
    2
"""

import time
from collections.abc import Callable, Mapping

import psutil

from .load import Meter, cpu_seconds, too_much
from .process import Worker

# What the machine itself delivers, measured in each round: bytes per second from memory, and operations per second in the caches.
PROBES = ("bandwidth", "compute")
# A round in which one of them is below this share of the run's best is disturbed: by a neighbour, or a slower clock, that the
# counters do not show.
SLOW = 0.85


def take_turns(
    workers: Mapping[str, Worker],
    method: str,
    tokens: int,
    rounds: int,
    *,
    seconds: float = float("inf"),
    extra: int = 0,
    probes: Mapping[str, Callable[[], float]] | None = None,
) -> dict[str, list]:
    """Tokens per second of each engine, round by round; every engine runs once before, unmeasured.

    Args:
        workers: name → engine.
        method, tokens: what each is asked for.
        rounds: how many undisturbed rounds are wanted.
        seconds: begin no further round after this time, but finish at least one.
        extra: at most so many rounds more, to make up for disturbed ones.
        probes: name, of PROBES, → a measurement of the machine, made before each engine's turn.

    Returns:
        For each engine its tokens per second. For each round: "others" and "steal", cores that other work took; "waiting", cores
        that the engines took whose turn it was not; and of each probe the least of the round (0 where it is not measured).
        See `undisturbed`.
    """
    for worker in workers.values():
        worker.ask(method, tokens=tokens)
    processes = {name: psutil.Process(worker.pid) for name, worker in workers.items()}
    meter = Meter(*(worker.pid for worker in workers.values()))
    found: dict[str, list] = {name: [] for name in (*workers, "others", "steal", "waiting", *PROBES)}
    started = time.perf_counter()
    for done in range(rounds + extra):
        if done and time.perf_counter() - started > seconds:
            break
        if done >= rounds and sum(undisturbed(found)) >= rounds:
            break
        meter.since()
        waiting = elapsed = 0.0
        speeds: dict[str, list[float]] = {name: [] for name in PROBES}
        for name, worker in workers.items():
            for probe, measure in (probes or {}).items():
                speeds[probe].append(measure())
            others = [process for other, process in processes.items() if other != name]
            before = sum(map(cpu_seconds, others))
            took = worker.ask(method, tokens=tokens)
            waiting += sum(map(cpu_seconds, others)) - before
            elapsed += took
            found[name].append(tokens / took)
        disturbance = meter.since()
        found["others"].append(disturbance["others"])
        found["steal"].append(disturbance["steal"])
        found["waiting"].append(waiting / elapsed)
        for probe, values in speeds.items():
            found[probe].append(min(values, default=0.0))
    return found


def best_of(*runs: dict[str, list]) -> dict[str, float]:
    """The best that each probe found in some runs of `take_turns`."""
    return {probe: max((value for found in runs for value in found[probe]), default=0.0) for probe in PROBES}


def undisturbed(found: dict[str, list], best: dict[str, float] | None = None) -> list[bool]:
    """Which rounds of `take_turns` can be trusted.

    Args:
        best: the best of each probe in the whole run. Default: in these rounds.
    """
    best = best or best_of(found)
    return [
        not too_much(found["others"][i] + found["steal"][i])
        and all(found[probe][i] >= SLOW * best[probe] for probe in PROBES)
        for i in range(len(found["others"]))
    ]
