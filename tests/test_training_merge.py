"""octavo merge: files in, files out, against PEFT's own merge in memory."""

import errno
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import octavo
from octavo.checkpoint import CheckpointError, convert
from octavo.checkpoint.writing.writer import CheckpointWriter
from octavo.merging.merge import merge

from .command import stop_midway
from .conftest import relative_error
from .models import (
    ARCHITECTURES,
    gpt2,
    gpt_oss,
    gptj,
    llama_tied,
    mixtral,
    move_adapters,
    plain_twin,
    quantized,
)
from .models.checkpoints import digest

peft = pytest.importorskip("peft")

PARTS = ("_qdata", "norm.weight")
IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(5))


def saved(make, folder, **options):
    """A quantized model and an adapter on disk, and the logits of both together."""
    model = quantized(make)
    model.save_pretrained(folder / "base")
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    move_adapters(model)
    model.save_pretrained(folder / "adapter")
    return model, logits(model)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_sixteen_bits_are_the_plain_models_own_merge(architecture, tmp_path):
    make = ARCHITECTURES[architecture]
    model, expected = saved(make, tmp_path, target_modules="all-linear")
    result = merge(
        tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "bfloat16", max_shard_size=60_000
    )
    assert not (tmp_path / "out.partial").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not any(isinstance(parameter, octavo.OctavoTensor) for parameter in again.parameters())
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 1
    for name, module in model.named_modules():
        if isinstance(module, peft.tuners.lora.Linear):
            dense = module.get_base_layer().weight.dequantize() + module.get_delta_weight("default")
            found = again.get_parameter(name.removeprefix("base_model.model.") + ".weight")
            torch.testing.assert_close(found, dense.to(torch.bfloat16).float(), rtol=0.005, atol=1e-6)
    assert relative_error(logits(again), expected) < 0.02
    assert len(result.changed) == sum(isinstance(m, peft.tuners.lora.Linear) for m in model.modules())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [gptj, gpt2])
def test_eight_bits_refit_what_changed_and_keep_the_other_bytes(make, tmp_path):
    targets = ["q_proj", "fc_out"] if make is gptj else ["c_attn"]
    _, expected = saved(make, tmp_path, target_modules=targets, use_rslora=True)
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    before = load_file(tmp_path / "base" / "model.safetensors")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {name.rpartition("_")[0] for name in changed} == set(result.changed)
    assert 1e-6 < result.added_error < 6e-5
    again = octavo.load(tmp_path / "out", dtype="float32")
    assert relative_error(logits(again), expected) < 0.02


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["8bit", "float16"])
def test_tied_weights_are_untied_on_purpose(to, tmp_path):
    _, expected = saved(llama_tied, tmp_path, target_modules=["embed_tokens", "q_proj"])
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", to)
    assert set(result.untied) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False
    again = octavo.load(tmp_path / "out", dtype="float32", device="cpu")
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert relative_error(logits(again), expected) < 0.03


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["8bit", "float16"])
def test_tied_weights_in_float_are_untied_as_well(to, tmp_path):
    """The adapter changes the head, and the files hold what it shares with the embedding under the embedding's name."""
    model = octavo.quantize_model(llama_tied(), octavo.OctavoConfig(skip=["embed_tokens", "lm_head"]))
    model.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    options = peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"])
    model = peft.get_peft_model(model, options)
    move_adapters(model)
    model.save_pretrained(tmp_path / "adapter")
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", to)
    assert set(result.untied) == {"model.embed_tokens.weight", "lm_head.weight"}
    again = octavo.load(tmp_path / "out", dtype="float32", device="cpu")
    assert again.lm_head.weight is not again.model.embed_tokens.weight
    assert relative_error(logits(again), logits(model)) < 0.03


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["8bit", "float16"])
def test_an_embedding_that_the_adapter_saves_as_it_was(to, tmp_path):
    """PEFT writes embeddings and heads in float that have an adapter on them beside it: the adapter still counts."""
    base = quantized(gptj)
    base.save_pretrained(tmp_path / "base")
    torch.manual_seed(1)
    options = peft.LoraConfig(r=4, lora_alpha=64, task_type="CAUSAL_LM", target_modules=["wte", "lm_head"])
    model = peft.get_peft_model(plain_twin(base), options)
    move_adapters(model, scale=0.2)
    model.save_pretrained(tmp_path / "adapter")
    assert any(
        ".base_layer." in name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    )
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", to)
    merged = octavo.load(tmp_path / "out", dtype="float32", device="cpu")
    on_top = octavo.load(tmp_path / "base", adapter=tmp_path / "adapter", dtype="float32", device="cpu")
    for again in (merged, on_top):
        assert relative_error(logits(again), logits(model)) < 0.03


