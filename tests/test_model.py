"""Which parameters are quantized, in place, on modules of every kind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import octavo
from octavo import CoverageError, OctavoConfig, OctavoTensor
from octavo.config import matches, stored_block_size
from octavo.model import plan_model

from .conftest import relative_error


def quantized(model) -> set[str]:
    return {n for n, p in model.named_parameters(remove_duplicate=False) if isinstance(p, OctavoTensor)}


class Custom(nn.Module):
    """No class that anyone knows, with a matrix, a stack, and things that are none."""

    def __init__(self):
        super().__init__()
        self.matrix = nn.Parameter(torch.randn(64, 128))
        self.stack = nn.Parameter(torch.randn(3, 64, 128))
        self.stack_bias = nn.Parameter(torch.randn(64, 128))
        self.A_log = nn.Parameter(torch.randn(128, 64))
        self.scale = nn.Parameter(torch.randn(128))
        self.broadcast = nn.Parameter(torch.randn(1, 1, 8192))
        self.narrow = nn.Parameter(torch.randn(4096, 8))
        self.small = nn.Parameter(torch.randn(32, 32))
        self.conv = nn.Conv1d(64, 64, 3)
        self.register_buffer("table", torch.randn(64, 128))

    def forward(self, x):
        return F.linear(x, self.matrix) + torch.einsum("bk,enk->bn", x, self.stack)


def test_everything_that_holds_a_matrix():
    model = Custom()
    plan = plan_model(model, OctavoConfig())
    assert set(plan.entries) == {"matrix", "stack"} and plan.coverage == 1.0 and not plan.left
    assert set(plan.other) == {
        "stack_bias", "A_log", "scale", "broadcast", "narrow", "small", "conv.weight", "conv.bias"
    }  # fmt: skip
    x = torch.randn(2, 128)
    before = model(x)
    assert octavo.quantize_model(model) is model
    assert quantized(model) == {"matrix", "stack"} and type(model.table) is torch.Tensor
    assert relative_error(model(x), before) < 0.02


def test_linear_embedding_conv1d(device):
    from transformers.pytorch_utils import Conv1D

    model = nn.Sequential(nn.Embedding(96, 64), nn.Linear(64, 128), Conv1D(96, 128)).to(device)
    ids = torch.randint(0, 96, (2, 3), device=device)
    before = model(ids)
    octavo.quantize_model(model)
    assert quantized(model) == {"0.weight", "1.weight", "2.weight"}
    assert model[2].weight.shape == (128, 96) and model[2].weight.qdata.shape == (96, 128)
    octavo.reset_fallbacks()
    found = model(ids)
    assert octavo.fallbacks() == {} and relative_error(found, before) < 0.02
    for module in model:
        assert isinstance(module.weight, nn.Parameter) and not module.weight.requires_grad
    plain = octavo.dequantize_model(model)
    assert quantized(plain) == set() and relative_error(plain(ids), found) < 1e-5
    assert plain[2].weight.is_contiguous() and plain[2].weight.shape == (128, 96)


def test_a_lone_layer():
    layer = octavo.quantize_model(nn.Linear(64, 128))
    assert isinstance(layer.weight, OctavoTensor) and type(layer.bias) is nn.Parameter


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compute_dtypes_stay(dtype):
    model = octavo.quantize_model(nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64).to(dtype)))
    assert model[0].weight.dtype == torch.float32 and model[1].weight.dtype == dtype


def test_tied_weights_are_one_and_stay_tied():
    model = nn.ModuleDict(
        {"a": nn.Embedding(96, 64), "b": nn.Linear(64, 96, bias=False), "c": nn.Linear(64, 96)}
    )
    model["b"].weight = model["a"].weight
    model["c"].weight = model["a"].weight
    plan = plan_model(model, OctavoConfig())
    assert set(plan.entries) == {"a.weight"} and plan.entries["a.weight"].aliases == ("b.weight", "c.weight")
    assert plan.names == {"a.weight", "b.weight", "c.weight"}
    octavo.quantize_model(model)
    assert model["a"].weight is model["b"].weight is model["c"].weight
    octavo.dequantize_model(model)
    assert model["a"].weight is model["b"].weight is model["c"].weight
    assert type(model["a"].weight) is nn.Parameter


def test_a_module_used_twice():
    shared = nn.Linear(64, 64)
    model = nn.Sequential(shared, shared)
    octavo.quantize_model(model)
    assert model[0].weight is model[1].weight and isinstance(model[0].weight, OctavoTensor)


def test_skipping_one_name_of_a_tied_weight_skips_it():
    model = nn.ModuleDict({"a": nn.Embedding(96, 64), "b": nn.Linear(64, 96, bias=False)})
    model["b"].weight = model["a"].weight
    plan = plan_model(model, OctavoConfig(skip=["b"]))
    assert set(plan.skipped) == {"a.weight"} and not plan.entries


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("gate", "model.mlp.gate.weight", True),
        ("gate", "model.mlp.gate_proj.weight", False),
        ("mlp.gate", "model.mlp.gate.weight", True),
        ("mlp.gate", "model.xmlp.gate.weight", False),
        ("lm_head", "lm_head.weight", True),
        ("head", "lm_head.weight", False),
        ("layers.1", "model.layers.1.mlp.weight", True),
        ("layers.1", "model.layers.11.mlp.weight", False),
        ("layers.[0-3].mlp", "model.layers.2.mlp.up.weight", True),
        ("layers.[0-3].mlp", "model.layers.5.mlp.up.weight", False),
        ("*.q_proj", "model.layers.2.attn.q_proj.weight", True),
        ("*_proj", "model.layers.2.attn.q_proj.weight", True),
        ("?_proj", "model.layers.2.attn.qk_proj.weight", False),
        ("model.layers.0.mlp.up.weight", "model.layers.0.mlp.up.weight", True),
        ("a+b", "x.a+b.weight", True),
        ("a.c", "abc.weight", False),
        ("*", "anything", True),
    ],
)
def test_skip_patterns_match_whole_components(pattern, name, expected):
    assert matches(pattern, name) is expected


def test_skip():
    model = nn.ModuleDict({"gate": nn.Linear(64, 128), "gate_proj": nn.Linear(64, 128)})
    octavo.quantize_model(model, OctavoConfig(skip=["gate"]))
    assert quantized(model) == {"gate_proj.weight"}


def test_a_pattern_that_matches_nothing_is_an_error():
    model = nn.ModuleDict({"gate": nn.Linear(64, 128)})
    with pytest.raises(ValueError, match=r"skip pattern 'gat' matches no parameter.*gate\.weight"):
        octavo.quantize_model(model, OctavoConfig(skip=["gat"]))
    with pytest.raises(ValueError, match="matches no parameter"):
        plan_model(nn.ReLU(), OctavoConfig(skip=["x"]))
    plan_model(model, OctavoConfig(skip=["gat"]), strict=False)


def test_low_coverage_is_an_error_that_names_what_is_left():
    model = nn.Module()
    model.odd = nn.Parameter(torch.randn(4, 4, 32, 64))
    model.layer = nn.Linear(64, 128)
    with pytest.raises(
        CoverageError, match=r"80\.0%(.|\n)*odd: 32,768 weights \(a tensor of 4 dimensions"
    ) as error:
        octavo.quantize_model(model)
    assert "skip=[" in str(error.value) and isinstance(error.value, ValueError)
    assert quantized(model) == set(), "nothing is changed"
    octavo.quantize_model(model, OctavoConfig(skip=["odd"]))
    assert quantized(model) == {"layer.weight"}


def test_a_large_stack_of_small_matrices_is_not_left_in_float_without_a_word():
    model = nn.Module()
    model.heads = nn.Parameter(torch.randn(128, 16, 64))
    model.few = nn.Parameter(torch.randn(4, 16, 64))
    model.layer = nn.Linear(64, 128)
    plan = plan_model(model, OctavoConfig())
    assert set(plan.left) == {"heads"} and "few" in plan.other
    with pytest.raises(CoverageError, match="heads: 131,072 weights"):
        octavo.quantize_model(model)


def test_little_left_in_float_is_allowed():
    model = nn.Module()
    model.odd = nn.Parameter(torch.randn(2, 2, 16, 16))
    model.layer = nn.Linear(512, 512)
    octavo.quantize_model(model)
    assert quantized(model) == {"layer.weight"}


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_names_the_weight(bad):
    model = nn.ModuleDict({"first": nn.Linear(64, 128), "second": nn.Linear(64, 128)})
    with torch.no_grad():
        model["second"].weight[5, 7] = bad
    with pytest.raises(ValueError, match=r"second\.weight holds NaN or infinity"):
        octavo.quantize_model(model)


def test_quantizing_twice_is_an_error():
    model = octavo.quantize_model(nn.Linear(64, 128))
    with pytest.raises(ValueError, match="quantized already"):
        octavo.quantize_model(model)


def test_what_a_model_never_saves_is_left_alone():
    model = nn.ModuleDict({"positions": nn.Embedding(128, 64), "layer": nn.Linear(64, 128)})
    model._keys_to_ignore_on_save = ["positions.weight"]
    assert quantized(octavo.quantize_model(model)) == {"layer.weight"}


def test_progress_is_reported():
    seen = []
    model = nn.Sequential(nn.Linear(64, 128), nn.Linear(128, 64))
    octavo.quantize_model(model, progress=lambda name, count: seen.append((name, count)))
    assert seen == [("0.weight", 8192), ("1.weight", 8192)]


def test_planning_works_on_the_meta_device():
    with torch.device("meta"):
        model = Custom()
    assert set(plan_model(model, OctavoConfig()).entries) == {"matrix", "stack"}


def test_experts_that_hold_inputs_as_rows():
    model = nn.Module()
    model.is_transposed = True
    model.up = nn.Parameter(torch.randn(3, 64, 128))
    dense = model.up.detach().clone()
    octavo.quantize_model(model)
    assert model.up.shape == (3, 64, 128) and model.up.qdata.shape == (3, 128, 64)
    assert relative_error(model.up.dequantize(), dense) < 0.01


# --- what a family of models keeps in float


class Block(nn.Module):
    def __init__(self, kind: str):
        super().__init__()
        self.config = type("Config", (), {"model_type": kind})()
        self.fn = nn.Parameter(torch.randn(64, 128))
        self.mlp = nn.ModuleDict({"gate": nn.Linear(64, 128), "gate_proj": nn.Linear(64, 128)})
        self.router = nn.ModuleDict({"classifier": nn.Linear(64, 128)})


@pytest.mark.parametrize("kind", ["hy_v4", "other"])
def test_what_a_family_keeps_in_float(kind):
    """Entries of a family count in models that hold one of it, those of "*" in all; each has its reason."""
    model = nn.ModuleDict({"part": Block(kind)})
    plan = plan_model(model, OctavoConfig())
    family = {"part.fn"} if kind == "hy_v4" else set()
    assert set(plan.entries) == {"part.mlp.gate_proj.weight", "part.fn"} - family and plan.coverage == 1.0
    kept = {name for name, why in plan.other.items() if why != "a vector"}
    assert kept == {"part.mlp.gate.weight", "part.router.classifier.weight"} | family
    assert all("router" in plan.other[name] for name in kept - family)


def test_a_file_from_before_an_entry_was_made_still_loads(monkeypatch, tmp_path):
    """What is stored in 8 bits is read in 8 bits, though this version would keep it in float."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    config = MixtralConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=64,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    name = "model.layers.0.mlp.gate.weight"
    assert name not in plan_model(model, OctavoConfig()).entries
    with monkeypatch.context() as patch:
        patch.setitem(octavo.model.KEEP_IN_FLOAT, "*", {})
        octavo.quantize_model(model).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.get_parameter(name), OctavoTensor)
    ids = torch.arange(9)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)


