"""Tiny models of the tests: two layers, 64 wide, with random weights.

| module | what is in it |
| --- | --- |
| here | configurations, models, models in 8 bits and their plain twins |
| `weights` | random 8-bit weights |
| `tokenizers` | tokenizers made on the spot |
| `checkpoints` | models saved in transformers' own form, one for each shape of checkpoint |
| `published` | published 8-bit checkpoints, made with bitsandbytes |
| `gguf_files` | GGUF files, made with the gguf package |
| `exported` | models saved with tokenizers, and llama.cpp to run what is exported of them |

(Models of every architecture of transformers: `tests/architectures`.)
"""

import copy

import torch
import transformers

import octavo

HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LAYERS = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
GPT = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 256, **NO_DROPOUT}
# kind → the class of its configuration, and sizes.
KINDS = {
    "llama": ("LlamaConfig", {**LAYERS, **HEADS}),
    "gpt2": ("GPT2Config", GPT),
    "gptj": ("GPTJConfig", {**GPT, "rotary_dim": 16}),
    "mixtral": ("MixtralConfig", {**LAYERS, **HEADS, "num_local_experts": 4}),
    "gpt_oss": (
        "GptOssConfig",
        {
            **LAYERS,
            **HEADS,
            "num_local_experts": 4,
            "head_dim": 16,
            "num_experts_per_tok": 2,
            "layer_types": ["full_attention", "full_attention"],
        },
    ),
    "bert": ("BertConfig", {**LAYERS, "num_attention_heads": 4}),
}


def config(kind: str, **options):
    """A small configuration; `options` replace what is said above."""
    name, sizes = KINDS[kind]
    ends = {} if kind == "bert" else {"bos_token_id": 0, "eos_token_id": 0}
    return getattr(transformers, name)(**{"vocab_size": 256, **ends, **sizes, **options})


def causal(kind: str, seed: int | None = None, **options) -> torch.nn.Module:
    """A causal model with the weights that transformers gives it, in evaluation mode; `seed`: always the same."""
    if seed is not None:
        torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config(kind, **options), dtype=torch.float32).eval()


def gptj():
    return causal("gptj").train()


def llama_tied():
    return causal("llama", tie_word_embeddings=True).train()


def gpt2():
    return causal("gpt2").train()


def mixtral():
    return causal("mixtral").train()


def gpt_oss():
    return causal("gpt_oss").train()


ARCHITECTURES = {"gptj": gptj, "llama_tied": llama_tied, "gpt2": gpt2}


def quantized(make) -> torch.nn.Module:
    torch.manual_seed(0)
    return octavo.quantize_model(make())


def plain_twin(model: torch.nn.Module) -> torch.nn.Module:
    """A frozen model that holds the de-quantized weights as plain parameters."""
    twin = octavo.dequantize_model(copy.deepcopy(model))
    return twin.requires_grad_(False)


def dense(model):
    """Every parameter as a plain float32 tensor."""
    return {
        name: (p.dequantize() if isinstance(p, octavo.OctavoTensor) else p).detach().float()
        for name, p in model.named_parameters()
    }


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
