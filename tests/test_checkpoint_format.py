"""docs/FORMAT.md against the code: its own reader reads our files, and known bytes stay what they are."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import octavo
from octavo.checkpoint import convert, open_source
from octavo.checkpoint.inspection import report
from octavo.checkpoint.units import Output
from octavo.checkpoint.writing.shards import ShardFile, header_room
from octavo.checkpoint.writing.unit_writer import _write_packed
from octavo.model import Entry
from octavo.quantizer import quantize_parameter

from .models.checkpoints import save
from .models.published import publish, tiny_gptj

FORMAT = Path(__file__).parent.parent / "docs" / "FORMAT.md"
# A file of one parameter, 2 rows of 5 weights in blocks of 4, codes (i - 128) / 128: every byte but the table's.
GOLDEN_HEADER = (
    b'{"__metadata__":{"format":"pt"},'
    b'"w_code":{"dtype":"F32","shape":[256],"data_offsets":[0,1024]},'
    b'"w_absmax":{"dtype":"F16","shape":[2,2],"data_offsets":[1024,1032]},'
    b'"w_qdata":{"dtype":"U8","shape":[2,5],"data_offsets":[1032,1042]}}'
)
# Scales 1, 2 / 0, 0.5 in float16, little-endian.
GOLDEN_ABSMAX = bytes.fromhex("003c 0040 0000 0038".replace(" ", ""))
GOLDEN_QDATA = bytes([255, 0, 128, 192, 255, 128, 128, 128, 128, 0])
GOLDEN_WEIGHTS = [[127 / 128, -1.0, 0.0, 0.5, 2 * 127 / 128], [0.0, 0.0, 0.0, 0.0, -0.5]]


def linear_code():
    return (torch.arange(256, dtype=torch.float32) - 128) / 128


def golden_file(path):
    """The golden parameter, written by the streaming writer."""
    weight = torch.tensor([[1.0, -1.0, 0.0, 0.5, 2.0], [0.0, 0.0, 0.0, 0.0, -0.5]])
    qdata, absmax = octavo.ops.quantize(weight, linear_code(), 4, torch.float16)
    packed = octavo.quantizer.Packed(qdata, absmax, linear_code(), 4)
    output = Output("w", "w", (2, 5), torch.float32, Entry("w", (2, 5), False), blocks=2)
    shard = ShardFile(path, header_room(output.pieces(torch.float32)))
    _write_packed(output, [packed], shard, torch.float16)
    shard.finish()


def documented_reader():
    """`read_weights` as the page prints it."""
    code = re.findall(r"```python\n(.*?)```", FORMAT.read_text(), flags=re.S)[-1]
    scope: dict = {}
    exec(code, scope)
    return scope["read_weights"]


def write_config(folder, **options):
    config = {"quantization_config": {**octavo.OctavoConfig(**options).to_dict()}}
    (folder / "config.json").write_text(json.dumps(config))


def test_golden_bytes(tmp_path):
    golden_file(tmp_path / "model.safetensors")
    data = (tmp_path / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert (8 + length) % 64 == 0
    assert data[8 : 8 + length].rstrip(b" ") == GOLDEN_HEADER
    body = data[8 + length :]
    assert body[:1024] == np.arange(-128, 128, dtype="<f4").__truediv__(np.float32(128)).tobytes()
    assert body[1024:1032] == GOLDEN_ABSMAX
    assert body[1032:] == GOLDEN_QDATA


def test_golden_bytes_are_read_back_by_everyone(tmp_path):
    golden_file(tmp_path / "model.safetensors")
    write_config(tmp_path, block_size=4)
    assert documented_reader()(tmp_path)["w"].tolist() == GOLDEN_WEIGHTS
    stored = load_file(tmp_path / "model.safetensors")
    ours = octavo.ops.dequantize(stored["w_qdata"], stored["w_absmax"], stored["w_code"], 4)
    assert ours.tolist() == GOLDEN_WEIGHTS
    with open_source(tmp_path) as source:
        assert source.kind == "octavo"
        assert bytes(source.read("w_qdata").flatten().tolist()) == GOLDEN_QDATA


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral", "gpt_oss"])
def test_the_documented_reader_reads_a_converted_model(kind, tmp_path):
    """Matrices, transposed ones and stacks of experts, against the loaded model."""
    from transformers import AutoModelForCausalLM

    save(kind, tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out")
    weights = documented_reader()(tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    quantized = {
        name: each for name, each in model.named_parameters() if isinstance(each, octavo.OctavoTensor)
    }
    assert set(quantized) == set(weights)
    for name, parameter in quantized.items():
        dense = parameter.dequantize(torch.float32)
        dense = dense.mT if parameter.transposed else dense
        assert np.array_equal(dense.numpy(), weights[name]), name


def test_the_documented_reader_reads_blocks_that_straddled_rows(tmp_path):
    (tmp_path / "published").mkdir()
    expected = publish(tiny_gptj(160), tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "out")
    for name, weight in documented_reader()(tmp_path / "out").items():
        assert np.array_equal(weight, expected.get_parameter(name).detach().numpy()), name


def test_what_a_writer_guarantees(tmp_path):
    """Codes ascending within [-1, 1] with a 0; zeros decode to zeros; scales cover every weight."""
    weight = torch.randn(64, 200)
    weight[3] = 0
    weight[5, ::3] = 0
    packed = quantize_parameter(weight, octavo.OctavoConfig())
    assert bool((packed.code[1:] >= packed.code[:-1]).all())
    assert float(packed.code.abs().max()) <= 1 and bool((packed.code == 0).any())
    dense = octavo.ops.dequantize(*packed)
    assert bool((dense[weight == 0] == 0).all())
    scales = packed.absmax.float().repeat_interleave(packed.block_size, 1)[:, :200]
    assert bool((weight.abs() <= scales).all())


def test_the_page_states_every_key_of_the_config():
    text = FORMAT.read_text()
    for key in octavo.OctavoConfig().to_dict():
        assert f"| `{key}` |" in text, key


def test_unknown_keys_and_versions_are_refused(tmp_path):
    save("llama", tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["rotation"] = "hadamard"
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="rotation"):
        report(tmp_path / "out")
