"""Streaming conversion gives what quantizing a live model gives, byte for byte, whatever happens on the way."""

import json
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import octavo
from octavo.checkpoint import CheckpointError, convert, open_source
from octavo.checkpoint.inspection import report

from .command import stop_midway
from .models.checkpoints import CONFIGS, build, digest, logits, save


def load(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, **options).eval()


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("codebook", ["fitted", "dynamic"])
def test_equals_quantizing_while_loading(kind, codebook, tmp_path):
    """`octavo quantize`, then `from_pretrained`: the logits of on-the-fly quantization, bit for bit."""
    save(kind, tmp_path / "plain")
    config = octavo.OctavoConfig(codebook=codebook, block_size=32 if codebook == "fitted" else None)
    result = convert(tmp_path / "plain", tmp_path / "out", config)
    live = load(tmp_path / "plain", quantization_config=config, dtype=torch.float32)
    converted = load(tmp_path / "out")
    assert torch.equal(logits(converted), logits(live))
    for name, parameter in live.named_parameters():
        other = converted.get_parameter(name)
        assert isinstance(other, octavo.OctavoTensor) == isinstance(parameter, octavo.OctavoTensor), name
        if isinstance(other, octavo.OctavoTensor):
            assert torch.equal(other.qdata, parameter.qdata), name
            assert torch.equal(other.absmax, parameter.absmax), name
            assert torch.equal(other.code, parameter.code), name
    assert result.unexpected == []


def test_each_source_precision_is_quantized_as_it_is(tmp_path):
    """float64, float16 and bfloat16 weights are quantized from their own values, not from rounded ones."""
    model = build(CONFIGS["llama"]())
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        folder = tmp_path / str(dtype)
        model.to(dtype).save_pretrained(folder)
        convert(folder, tmp_path / f"{dtype}-8bit")
        stored = load_file(tmp_path / f"{dtype}-8bit" / "model.safetensors")
        name = "model.layers.0.mlp.up_proj.weight"
        weight = model.get_parameter(name).detach().to(torch.float32)
        expected = octavo.OctavoTensor.from_float(weight)
        assert torch.equal(stored[f"{name}_qdata"], expected.qdata)
        assert torch.equal(stored[f"{name}_code"], expected.code)
        assert stored["model.norm.weight"].dtype == dtype
        assert json.loads((tmp_path / f"{dtype}-8bit" / "config.json").read_text())["dtype"] == str(dtype)[6:]
        model.to(torch.float32)


def test_shards_with_an_index(tmp_path):
    """Files stay under the limit, the index names every tensor, and the weights are those of a single file."""
    save("llama", tmp_path / "plain")
    limit = 40_000
    convert(tmp_path / "plain", tmp_path / "one")
    convert(tmp_path / "plain", tmp_path / "many", max_shard_size=limit)
    files = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(files) > 2
    assert all(path.stat().st_size <= limit for path in files)
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    joined = {}
    for path in files:
        part = load_file(path)
        assert {name for name, file in index["weight_map"].items() if file == path.name} == set(part)
        joined.update(part)
    single = load_file(tmp_path / "one" / "model.safetensors")
    assert set(single) == set(joined)
    assert all(torch.equal(single[name], joined[name]) for name in single)
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in single.values())
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "many")))


