"""Mixtures of experts: every implementation that transformers offers reaches the kernels, without a float copy of all experts."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import AutoConfig, AutoModelForCausalLM

import octavo

from .conftest import relative_error

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
    copy = min(4 * stack.numel() for stack in stacks)
    assert largest_allocation(lambda: results.extend(run(eight))) < copy / 2
    assert octavo.fallbacks() == {}
    # The instrument sees what is to be avoided.
    assert largest_allocation(lambda: stacks[0].dequantize()) >= copy
    twin = octavo.dequantize_model(eight)
    for found, expected in zip(results, run(twin), strict=True):
        assert relative_error(found, expected) < 1e-4
