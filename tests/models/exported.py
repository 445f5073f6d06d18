"""Small random models with tokenizers trained on the spot, and llama.cpp to run what is exported of them."""

from contextlib import contextmanager

import numpy as np
import torch

import octavo

from .tokenizers import VOCABULARY


def randomized(model):
    """Weights large enough that positions, norms and biases all matter to the result."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1:
                parameter.copy_(
                    0.1 * noise + (1.0 if "norm" in name or "ln_" in name else 0.0) * ("weight" in name)
                )
            else:
                parameter.copy_(0.12 * noise)
    return model.eval()


def random_model(config):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return randomized(AutoModelForCausalLM.from_config(config, dtype=torch.float32))


def quantized(config, folder, tokenizer, **options):
    """A random model quantized and saved with its tokenizer; returns it."""
    model = octavo.quantize_model(random_model(config), octavo.OctavoConfig(**options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


def token_ids(count=40, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(11)
    return torch.randint(0, vocabulary, (count,), generator=generator).tolist()


def logits(model, ids):
    """float32 [tokens, vocabulary]"""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].float().numpy()


@contextmanager
def llama(path, **options):
    """The file in llama.cpp, keys and values in float32."""
    import llama_cpp

    defaults = {
        "n_ctx": 64,
        "logits_all": True,
        "type_k": 0,
        "type_v": 0,
        "flash_attn": False,
        "n_threads": 1,
    }
    instance = llama_cpp.Llama(str(path), verbose=False, **{**defaults, **options})
    try:
        yield instance
    finally:
        instance.close()


def llama_logits(path, ids):
    with llama(path) as instance:
        instance.eval(ids)
        return np.array(instance.scores[: len(ids)])


def difference(found, expected) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))
