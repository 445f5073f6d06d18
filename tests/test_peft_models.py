"""PEFT's own layers on 8-bit weights: the numbers of a plain model, saving, several adapters, merging."""

import copy

import pytest
import torch

import octavo

from .conftest import relative_error
from .models import (
    ARCHITECTURES,
    frozen_bytes,
    gpt2,
    gptj,
    llama_tied,
    mixtral,
    move_adapters,
    plain_twin,
    quantized,
)

peft = pytest.importorskip("peft")

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(5))
FLOAT32 = 2e-6
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

# Which layers, with which kind of adapter, and on how many adapter parameters that comes down.
CASES = {
    "all-linear": (gptj, {"target_modules": "all-linear"}),
    "names": (llama_tied, {"target_modules": ["q_proj", "down_proj"]}),
    "embedding and head": (gptj, {"target_modules": ["q_proj", "wte", "lm_head"]}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "DoRA": (llama_tied, {"target_modules": "all-linear", "use_dora": True}),
    "DoRA, Conv1D": (gpt2, {"target_modules": "all-linear", "use_dora": True}),
    "DoRA, embedding": (gptj, {"target_modules": ["wte", "q_proj"], "use_dora": True}),
    "rsLoRA": (llama_tied, {"target_modules": "all-linear", "use_rslora": True}),
    "experts": (mixtral, {"target_modules": [], "target_parameters": EXPERTS}),
    "experts and linears": (mixtral, {"target_modules": "all-linear", "target_parameters": EXPERTS}),
    # Its tokens 5 to 7 of the second text begin what the adapter changes.
    "activated": (
        llama_tied,
        {"target_modules": ["q_proj"], "alora_invocation_tokens": IDS[1, 5:8].tolist()},
    ),
    "some tokens": (gptj, {"target_modules": ["q_proj"], "trainable_token_indices": {"wte": [1, 5, 7]}}),
    "biases": (gptj, {"target_modules": ["fc_in"], "bias": "all"}),
    "norms": (gptj, {"target_modules": ["fc_in"], "modules_to_save": ["ln_1", "ln_f"]}),
}


def adapted(model, **options):
    torch.manual_seed(1)
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **options))
    move_adapters(model)
    return model


def gradients(model):
    model.train()
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients_equal_those_of_the_plain_model(case):
    make, options = CASES[case]
    model = quantized(make)
    twin = plain_twin(model)
    before = frozen_bytes(model)
    model, twin = adapted(model, **options), adapted(twin, **options)
    loss, found = gradients(model)
    expected_loss, expected = gradients(twin)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert found.keys() == expected.keys() == trainable and trainable
    torch.testing.assert_close(loss, expected_loss, rtol=FLOAT32, atol=0)
    for name in found:
        assert relative_error(found[name], expected[name]) < FLOAT32, name
    assert set(frozen_bytes(model).values()) == set(before.values())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_of_adapters_and_input(architecture, checkpointing):
    """Acceptance: adapters' and input's gradients, with and without checkpointing, on three architectures."""
    model = quantized(ARCHITECTURES[architecture])
    twin = plain_twin(model)
    results = []
    for each in (model, twin):
        if checkpointing:
            each.gradient_checkpointing_enable({"use_reentrant": False})
        each = adapted(each, target_modules="all-linear").train()
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_(True)
        loss = each(inputs_embeds=embedded, labels=IDS, use_cache=False).loss
        loss.backward()
        grads = {name: p.grad for name, p in each.named_parameters() if p.grad is not None}
        results.append({"input": embedded.grad, **grads})
    found, expected = results
    assert found.keys() == expected.keys() and len(found) > 8
    for name in found:
        assert relative_error(found[name], expected[name]) < FLOAT32, name


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["all-linear", "embedding and head", "DoRA", "experts", "biases", "norms"])
def test_adapter_folder_holds_no_frozen_weight_and_loads_again(case, tmp_path):
    make, options = CASES[case]
    model = adapted(quantized(make), **options)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "adapter_model.safetensors")
    # The bias of a head that an adapter targets is saved with it; it is the only frozen value.
    frozen = {name for name in saved if name.endswith("lm_head.base_layer.bias")}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(tensor.numel() for name, tensor in saved.items() if name not in frozen) == trainable
    again = peft.PeftModel.from_pretrained(quantized(make), tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)


def test_several_adapters_switch_and_switch_off():
    model = quantized(gptj)
    base = logits(model)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "fc_in"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, adapter_name="one")
    move_adapters(model, seed=1)
    one = logits(model)
    model.add_adapter("two", config)
    model.set_adapter("two")
    move_adapters(model, seed=2)
    two = logits(model)
    assert relative_error(one, base) > 1e-3 and relative_error(two, one) > 1e-3
    model.set_adapter("one")
    torch.testing.assert_close(logits(model), one, rtol=0, atol=0)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), base, rtol=0, atol=0)
    model.delete_adapter("two")
    torch.testing.assert_close(logits(model), one, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ["all-linear", "Conv1D", "DoRA", "rsLoRA", "experts", "embedding and head"])
def test_merging_refits_the_codebook_and_stays_in_eight_bits(case):
    make, options = CASES[case]
    model = quantized(make)
    model = adapted(model, **options)
    expected = logits(model)
    twin = copy.deepcopy(model)
    merged = twin.merge_and_unload()
    assert not any("lora" in name for name, _ in merged.named_parameters())
    assert sum(isinstance(p, octavo.OctavoTensor) for p in merged.parameters()) == sum(
        isinstance(p, octavo.OctavoTensor) for p in model.parameters()
    )
    # Each merged weight is as near to W + ΔW as 8 bits allow; 5e-3 is a fitted codebook's usual error with a
    # margin.
    original = dict(model.base_model.model.named_modules())
    for name, layer in original.items():
        if not isinstance(layer, peft.tuners.lora.Linear) or options.get("use_dora"):
            continue
        wanted = layer.get_base_layer().weight.dequantize() + layer.get_delta_weight("default")
        assert relative_error(merged.get_submodule(name).weight.dequantize(), wanted) < 8e-3, name
    assert relative_error(logits(merged), expected) < 0.03


def test_unmerge_comes_back_to_within_eight_bit_rounding():
    """Merging rounds to 8 bits once, unmerging once more; `disable_adapter` is the exact way back."""
    model = quantized(llama_tied)
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.dequantize()
    model = adapted(model, target_modules=["up_proj"])
    expected = logits(model)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), expected, rtol=0.2, atol=0.02)
    model.unmerge_adapter()
    assert 0 < relative_error(weight.dequantize(), before) < 0.012
    with pytest.raises(ValueError, match="NaN or infinity"):
        weight.data += float("nan")


def test_a_head_tied_to_the_embedding_stays_tied_through_training_and_merging_of_other_layers():
    model = adapted(quantized(llama_tied), target_modules=["q_proj"])
    gradients(model)
    merged = model.merge_and_unload()
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert isinstance(merged.lm_head.weight, octavo.OctavoTensor)


def test_training_a_frozen_weight_in_full_says_what_to_do():
    with pytest.raises(RuntimeError, match=r"frozen.*skip=\[pattern\]"):
        adapted(quantized(llama_tied), target_modules=["q_proj"], modules_to_save=["embed_tokens"])
