"""Mixtures of experts: every implementation that transformers offers reaches the kernels, without a float copy of all experts."""

import copy

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import octavo

from .conftest import relative_error
from .versions import needs

COMMON = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
EXPERTS = 32
# Experts as [out, in], [in, out] with biases, and several names for the same.
KINDS = {
    "mixtral": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": EXPERTS, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": 96},
}
IDS = torch.arange(6)[None]


def model(kind: str):
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **COMMON, **KINDS[kind])).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    return made


def largest_allocation(function) -> int:
    """Bytes of the largest single allocation on the CPU while `function` runs."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    sizes = [e.nbytes() for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert sizes
    return max(sizes)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_implementation_of_experts(kind, implementation, no_fallbacks):
    """Logits and the gradient of the input are those of the de-quantized weights; no float copy of all experts is made."""
    eight = octavo.quantize_model(model(kind))
    stacks = [p for p in eight.parameters() if isinstance(p, octavo.OctavoTensor) and p.dim() == 3]
    assert len(stacks) == 2 and {stack.shape[0] for stack in stacks} == {EXPERTS}
    eight.set_experts_implementation(implementation)

    def run(each):
        embedded = each.get_input_embeddings()(IDS).detach().requires_grad_()
        out = each(inputs_embeds=embedded, use_cache=False).logits
        (gradient,) = torch.autograd.grad(out.square().sum(), embedded)
        return out.detach(), gradient

    results = []
    copied = min(4 * stack.numel() for stack in stacks)
    assert largest_allocation(lambda: results.extend(run(eight))) < copied / 2
    assert octavo.fallbacks() == {}
    # The instrument sees what is to be avoided.
    assert largest_allocation(lambda: stacks[0].dequantize()) >= copied
    twin = octavo.dequantize_model(eight)
    for found, expected in zip(results, run(twin), strict=True):
        assert relative_error(found, expected) < 1e-4


@pytest.mark.filterwarnings("ignore")
@needs("peft", "0.21", "adds an adapter to a de-quantized copy of all experts")
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_training_adapters_of_experts(kind, implementation, no_fallbacks):
    """PEFT's LoRA on the experts: gradients of the plain model, and no float copy of all experts forward or backward."""
    peft = pytest.importorskip("peft")
    eight = octavo.quantize_model(model(kind))
    stacks = [p for p in eight.parameters() if isinstance(p, octavo.OctavoTensor) and p.dim() == 3]
    twin = octavo.dequantize_model(copy.deepcopy(eight))
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def adapted(each):
        torch.manual_seed(1)
        each.set_experts_implementation(implementation)
        options = {"target_modules": [], "target_parameters": names, "init_lora_weights": False}
        return peft.get_peft_model(each, peft.LoraConfig(r=2, **options))

    def step(each):
        each(input_ids=IDS, use_cache=False).logits.square().sum().backward()

    eight, twin = adapted(eight), adapted(twin)
    copied = min(4 * stack.numel() for stack in stacks)
    assert largest_allocation(lambda: step(eight)) < copied / 2
    step(twin)
    expected = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in eight.named_parameters() if p.requires_grad}
    assert found.keys() == expected.keys() and len(found) == 4
    for name, gradient in found.items():
        assert gradient.abs().max() > 0 and relative_error(gradient, expected[name]) < 1e-4, name
