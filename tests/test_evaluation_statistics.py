"""Intervals and p-values against SciPy, and against what they promise."""

import numpy as np
import pytest

from octavo.evaluation import statistics


def paired(seed, windows, shift=0.0, tokens=40, spread=0.1):
    """Likelihoods of a model and a base whose difference has the mean `shift`."""
    random = np.random.default_rng(seed)
    base = random.gamma(2.0, 1.2, windows * tokens)
    window_effect = np.repeat(random.normal(0, spread, windows), tokens)
    return base + shift + window_effect + random.normal(0, spread, windows * tokens), base, [tokens] * windows


def test_interval_equals_scipys_bootstrap():
    scipy = pytest.importorskip("scipy.stats")
    random = np.random.default_rng(3)
    sums, lengths = random.normal(1.0, 0.4, 50), random.integers(20, 90, 50)
    expected = scipy.bootstrap(
        (sums, lengths),
        lambda s, n, axis: s.sum(axis) / n.sum(axis),
        paired=True,
        vectorized=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(1),
    )
    found = np.quantile(statistics.bootstrap(sums, lengths, seed=2, resamples=20_000), [0.025, 0.975])
    width = expected.confidence_interval.high - expected.confidence_interval.low
    np.testing.assert_allclose(found, expected.confidence_interval, atol=0.03 * width)


@pytest.mark.parametrize("count", [10, 60])
def test_p_value_equals_scipys_permutation_test(count):
    scipy = pytest.importorskip("scipy.stats")
    for seed, shift in ((0, 0.0), (1, 0.3), (2, 0.1)):
        sums = np.random.default_rng(seed).normal(shift, 1.0, count)
        # SciPy flips signs too when it permutes one sample "in pairs" with its negative.
        expected = scipy.permutation_test(
            (sums, np.zeros(count)),
            lambda a, b, axis: (a - b).sum(axis),
            permutation_type="samples",
            vectorized=True,
            n_resamples=20_000 if count > 14 else np.inf,
            rng=np.random.default_rng(7),
        ).pvalue
        found = statistics.sign_flip_test(sums, resamples=20_000)
        if count <= 14:
            # All flips on both sides. SciPy doubles the smaller tail, which is the same by symmetry.
            assert found == pytest.approx(expected, abs=1e-12)
        else:
            assert found == pytest.approx(expected, abs=4 * np.sqrt(0.25 / 20_000) + 1e-4)


def test_no_difference_is_rejected_about_as_often_as_promised():
    rejected = covered = 0
    for seed in range(200):
        found = statistics.compare(*paired(seed, 40))
        rejected += found.p_value < 0.05
        covered += found.low <= 0 <= found.high
    # Binomial(200, 0.05) lies within 2..21 but for one case in a thousand; the percentile interval is a little narrow.
    assert 2 <= rejected <= 21
    assert 200 - covered <= 26


def test_a_difference_is_found_and_its_sign():
    worse = statistics.compare(*paired(0, 60, shift=0.05))
    assert worse.p_value < 0.01 and 0 < worse.low < worse.mean < worse.high
    better = statistics.compare(*paired(0, 60, shift=-0.05))
    assert better.p_value < 0.05 and better.high < 0


def test_a_model_is_no_different_from_itself():
    nll, _, sizes = paired(0, 40)
    found = statistics.compare(nll, nll, sizes)
    assert (found.mean, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_the_seed_fixes_every_figure_and_another_changes_little():
    data = paired(5, 40)
    assert statistics.compare(*data, seed=1) == statistics.compare(*data, seed=1)
    one, two = statistics.compare(*data, seed=1), statistics.compare(*data, seed=2)
    assert one.low != two.low and one.low == pytest.approx(two.low, abs=0.1 * (one.high - one.low))


def test_units_are_windows_or_runs_that_cover_every_token():
    lengths, unit = statistics.units([100] + [50] * 40)
    assert unit == "window" and lengths.tolist() == [100] + [50] * 40
    lengths, unit = statistics.units([2047, 1024, 300])
    assert "run" in unit and lengths.sum() == 3371 and 48 <= len(lengths) <= 80
    assert lengths.min() >= statistics.SHORTEST_RUN
    assert statistics.units([5])[0].tolist() == [5]


def test_too_short_a_text_gives_no_interval_and_no_p_value():
    found = statistics.compare(np.ones(60), np.zeros(60), [60])
    assert (found.mean, found.low, found.high, found.p_value) == (1.0, None, None, None)
    with pytest.raises(ValueError, match="as many tokens"):
        statistics.compare(np.ones(3), np.ones(2), [3])