def test_sharded_source_and_bin_source_give_the_same(tmp_path):
    model = save("llama", tmp_path / "plain")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert (tmp_path / "sharded" / "model.safetensors.index.json").exists()
    (tmp_path / "bin").mkdir()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    (tmp_path / "legacy").mkdir()
    torch.save(
        model.state_dict(), tmp_path / "legacy" / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    for name in ("bin", "legacy"):
        model.config.save_pretrained(tmp_path / name)
    outputs = {}
    for name in ("plain", "sharded", "bin", "legacy"):
        convert(tmp_path / name, tmp_path / f"{name}-out")
        outputs[name] = load_file(tmp_path / f"{name}-out" / "model.safetensors")
    for name in ("sharded", "bin", "legacy"):
        assert set(outputs[name]) == set(outputs["plain"])
        assert all(torch.equal(outputs[name][key], outputs["plain"][key]) for key in outputs["plain"])


def test_experts_are_read_one_at_a_time(tmp_path):
    """Experts that lie in the file one by one are never all in memory."""
    save("mixtral", tmp_path / "plain")
    with open_source(tmp_path / "plain") as source:
        held, most = set(), 0
        read, release = source.read, source.release

        def counting_read(name):
            nonlocal most
            held.add(name)
            most = max(most, sum(".experts." in each for each in held))
            return read(name)

        def counting_release(name):
            held.discard(name)
            release(name)

        source.read, source.release = counting_read, counting_release
        convert(source, tmp_path / "out")
    # w1 and w3 of one expert
    assert 0 < most <= 2 + 2


def test_auxiliary_files_come_along(tmp_path):
    save("llama", tmp_path / "plain")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        (tmp_path / "plain" / name).write_text(name)
    convert(tmp_path / "plain", tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "LICENSE"):
        assert (tmp_path / "out" / name).read_text() == name
    assert (tmp_path / "out" / "generation_config.json").exists()
    assert not list((tmp_path / "out").glob("octavo-journal*"))


def test_skip_leaves_parameters_in_float(tmp_path):
    model = save("llama", tmp_path / "plain")
    config = octavo.OctavoConfig(skip=["lm_head", "layers.0.mlp"])
    convert(tmp_path / "plain", tmp_path / "out", config)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(stored["lm_head.weight"], model.lm_head.weight)
    assert "model.layers.0.mlp.up_proj.weight" in stored
    assert "model.layers.1.mlp.up_proj.weight_qdata" in stored
    loaded = load(tmp_path / "out")
    assert not isinstance(loaded.lm_head.weight, octavo.OctavoTensor)


def test_result_and_report_agree(tmp_path):
    """Error and size are the same measured while writing and afterwards, and by an independent computation."""
    model = save("gpt2", tmp_path / "plain")
    result = convert(tmp_path / "plain", tmp_path / "out")
    found = report(tmp_path / "out", against=tmp_path / "plain")
    assert found.error == pytest.approx(result.error, rel=1e-6)
    assert found.bits_per_weight == pytest.approx(result.bits_per_weight)
    assert found.coverage == 1.0
    loaded = load(tmp_path / "out")
    error = power = 0.0
    for name, parameter in loaded.named_parameters():
        if isinstance(parameter, octavo.OctavoTensor):
            weight = model.get_parameter(name).detach().double()
            error += float((parameter.dequantize().double() - weight).square().sum())
            power += float(weight.square().sum())
    assert result.error == pytest.approx(error / power, rel=1e-5)


class Interrupted(Exception):
    """Stands for a process that ends at once."""


def interrupt_after(count, monkeypatch, error):
    """Make the `count`-th unit fail with `error`, once."""
    from octavo.checkpoint.writing import writer

    original, calls = writer.write_unit, []

    def failing(*args):
        calls.append(None)
        if len(calls) == count:
            raise error
        return original(*args)

    monkeypatch.setattr(writer, "write_unit", failing)


@pytest.mark.parametrize("count", [1, 2, 9, 15])
def test_interrupted_conversion_goes_on_to_the_same_bytes(count, tmp_path, monkeypatch):
    from octavo.checkpoint.writing import writer

    monkeypatch.setattr(writer, "SYNC_EVERY", 1)
    save("llama", tmp_path / "plain")
    options = {"max_shard_size": 60_000}
    convert(tmp_path / "plain", tmp_path / "whole", **options)
    with monkeypatch.context() as patched:
        interrupt_after(count, patched, Interrupted())
        with pytest.raises(Interrupted):
            convert(tmp_path / "plain", tmp_path / "out", **options)
    assert not (tmp_path / "out").exists()
    result = convert(tmp_path / "plain", tmp_path / "out", **options)
    assert result.resumed == count - 1
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")
    assert not (tmp_path / "out.partial").exists()


def test_journal_cut_in_half_is_repaired(tmp_path, monkeypatch):
    from octavo.checkpoint.writing import writer

    monkeypatch.setattr(writer, "SYNC_EVERY", 1)
    save("llama", tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "whole")
    with monkeypatch.context() as patched:
        interrupt_after(6, patched, Interrupted())
        with pytest.raises(Interrupted):
            convert(tmp_path / "plain", tmp_path / "out")
    journal = tmp_path / "out.partial" / "octavo-journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-40])
    assert convert(tmp_path / "plain", tmp_path / "out").resumed == 4
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_kill_9_then_again(tmp_path):
    """The process is killed, not asked; the same command then ends in the same bytes."""
    config = CONFIGS["llama"]()
    config.num_hidden_layers, config.hidden_size, config.intermediate_size = 6, 256, 1024
    build(config).save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "whole")
    code = (
        "import sys; from octavo.checkpoint import convert; from octavo.checkpoint.writing import writer;"
        "writer.SYNC_EVERY = 1;"
        "convert(sys.argv[1], sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "plain"), str(tmp_path / "out")]
    process = subprocess.Popen(command)
    stop_midway(process, tmp_path / "out", signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    result = convert(tmp_path / "plain", tmp_path / "out")
    assert result.resumed >= 4
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


def test_a_folder_in_use_is_refused(tmp_path, monkeypatch):
    from octavo.checkpoint.writing import writer

    save("llama", tmp_path / "plain")
    original = writer.write_unit

    def meanwhile(*args):
        with pytest.raises(CheckpointError, match="another process"):
            convert(tmp_path / "plain", tmp_path / "out", overwrite=True)
        monkeypatch.setattr(writer, "write_unit", original)
        return original(*args)

    monkeypatch.setattr(writer, "write_unit", meanwhile)
    convert(tmp_path / "plain", tmp_path / "out")


def test_other_options_or_another_source_are_refused(tmp_path, monkeypatch):
    model = save("llama", tmp_path / "plain")
    with monkeypatch.context() as patched:
        interrupt_after(6, patched, Interrupted())
        with pytest.raises(Interrupted):
            convert(tmp_path / "plain", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"other options.*--overwrite"):
        convert(tmp_path / "plain", tmp_path / "out", octavo.OctavoConfig(block_size=32))
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"another source.*--overwrite"):
        convert(tmp_path / "plain", tmp_path / "out")
    result = convert(tmp_path / "plain", tmp_path / "out", overwrite=True)
    assert result.resumed == 0


def test_overwrite_replaces_only_by_a_whole_one(tmp_path, monkeypatch):
    save("llama", tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out")
    before = digest(tmp_path / "out")
    with pytest.raises(CheckpointError, match="not empty"):
        convert(tmp_path / "plain", tmp_path / "out")
    config = octavo.OctavoConfig(block_size=32)
    with monkeypatch.context() as patched:
        interrupt_after(6, patched, Interrupted())
        with pytest.raises(Interrupted):
            convert(tmp_path / "plain", tmp_path / "out", config, overwrite=True)
    assert digest(tmp_path / "out") == before
    convert(tmp_path / "plain", tmp_path / "out", config, overwrite=True)
    assert (
        json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["block_size"] == 32
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "plain"]


def test_an_empty_folder_is_no_obstacle(tmp_path):
    save("llama", tmp_path / "plain")
    (tmp_path / "out").mkdir()
    convert(tmp_path / "plain", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_weights_that_config_ties_but_that_differ_are_both_kept(tmp_path):
    """transformers unties such weights when it loads them; the copy's config.json says so."""
    model = save("llama", tmp_path / "plain")
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    (tmp_path / "plain" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.warns(UserWarning, match="differ"):
        convert(tmp_path / "plain", tmp_path / "out")
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is not loaded.model.embed_tokens.weight
    difference = loaded.lm_head.weight.dequantize() - model.lm_head.weight.detach()
    assert float(difference.norm() / model.lm_head.weight.detach().norm()) < 0.01


def test_tied_weight_stored_under_its_other_name(tmp_path):
    """A checkpoint that holds only lm_head.weight of a tied pair."""
    model = save("llama-tied", tmp_path / "plain")
    state = dict(model.state_dict())
    state.pop("model.embed_tokens.weight")
    (tmp_path / "plain" / "model.safetensors").unlink()
    torch.save(state, tmp_path / "plain" / "pytorch_model.bin")
    convert(tmp_path / "plain", tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert "model.embed_tokens.weight_qdata" in stored
    assert not any(name.startswith("lm_head") for name in stored)
    loaded = load(tmp_path / "out")
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_scales_out_of_half_range_stay_float32(tmp_path):
    """One matrix of tiny weights keeps float32 scales; files and their shards stay valid."""
    model = build(CONFIGS["llama"]())
    model.model.layers[0].mlp.up_proj.weight.data *= 1e-7
    model.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out", max_shard_size=60_000)
    stored = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored.update(load_file(path))
    assert stored["model.layers.0.mlp.up_proj.weight_absmax"].dtype == torch.float32
    assert stored["model.layers.1.mlp.up_proj.weight_absmax"].dtype == torch.float16
    live = load(tmp_path / "plain", quantization_config=octavo.OctavoConfig(), dtype=torch.float32)
    assert torch.equal(logits(load(tmp_path / "out")), logits(live))


def test_progress_ends_at_the_total(tmp_path):
    save("llama", tmp_path / "plain")
    seen = []
    convert(tmp_path / "plain", tmp_path / "out", progress=lambda *args: seen.append(args))

    done = [step[0] for step in seen]
    assert done == sorted(done)
    assert seen[-1][0] == seen[-1][1]
    assert {step[2] for step in seen} >= {"model.norm.weight", "lm_head.weight"}


def test_files_are_what_the_library_reads(tmp_path):
    """Header padding and order are within the format: the reference library lists and reads every tensor."""
    save("gpt_oss", tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = list(file.keys())
        for name in names:
            assert list(file.get_slice(name).get_shape()) == list(file.get_tensor(name).shape)
    with open_source(tmp_path / "out") as source:
        assert source.kind == "octavo"
        for name, tensor in load_file(path).items():
            assert torch.equal(source.read(name), tensor)
