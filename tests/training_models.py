"""Tiny models of several architectures, quantized, and the same weights as a plain model."""

import copy

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
)

import octavo

TOKENS = {"vocab_size": 256, "bos_token_id": 0, "eos_token_id": 0}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def gptj():
    return GPTJForCausalLM(
        GPTJConfig(n_embd=64, n_layer=2, n_head=4, rotary_dim=16, n_positions=256, **TOKENS, **NO_DROPOUT)
    )


def llama_tied():
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            tie_word_embeddings=True,
            **HEADS,
            **TOKENS,
        )
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **TOKENS, **NO_DROPOUT)
    )


def mixtral():
    return MixtralForCausalLM(
        MixtralConfig(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_local_experts=4, **HEADS, **TOKENS
        )
    )


def gpt_oss():
    return GptOssForCausalLM(
        GptOssConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_local_experts=4,
            head_dim=16,
            num_experts_per_tok=2,
            layer_types=["full_attention", "full_attention"],
            **HEADS,
            **TOKENS,
        )
    )


ARCHITECTURES = {"gptj": gptj, "llama_tied": llama_tied, "gpt2": gpt2}


def quantized(make) -> torch.nn.Module:
    torch.manual_seed(0)
    return octavo.quantize_model(make())


def plain_twin(model: torch.nn.Module) -> torch.nn.Module:
    """A frozen model that holds the de-quantized weights as plain parameters."""
    twin = octavo.dequantize_model(copy.deepcopy(model))
    return twin.requires_grad_(False)


def move_adapters(model: torch.nn.Module, seed: int = 3, scale: float = 0.02) -> None:
    """Random values for all trainable parameters: a fresh LoRA adds nothing, and tests nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * scale)


def frozen_bytes(model: torch.nn.Module) -> dict[str, bytes]:
    """The stored bytes of every 8-bit weight."""
    return {
        name: b"".join(getattr(weight, part).numpy().tobytes() for part in ("qdata", "absmax", "code"))
        for name, weight in model.named_parameters()
        if isinstance(weight, octavo.OctavoTensor)
    }
