"""Published 8-bit checkpoints, produced with bitsandbytes, are read and converted exactly."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

import octavo
from octavo import ops
from octavo.checkpoint import CheckpointError, convert, open_source
from octavo.checkpoint.reading.published import _canonical

from .models.published import publish, tiny_gptj

IDS = torch.arange(11)[None] * 7


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder).eval()


def one_layer(folder, weight, **extra):
    """A checkpoint of one published weight, from bitsandbytes; returns what bitsandbytes de-quantizes."""
    import bitsandbytes.functional as bnb

    qdata, state = bnb.quantize_blockwise(weight.contiguous(), blocksize=4096)
    tensors = {"l.weight": qdata.view(weight.shape), "l.absmax": state.absmax, "l.code": state.code, **extra}
    torch.save(tensors, folder / "pytorch_model.bin")
    return bnb.dequantize_blockwise(qdata, state).view(weight.shape)


# 4096: as GPT-J; 2560: GPT-Neo, blocks straddle rows; 96: gcd 32; 64 in 3 rows: less than one block.
@pytest.mark.parametrize("shape", [(8, 4096), (5, 2560), (130, 96), (3, 64), (2, 16384)])
def test_every_weight_is_exact(shape, tmp_path):
    expected = one_layer(tmp_path, torch.randn(shape))
    with open_source(tmp_path) as source:
        assert source.kind == "published"
        assert list(source.tensors) == ["l.weight"]
        assert torch.equal(source.read("l.weight"), expected)
        packed = source.read_packed("l.weight")
    assert packed.block_size == math.gcd(4096, shape[1])
    assert packed.absmax.dtype == torch.float32
    assert packed.absmax.shape == (shape[0], shape[1] // packed.block_size)
    assert torch.equal(ops.dequantize(*packed), expected)


def test_rows_too_ragged_to_repeat_scales_are_left_to_the_caller(tmp_path):
    expected = one_layer(tmp_path, torch.randn(100, 72))
    with open_source(tmp_path) as source:
        assert source.block_size("l.weight") is None
        assert source.read_packed("l.weight") is None
        assert torch.equal(source.read("l.weight"), expected)


def test_unsorted_codebook_is_sorted_exactly():
    code = octavo.codebook.dynamic()[torch.randperm(256)]
    qdata = torch.randint(0, 256, (64, 128), dtype=torch.uint8)
    absmax = torch.rand(3)
    new_qdata, new_absmax, new_code = _canonical(qdata, absmax, code)
    assert bool((new_code[1:] >= new_code[:-1]).all())
    assert torch.equal(new_code[new_qdata.long()], code[qdata.long()])
    assert torch.equal(new_absmax, absmax)


def test_codebook_beyond_one_is_scaled_by_a_power_of_two():
    code = octavo.codebook.dynamic() * 2.7
    qdata = torch.randint(0, 256, (64, 128), dtype=torch.uint8)
    absmax = torch.rand(64, 1)
    new_qdata, new_absmax, new_code = _canonical(qdata, absmax, code)
    assert float(new_code.abs().max()) <= 1
    assert torch.equal(new_code[new_qdata.long()] * new_absmax, code[qdata.long()] * absmax)


def test_codebook_without_zero_gives_up_an_unused_entry():
    code = torch.linspace(-1, 1, 256)
    assert not bool((code == 0).any())
    qdata = torch.randint(0, 200, (64, 128), dtype=torch.uint8)
    new_qdata, _, new_code = _canonical(qdata, torch.ones(2), code)
    assert bool((new_code == 0).any())
    assert bool((new_code[1:] >= new_code[:-1]).all())
    assert torch.equal(new_code[new_qdata.long()], code[qdata.long()])
    everything = torch.arange(256, dtype=torch.uint8).view(2, 128)
    assert _canonical(everything, torch.ones(1), code) is None


def test_codebook_without_zero_and_in_full_use_is_fitted_anew(tmp_path):
    model = tiny_gptj()
    publish(model, tmp_path)
    state = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    state["lm_head.code"] = torch.linspace(-1, 1, 256)
    state["lm_head.weight"] = torch.randint(0, 256, state["lm_head.weight"].shape, dtype=torch.uint8)
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.warns(UserWarning, match="quantized anew"):
        result = convert(tmp_path, tmp_path.with_name("out"))
    kinds = {row.name: row.kind for row in result.rows}
    assert kinds["lm_head.weight"] == "8-bit"
    assert kinds["transformer.wte.weight"] == "exact"
    live = octavo.load(tmp_path, device="cpu")
    assert torch.equal(logits(load(tmp_path.with_name("out"))), logits(live))


@pytest.mark.parametrize("width", [64, 160])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_conversion_keeps_the_published_numbers(width, file, tmp_path):
    (tmp_path / "published").mkdir()
    expected = publish(tiny_gptj(width), tmp_path / "published", file=file)
    result = convert(tmp_path / "published", tmp_path / "out")
    assert {row.kind for row in result.rows} == {"exact", "float"}
    assert result.error == 0
    assert sorted(result.dropped) == [
        f"transformer.h.{layer}.attn.{name}" for layer in range(2) for name in ("bias", "masked_bias")
    ]
    assert result.unexpected == []
    loaded = load(tmp_path / "out")
    for name, parameter in loaded.named_parameters():
        weight = parameter.dequantize() if isinstance(parameter, octavo.OctavoTensor) else parameter
        assert torch.equal(weight, expected.get_parameter(name)), name
    torch.testing.assert_close(logits(loaded), logits(expected), rtol=0, atol=1e-5)
    quantization = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (quantization["codebook"], quantization["block_size"]) == ("dynamic", 4096)


def test_conversion_can_quantize_anew(tmp_path):
    (tmp_path / "published").mkdir()
    publish(tiny_gptj(64), tmp_path / "published")
    config = octavo.OctavoConfig(block_size=32)
    result = convert(tmp_path / "published", tmp_path / "out", config, requantize=True)
    assert {row.kind for row in result.rows} == {"8-bit", "float"}
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["lm_head.weight_absmax"].shape == (300, 2)


def test_skipped_published_weights_become_plain(tmp_path):
    (tmp_path / "published").mkdir()
    expected = publish(tiny_gptj(64), tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "out", octavo.OctavoConfig(skip=["lm_head"]))
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], expected.lm_head.weight)


def test_adapters_come_along_in_pefts_format(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT applies the adapters")
    (tmp_path / "published").mkdir()
    expected = publish(tiny_gptj(64), tmp_path / "published", adapters=True)
    with open_source(tmp_path / "published") as source:
        assert set(source.adapters) == {name.removesuffix(".weight") for name in source.quantized}
        assert not any("adapter" in name for name in source.tensors)
    result = convert(tmp_path / "published", tmp_path / "out")
    model = peft.PeftModel.from_pretrained(load(tmp_path / "out"), result.adapter)
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


def test_uint8_mask_is_no_weight_and_attention_biases_are_kept(tmp_path):
    """A buffer `attn.bias` [1, 1, n, n] is dropped; a parameter `attn.bias` [n] is not."""
    mask = torch.ones(1, 1, 8, 8, dtype=torch.uint8).tril()
    extra = {
        "h.0.attn.bias": mask,
        "h.0.attn.masked_bias": torch.tensor(-1e9),
        "h.1.attn.bias": torch.ones(64),
    }
    one_layer(tmp_path, torch.randn(64, 64), **extra)
    with open_source(tmp_path) as source:
        assert source.dropped == ["h.0.attn.bias", "h.0.attn.masked_bias"]
        assert set(source.tensors) == {"l.weight", "h.1.attn.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"l.absmax": torch.ones(3)}, r"l.absmax: expected 1 scales.*found 3"),
        ({"l.code": torch.ones(16)}, r"l.code: expected 256 entries"),
        ({"l.absmax": torch.full((1,), torch.nan)}, r"l.absmax holds NaN"),
        ({"l.adapter.0.weight": torch.ones(4, 64)}, r"no counterpart.*l.adapter.2.weight"),
        ({"l.adapter.0.weight": torch.ones(4, 9), "l.adapter.2.weight": torch.ones(64, 4)}, r"does not fit"),
    ],
)
def test_what_does_not_fit_is_named(change, message, tmp_path):
    one_layer(tmp_path, torch.randn(64, 64), **change)
    with pytest.raises(CheckpointError, match=message), open_source(tmp_path) as source:
        source.read_packed("l.weight")
