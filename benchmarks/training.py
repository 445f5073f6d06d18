"""Training step on the CPU: Octavo's time over the 16-bit (or 32-bit) model's, in one run, at several lengths.

Both models are the same Llama shape with the same adapters, prepared in the same way; steps alternate, so that a
busy machine troubles both alike. The median of the ratios of neighbouring steps is reported.

    python benchmarks/training.py --hidden 1024 --layers 8 --dtype bfloat16 --steps 5
"""

import argparse
import copy
import statistics
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import octavo
from octavo.training.adapters import add_adapters
from octavo.training.loss import language_model_loss
from octavo.training.prepare import prepare_for_training
from octavo.training.recipe import Recipe


def models(hidden: int, layers: int, vocabulary: int, dtype: torch.dtype):
    """(8-bit model, plain model), both with adapters, checkpointing and frozen weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=hidden * 11 // 4 // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        bos_token_id=1,
        eos_token_id=2,
    )
    packed = octavo.quantize_model(LlamaForCausalLM(config).to(dtype))
    plain = octavo.dequantize_model(copy.deepcopy(packed), dtype)
    plain.requires_grad_(False)
    plain.enable_input_require_grads()
    plain.gradient_checkpointing_enable({"use_reentrant": False})
    plain.is_quantized = False
    recipe = Recipe(lora_dropout=0.0)
    return add_adapters(prepare_for_training(packed), recipe).train(), add_adapters(plain, recipe).train()


def step(model, ids: torch.Tensor, dtype: torch.dtype) -> float:
    """Seconds for one forward and backward pass."""
    started = time.perf_counter()
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        total, tokens = language_model_loss(model, {"input_ids": ids, "labels": ids})
    (total / tokens).backward()
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 1024, 2048])
    options = parser.parse_args()
    dtype = getattr(torch, options.dtype)
    packed, plain = models(options.hidden, options.layers, options.vocabulary, dtype)
    count = sum(parameter.numel() for parameter in packed.parameters()) / 1e6
    print(
        f"{count:.0f} million parameters, {options.dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    for length in options.lengths:
        ids = torch.randint(0, options.vocabulary, (1, length))
        for model in (packed, plain):
            step(model, ids, dtype)
        pairs = [(step(packed, ids, dtype), step(plain, ids, dtype)) for _ in range(options.steps)]
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        mine, theirs = (statistics.median(times) for times in zip(*pairs, strict=True))
        print(f"{length:5} tokens: octavo {mine:.2f} s, {options.dtype} {theirs:.2f} s, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
