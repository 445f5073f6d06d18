"""What every test may use: the device fixture, a seed, and an independent way to de-quantize."""

import os
import signal
import sys

import pytest

# Beside other workers (`pytest -n`) a process takes one thread, and so do the processes that it starts: two threads that wait
# for each other on a busy core take far longer than one.
os.environ.update({"OMP_NUM_THREADS": "1"} if "PYTEST_XDIST_WORKER" in os.environ else {})

# Tests build their models from configs: nothing may be fetched. Set before huggingface_hub is imported.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

# Helper modules beside the tests are found by their plain names too.
sys.path.insert(0, os.path.dirname(__file__))

import torch


def pytest_configure() -> None:
    """Started in the background by a shell, this process and those that it starts would ignore Ctrl-C, which some tests send."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request) -> torch.device:
    """cpu always; cuda where there is one."""
    return torch.device(request.param)


@pytest.fixture(autouse=True)
def _reproducible():
    torch.manual_seed(0)
    torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)


@pytest.fixture
def no_fallbacks():
    """Fails a test in which an operation had to de-quantize a whole weight."""
    import octavo

    octavo.reset_fallbacks()
    yield
    assert octavo.fallbacks() == {}


def brute_dequantize(qdata, absmax, code, block_size) -> torch.Tensor:
    """weight[n, k] = code[qdata[n, k]] * absmax[n, k // B], weight by weight: float64 [N, K] on the CPU."""
    rows, columns = qdata.shape
    qdata, absmax, code = qdata.cpu().tolist(), absmax.cpu().double().tolist(), code.cpu().double().tolist()
    out = torch.empty(rows, columns, dtype=torch.float64)
    for n in range(rows):
        for k in range(columns):
            out[n, k] = code[qdata[n][k]] * absmax[n][k // block_size]
    return out


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖, in float64."""
    found, expected = found.detach().cpu().double(), expected.detach().cpu().double()
    return float((found - expected).norm() / expected.norm().clamp_min(1e-300))


def packed(rows, columns, block_size, device="cpu", absmax_dtype=None):
    """A random matrix as the operations take it: (qdata, absmax, code, block_size)."""
    from octavo import codebook, ops

    weight = torch.randn(rows, columns)
    code = codebook.fit(weight, block_size)
    qdata, absmax = ops.quantize(weight.to(device), code.to(device), block_size, absmax_dtype)
    return qdata, absmax, code.to(device), block_size