# --- the config


def test_config_defaults_and_round_trip():
    assert (OctavoConfig().block_size, OctavoConfig(codebook="dynamic").block_size) == (64, 4096)
    config = OctavoConfig(codebook="dynamic", block_size=128, skip=["lm_head"], scales="float32")
    assert OctavoConfig.from_dict(config.to_dict()) == config
    assert config.to_dict()["quant_method"] == "octavo" and config.to_dict()["format_version"] == 1
    assert OctavoConfig(skip="lm_head").skip == ["lm_head"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format_version": 2}, "format_version: expected 1, found 2.*upgrade"),
        ({"format_version": 2, "new_option": 1}, "format_version: expected 1, found 2"),
        ({"new_option": 1}, "unknown options.*new_option.*block_size"),
        ({"codebook": "linear"}, "codebook: expected one of fitted, dynamic, found 'linear'"),
        ({"block_size": 0}, "block_size: expected a positive integer, found 0"),
        ({"block_size": True}, "block_size"),
        ({"block_size": 64.0}, "block_size"),
        ({"scales": "float64"}, "scales"),
        ({"quant_method": "gptq"}, "quant_method"),
    ],
)
def test_config_errors_say_what_was_expected(options, message):
    with pytest.raises(ValueError, match=message):
        OctavoConfig.from_dict(options)


@pytest.mark.parametrize(
    ("columns", "blocks", "block_size", "expected"),
    [(128, 2, 64, 64), (100, 2, 64, 64), (384, 3, 4096, 128), (2560, 5, 4096, 512), (64, 1, 4096, 4096)],
)
def test_stored_block_size(columns, blocks, block_size, expected):
    assert stored_block_size(columns, blocks, block_size) == expected


def test_stored_block_size_of_damaged_files():
    for blocks in (0, 7):
        with pytest.raises(ValueError, match=f"128 weights with {blocks} scales"):
            stored_block_size(128, blocks, 64)
