"""Tests that need a GPU. Without one they are skipped, unless OCTAVO_REQUIRE_GPU=1: then skipping anything is a failure."""

import os

import pytest
import torch

from octavo.ops import gpu  # noqa: F401  (importing it registers the kernels for GPUs)

REQUIRED = os.environ.get("OCTAVO_REQUIRE_GPU") == "1"


def pytest_collection_modifyitems(items):
    for item in items:
        if "/gpu/" in item.path.as_posix():
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True, scope="session")
def _a_gpu():
    if not torch.cuda.is_available():
        if REQUIRED:
            pytest.fail("OCTAVO_REQUIRE_GPU=1, but this torch finds no GPU")
        pytest.skip("needs a GPU")


@pytest.fixture
def device():
    return torch.device("cuda", torch.cuda.current_device())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if REQUIRED and report.skipped:
        report.outcome = "failed"
        report.longrepr = f"skipped where skipping is a failure: {report.longrepr}"
    return report


@pytest.fixture
def no_waiting():
    """Fails on any operation that makes the host wait for the device."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")