@pytest.mark.filterwarnings("ignore")
def test_tied_weights_that_are_not_changed_stay_tied(tmp_path):
    saved(llama_tied, tmp_path, target_modules=["q_proj"])
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    again = octavo.load(tmp_path / "out", dtype="float32", device="cpu")
    assert result.untied == [] and again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.filterwarnings("ignore")
def test_norms_biases_head_and_embedding(tmp_path):
    _, expected = saved(
        gptj,
        tmp_path,
        target_modules=["wte", "lm_head", "fc_in"],
        bias="all",
        modules_to_save=["ln_1", "ln_f"],
    )
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    again = octavo.load(tmp_path / "out", dtype="float32", device="cpu")
    assert relative_error(logits(again), expected) < 0.02


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("make", "targets"),
    [(llama_tied, "all-linear"), (gpt2, "all-linear"), (gptj, ["wte", "fc_in", "lm_head"])],
)
def test_dora_is_peft_s_own_merge_of_the_plain_weights(make, targets, tmp_path):
    _, expected = saved(make, tmp_path, target_modules=targets, use_dora=True)
    twin = plain_twin(quantized(make))
    plain = peft.PeftModel.from_pretrained(twin, tmp_path / "adapter").merge_and_unload()
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "bfloat16")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    found = dict(again.named_parameters())
    changed = 0
    for name, weight in plain.named_parameters():
        torch.testing.assert_close(found[name], weight.to(torch.bfloat16).float(), rtol=0.008, atol=1e-6)
        changed += "norm" not in name and "ln_" not in name
    assert changed > 3
    assert relative_error(logits(again), expected) < 0.02
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out8")
    assert 1e-6 < result.added_error < 6e-5
    assert (
        relative_error(logits(octavo.load(tmp_path / "out8", dtype="float32", device="cpu")), expected) < 0.02
    )


EXPERTS = {
    "mixtral": (mixtral, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "gpt-oss, inputs first": (gpt_oss, ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
    "one of two": (mixtral, ["mlp.experts.down_proj"]),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("to", ["8bit", "bfloat16"])
@pytest.mark.parametrize("case", EXPERTS.values(), ids=EXPERTS)
def test_experts_are_peft_s_own_merge_of_the_plain_weights(case, to, tmp_path):
    make, names = case
    # The stacks under the model's own names, as `octavo quantize` writes them.
    plain = make()
    plain.save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "base")
    model = plain_twin(octavo.load(tmp_path / "base", dtype="float32", device="cpu"))
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], "target_parameters": names}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", use_rslora=True, **options))
    move_adapters(model, scale=0.05)
    model.save_pretrained(tmp_path / "adapter")
    expected = logits(model)
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out", to)
    assert len(result.changed) == 2 * (1 + len(names))
    merged = model.merge_and_unload()
    again = octavo.load(tmp_path / "out", dtype="float32", device="cpu") if to == "8bit" else None
    again = again or AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    for name in result.changed:
        found = again.get_parameter(name)
        found = found.dequantize() if isinstance(found, octavo.OctavoTensor) else found
        assert relative_error(found, merged.get_parameter(name)) < 0.008, name
    if to == "8bit":
        assert 1e-6 < result.added_error < 6e-5
    else:
        # A router may choose another expert for weights that are rounded: so are those it is compared with.
        expected = logits(merged.to(torch.bfloat16).to(torch.float32))
    assert relative_error(logits(again), expected) < 0.03


@pytest.mark.filterwarnings("ignore")
def test_stacks_under_other_names_in_the_files(tmp_path):
    """transformers' save_pretrained writes Mixtral's experts under the names of the published checkpoints."""
    names = ["mlp.experts.down_proj"]
    saved(mixtral, tmp_path, target_modules=["q_proj"], target_parameters=names)
    assert not any(".mlp." in name for name in load_file(tmp_path / "base" / "model.safetensors"))
    base = plain_twin(octavo.load(tmp_path / "base", dtype="float32", device="cpu"))
    merged = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").merge_and_unload()
    result = merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")
    assert "model.layers.0.mlp.experts.down_proj" in result.changed
    again = octavo.load(tmp_path / "out", dtype="float32", device="cpu")
    for name in result.changed:
        assert relative_error(again.get_parameter(name).dequantize(), merged.get_parameter(name)) < 0.008


