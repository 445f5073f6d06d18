"""transformers: quantizing while loading, saving, loading again, de-quantizing; models from small random configs."""

import json
import subprocess
import sys

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

import octavo
from octavo import OctavoConfig, OctavoTensor

from .conftest import relative_error

transformers.logging.set_verbosity_error()

COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "vocab_size": 256,
}
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
CONFIGS = {
    "gptj": {"n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 16, "vocab_size": 256, "n_positions": 64},
    "gpt_neox": {**COMMON, "tie_word_embeddings": False},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 256, "n_positions": 64},
    "llama": {**COMMON, "tie_word_embeddings": True},
    "mixtral": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2},
    "ernie4_5_moe": {**COMMON, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 64},
    "gpt_oss": {**COMMON, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "mamba": {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256, "state_size": 16},
    "t5": {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 128, "vocab_size": 256},
}
# What is in float on purpose: routers of 4 rows, convolutions, biases, decays and position tables are no matrices.
EXPECTED = {
    "gptj": "transformer.h.0.attn.q_proj.weight",
    "gpt_neox": "gpt_neox.layers.0.attention.query_key_value.weight",
    "gpt2": "transformer.h.0.attn.c_attn.weight",
    "llama": "model.layers.0.mlp.up_proj.weight",
    "mixtral": "model.layers.0.mlp.experts.gate_up_proj",
    "ernie4_5_moe": "model.layers.1.mlp.experts.gate_up_proj",
    "gpt_oss": "model.layers.0.mlp.experts.down_proj",
    "mamba": "backbone.layers.0.mixer.in_proj.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.q.weight",
}


def auto(kind):
    return AutoModelForSeq2SeqLM if kind == "t5" else AutoModelForCausalLM


def logits(model, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 256, (2, 9), generator=generator).to(next(model.parameters()).device)
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            return model(input_ids=ids, decoder_input_ids=ids[:, :5]).logits
        return model(ids).logits


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """kind → (folder with a float32 checkpoint, the model)."""
    made = {}

    def get(kind):
        if kind not in made:
            torch.manual_seed(0)
            config = AutoConfig.for_model(kind, **CONFIGS[kind], **TOKENS)
            model = auto(kind).from_config(config).float().eval()
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            made[kind] = (folder, model)
        return made[kind]

    return get


def load(kind, folder, **options):
    model, info = auto(kind).from_pretrained(folder, output_loading_info=True, **options)
    assert not any(
        info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    ), info
    return model.eval()


def parts(model) -> dict[str, torch.Tensor]:
    return {
        f"{name}_{suffix}": getattr(parameter, suffix)
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if isinstance(parameter, OctavoTensor)
        for suffix in ("qdata", "absmax", "code")
    }


def same(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and torch.equal(one[k], other[k]) for k in one
    )


