"""Small random models, one for each shape of checkpoint, and how they are saved."""

import hashlib

import torch
from transformers import AutoModelForCausalLM

from . import config

VOCABULARY = 160
SMALL = {"vocab_size": VOCABULARY, "max_position_embeddings": 64}
GPT = {"vocab_size": VOCABULARY, "n_positions": 64}

CONFIGS = {
    "llama": lambda: config("llama", intermediate_size=192, **SMALL),
    "llama-tied": lambda: config("llama", intermediate_size=192, tie_word_embeddings=True, **SMALL),
    "gpt2": lambda: config("gpt2", n_embd=96, **GPT),
    "gptj": lambda: config("gptj", rotary_dim=8, **GPT),
    "mixtral": lambda: config("mixtral", **SMALL),
    "gpt_oss": lambda: config("gpt_oss", intermediate_size=96, **SMALL),
}


def build(configuration, dtype=torch.float32):
    """A model of this configuration with random weights, norms and biases included."""
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(configuration, dtype=dtype)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def save(kind, folder, dtype=torch.float32, **options):
    """Build a model, save it to `folder`; returns the model."""
    model = build(CONFIGS[kind](), dtype)
    model.save_pretrained(folder, **options)
    return model


def logits(model):
    """float32 [2, 12, vocabulary] for fixed tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=generator)
    with torch.no_grad():
        return model(ids).logits.float()


def digest(folder):
    """Hash of every file of a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