@pytest.fixture
def wide(tmp_path):
    """A base and an adapter large enough to be caught in the middle, and what an undisturbed merge gives."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 4}
    saved(
        lambda: LlamaForCausalLM(LlamaConfig(vocab_size=256, **sizes)), tmp_path, target_modules="all-linear"
    )
    merge(tmp_path / "base", tmp_path / "adapter", tmp_path / "whole")
    return tmp_path


@pytest.mark.filterwarnings("ignore")
def test_a_killed_merge_goes_on_to_the_same_bytes(wide):
    """SIGKILL in the middle, again and again, until one run ends by itself: nothing appears under OUT before."""
    base, adapter, out = (str(wide / name) for name in ("base", "adapter", "out"))
    code = (
        "import sys, time; from octavo.checkpoint.writing import writer; writer.SYNC_EVERY = 1; unit = writer.write_unit\n"
        "def slow(*args):\n    time.sleep(0.02); return unit(*args)\n"
        "writer.write_unit = slow\n"
        "from octavo.merging.merge import merge; merge(*sys.argv[1:])"
    )
    journal = wide / "out.partial" / "octavo-journal.jsonl"
    lines = []
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-c", code, base, adapter, out])
        stop_midway(process, Path(out), signal.SIGKILL, (lines or [1])[-1] + 3)
        assert process.wait() == -signal.SIGKILL
        assert not Path(out).exists()
        lines.append(journal.read_bytes().count(b"\n"))
    assert lines == sorted(set(lines))  # each run went on from the one before
    result = merge(base, adapter, out)
    assert digest(wide / "out") == digest(wide / "whole")
    assert result.added_error == merge(base, adapter, wide / "again").added_error
    assert not (wide / "out.partial").exists()


def octavo_units(folder):
    """Parameters of a folder, each of which is written at once."""
    return {
        name.removesuffix(s)
        for name in load_file(folder / "model.safetensors")
        for s in PARTS
        if name.endswith(s)
    }


@pytest.mark.filterwarnings("ignore")
def test_a_merge_onto_a_full_disk_goes_on_when_there_is_room(wide, monkeypatch):
    from octavo.checkpoint.writing import writer

    monkeypatch.setattr(writer, "SYNC_EVERY", 1)
    original, calls = writer.write_unit, []

    def full(*args):
        calls.append(None)
        if len(calls) == 9:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(*args)

    monkeypatch.setattr(writer, "write_unit", full)
    with pytest.raises(CheckpointError, match=r"disk is full.*same command again"):
        merge(wide / "base", wide / "adapter", wide / "out")
    assert not (wide / "out").exists()
    done = len(calls) - 1
    merge(wide / "base", wide / "adapter", wide / "out")
    again = len(calls) - done - 1
    assert done == 8 and again == len(octavo_units(wide / "base")) - done
    assert digest(wide / "out") == digest(wide / "whole")


@pytest.mark.filterwarnings("ignore")
def test_unfinished_work_of_another_adapter_is_not_gone_on_with(wide, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(
            CheckpointWriter, "_write_aside", lambda self: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            merge(wide / "base", wide / "adapter", wide / "out")
    config = json.loads((wide / "adapter" / "adapter_config.json").read_text())
    (wide / "adapter" / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": 80}))
    with pytest.raises(CheckpointError, match=r"--overwrite"):
        merge(wide / "base", wide / "adapter", wide / "out")
    merge(wide / "base", wide / "adapter", wide / "out", overwrite=True)
    assert digest(wide / "out") != digest(wide / "whole")


def test_what_cannot_be_merged_is_named(tmp_path):
    saved(gptj, tmp_path, target_modules=["q_proj"])
    base, adapter, out = tmp_path / "base", tmp_path / "adapter", tmp_path / "out"
    with pytest.raises(ValueError, match=r"--to: expected one of 8bit, float16, bfloat16, found 'int4'"):
        merge(base, adapter, out, "int4")
    with pytest.raises(ValueError, match=r"expected a PEFT adapter folder"):
        merge(base, base, out)
    with pytest.raises(ValueError, match=r"base holds the source itself"):
        merge(base, adapter, base)
    quantized(llama_tied).save_pretrained(tmp_path / "other")
    with pytest.raises(
        ValueError, match=r"the adapter changes transformer.h.0.attn.q_proj.weight, which this model"
    ):
        merge(tmp_path / "other", adapter, out)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "trainable_token_indices": [1]}))
    with pytest.raises(ValueError, match=r"expected a LoRA adapter, found LORA with trainable_token_indices"):
        merge(base, adapter, out)
    of_another = {**config, "target_modules": [], "target_parameters": ["k_proj.weight"]}
    (adapter / "adapter_config.json").write_text(json.dumps(of_another))
    with pytest.raises(ValueError, match=r"names weight in target_parameters, but"):
        merge(base, adapter, out)
    assert not out.exists() and not (tmp_path / "out.partial").exists()
