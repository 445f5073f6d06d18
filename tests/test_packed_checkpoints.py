"""Weights packed by other methods are de-quantized exactly or refused by name, never taken for plain values."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

import octavo
from octavo.checkpoint import CheckpointError, convert, open_source
from octavo.evaluation.models import load_as_it_is

from .models.checkpoints import logits, save
from .versions import needs


def brute_scale(data, scale, rows, columns):
    """Value by value: data[n, k] * scale[n // rows, k // columns], in float32."""
    out = torch.empty(data.shape, dtype=torch.float32)
    values, scales = data.float().tolist(), scale.float()
    for n in range(data.shape[0]):
        for k in range(data.shape[1]):
            out[n, k] = torch.tensor(values[n][k]) * scales[n // rows, k // columns]
    return out


def fp8(weight, rows, columns, kind=torch.float8_e4m3fn):
    """float8 values and float32 scales of blocks [rows, columns], the last ones cut; and what they stand for."""
    n, k = weight.shape
    scale = torch.empty(math.ceil(n / rows), math.ceil(k / columns))
    data = torch.empty(n, k, dtype=kind)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            block = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scale[i, j] = weight[block].abs().max().clamp_min(1e-6) / torch.finfo(kind).max
            data[block] = (weight[block] / scale[i, j]).to(kind)
    return data, scale, brute_scale(data, scale, rows, columns)


def pack_blocks(rows, columns, suffix="weight_scale_inv", kind=torch.float8_e4m3fn):
    def pack(name, weight):
        data, scale, plain = fp8(weight, min(rows, weight.shape[0]), min(columns, weight.shape[1]), kind)
        return {name: data, f"{name.removesuffix('weight')}{suffix}": scale}, plain

    return pack


def pack_tensor(name, weight):
    data, scale, plain = fp8(weight, *weight.shape)
    return {
        name: data,
        f"{name}_scale": scale.reshape(()),
        f"{name[:-7]}.input_scale": torch.tensor(0.5),
    }, plain


def pack_rows(name, weight):
    data, scale, plain = fp8(weight, 1, weight.shape[1])
    return {name: data, f"{name}_scale": scale}, plain


def pack_e8m0(name, weight):
    """MXFP8: scales are powers of two, of which only the exponent is stored, for 32 weights of a row."""
    groups = weight.reshape(weight.shape[0], -1, 32)
    exponent = (groups.abs().amax(-1) / 448).log2().ceil()
    data = (groups / exponent.exp2()[..., None]).to(torch.float8_e4m3fn).reshape(weight.shape)
    plain = brute_scale(data, exponent.exp2(), 1, 32)
    return {name: data, f"{name}_scale_inv": (exponent + 127).to(torch.uint8)}, plain


def pack_bitsandbytes(name, weight):
    import bitsandbytes.functional as bnb

    scale = weight.abs().amax(1)
    data = (weight / scale[:, None] * 127).round().to(torch.int8)
    base = name.removesuffix("weight")
    parts = {name: data, f"{base}SCB": scale, f"{base}weight_format": torch.tensor(0, dtype=torch.uint8)}
    return parts, bnb.int8_vectorwise_dequant(data, scale)


def pack_int8(name, weight):
    scale = weight.abs().amax(1, keepdim=True) / 127
    data = (weight / scale).round().to(torch.int8)
    return {name: data, f"{name}_scale": scale}, brute_scale(data, scale, 1, weight.shape[1])


METHODS = {
    "fp8 blocks of 128": pack_blocks(128, 128),
    "fp8 blocks of 64 by 32": pack_blocks(64, 32),
    "fp8 e5m2": pack_blocks(128, 128, kind=torch.float8_e5m2),
    "fp8 qscale": pack_blocks(128, 128, "qscale_weight"),
    "fp8 by tensor": pack_tensor,
    "fp8 by row": pack_rows,
    "mxfp8": pack_e8m0,
    "bitsandbytes int8": pack_bitsandbytes,
    "int8 by row": pack_int8,
}


def repack(folder, pack, quantization=None, where=None):
    """Pack the projections of the model in `folder`; returns its state with their exact values."""
    packed, plain = {}, {}
    for name, weight in load_file(folder / "model.safetensors").items():
        parts, value = (
            pack(name, weight) if "proj" in name and weight.dim() == 2 else ({name: weight}, weight)
        )
        packed.update(parts)
        plain[name] = value
    save_file(packed, folder / "model.safetensors", {"format": "pt"})
    if quantization:
        edit(folder, {where or "quantization_config": quantization})
    return plain


def edit(folder, changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def plain_folder(kind, plain, folder):
    model = save(kind, folder)
    save_file(
        {name: value.contiguous() for name, value in plain.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return model


@pytest.mark.parametrize("said", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_packed_weights_convert_and_load_as_their_exact_values(method, said, tmp_path):
    """`octavo quantize` and `octavo.load` give what they give for the de-quantized checkpoint, byte for byte.

    Widths of 192 leave blocks of 128 cut.
    """
    save("llama", tmp_path / "packed")
    sizes = {"fp8 blocks of 64 by 32": [64, 32], "mxfp8": [1, 32]}.get(method, [128, 128])
    stated = {"quant_method": "fp8", "weight_block_size": sizes} if said else None
    plain = repack(tmp_path / "packed", METHODS[method], stated)
    plain_folder("llama", plain, tmp_path / "plain")
    with open_source(tmp_path / "packed") as source:
        assert source.kind == "packed"
        for name, value in plain.items():
            assert torch.equal(source.read(name), value), name
            assert source.tensors[name].shape == tuple(value.shape)
    result = convert(tmp_path / "packed", tmp_path / "a")
    convert(tmp_path / "plain", tmp_path / "b")
    assert result.unexpected == []
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    assert torch.equal(logits(octavo.load(tmp_path / "packed")), logits(octavo.load(tmp_path / "plain")))


@needs("transformers", "5.17", "cannot de-quantize FP8 on a CPU")
def test_fp8_as_transformers_de_quantizes_it(tmp_path):
    """The same weights through transformers' own FP8 loader."""
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    save("llama", tmp_path)
    repack(
        tmp_path, METHODS["fp8 blocks of 64 by 32"], {"quant_method": "fp8", "weight_block_size": [64, 32]}
    )
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True, weight_block_size=(64, 32)),
    )
    with open_source(tmp_path) as source:
        for name, value in theirs.state_dict().items():
            assert torch.equal(source.read(name), value), name
    ours = load_as_it_is(tmp_path)
    assert torch.equal(logits(ours), logits(theirs))


def test_experts_packed_one_by_one(tmp_path):
    """Mixtral's experts lie in the file one by one, each with its scales, and are merged after."""
    save("mixtral", tmp_path / "packed")
    packed, plain = {}, {}
    for name, weight in load_file(tmp_path / "packed" / "model.safetensors").items():
        parts, value = (pack_rows(name, weight)) if ".experts." in name else ({name: weight}, weight)
        packed.update(parts)
        plain[name] = value
    assert len(packed) > len(plain)
    save_file(packed, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    plain_folder("mixtral", plain, tmp_path / "plain")
    convert(tmp_path / "packed", tmp_path / "a")
    convert(tmp_path / "plain", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("said", [False, True])
def test_mxfp4_as_transformers_de_quantizes_it(said, tmp_path):
    """GPT-OSS's experts: blocks of four-bit values, against transformers' own unpacking."""
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    save("gpt_oss", tmp_path / "packed")
    state, plain = load_file(tmp_path / "packed" / "model.safetensors"), {}
    packed = {}
    for name, weight in state.items():
        if not name.endswith("_proj") or weight.dim() != 3:
            packed[name] = plain[name] = weight
            continue
        experts, columns, rows = weight.shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(118, 126, (experts, rows, columns // 32), dtype=torch.uint8)
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).contiguous()
        assert plain[name].shape == weight.shape
    save_file(packed, tmp_path / "packed" / "model.safetensors", {"format": "pt"})
    if said:
        edit(tmp_path / "packed", {"quantization_config": {"quant_method": "mxfp4"}})
    plain_folder("gpt_oss", plain, tmp_path / "plain")
    with open_source(tmp_path / "packed") as source:
        for name, value in plain.items():
            assert torch.equal(source.read(name), value), name
    convert(tmp_path / "packed", tmp_path / "a")
    convert(tmp_path / "plain", tmp_path / "b")
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == (
        tmp_path / "b" / "model.safetensors"
    ).read_bytes()
    assert torch.equal(logits(octavo.load(tmp_path / "packed")), logits(octavo.load(tmp_path / "plain")))


@pytest.mark.parametrize("method", ["fp8 by tensor", "bitsandbytes int8", "published"])
def test_transformers_own_loading_is_told(method, tmp_path):
    """`from_pretrained(quantization_config=OctavoConfig())` reads tensors itself: it must not take these for plain."""
    from transformers import AutoModelForCausalLM, GPTJForCausalLM

    if method == "published":
        from .models.published import publish, tiny_gptj

        publish(tiny_gptj(), tmp_path)
        loader = GPTJForCausalLM
    else:
        save("llama", tmp_path)
        repack(tmp_path, METHODS[method])
        loader = AutoModelForCausalLM
    with pytest.raises(CheckpointError, match=r"packed .*octavo\.load"):
        loader.from_pretrained(tmp_path, quantization_config=octavo.OctavoConfig())


def nibbles(weight):
    return torch.zeros(weight.shape[0], weight.shape[1] // 2, dtype=torch.uint8)


# Method → what the error says, and the tensors it leaves in place of X.weight.
REFUSED = {
    "GPTQ or AWQ": lambda x, w: {
        f"{x}.qweight": torch.zeros(w.shape[1] // 8, w.shape[0], dtype=torch.int32),
        f"{x}.qzeros": torch.zeros(1, w.shape[0] // 8, dtype=torch.int32),
        f"{x}.scales": torch.ones(1, w.shape[0], dtype=torch.float16),
    },
    "compressed-tensors": lambda x, w: {
        f"{x}.weight_packed": torch.zeros(w.shape[0], w.shape[1] // 8, dtype=torch.int32),
        f"{x}.weight_scale": torch.ones(w.shape[0], 1),
    },
    "HQQ": lambda x, w: {
        f"{x}.W_q": nibbles(w),
        f"{x}.scale": torch.ones(2, 1),
        f"{x}.zero": torch.ones(2, 1),
    },
    "quanto": lambda x, w: {
        f"{x}.weight._data": w.to(torch.int8),
        f"{x}.weight._scale": torch.ones(w.shape[0], 1),
    },
    "torchao": lambda x, w: {f"{x}._weight_qdata": w.to(torch.int8), f"{x}._weight_scale": torch.ones(1)},
    "bitsandbytes 4-bit": lambda x, w: {
        f"{x}.weight": torch.zeros(w.numel() // 2, 1, dtype=torch.uint8),
        f"{x}.weight.absmax": torch.ones(w.numel() // 64),
        f"{x}.weight.quant_map": torch.ones(16),
    },
    "NVFP4": lambda x, w: {
        f"{x}.weight": nibbles(w),
        f"{x}.weight_scale": torch.ones(w.shape[0], w.shape[1] // 16).to(torch.float8_e4m3fn),
        f"{x}.weight_scale_2": torch.tensor(1.0),
    },
    "EETQ": lambda x, w: {f"{x}.weight": w.to(torch.int8), f"{x}.weight_scales": torch.ones(w.shape[1])},
    "does not name": lambda x, w: {f"{x}.weight": w.to(torch.int8)},
    "does not name (float8)": lambda x, w: {f"{x}.weight": w.to(torch.float8_e4m3fn)},
    "does not name (4 bits in int8)": lambda x, w: {
        f"{x}.weight": nibbles(w).to(torch.int8),
        f"{x}.weight_scale_inv": torch.ones(w.shape[0], w.shape[1] // 32),
    },
    "does not name (scales beside float)": lambda x, w: {
        f"{x}.weight": w,
        f"{x}.weight_scale": torch.ones(w.shape[0], 1),
    },
    "does not name (zero points)": lambda x, w: {
        f"{x}.weight": w.to(torch.int8),
        f"{x}.weight_scale": torch.ones(w.shape[0], 1),
        f"{x}.weight_zero_point": torch.ones(w.shape[0], 1, dtype=torch.int8),
    },
    "Octavo": lambda x, w: {
        f"{x}.weight_qdata": w.to(torch.uint8),
        f"{x}.weight_absmax": torch.ones(w.shape[0], 1),
        f"{x}.weight_code": torch.zeros(256),
    },
}


@pytest.mark.parametrize("method", REFUSED)
def test_other_methods_are_named_wherever_they_are_opened(method, tmp_path):
    from transformers import AutoModelForCausalLM

    save("llama", tmp_path)
    repack(tmp_path, lambda name, w: (REFUSED[method](name.removesuffix(".weight"), w), w))
    word = method.partition(" (")[0]
    with pytest.raises(CheckpointError, match=rf"quantized already .*{word}.*give the original"):
        convert(tmp_path, tmp_path / "out")
    with pytest.raises(CheckpointError, match=rf"quantized already .*{word}.*give the original"):
        octavo.load(tmp_path)
    with pytest.raises(CheckpointError, match=rf"quantized already .*{word}.*give the original"):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=octavo.OctavoConfig())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("place", "content"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}),
        ("compression_config", {"format": "pack-quantized"}),
        ("text_config", {"quantization_config": {"quant_method": "awq"}}),
        ("quantization", {"group_size": 64, "bits": 4}),
        ("quantize_config.json", {"bits": 4, "group_size": 128}),
        ("hf_quant_config.json", {"quantization": {"quant_algo": "FP8"}}),
    ],
)
def test_a_configuration_that_says_so_is_believed(place, content, tmp_path):
    """Wherever it says so, and though the tensors look plain."""
    save("llama", tmp_path)
    if place.endswith(".json"):
        (tmp_path / place).write_text(json.dumps(content))
    else:
        edit(tmp_path, {place: content})
    for use in (octavo.load, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"quantized already .*give the original"):
            use(tmp_path)


def test_packed_text_model_of_a_composite_configuration(tmp_path):
    """Pixels and text in one: text_config.quantization_config says it, and the copy's config.json no longer does."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**sizes, "vocab_size": 300, "head_dim": 32, "num_key_value_heads": 1}
    vision = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(
        text_config=text, vision_config=vision, mm_tokens_per_image=4, image_token_index=299
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    model.save_pretrained(tmp_path / "packed")
    plain = repack(tmp_path / "packed", pack_tensor)
    parts = json.loads((tmp_path / "packed" / "config.json").read_text())["text_config"]
    edit(tmp_path / "packed", {"text_config": {**parts, "quantization_config": {"quant_method": "fp8"}}})
    convert(tmp_path / "packed", tmp_path / "out")
    found = json.loads((tmp_path / "out" / "config.json").read_text())
    assert found["quantization_config"]["quant_method"] == "octavo"
    assert "quantization_config" not in found["text_config"]
    model.save_pretrained(tmp_path / "plain")
    save_file(plain, tmp_path / "plain" / "model.safetensors", {"format": "pt"})
    ids = torch.arange(12)[None]
    expected = octavo.load(tmp_path / "plain")(input_ids=ids).logits
    for each in ("out", "packed"):
        assert torch.equal(octavo.load(tmp_path / each)(input_ids=ids).logits, expected)


def test_scales_that_do_not_fit(tmp_path):
    save("llama", tmp_path)
    repack(tmp_path, lambda n, w: ({n: w.to(torch.float8_e4m3fn), f"{n}_scale_inv": torch.ones(7, 7)}, w))
    with pytest.raises(CheckpointError, match=r"weight_scale_inv: its shape \[7, 7\] does not fit"):
        open_source(tmp_path)


def test_integer_buffers_are_no_packed_weights(tmp_path):
    """Masks, position ids and the like are of integer types, too."""
    save("gpt2", tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["transformer.h.0.attn.bias"] = torch.ones(1, 1, 64, 64, dtype=torch.uint8).tril()
    state["transformer.position_ids"] = torch.arange(64)[None]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    with open_source(tmp_path) as source:
        assert source.kind == "safetensors"
