"""Streaming conversion of many architectures: names, fused experts, split and renamed tensors, tied heads."""

import pytest
import torch

import octavo
from octavo.checkpoint import convert

COMMON = {
    "vocab_size": 160,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "head_dim": 16,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
# What a type of model calls otherwise, or needs besides.
ARCHITECTURES = {
    "bloom": {"n_head": 4, "n_layer": 2},
    "gemma3_text": {"sliding_window": 32},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global"], 2]], "num_heads": 4},
    "gpt_neox": {},
    "mamba": {"state_size": 8},
    "mpt": {"d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "phi3": {},
    "recurrent_gemma": {"lru_width": 64, "num_hidden_layers": 3},
    "rwkv": {"attention_hidden_size": 64},
    "deepseek_v3": {
        **EXPERTS,
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 32,
        "qk_rope_head_dim": 16,
        "qk_nope_head_dim": 16,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jetmoe": {"num_local_experts": 4, "kv_channels": 16},
    "lfm2_moe": {**EXPERTS, "num_dense_layers": 1, "layer_types": ["conv", "full_attention"]},
    "llama4_text": {"num_local_experts": 4, "intermediate_size_mlp": 128},
    "qwen2_moe": {**EXPERTS, "shared_expert_intermediate_size": 96},
    "qwen3_moe": EXPERTS,
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_conversion_is_that_of_the_live_model(kind, tmp_path):
    """Every parameter of the converted model is, byte for byte, that of the model quantized in memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, **{**COMMON, **ARCHITECTURES[kind]})
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.02
    model.save_pretrained(tmp_path / "plain")
    assert convert(tmp_path / "plain", tmp_path / "out").unexpected == []
    converted = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "out").named_parameters())
    live = octavo.quantize_model(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    quantized = 0
    for name, expected in live.named_parameters():
        found = converted.pop(name)
        if isinstance(expected, octavo.OctavoTensor):
            quantized += 1
            for part in ("qdata", "absmax", "code"):
                assert torch.equal(getattr(found, part), getattr(expected, part)), f"{name}.{part}"
        else:
            assert torch.equal(found, expected), name
    assert converted == {}
    assert quantized >= 5
