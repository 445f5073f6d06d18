"""8-bit weights and memory: shared with other processes, given to other libraries, asked for by those that write files."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import save_file, save_model

import octavo

from .models import llama_tied, quantized

# Calls every method of a tensor that takes no argument, on a line of its own.
EVERY_METHOD = """
import torch, octavo, warnings
warnings.simplefilter("ignore")
for name in dir(torch.Tensor):
    if not name.startswith("__") and callable(getattr(torch.Tensor, name)):
        print(name, flush=True)
        weight = octavo.OctavoTensor.from_float(torch.randn(16, 64))
        try:
            getattr(weight, name)()
        except Exception:
            pass
print("all of them")
"""


def test_no_method_kills_the_process():
    done = subprocess.run([sys.executable, "-c", EVERY_METHOD], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.endswith("all of them\n"), done.stdout.splitlines()[-1]


def change_and_report(model, ids, queue):
    with torch.no_grad():
        # No tensor: its memory would go with this process, which may end first.
        queue.put(model(ids).logits.numpy())
        model.lm_head.weight.zero_()


def test_a_model_is_shared_with_a_spawned_process():
    model = quantized(llama_tied)
    ids = torch.arange(8)[None]
    with torch.no_grad():
        expected = model(ids).logits
    assert model.share_memory() is model
    assert all(parameter.is_shared() for parameter in model.parameters())
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=change_and_report, args=(model, ids, queue))
    process.start()
    found = queue.get(timeout=120)
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=0, atol=0)
    process.join(timeout=120)
    assert process.exitcode == 0
    assert not model.lm_head.weight.dequantize().any()  # what the other process did


def test_other_libraries_get_the_floats():
    weight = octavo.OctavoTensor.from_float(torch.randn(16, 64))
    expected = weight.dequantize().numpy()
    for found in (np.from_dlpack(weight), np.asarray(weight), weight.numpy()):
        assert np.array_equal(found, expected)


def test_apply_changes_the_weight():
    weight = octavo.OctavoTensor.from_float(torch.ones(16, 64))
    assert weight.apply_(lambda value: 2 * value) is weight
    assert torch.equal(weight.dequantize(), torch.full((16, 64), 2.0))


def test_safetensors_own_functions_say_what_to_do_instead(tmp_path):
    model = quantized(llama_tied)
    path = tmp_path / "model.safetensors"
    for save in (lambda: save_file(model.state_dict(), path), lambda: save_model(model, str(path))):
        with pytest.raises(RuntimeError, match=r"save_pretrained\(folder\).*dequantize_model"):
            save()
    assert not path.exists()
    # What the message names works.
    octavo.dequantize_model(model)
    save_model(model, str(path))
    assert path.exists()
