"""An adapter of another model is refused in one line, wherever it is put onto a model; its own model's is taken, in silence."""

import warnings

import pytest
import torch

import octavo
from octavo.integrations.peft import add_adapter

from .models import causal, gpt2, move_adapters

peft = pytest.importorskip("peft")


def llama(layers=2, width=64):
    return causal("llama", num_hidden_layers=layers, hidden_size=width)


def trained(model, folder, **options):
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", **options))
    move_adapters(model)
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (lambda: llama(layers=4), {}, "which this model does not have"),
        (lambda: llama(width=128), {}, "size mismatch"),
        (gpt2, {}, "Target modules"),
    ],
)
def test_another_models_adapter_is_refused_in_one_line(tmp_path, make, options, message):
    trained(make(), tmp_path, **options)
    with warnings.catch_warnings(record=True) as said, pytest.raises(ValueError, match=message) as refused:
        warnings.simplefilter("always")
        add_adapter(octavo.quantize_model(llama()), tmp_path)
    text = str(refused.value)
    assert "not of this model" in text and "\n" not in text and len(text) < 600
    assert not [each for each in said if "adapter keys" in str(each.message)]


def test_an_adapter_that_leaves_a_layer_without_values_is_refused(tmp_path):
    trained(llama(), tmp_path, modules_to_save=["input_layernorm"])
    with pytest.raises(ValueError, match=r"holds no .*layers\.2\.input_layernorm"):
        add_adapter(octavo.quantize_model(llama(layers=3)), tmp_path)


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"modules_to_save": ["norm"]}])
def test_its_own_models_adapter_is_taken_in_silence(tmp_path, options):
    torch.manual_seed(0)
    base = llama()
    ids = torch.arange(1, 9)[None]
    quantized = octavo.quantize_model(base)
    wrapped = trained(quantized, tmp_path, **options)
    expected = wrapped(ids).logits
    torch.manual_seed(0)
    fresh = octavo.quantize_model(llama())
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        add_adapter(fresh, tmp_path)
    assert not [each for each in said if "adapter" in str(each.message).lower()]
    torch.testing.assert_close(fresh(ids).logits, expected)
