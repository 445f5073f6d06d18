"""Functions timed in turns, so that a ratio compares two measurements made moments apart; medians and ranges.

Example:
    >>> from octavo.bench.timing import alternate
    >>> len(alternate({"nothing": lambda: None}, rounds=3)["nothing"])
    3
"""

import statistics
import time
from collections.abc import Callable


def alternate(
    functions: dict[str, Callable[[], object]],
    rounds: int,
    *,
    seconds: float = float("inf"),
    synchronize: Callable[[], object] = lambda: None,
) -> dict[str, list[float]]:
    """Seconds that each function took, round by round; every function runs once before, unmeasured.

    Args:
        rounds: how often each function runs.
        seconds: begin no further round after this time, but finish at least one.
        synchronize: waits for a device to finish; called before each reading of the clock.
    """
    found: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    started = time.perf_counter()
    for done in range(rounds):
        if done and time.perf_counter() - started > seconds:
            break
        for name, function in functions.items():
            synchronize()
            start = time.perf_counter()
            function()
            synchronize()
            found[name].append(time.perf_counter() - start)
    return found


def spread(values: list[float]) -> dict[str, float]:
    """Median and range of some measurements."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def ratios(upper: list[float], lower: list[float]) -> dict[str, float]:
    """Median and range of upper / lower, round by round."""
    return spread([a / b for a, b in zip(upper, lower, strict=True)])
