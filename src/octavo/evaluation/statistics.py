"""Whether two models differ on a text: paired by window, an interval by bootstrap and a p-value by sign flips.

The unit is a window (what it scores): tokens within one are too much alike to count as independent. A short text
has few windows; below 32 they are cut into shorter runs, which is said beside the result.

- The interval: the percentile bootstrap (Efron, 1979). Units are drawn with replacement, and the mean difference per token is
  taken anew.
- The p-value: if the models did not differ, each unit's difference might as well have had the other sign (Fisher's
  randomization test for pairs). Signs are flipped at random; p is the share of flips, the text's own among them, whose
  sum is at least as far from zero. It assumes no distribution, and with up to 14 units all flips are taken: it is exact.

Both are seeded, so that a repeated measurement gives the same figures.

Example:
    >>> import numpy as np
    >>> found = compare(np.array([2.0, 2.2] * 500), np.array([2.0, 2.1] * 500), [20] * 50)
    >>> round(found.mean, 3), found.p_value < 0.001
    (0.05, True)
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
CONFIDENCE = 0.95
# Windows from which on they are the units; below, runs of at least SHORTEST_RUN tokens.
ENOUGH_UNITS = 32
SHORTEST_RUN = 32
# Below this no interval is given: resampling so few would look more certain than it is.
FEWEST_UNITS = 8
MOST_ENUMERATED = 14
SEED = 0
# Units drawn at once.
_DRAWS = 1 << 22


@dataclass(frozen=True)
class Interval:
    """A mean per token and its interval.

    Attributes:
        mean: in nats per token.
        low, high: the bootstrap interval of 95 %; None where the text has too few units.
        units: what was drawn; `unit` says what one is.
    """

    mean: float
    low: float | None
    high: float | None
    units: int
    unit: str


@dataclass(frozen=True)
class Difference(Interval):
    """The difference of two models, the first minus the second: above 0, the first predicts worse.

    Attributes:
        p_value: two-sided; None where the text has too few units.
    """

    p_value: float | None = None


def units(sizes: Sequence[int]) -> tuple[np.ndarray, str]:
    """Cut scored tokens into units.

    Args:
        sizes: tokens that each window scores, in order.

    Returns:
        Tokens of each unit, int64, in order, and what a unit is, in words.
    """
    if len(sizes) >= ENOUGH_UNITS:
        return np.asarray(sizes), "window"
    run = max(SHORTEST_RUN, -(-sum(sizes) // (2 * ENOUGH_UNITS)))
    cut: list[int] = []
    for size in sizes:
        parts = max(1, round(size / run))
        cut += [size * (i + 1) // parts - size * i // parts for i in range(parts)]
    return np.asarray(cut), f"run of about {run} tokens"


def _sums(values: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    return np.add.reduceat(np.asarray(values, dtype=np.float64), starts)


def bootstrap(
    sums: np.ndarray, lengths: np.ndarray, seed: int = SEED, resamples: int = RESAMPLES
) -> np.ndarray:
    """Mean per token of each of `resamples` draws of units with replacement.

    Args:
        sums: each unit's sum.
        lengths: each unit's tokens.
    """
    random = np.random.default_rng(seed)
    step = max(1, _DRAWS // len(sums))
    found = []
    for start in range(0, resamples, step):
        drawn = random.integers(0, len(sums), (min(step, resamples - start), len(sums)))
        found.append(sums[drawn].sum(1) / lengths[drawn].sum(1))
    return np.concatenate(found)


def sign_flip_test(sums: np.ndarray, seed: int = SEED, resamples: int = RESAMPLES) -> float:
    """Two-sided p-value of paired differences `sums`: how often random signs give a sum as far from zero."""
    observed = abs(sums.sum())
    # Sums of the same numbers in another order differ in their last digits.
    limit = observed - 1e-12 * np.abs(sums).sum()
    if len(sums) <= MOST_ENUMERATED:
        bits = np.arange(2 ** len(sums))[:, None] >> np.arange(len(sums)) & 1
        return float((np.abs((1 - 2 * bits) @ sums) >= limit).mean())
    random = np.random.default_rng(seed)
    step = max(1, _DRAWS // len(sums))
    beyond = 0
    for start in range(0, resamples, step):
        signs = 1 - 2 * random.integers(0, 2, (min(step, resamples - start), len(sums)), dtype=np.int8)
        beyond += int((np.abs(signs @ sums) >= limit).sum())
    return (1 + beyond) / (1 + resamples)


def interval(nll: np.ndarray, sizes: Sequence[int], seed: int = SEED) -> Interval:
    """Mean of tokens' values and its bootstrap interval.

    Args:
        nll: [tokens].
        sizes: tokens that each window scores.
    """
    lengths, unit = units(sizes)
    sums = _sums(nll, lengths)
    mean = float(sums.sum() / lengths.sum())
    if len(sums) < FEWEST_UNITS:
        return Interval(mean, None, None, len(sums), unit)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(bootstrap(sums, lengths, seed), [tail, 1 - tail])
    return Interval(mean, float(low), float(high), len(sums), unit)


def compare(nll: np.ndarray, base: np.ndarray, sizes: Sequence[int], seed: int = SEED) -> Difference:
    """Difference of two models on the same tokens.

    Args:
        nll, base: negative log-likelihoods of the model and of the base, [tokens], in nats.
        sizes: tokens that each window scores; their sum is `tokens`.

    Raises:
        ValueError: if the lengths differ.
    """
    if not len(nll) == len(base) == sum(sizes):
        raise ValueError(
            f"expected as many tokens of the model, the base and the windows, found {len(nll)}, {len(base)}, {sum(sizes)}"
        )
    difference = np.asarray(nll, dtype=np.float64) - np.asarray(base, dtype=np.float64)
    found = interval(difference, sizes, seed)
    p_value = None
    if found.units >= FEWEST_UNITS:
        p_value = sign_flip_test(_sums(difference, units(sizes)[0]), seed)
    return Difference(found.mean, found.low, found.high, found.units, found.unit, p_value)
