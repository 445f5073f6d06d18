"""The chunked loss: value, gradients and memory against PyTorch's own cross-entropy on whole logits."""

import pytest
import torch
import torch.nn.functional as F

import octavo
from octavo.training import loss as chunked

from .conftest import relative_error
from .models import ARCHITECTURES, gptj, move_adapters, quantized
from .versions import needs

peft = pytest.importorskip("peft")

IDS = torch.randint(0, 256, (2, 24), generator=torch.Generator().manual_seed(5))


def labels_with_prompt():
    labels = IDS.clone()
    labels[0, :9] = -100
    labels[1, 20:] = -100
    return labels


def reference_loss(logits, labels):
    return F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(),
        labels[:, 1:].reshape(-1),
        ignore_index=-100,
        reduction="sum",
    )


@pytest.mark.parametrize("rows", [3, 16, 1000])
def test_value_and_gradients_of_any_chunk_size(rows, monkeypatch):
    monkeypatch.setattr(chunked, "rows_per_chunk", lambda vocabulary: rows)
    hidden = torch.randn(2, 24, 32, requires_grad=True)
    head = torch.nn.Linear(32, 256)
    labels = labels_with_prompt()
    total, tokens = chunked.summed_cross_entropy(hidden, labels, head)
    (total / tokens).backward()
    found = [hidden.grad.clone(), head.weight.grad.clone(), head.bias.grad.clone()]
    hidden.grad = head.weight.grad = head.bias.grad = None
    expected = reference_loss(head(hidden), labels)
    count = int((labels[:, 1:] != -100).sum())
    assert int(tokens) == count
    (expected / count).backward()
    torch.testing.assert_close(total, expected)
    for one, other in zip(found, (hidden.grad, head.weight.grad, head.bias.grad), strict=True):
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_model_gives_the_loss_and_gradients_of_its_own_forward(architecture, monkeypatch):
    monkeypatch.setattr(chunked, "rows_per_chunk", lambda vocabulary: 7)
    model = octavo.prepare_for_training(quantized(ARCHITECTURES[architecture]))
    targets = ["lm_head", "q_proj", "c_attn"] if architecture != "llama_tied" else ["q_proj"]
    config = peft.LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config).train()
    move_adapters(model)
    labels = labels_with_prompt()
    results = []
    for chunks in (True, False):
        model.zero_grad()
        if chunks:
            total, _ = chunked.language_model_loss(model, {"input_ids": IDS, "labels": labels})
        else:
            total = reference_loss(model(input_ids=IDS).logits, labels)
        total.backward()
        results.append(
            (total.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        )
    (found, grads), (expected, expected_grads) = results
    torch.testing.assert_close(found, expected)
    assert grads.keys() == expected_grads.keys()
    for name in grads:
        assert relative_error(grads[name], expected_grads[name]) < 1e-5, name
    assert "forward" not in model.get_output_embeddings().__dict__


def test_tokens_without_a_label_never_reach_the_head():
    seen = []
    head = torch.nn.Linear(8, 32)
    head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].shape[0]))
    labels = torch.full((1, 100), -100)
    labels[0, 90:] = 3
    chunked.summed_cross_entropy(torch.randn(1, 100, 8), labels, head)
    assert seen == [10]


# The families that change their logits after the head, with values that matter.
CHANGED = {
    "gemma2": {"final_logit_softcapping": 0.5},
    "gemma3_text": {"final_logit_softcapping": 0.5},
    "vaultgemma": {"final_logit_softcapping": 0.5},
    "nanochat": {"final_logit_softcapping": 0.5},
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "hyperclovax": {"logits_scaling": 4.0},
    "falcon_h1": {"lm_head_multiplier": 4.0},
}


def kinds():
    crashes = needs("torch", "2.11", "ends the process in Falcon-H1's convolution, 5.16 of transformers")
    return [pytest.param(kind, marks=[crashes] * (kind == "falcon_h1")) for kind in CHANGED]


@pytest.mark.parametrize("kind", kinds())
def test_logits_changed_after_the_head(kind):
    """Scaled or capped: the loss and its gradient are those of the model's own logits, and no whole logits are made."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = dict(
        vocab_size=256, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4
    )
    try:
        config = AutoConfig.for_model(
            kind, **sizes, num_key_value_heads=4, head_dim=16, pad_token_id=0, **CHANGED[kind]
        )
    except ValueError:
        pytest.skip(f"this transformers knows no {kind}")
    model = AutoModelForCausalLM.from_config(config).float()
    assert chunked.takes_chunked_loss(model)
    head = model.get_output_embeddings().weight
    head.data.normal_()
    results = []
    for chunks in (True, False):
        model.zero_grad()
        if chunks:
            total, _ = chunked.language_model_loss(model, {"input_ids": IDS, "labels": labels_with_prompt()})
        else:
            total = reference_loss(model(input_ids=IDS).logits, labels_with_prompt())
        total.backward()
        results.append((total.detach(), head.grad.clone()))
    (found, grad), (expected, expected_grad) = results
    torch.testing.assert_close(found, expected)
    assert relative_error(grad, expected_grad) < 1e-5
    # The change is one that shows.
    plain = reference_loss(
        torch.nn.functional.linear(model.base_model(IDS).last_hidden_state, head), labels_with_prompt()
    )
    assert abs(plain / expected - 1) > 0.01


def test_logits_changed_in_an_unknown_way_keep_their_own_loss():
    model = quantized(gptj)
    assert chunked.takes_chunked_loss(model)
    model.config.final_logit_softcapping = 30.0
    assert not chunked.takes_chunked_loss(model)
    total, tokens = chunked.language_model_loss(model, {"input_ids": IDS, "labels": IDS})
    torch.testing.assert_close(total, reference_loss(model(input_ids=IDS).logits, IDS))
    assert int(tokens) == 46


def test_float16_gradients_do_not_vanish_behind_a_mean():
    hidden = (torch.randn(1, 500, 64) / 8).half().requires_grad_(True)
    weight = torch.randn(256, 64).half() / 64
    labels = torch.randint(0, 256, (1, 500))
    total, tokens = chunked.summed_cross_entropy(hidden, labels, lambda x: F.linear(x, weight))
    # A loss scaler multiplies before the gradient reaches the Function, and divides after.
    (total / tokens * 2.0**16).backward()
    plain = hidden.detach().double().requires_grad_(True)
    (reference_loss(F.linear(plain, weight.double()), labels) / tokens).backward()
    assert relative_error(hidden.grad.double() / 2.0**16, plain.grad) < 2e-3


def test_logits_in_memory_stay_under_the_limit():
    assert chunked.rows_per_chunk(50400) * 50400 * 4 <= chunked.CHUNK_BYTES
    sizes = []
    head = torch.nn.Linear(8, 50400)
    head.register_forward_hook(lambda module, inputs, output: sizes.append(output.nbytes))
    chunked.summed_cross_entropy(torch.randn(1, 700, 8), torch.zeros(1, 700, dtype=torch.long), head)
    assert len(sizes) == 3 and max(sizes) <= chunked.CHUNK_BYTES
