"""Damaged, dangerous and hopeless input: each ends in one error that says what is wrong and what to do."""

import errno
import json
import os
import pickle
import random
import re
import shutil
import struct
import subprocess
from functools import partial

import pytest
import torch

import octavo
from octavo.checkpoint import CheckpointError, convert, open_source
from octavo.checkpoint.inspection import report
from octavo.checkpoint.writing.shards import ShardFile

from .models.checkpoints import save


@pytest.fixture
def plain(tmp_path):
    """A small Llama on disk."""
    save("llama", tmp_path / "plain")
    return tmp_path / "plain"


def fails(source, out, message, **options):
    """Conversion fails with this message, on one line, and `out` does not appear."""
    with pytest.raises((CheckpointError, ValueError), match=message) as caught:
        convert(source, out, **options)
    assert "\n" not in str(caught.value)
    assert not out.exists()
    return str(caught.value)


def rewrite_header(path, change):
    data = path.read_bytes()
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    change(header)
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw + data[8 + length :])


@pytest.mark.parametrize("length", [0, 5, 100, -1, -1000])
def test_truncated_safetensors(plain, tmp_path, length):
    path = plain / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:length])
    fails(plain, tmp_path / "out", r"model\.safetensors.*(truncated|expected a safetensors file).*download")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda row: row.update(data_offsets=[row["data_offsets"][0], 10**12]), "takes .* bytes"),
        (lambda row: row.update(shape=[10**6, 64]), "takes .* bytes"),
        (lambda row: row.update(shape=[-1, 64]), "expected dtype, shape and data_offsets"),
        (lambda row: row.update(data_offsets="everything"), "expected dtype, shape and data_offsets"),
        (lambda row: row.update(dtype="F4"), "type 'F4'"),
        (lambda row: row.pop("shape"), "expected dtype, shape and data_offsets"),
        (
            lambda row: row.update(data_offsets=[0, row["data_offsets"][1] - row["data_offsets"][0]]),
            "overlap",
        ),
    ],
)
def test_header_that_lies(plain, tmp_path, change, message):
    rewrite_header(plain / "model.safetensors", lambda header: change(header["model.norm.weight"]))
    text = fails(plain, tmp_path / "out", message)
    assert "model.safetensors" in text


def test_header_that_is_no_json(plain, tmp_path):
    path = plain / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:8] + b"[" * (len(data) - 8))
    fails(plain, tmp_path / "out", "not valid JSON")
    path.write_bytes(struct.pack("<Q", 2**62) + data[8:])
    fails(plain, tmp_path / "out", "expected a safetensors file")


def test_missing_shard_and_index_that_lies(tmp_path):
    model = save("llama", tmp_path / "whole")
    plain = tmp_path / "plain"
    model.save_pretrained(plain, max_shard_size="50KB")
    shard = sorted(plain.glob("model-*.safetensors"))[1]
    kept = shard.read_bytes()
    shard.unlink()
    text = fails(plain, tmp_path / "out", r"1 of \d+ shards .* are missing")
    assert shard.name in text
    shard.write_bytes(kept)
    index = plain / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    changed = {**content, "weight_map": {**content["weight_map"], "model.layers.9.mlp.weight": shard.name}}
    index.write_text(json.dumps(changed))
    fails(
        plain, tmp_path / "out", r"names 1 tensors that are not in their files: model\.layers\.9\.mlp\.weight"
    )
    changed = {
        **content,
        "weight_map": {**content["weight_map"], "lm_head.weight": "../whole/model.safetensors"},
    }
    index.write_text(json.dumps(changed))
    fails(plain, tmp_path / "out", "plain file names of its own folder")
    index.write_text("{")
    fails(plain, tmp_path / "out", "weight_map")
    index.unlink()
    shard.unlink()
    fails(plain, tmp_path / "out", "shards are missing")