@pytest.mark.parametrize("kind", CONFIGS)
def test_round_trip(kind, saved, tmp_path):
    folder, plain = saved(kind)
    octavo.reset_fallbacks()
    model = load(kind, folder, quantization_config=OctavoConfig())
    stored = parts(model)
    assert f"{EXPECTED[kind]}_qdata" in stored
    assert model.hf_quantizer.plan.coverage > 0.99
    expected = logits(model)
    # Routing may flip for a token of a tiny mixture of experts.
    assert relative_error(expected, logits(plain)) < (0.2 if kind in ("mixtral", "gpt_oss") else 0.05)
    if kind != "mamba":
        assert octavo.fallbacks() == {}

    # In place it gives the same bytes as while loading.
    in_place = octavo.quantize_model(load(kind, folder))
    assert same(parts(in_place), stored) and torch.equal(logits(in_place), expected)

    # The plain model holding the de-quantized weights is an independent computation of the same.
    dense = load(kind, folder)
    dense.load_state_dict(
        {k: v.dequantize() if isinstance(v, OctavoTensor) else v for k, v in model.state_dict().items()}
    )
    assert relative_error(expected, logits(dense)) < 1e-4

    model.save_pretrained(tmp_path / "whole")
    in_place.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    for name in ("whole", "sharded"):
        again = load(kind, tmp_path / name)
        assert same(parts(again), stored), name
        assert torch.equal(logits(again), expected), name
        if model.config.tie_word_embeddings:
            assert again.get_input_embeddings().weight is again.get_output_embeddings().weight

    # And from there once more, on its own config.
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(logits(load(kind, tmp_path / "again", device_map="cpu")), expected)

    floats = again.dequantize()
    assert not parts(floats) and relative_error(logits(floats), expected) < 1e-4
    floats.save_pretrained(tmp_path / "floats")
    assert "quantization_config" not in json.loads((tmp_path / "floats" / "config.json").read_text())
    assert torch.equal(logits(load(kind, tmp_path / "floats")), logits(floats))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mixtral"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types(kind, dtype, saved, tmp_path):
    folder, plain = saved(kind)
    model = load(kind, folder, quantization_config=OctavoConfig(), dtype=dtype)
    stored = parts(model)
    # float32 weights are read unrounded, whatever is computed in: the same bytes as without dtype.
    assert same(stored, parts(load(kind, folder, quantization_config=OctavoConfig())))
    for name, parameter in model.named_parameters():
        assert parameter.dtype == dtype, name
    expected = logits(model)
    assert expected.dtype == dtype and relative_error(expected, logits(plain)) < 0.2
    model.save_pretrained(tmp_path)
    for options in ({}, {"dtype": dtype}, {"dtype": "auto"}, {"dtype": dtype, "device_map": "cpu"}):
        again = load(kind, tmp_path, **options)
        assert same(parts(again), stored)
        assert torch.equal(logits(again), expected), options
    other = load(kind, tmp_path, dtype=torch.float32)
    assert same(parts(other), stored) and logits(other).dtype == torch.float32
    floats = again.dequantize()
    assert {p.dtype for p in floats.parameters()} == {dtype}


def test_a_half_precision_checkpoint_in_float32(saved, tmp_path):
    _, plain = saved("llama")
    import copy

    copy.deepcopy(plain).to(torch.bfloat16).save_pretrained(tmp_path / "bf16")
    model = load("llama", tmp_path / "bf16", quantization_config=OctavoConfig(), dtype=torch.float32)
    assert model.get_input_embeddings().weight.dtype == torch.float32
    assert model.model.norm.weight.dtype == torch.float32


@pytest.mark.parametrize(
    "config",
    [
        OctavoConfig(codebook="dynamic"),
        OctavoConfig(block_size=24),
        OctavoConfig(scales="float32", block_size=4096),
        OctavoConfig(skip=["lm_head", "layers.0.mlp"]),
        OctavoConfig(skip=["gpt_neox.layers.1"]),
    ],
    ids=["dynamic", "ragged", "long", "skip", "skip from the root"],
)
def test_other_configs(config, saved, tmp_path):
    kind = "gpt_neox"
    folder, _ = saved(kind)
    model = load(kind, folder, quantization_config=config)
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert written == {**config.to_dict(), "quant_method": "octavo", "format_version": 1}
    again = load(kind, tmp_path)
    assert same(parts(model), parts(again)) and torch.equal(logits(again), logits(model))
    for name in parts(model):
        assert not config.skips(name.rpartition("_")[0])


def test_the_base_model_of_a_stored_one(saved, tmp_path):
    folder, _ = saved("llama")
    config = OctavoConfig(skip=["model.layers.1.mlp"])
    model = load("llama", folder, quantization_config=config)
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert same(
        {f"model.{k}": v for k, v in parts(base).items()},
        {k: v for k, v in parts(model).items() if "lm_head" not in k},
    )
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(base(ids)[0], model.model(ids)[0])


