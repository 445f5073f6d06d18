"""A model of GPT-J-6B's shape in random weights, made on the device layer by layer: in 16 bits, in 8, and as published.

Example:
    >>> from benchmarks.gpu_models import build
    >>> model = build("octavo", "cpu", tiny=True)   # doctest: +SKIP
"""

import gc

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoModelForCausalLM, GPTJConfig

import octavo
from octavo.model import plan_model, set_parameter
from octavo.ops import gpu  # noqa: F401  (importing it registers the kernels for GPUs)
from octavo.quantizer import Packed

from .gpu_common import matrix

KINDS = ("16-bit", "octavo", "published way")
BLOCK = 64
LEARNING_RATE = 1e-3


def config(tiny: bool, layers: int | None = None, vocabulary: int | None = None) -> GPTJConfig:
    """GPT-J-6B's own sizes; without dropout, so that both models do the same work."""
    sizes = dict(n_embd=64, n_layer=2, n_head=4, rotary_dim=8, vocab_size=128, n_positions=64) if tiny else {}
    sizes |= {"n_layer": layers} if layers else {}
    sizes |= {"vocab_size": vocabulary} if vocabulary else {}
    # Its two special tokens lie beyond a tiny vocabulary.
    special = dict(bos_token_id=1, eos_token_id=2) if tiny else {}
    return GPTJConfig(
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, tie_word_embeddings=False, **sizes, **special
    )


def dtype_for(device: str) -> torch.dtype:
    """bfloat16 where the GPU has it, else float16."""
    if device == "cpu" or torch.cuda.get_device_capability()[0] >= 8:
        return torch.bfloat16
    return torch.float16


def build(
    kind: str, device: str, tiny: bool, layers: int | None = None, vocabulary: int | None = None
) -> nn.Module:
    """The model, evaluated and frozen.

    Args:
        kind: "16-bit"; "octavo": fitted codebook, blocks of 64; "published way": bytes in blocks of 4096, de-quantized
            as a whole and multiplied in every layer.
        layers, vocabulary: how many layers and tokens; by default GPT-J-6B's 28 and 50400.
    """
    from accelerate import init_empty_weights

    dtype = dtype_for(device)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config(tiny, layers, vocabulary), dtype=dtype)
    entries = {} if kind == "16-bit" else plan_model(model, octavo.OctavoConfig()).entries
    for entry in entries.values():
        assert not entry.transposed and not entry.aliases
        block = BLOCK if kind == "octavo" else min(4096, entry.shape[1])
        packed = Packed(*matrix(*entry.shape, block, device), block)
        set_parameter(model, entry, octavo.OctavoTensor.from_packed(packed, dtype))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = torch.empty(parameter.shape, dtype=dtype, device=device)
            if parameter.dim() > 1:
                value.normal_(0.0, 0.02)
            else:
                value.fill_(1.0 if leaf == "weight" else 0.0)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
    model.to(device)
    if kind == "published way":
        for module in list(model.modules()):
            if isinstance(getattr(module, "weight", None), octavo.OctavoTensor):
                as_published(module)
    return model.eval().requires_grad_(False)


def as_published(module: nn.Module) -> None:
    """De-quantize the whole weight, the embedding's too, and multiply: what the model card's snippet does."""
    weight = module.weight
    parts = {name: getattr(weight, name) for name in ("qdata", "absmax", "code")}
    block, dtype = weight.block_size, weight.dtype
    del module.weight
    for name, part in parts.items():
        module.register_buffer(f"stored_{name}", part, persistent=False)
    dequantize = _bitsandbytes(parts, block, dtype)
    if dequantize is None:

        def dequantize():
            return octavo.ops.dequantize(parts["qdata"], parts["absmax"], parts["code"], block, dtype)

    if isinstance(module, nn.Embedding):
        module.forward = lambda ids: F.embedding(ids, dequantize())
    else:
        module.forward = lambda x: F.linear(x, dequantize(), module.bias)


def _bitsandbytes(parts, block, dtype):
    """The published system's own de-quantizing, where bitsandbytes is installed and knows the device."""
    if parts["qdata"].device.type == "cpu":
        return None
    try:
        from bitsandbytes import functional
    except ImportError:
        return None
    absmax = parts["absmax"].float().reshape(-1)
    state = functional.QuantState(absmax=absmax, code=parts["code"], blocksize=block, dtype=dtype)
    return lambda: functional.dequantize_blockwise(parts["qdata"], state)


def chunked_loss(
    model: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, chunk: int = 256
) -> torch.Tensor:
    """Mean cross-entropy of the next token; logits exist for `chunk` tokens at a time, forwards and backwards.

    Args:
        hidden: [batch, tokens, width], what the head is applied to; labels: [batch, tokens].
    """
    hidden = hidden[:, :-1].reshape(-1, hidden.shape[-1])
    labels = labels[:, 1:].reshape(-1)

    def part(h, wanted):
        return F.cross_entropy(model.lm_head(h).float(), wanted, reduction="sum")

    total = hidden.new_zeros((), dtype=torch.float32)
    for start in range(0, len(labels), chunk):
        stop = start + chunk
        total = total + torch.utils.checkpoint.checkpoint(
            part, hidden[start:stop], labels[start:stop], use_reentrant=False
        )
    return total / len(labels)


class Training:
    """LoRA on every linear layer with gradient checkpointing and 8-bit AdamW: `step()` runs one training step."""

    def __init__(self, model: nn.Module, tokens: int, device: str):
        from peft import LoraConfig, get_peft_model

        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
        names = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"]
        adapters = LoraConfig(r=8, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM")
        self.model = get_peft_model(model, adapters).train()
        self.inner = self.model.get_base_model()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.trained = sum(p.numel() for p in trained)
        self.optimizer, self.optimizer_name = optimizer(trained, device)
        vocabulary = self.inner.config.vocab_size
        self.ids = torch.randint(0, vocabulary, (1, tokens), device=device)

    def step(self) -> torch.Tensor:
        hidden = self.inner.transformer(self.ids, use_cache=False).last_hidden_state
        loss = chunked_loss(self.inner, hidden, self.ids)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


def optimizer(parameters, device: str):
    """bitsandbytes' AdamW8bit; where it is missing, torch's, whose state takes four times the memory."""
    try:
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, lr=LEARNING_RATE), "bitsandbytes AdamW8bit"
    except ImportError:
        return torch.optim.AdamW(
            parameters, lr=LEARNING_RATE
        ), "torch AdamW: bitsandbytes is missing; its larger state is counted"


def free(*_) -> None:
    """Give back what the last model held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