class RunsCode:
    """Pickled, it creates a file when it is opened."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("new_format", [True, False])
def test_pickle_that_runs_code_is_refused(plain, tmp_path, new_format):
    (plain / "model.safetensors").unlink()
    state = {"lm_head.weight": torch.zeros(2, 2), "extra": RunsCode(tmp_path / "was-run")}
    torch.save(state, plain / "pytorch_model.bin", _use_new_zipfile_serialization=new_format)
    text = fails(plain, tmp_path / "out", "asks to run code")
    assert "system" in text
    assert not (tmp_path / "was-run").exists()
    with pytest.raises(CheckpointError, match="asks to run code"):
        octavo.load(plain, device="cpu")
    assert not (tmp_path / "was-run").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04 and then nothing", pickle.dumps([1, 2, 3])])
def test_bin_that_is_none(plain, tmp_path, content):
    (plain / "model.safetensors").unlink()
    (plain / "pytorch_model.bin").write_bytes(content)
    fails(plain, tmp_path / "out", r"pytorch_model\.bin")


def test_truncated_bin(plain, tmp_path):
    (plain / "model.safetensors").unlink()
    torch.save({"lm_head.weight": torch.randn(64, 64)}, plain / "pytorch_model.bin")
    data = (plain / "pytorch_model.bin").read_bytes()
    for length in (50, len(data) // 2, len(data) - 30):
        (plain / "pytorch_model.bin").write_bytes(data[:length])
        fails(plain, tmp_path / "out", r"pytorch_model\.bin.*(damaged|not a checkpoint)")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight"])
def test_nan_names_the_tensor_and_leaves_nothing(tmp_path, value, name):
    model = save("llama", tmp_path / "plain")
    model.get_parameter(name).data.view(-1)[7] = value
    model.save_pretrained(tmp_path / "plain")
    text = fails(tmp_path / "plain", tmp_path / "out", "NaN or infinity")
    assert name in text
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain"]


def test_nan_in_one_expert(tmp_path):
    model = save("mixtral", tmp_path / "plain")
    model.get_parameter("model.layers.1.mlp.experts.down_proj").data[2, 3, 4] = float("nan")
    model.save_pretrained(tmp_path / "plain")
    assert "layers.1.mlp.experts.down_proj" in fails(tmp_path / "plain", tmp_path / "out", "NaN or infinity")


def test_output_in_the_way(plain, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "letter.txt").write_text("dear")
    with pytest.raises(CheckpointError, match=r"not empty.*--overwrite"):
        convert(plain, out)
    assert (out / "letter.txt").read_text() == "dear"
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(CheckpointError, match="is a file"):
        convert(plain, file)
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(plain, plain, overwrite=True)
    with pytest.raises(CheckpointError, match="holds the source"):
        convert(plain, tmp_path, overwrite=True)


def test_disk_that_fills_up(plain, tmp_path, monkeypatch):
    """What is done stays; with room again the same call ends in the same bytes."""
    convert(plain, tmp_path / "whole")
    written = 0
    original = ShardFile._write_at

    def full(self, offset, data):
        nonlocal written
        written += len(data)
        if written > 60_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, offset, data)

    with monkeypatch.context() as patched:
        patched.setattr(ShardFile, "_write_at", full)
        text = fails(plain, tmp_path / "out", "disk is full")
    assert "more are needed" in text and "same command" in text
    remaining = re.search(r"full: ([\d.]+) MB more", text)
    assert remaining and float(remaining[1]) <= 68  # what is left, and room for config files and tokenizer
    convert(plain, tmp_path / "out")
    same = (tmp_path / name / "model.safetensors" for name in ("out", "whole"))
    assert next(same).read_bytes() == next(same).read_bytes()


def test_disk_too_small_is_told_before_the_work(plain, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6 - 5, 5))
    text = fails(plain, tmp_path / "out", "disk is full")
    assert "0 MB are free" in text
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.slow
def test_disk_that_fills_up_for_real(tmp_path):
    """A small tmpfs; needs the right to mount."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=120k", "tmpfs", str(small)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        save("llama", tmp_path / "plain")
        from octavo.checkpoint.writing import writer

        aside, writer.ASIDE_BYTES = writer.ASIDE_BYTES, -(10**9)
        try:
            fails(tmp_path / "plain", small / "out", "disk is full")
        finally:
            writer.ASIDE_BYTES = aside
        fails(tmp_path / "plain", small / "out", r"disk is full: .* more are needed, .* are free")
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_already_quantized(plain, tmp_path):
    convert(plain, tmp_path / "out")
    fails(tmp_path / "out", tmp_path / "again", "already quantized")
    config = json.loads((plain / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (plain / "config.json").write_text(json.dumps(config))
    fails(plain, tmp_path / "again", r"quantized already \(quant_method 'gptq'\)")


def test_a_newer_format_version_is_refused(plain, tmp_path):
    convert(plain, tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["format_version"] = 2
    path.write_text(json.dumps(config))
    for use in (report, octavo.load):
        with pytest.raises(
            ValueError, match=r"format_version.*2.*upgrade|format_version: expected 1, found 2"
        ):
            use(tmp_path / "out")


def test_parts_that_do_not_belong_together(plain, tmp_path):
    from safetensors.torch import load_file, save_file

    convert(plain, tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    stored = load_file(path)
    name = "lm_head.weight"
    damages = [
        ({f"{name}_absmax": stored[f"{name}_absmax"][:, :0].contiguous()}, "fit neither"),
        ({f"{name}_absmax": stored[f"{name}_absmax"][:5].contiguous()}, "do not belong together"),
        ({f"{name}_code": stored[f"{name}_code"].flip(0).contiguous()}, "ascending"),
        ({f"{name}_code": stored[f"{name}_code"] * 2}, "within"),
        ({f"{name}_code": stored[f"{name}_code"].abs().add(1e-3).sort().values.clamp(max=1)}, "exact 0"),
        ({f"{name}_qdata": stored[f"{name}_qdata"].to(torch.int16)}, "do not belong together"),
    ]
    for damage, message in damages:
        save_file({**stored, **damage}, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message):
            report(tmp_path / "out")
    stored.pop(f"{name}_code")
    save_file(stored, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"lacks {name}_code"):
        report(tmp_path / "out")


def test_config_of_another_model(plain, tmp_path):
    config = json.loads((plain / "config.json").read_text())
    (plain / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    fails(
        plain,
        tmp_path / "out",
        r"parameters of a LlamaForCausalLM are not in the checkpoint: model\.layers\.2",
    )
    (plain / "config.json").write_text(json.dumps({**config, "hidden_size": 128}))
    fails(plain, tmp_path / "out", r"expected shape \[.*128.*found \[")
    (plain / "config.json").write_text(
        json.dumps({**config, "architectures": ["NoSuchModel"], "model_type": "nosuch"})
    )
    fails(plain, tmp_path / "out", "config.json")
    (plain / "config.json").write_text("{")
    fails(plain, tmp_path / "out", "not valid JSON")
    (plain / "config.json").write_text("[]")
    fails(plain, tmp_path / "out", "expected a JSON object")
    (plain / "config.json").unlink()
    fails(plain, tmp_path / "out", "config.json is missing")


@pytest.mark.parametrize("kind", ["safetensors", "gguf", "bin", "legacy"])
def test_random_damage_is_never_another_error(kind, tmp_path):
    """A few bytes of a header changed, or the end cut off: readable, or a CheckpointError."""
    from octavo.checkpoint.reading.gguf_header import read_gguf_header

    from .models.gguf_files import write_llama

    model = save("llama", tmp_path)
    path = tmp_path / "model.safetensors"
    if kind == "gguf":
        path = tmp_path / "m.gguf"
        write_llama(path, model)
    elif kind != "safetensors":
        path.unlink()
        path = tmp_path / "pytorch_model.bin"
        torch.save(model.state_dict(), path, _use_new_zipfile_serialization=kind == "bin")
    whole = path.read_bytes()
    generator = random.Random(0)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(generator.choice([1, 2, 8])):
            damaged[generator.randrange(4000)] = generator.randrange(256)
        if generator.random() < 0.2:
            del damaged[generator.randrange(len(damaged)) :]
        path.write_bytes(bytes(damaged))
        try:
            if kind == "gguf":
                read_gguf_header(path)
            else:
                with open_source(path) as source:
                    for name in source.tensors:
                        source.read(name).sum()
        except CheckpointError:
            refused += 1
    assert refused > 5


def test_model_that_brings_its_own_code(plain, tmp_path):
    """Code beside the weights is neither run nor asked about."""
    config = json.loads((plain / "config.json").read_text())
    config.update(model_type="evil", architectures=["EvilModel"], auto_map={"AutoConfig": "evil.EvilConfig"})
    (plain / "config.json").write_text(json.dumps(config))
    (plain / "evil.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'was-run')!r}).touch()\n")
    text = fails(plain, tmp_path / "out", r"config\.json: transformers cannot make a model of this")
    assert "code" in text
    with pytest.raises(CheckpointError, match="cannot make a model"):
        octavo.load(plain, device="cpu")
    assert not (tmp_path / "was-run").exists()


def test_nothing_there(tmp_path):
    (tmp_path / "empty").mkdir()
    fails(tmp_path / "empty", tmp_path / "out", "no weights here")
    fails(tmp_path / "absent" / "deep" / "er", tmp_path / "out", "no such file or folder")
    fails("organization/no-such-model", tmp_path / "out", "no such file or folder here")
    (tmp_path / "empty" / "notes.txt").write_text("")
    fails(tmp_path / "empty" / "notes.txt", tmp_path / "out", r"expected a \.safetensors, \.bin or \.gguf")


def test_skip_pattern_that_matches_nothing(plain, tmp_path):
    fails(plain, tmp_path / "out", "matches no parameter", config=octavo.OctavoConfig(skip=["lm_haed"]))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("kind", ["a pipe", "a folder", "missing"])
def test_what_is_no_file(plain, tmp_path, name, kind):
    path = plain / name
    path.unlink()
    if kind == "a pipe":
        os.mkfifo(path)
    elif kind == "a folder":
        path.mkdir()
    else:
        path.symlink_to(tmp_path / "nowhere")
    fails(plain, tmp_path / "out", f"{kind}|no weights")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("vocab_size", "x"),
        ("hidden_size", -(2**63)),
        ("tie_word_embeddings", [[]]),
        ("dtype", 2**40),
        ("vocab_size", 10**12),
    ],
)
def test_configuration_with_values_of_another_kind(plain, tmp_path, key, value):
    """For a plain folder and for one of ours, which transformers reads."""
    octavo.load(plain, device="cpu").save_pretrained(tmp_path / "eight")
    for folder in (plain, tmp_path / "eight"):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, key: value}))
        for use in (partial(octavo.load, folder, device="cpu"), partial(convert, folder, tmp_path / "out")):
            with pytest.raises(ValueError) as caught:
                use()
            assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_configuration_that_is_nested_too_deep(plain, tmp_path):
    (plain / "config.json").write_text('{"a": ' * 50_000)
    fails(plain, tmp_path / "out", "not valid JSON")