@pytest.mark.parametrize("kind", ["llama", "mixtral", "ernie4_5_moe"])
def test_what_stays_in_float_has_the_types_of_the_plain_model(kind, saved, tmp_path):
    """Also what has another name in the file: routers, one with a bias kept in float32; everything in a base model."""
    folder, _ = saved(kind)
    load(kind, folder, quantization_config=OctavoConfig()).save_pretrained(tmp_path)
    for maker in (auto(kind), AutoModel):
        plain, model = (maker.from_pretrained(path, dtype=torch.bfloat16) for path in (folder, tmp_path))
        types = {name: value.dtype for name, value in plain.state_dict().items()}
        assert {name: value.dtype for name, value in model.state_dict().items()} == types


def test_generate(saved, tmp_path):
    folder, _ = saved("llama")
    model = load("llama", folder, quantization_config=OctavoConfig())
    model.save_pretrained(tmp_path)
    ids = torch.arange(3, 9)[None]
    options = {"max_new_tokens": 5, "do_sample": False}
    found = model.generate(ids, **options)
    assert torch.equal(found, load("llama", tmp_path).generate(ids, **options)) and found.shape == (1, 11)


def test_offloading_to_the_cpu(saved, tmp_path):
    """accelerate keeps the weights in its own table and puts each into its module while that runs."""
    accelerate = pytest.importorskip("accelerate")
    folder, _ = saved("llama")
    model = load("llama", folder, quantization_config=OctavoConfig())
    expected = logits(model)
    accelerate.cpu_offload(
        model, execution_device=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    octavo.reset_fallbacks()
    ids = torch.randint(3, 256, (2, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = model(ids).logits
    assert relative_error(found, expected) < 1e-5 and octavo.fallbacks() == {}
    with pytest.raises(ValueError, match="cannot be offloaded to disk"):
        load(
            "llama",
            folder,
            quantization_config=OctavoConfig(),
            device_map={"model": "cpu", "lm_head": "disk"},
        )


def test_what_a_file_holds(saved, tmp_path):
    from safetensors import safe_open

    folder, _ = saved("llama")
    load("llama", folder, quantization_config=OctavoConfig()).save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        keys = set(file.keys())
        name = "model.layers.0.mlp.up_proj.weight"
        assert {f"{name}_qdata", f"{name}_absmax", f"{name}_code"} <= keys and name not in keys
        assert file.get_tensor(f"{name}_qdata").dtype == torch.uint8
        assert file.get_tensor(f"{name}_absmax").dtype == torch.float16
        assert file.get_tensor(f"{name}_code").shape == (256,)
        assert not any("lm_head" in key for key in keys), "a tied weight is stored once"


def test_resized_embeddings_keep_what_they_held(saved):
    folder, _ = saved("llama")
    model = load("llama", folder, quantization_config=OctavoConfig())
    before = model.get_input_embeddings().weight.dequantize()
    model.resize_token_embeddings(260, mean_resizing=False)
    after = model.get_input_embeddings().weight
    after = after.dequantize() if isinstance(after, OctavoTensor) else after
    assert after.shape == (260, 64) and relative_error(after[:256], before) < 0.01


# --- errors


def edited(folder, target, **changes):
    import shutil

    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    config["quantization_config"].update(changes)
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.fixture(scope="module")
def octavo_folder(saved, tmp_path_factory):
    folder = tmp_path_factory.mktemp("octavo")
    load("gpt_neox", saved("gpt_neox")[0], quantization_config=OctavoConfig()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format_version": 2}, "format_version: expected 1, found 2"),
        ({"shuffle": True}, r"unknown options \['shuffle'\]"),
        ({"codebook": "curve"}, "codebook: expected one of"),
    ],
)
def test_a_config_of_another_version(changes, message, octavo_folder, tmp_path):
    with pytest.raises(ValueError, match=message):
        AutoModelForCausalLM.from_pretrained(edited(octavo_folder, tmp_path / "x", **changes))


def test_a_config_with_other_patterns_than_the_file(octavo_folder, tmp_path):
    with pytest.raises(ValueError, match=r"lm_head\.weight is stored in 8 bits, but.*config\.json differ"):
        AutoModelForCausalLM.from_pretrained(edited(octavo_folder, tmp_path / "x", skip=["lm_head"]))


def test_a_missing_part_names_it(octavo_folder, tmp_path):
    from safetensors.torch import load_file, save_file

    folder = edited(octavo_folder, tmp_path / "x")
    state = load_file(folder / "model.safetensors")
    del state["gpt_neox.layers.1.mlp.dense_h_to_4h.weight_absmax"]
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ValueError, match=r"gpt_neox\.layers\.1\.mlp\.dense_h_to_4h\.weight: the checkpoint lacks .*_absmax"
    ):
        AutoModelForCausalLM.from_pretrained(folder)


def test_nan_in_a_checkpoint_names_the_weight(saved, tmp_path):
    from safetensors.torch import load_file, save_file

    folder, _ = saved("gpt_neox")
    name = "gpt_neox.layers.1.mlp.dense_h_to_4h.weight"
    state = load_file(folder / "model.safetensors")
    state[name][3, 4] = torch.nan
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"{name} holds NaN or infinity".replace(".", r"\.")):
        AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=OctavoConfig())


