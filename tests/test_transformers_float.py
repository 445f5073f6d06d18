"""Parameters in float where 8 bits were planned: grown vocabularies, new heads. They are saved and loaded, what is new is
initialized by transformers, which says so, and what is missing from a checkpoint is an error."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

import octavo
from octavo import OctavoConfig, OctavoTensor

from .models import gptj, llama_tied, quantized
from .versions import needs

IDS = torch.arange(1, 9)[None]


def llama():
    model = llama_tied()
    model.config.tie_word_embeddings = False
    return type(model)(model.config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """ "8-bit" and "plain" → a folder with a causal model whose head is its own."""
    torch.manual_seed(0)
    out = {name: tmp_path_factory.mktemp(name) for name in ("plain", "8-bit")}
    model = llama()
    model.save_pretrained(out["plain"])
    octavo.quantize_model(model).save_pretrained(out["8-bit"])
    return out


def grown(model):
    model.resize_token_embeddings(300)


def shrunk(model):
    model.resize_token_embeddings(200)


def new_head(model):
    # With a bias where the class has one: its file would lack it otherwise, and `octavo.load` makes no numbers up.
    bias = model.get_output_embeddings().bias is not None
    model.set_output_embeddings(torch.nn.Linear(64, 256, bias=bias))


def new_embedding(model):
    model.set_input_embeddings(torch.nn.Embedding(256, 64))


def new_layer(model):
    """Somewhere in the middle, by hand."""
    model.get_decoder().layers[1].mlp.up_proj = torch.nn.Linear(64, 128, bias=False)


@pytest.mark.parametrize("change", [grown, shrunk, new_head, new_embedding, new_layer])
@pytest.mark.parametrize("make", [llama, llama_tied, gptj])
def test_changed_models_are_saved_and_loaded(make, change, tmp_path, caplog):
    if make is gptj and change is new_layer:
        pytest.skip("its layers have other names")
    model = quantized(make).eval()
    change(model)
    if make is llama_tied:
        model.tie_weights()  # as saving and loading does with a plain model
    with torch.no_grad():
        expected = model(IDS).logits
    model.save_pretrained(tmp_path)
    for load in (AutoModelForCausalLM.from_pretrained, octavo.load):
        again = load(tmp_path)
        for name, parameter in model.named_parameters():
            assert type(again.get_parameter(name)) is type(parameter), name
        with torch.no_grad():
            torch.testing.assert_close(again.eval()(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    # config.json promises no more than there is.
    plain = {
        n
        for n, p in model.named_parameters()
        if not isinstance(p, OctavoTensor) and p.dim() == 2 and p.numel() >= 4096
    }
    config = json.loads((tmp_path / "config.json").read_text())
    assert set(config["quantization_config"]["skip"]) == plain
    # Nor need it say so: the files count.
    config["quantization_config"]["skip"] = []
    (tmp_path / "config.json").write_text(json.dumps(config))
    with torch.no_grad():
        found = AutoModelForCausalLM.from_pretrained(tmp_path)(IDS).logits
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_the_users_config_is_left_alone(tmp_path):
    config = OctavoConfig()
    model = octavo.quantize_model(llama(), config)
    grown(model)
    model.save_pretrained(tmp_path)
    assert config.skip == []
    assert AutoConfig.from_pretrained(tmp_path).quantization_config["skip"] == ["lm_head.weight"]


# Llama's class for questions calls its base otherwise and finds nothing of a causal model, plain or not.
HEADS = {
    "score.weight": AutoModelForSequenceClassification,
    "classifier.weight": AutoModelForTokenClassification,
}


@pytest.mark.parametrize("labels", [2, 150])
@pytest.mark.parametrize("source", ["8-bit", "plain"])
@pytest.mark.parametrize("auto", HEADS.values(), ids=HEADS)
def test_a_new_head_is_new(auto, source, labels, folders, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(transformers.modeling_utils.logger, "warning", lambda text, *_: said.append(text))
    options = {} if source == "8-bit" else {"quantization_config": OctavoConfig()}
    model, info = auto.from_pretrained(
        folders[source], num_labels=labels, output_loading_info=True, **options
    )
    _, expected = auto.from_pretrained(folders["plain"], num_labels=labels, output_loading_info=True)
    # The same notice as of the plain model.
    assert info["missing_keys"] == expected["missing_keys"] != set()
    assert len(said) == 2 and "MISSING" in said[0]
    for name in info["missing_keys"]:
        parameter = model.get_parameter(name)
        assert type(parameter) is torch.nn.Parameter and parameter.requires_grad
        assert name.endswith("bias") or 0.005 < parameter.std() < 0.05  # initializer_range is 0.02
    layer = next(p for n, p in model.named_parameters() if n.endswith("layers.0.mlp.up_proj.weight"))
    assert isinstance(layer, OctavoTensor)
    model.save_pretrained(tmp_path)
    again, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    for name, parameter in model.named_parameters():
        if type(parameter) is torch.nn.Parameter:
            assert torch.equal(again.get_parameter(name), parameter), name


@needs("transformers", "5.17", "refuses a number of labels that config.json does not have")
def test_a_head_of_another_size_replaces_one(folders, tmp_path):
    """As with plain models: only where it is asked for."""
    auto = AutoModelForSequenceClassification
    plain = auto.from_pretrained(folders["plain"], num_labels=150)
    octavo.quantize_model(plain).save_pretrained(tmp_path)
    assert isinstance(auto.from_pretrained(tmp_path).score.weight, OctavoTensor)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        auto.from_pretrained(tmp_path, num_labels=100)
    model = auto.from_pretrained(tmp_path, num_labels=100, ignore_mismatched_sizes=True)
    assert model.score.weight.shape == (100, 64) and type(model.score.weight) is torch.nn.Parameter


def test_a_base_model_gets_a_head(folders, tmp_path):
    AutoModel.from_pretrained(folders["8-bit"]).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(model.lm_head.weight) is torch.nn.Parameter
    assert isinstance(model.model.embed_tokens.weight, OctavoTensor)


@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.1.mlp.up_proj.weight"])
@pytest.mark.parametrize("source", ["8-bit", "plain"])
def test_what_is_missing_is_an_error(source, name, folders, tmp_path):
    folder = tmp_path / "incomplete"
    shutil.copytree(folders[source], folder)
    state = load_file(folder / "model.safetensors")
    kept = {key: value for key, value in state.items() if not key.startswith(name)}
    assert len(kept) == len(state) - (3 if source == "8-bit" else 1)
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    options = {} if source == "8-bit" else {"quantization_config": OctavoConfig()}
    with pytest.raises(ValueError, match=rf"{name}: .*found none.*incomplete"):
        AutoModelForCausalLM.from_pretrained(folder, **options)
    auto, options = AutoModelForSequenceClassification, {"num_labels": 150, **options}
    if name.startswith("model"):
        # Another class does not make it new.
        with pytest.raises(ValueError, match=rf"{name}: .*found none.*incomplete"):
            auto.from_pretrained(folder, **options)
        with pytest.raises(ValueError, match=rf"{name.removeprefix('model.')}: .*found none.*incomplete"):
            AutoModel.from_pretrained(
                folder, **({} if source == "8-bit" else {k: options[k] for k in options if k != "num_labels"})
            )
    else:
        auto.from_pretrained(folder, **options)  # it has no such head
