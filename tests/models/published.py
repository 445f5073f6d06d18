"""Published 8-bit checkpoints, made with bitsandbytes and never with our own code."""

import copy
import math

import torch
from transformers import GPTJForCausalLM

from . import causal


def tiny_gptj(width: int = 64, **options) -> GPTJForCausalLM:
    return causal("gptj", 0, n_embd=width, rotary_dim=4, vocab_size=300, n_positions=64, **options)


def publish(
    model: GPTJForCausalLM, folder, adapters: bool = False, file: str = "pytorch_model.bin"
) -> GPTJForCausalLM:
    """Write `model` as a published checkpoint; returns the plain model that holds its de-quantized weights.

    With `adapters`, each layer also gets one, and the plain model its product added.
    """
    import bitsandbytes.functional as bnb

    state, plain = {}, {}
    for name, weight in model.state_dict().items():
        state[name] = plain[name] = weight
        if not name.endswith(".weight") or weight.dim() != 2:
            continue
        layer = name.removesuffix(".weight")
        qdata, quantized = bnb.quantize_blockwise(weight.contiguous(), blocksize=4096)
        assert quantized.absmax.numel() == math.ceil(weight.numel() / 4096)
        state[name] = qdata.view(weight.shape)
        state[f"{layer}.absmax"] = quantized.absmax
        state[f"{layer}.code"] = quantized.code
        plain[name] = bnb.dequantize_blockwise(qdata, quantized).view(weight.shape)
        if adapters:
            embedding = layer.endswith("wte")
            rank = 3 if layer.endswith("q_proj") else 4
            rows, columns = weight.shape
            down = torch.randn(rows if embedding else rank, rank if embedding else columns) * 0.05
            up = torch.randn(columns if embedding else rows, rank) * 0.05
            state[f"{layer}.adapter.0.weight"], state[f"{layer}.adapter.2.weight"] = down, up
            plain[name] = plain[name] + (down @ up.T if embedding else up @ down)
    # The causal mask that GPT-J saved with its weights in those days.
    for layer in range(model.config.n_layer):
        length = model.config.n_positions
        mask = torch.ones(length, length, dtype=torch.uint8).tril().view(1, 1, length, length)
        state[f"transformer.h.{layer}.attn.bias"] = mask
        state[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e9)
    if file.endswith(".bin"):
        torch.save(state, folder / file)
    else:
        from safetensors.torch import save_file

        save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / file)
    model.config.save_pretrained(folder)
    config = copy.deepcopy(model.config)
    if adapters:
        # Each of two tied layers has an adapter of its own.
        config.tie_word_embeddings = False
    expected = GPTJForCausalLM(config).eval()
    expected.load_state_dict(plain)
    return expected
