"""The models that vLLM is tried on: small, random, in the shapes of their families."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch
import transformers

from octavo import demo

SIZES = dict(
    vocab_size=211, hidden_size=128, intermediate_size=192, num_hidden_layers=2, max_position_embeddings=64
)
# vLLM's attention on a CPU knows heads of 32.
HEADS = dict(num_attention_heads=4, num_key_value_heads=2, head_dim=32)
ENDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES, **HEADS, **ENDS, tie_word_embeddings=False),
    "llama-tied": lambda: transformers.LlamaConfig(**SIZES, **HEADS, **ENDS, tie_word_embeddings=True),
    "gpt-neox": lambda: transformers.GPTNeoXConfig(**SIZES, **ENDS, num_attention_heads=4),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=211, n_embd=128, n_layer=2, n_head=4, n_positions=64, **ENDS
    ),
    "gemma2": lambda: transformers.Gemma2Config(
        **SIZES, **HEADS, **ENDS, query_pre_attn_scalar=32, sliding_window=32
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES, **ENDS, num_attention_heads=4, num_key_value_heads=2),
    "qwen3-moe": lambda: transformers.Qwen3MoeConfig(
        **SIZES,
        **HEADS,
        **ENDS,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        tie_word_embeddings=False,
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SIZES, **HEADS, **ENDS, num_local_experts=4),
}


def random_model(name: str, **changes) -> transformers.PreTrainedModel:
    """The model of a name, with weights large enough that its greedy tokens are far apart.

    Args:
        changes: of its configuration.
    """
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for option, value in {"initializer_range": 0.2, **changes}.items():
        setattr(config, option, value)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def finetune(base: Path, out: Path) -> None:
    """An adapter by `octavo finetune`, which changes what a random model says. `base` gets the shipped model's tokenizer."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL / name, base)
    texts = out.with_suffix(".txt")
    texts.write_text("El viento del norte y el sol discutían.\n\n" * 40)
    options = {
        "data": texts,
        "output": out,
        "max-steps": 4,
        "max-length": 32,
        "learning-rate": 0.05,
        "lora-r": 8,
    }
    command = [sys.executable, "-m", "octavo", "finetune", str(base)]
    command += [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
