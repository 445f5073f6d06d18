"""Folders that version 0.1.0 wrote load for ever: the same bytes, the same weights, the same logits."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import octavo

FROZEN = Path(__file__).parent / "data" / "frozen_0_1_0"


@pytest.mark.parametrize("kind", ["fitted", "dynamic"])
def test_a_folder_of_0_1_0(kind, tmp_path):
    """A Llama of one layer; what is expected was computed by 0.1.0's plain-PyTorch kernels, in float32."""
    expected = load_file(FROZEN / f"{kind}_expected.safetensors")
    logits = expected.pop("logits")
    model = octavo.load(FROZEN / kind)
    found = {name: p for name, p in model.named_parameters() if isinstance(p, octavo.OctavoTensor)}
    assert found.keys() == expected.keys() and len(found) == 7
    for name, weight in expected.items():
        assert torch.equal(found[name].dequantize(), weight), name
    with torch.no_grad():
        torch.testing.assert_close(model(torch.arange(1, 33)[None]).logits, logits, rtol=1e-4, atol=1e-5)
    model.save_pretrained(tmp_path)
    stored, again = load_file(FROZEN / kind / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert stored.keys() == again.keys()
    for name, tensor in stored.items():
        assert torch.equal(tensor, again[name]), name