@pytest.mark.parametrize("metadata", [[], 1, {"format": 1}])
def test_metadata_of_another_kind(plain, tmp_path, metadata):
    rewrite_header(plain / "model.safetensors", lambda header: header.update(__metadata__=metadata))
    fails(plain, tmp_path / "out", "metadata")


def test_a_float_parameter_that_is_missing_is_no_random_one(plain, tmp_path):
    """transformers would initialize it, and only warn."""
    octavo.load(plain, device="cpu").save_pretrained(tmp_path / "eight")
    for folder in (plain, tmp_path / "eight"):
        rewrite_header(
            folder / "model.safetensors", lambda header: header.update(x=header.pop("model.norm.weight"))
        )
        with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
            octavo.load(folder, device="cpu")


def test_a_damaged_adapter(plain, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(octavo.load(plain, device="cpu"), LoraConfig(target_modules="all-linear"))
    model.save_pretrained(tmp_path / "adapter")
    weights, config = (
        tmp_path / "adapter" / "adapter_model.safetensors",
        tmp_path / "adapter" / "adapter_config.json",
    )
    whole, settings = weights.read_bytes(), config.read_text()
    for change in (whole[:8], whole[:-5], b"", whole + b"x"):
        weights.write_bytes(change)
        with pytest.raises(CheckpointError, match="download it again"):
            octavo.load(plain, adapter=tmp_path / "adapter", device="cpu")
    weights.write_bytes(whole)
    changes = (
        *(("rank_pattern", 1e308), ("peft_type", 2**63)),
        *(("trainable_token_indices", 2**32), ("trainable_token_indices", -1e308)),
    )
    for key, value in changes:
        config.write_text(json.dumps({**json.loads(settings), key: value}))
        with pytest.raises(ValueError) as caught:
            octavo.load(plain, adapter=tmp_path / "adapter", device="cpu")
        assert "\n" not in str(caught.value) and str(tmp_path / "adapter") in str(caught.value)
    for change in ({"r": 2**46}, {"rank_pattern": {"q_proj": 2**46}}):
        config.write_text(json.dumps({**json.loads(settings), **change}))
        with pytest.raises(CheckpointError, match=r"(r|rank_pattern) = 70368744177664: there is no memory"):
            octavo.load(plain, adapter=tmp_path / "adapter", device="cpu")
