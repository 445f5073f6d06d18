"""A process that has computed with several threads, and then forks: both go on, and compute the same."""

import os
import subprocess
import sys

import pytest

from octavo.ops import cpu

CODE = """
import os, select, signal, sys, torch, octavo
torch.set_num_threads(2)
layer = octavo.quantize_model(torch.nn.Sequential(torch.nn.Linear(512, 2048)))
x = torch.randn({rows}, 512)
with torch.no_grad():
    right = layer(x)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.write(writing, b"right" if torch.allclose(layer(x), right, rtol=1e-5, atol=1e-5) else b"wrong")
        os._exit(0)
    os.close(writing)
    answered = select.select([reading], [], [], 60)[0]
    print((os.read(reading, 10).decode() or "died") if answered else "hung")
    os.kill(child, signal.SIGKILL)
    print("right" if torch.equal(layer(x), right) else "wrong")
"""


@pytest.mark.skipif(
    not hasattr(os, "fork") or not cpu.AVAILABLE, reason="forks, and needs the native kernels"
)
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_fork_computes_alone(rows):
    """It waited for ever for threads that only its parent has: in our products, and of many rows in PyTorch's."""
    done = subprocess.run(
        [sys.executable, "-c", CODE.format(rows=rows)], capture_output=True, text=True, timeout=300
    )
    assert done.stdout.split() == ["right", "right"], done.stderr[-2000:]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_fork_before_computing_keeps_its_threads():
    code = """
import os, torch, octavo.ops.cpu
torch.set_num_threads(2)
if os.fork():
    os.wait()
else:
    print(torch.get_num_threads(), flush=True)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.stdout.split() == ["2"], done.stderr[-2000:]