def test_a_skip_pattern_that_matches_nothing(saved):
    with pytest.raises(ValueError, match="skip pattern 'nothing' matches no parameter"):
        AutoModelForCausalLM.from_pretrained(
            saved("llama")[0], quantization_config=OctavoConfig(skip=["nothing"])
        )


# --- importing


def python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light():
    loaded = python(
        "import octavo, sys; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert loaded == "[]"


CHECK = "import transformers.quantizers.auto as a; print('octavo' in a.AUTO_QUANTIZER_MAPPING)"


@pytest.mark.parametrize(
    "order",
    [
        f"import octavo; octavo.OctavoConfig(); {CHECK}",
        f"import transformers.quantizers.auto; import octavo; octavo.OctavoConfig(); {CHECK}; "
        f"import importlib; importlib.reload(octavo); {CHECK}",
        f"import torch; {CHECK}",
        f"from transformers import LlamaForCausalLM; {CHECK}",
        f"import transformers.quantizers.auto; from transformers import LlamaForCausalLM; {CHECK}",
        f"import octavo.integrations.transformers; {CHECK}",
    ],
    ids=[
        "octavo first",
        "transformers first",
        "never, torch first",
        "never",
        "never, the table first",
        "the plugin first",
    ],
)
def test_registered_whichever_comes_first(order):
    assert set(python(order).split()) == {"True"}


def test_memory_is_reserved_for_8_bits(saved):
    """What transformers reserves on a GPU before it loads: it asks the quantizer for the bytes of an element."""
    for config in (octavo.OctavoConfig(), octavo.OctavoConfig(codebook="dynamic", block_size=32)):
        model = AutoModelForCausalLM.from_pretrained(saved("llama")[0], quantization_config=config)
        stored, counted = {}, {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            packed = isinstance(parameter, octavo.OctavoTensor)
            stored[name] = parameter.nbytes_stored - 4 * 256 if packed else parameter.nbytes
            plain = torch.empty(parameter.shape, dtype=torch.bfloat16, device="meta")
            each = model.hf_quantizer.param_element_size(model, name, plain if packed else parameter)
            counted[name] = each * parameter.numel()
        # Rows that are no multiple of a block have one scale more than their share of one.
        assert sum(stored.values()) * 0.95 <= sum(counted.values()) <= sum(stored.values())


def test_dtype_none_is_the_configuration_s(saved, tmp_path):
    """Of the first floats in the file, which transformers would ask, the scales are float16."""
    folder, _ = saved("gpt_neox")
    for dtype in (torch.float32, torch.bfloat16):
        model = load("gpt_neox", folder, quantization_config=OctavoConfig(), dtype=dtype)
        model.save_pretrained(tmp_path / str(dtype))
        assert load("gpt_neox", tmp_path / str(dtype), dtype=None).dtype == dtype
