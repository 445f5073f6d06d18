"""Campaign: silently wrong numbers.

    python -m tests.campaigns.differential --count 3000 --seed 1     # hours
    python -m tests.campaigns.differential --count 30

A random architecture, with random sizes, in a random type, quantized with a random block size, codebook, type of scales and
skip list, run by the kernels of a random instruction set. Reference: the plain model on the de-quantized weights
(`dequantize_model` of a copy). In each case:

    logits             no farther from float64 than the plain model in the same type is, within a factor
    gradients          of the loss by the input embeddings, likewise
    one by one         tokens decoded with a cache give the logits of the whole pass
    saved and loaded   the same parameters bit for bit and logits as above, from `save_pretrained` and from a streamed conversion
                       of the plain model

A fault is printed with the seed that repeats it, and the exit status is 1.
"""

import copy
import random
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

import octavo
from octavo.checkpoint import convert
from octavo.model import dequantize_model
from octavo.ops import cpu

from ..models.checkpoints import build
from . import runner

VOCABULARY = 97
# Tokens of a text that are also decoded one after another.
ONE_BY_ONE = 20
# How much farther from float64 than the plain model's own error, and what is always allowed, relative to the size of the logits.
FACTOR = 2.0
ALWAYS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def configuration(rng: random.Random):
    """A small model of any of some twelve families, its sizes not always multiples of anything."""
    import transformers as tf

    heads = rng.choice([2, 4])
    width = heads * rng.choice([16, 24, 40, 48])
    inner = rng.choice([128, 200, 300, 333])
    layers = rng.choice([1, 2])
    tied = rng.random() < 0.4
    llama = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": rng.choice([1, heads]),
        "max_position_embeddings": 128,
        "tie_word_embeddings": tied,
    }
    gpt = {"vocab_size": VOCABULARY, "n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 128}
    neox = {key: llama[key] for key in llama if key != "num_key_value_heads"}
    makers = {
        "llama": lambda: tf.LlamaConfig(**llama, attention_bias=rng.random() < 0.3),
        "mistral": lambda: tf.MistralConfig(**llama),
        "qwen2": lambda: tf.Qwen2Config(**llama),
        "qwen3": lambda: tf.Qwen3Config(**llama, head_dim=16),
        "gemma2": lambda: tf.Gemma2Config(**{**llama, "tie_word_embeddings": True}, head_dim=16),
        "phi": lambda: tf.PhiConfig(**llama),
        "mixtral": lambda: tf.MixtralConfig(**llama, num_local_experts=3),
        "qwen3_moe": lambda: tf.Qwen3MoeConfig(
            **llama, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48
        ),
        "gpt2": lambda: tf.GPT2Config(**gpt, tie_word_embeddings=tied),
        "gptj": lambda: tf.GPTJConfig(**gpt, rotary_dim=8, tie_word_embeddings=tied),
        "gpt_neox": lambda: tf.GPTNeoXConfig(**neox),
        "opt": lambda: tf.OPTConfig(
            vocab_size=VOCABULARY, hidden_size=width, ffn_dim=inner, num_hidden_layers=layers, num_attention_heads=heads,
            max_position_embeddings=128, word_embed_proj_dim=width,
        ),
        "bloom": lambda: tf.BloomConfig(vocab_size=VOCABULARY, hidden_size=width, n_layer=layers, n_head=heads),
    }  # fmt: skip
    name = rng.choice(list(makers))
    return name, makers[name]()


def quantization(rng: random.Random, names: list[str]) -> octavo.OctavoConfig:
    codebook = rng.choice(["fitted", "fitted", "dynamic"])
    leaves = sorted({name.split(".")[-2] for name in names if "." in name})
    return octavo.OctavoConfig(
        codebook=codebook,
        block_size=rng.choice([16, 24, 32, 48, 64, 100, 128, 4096]),
        scales=rng.choice(["float16", "float32"]),
        skip=rng.sample(leaves, rng.choice([0, 0, 0, 1])),
    )


def case(seed: int, folder: Path) -> tuple[str, list[str]]:
    """One case → (what it was, its faults)."""
    rng = random.Random(seed)
    name, config = configuration(rng)
    dtype = rng.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16])
    if name in ("mixtral", "qwen3_moe"):
        dtype = torch.float32  # a rounding may send a token to another expert
    isa = rng.choice(cpu.status()["supported"]) if cpu.AVAILABLE else "none"
    torch.set_num_threads(rng.choice([1, 2]))
    if cpu.AVAILABLE:
        cpu.native.library.select(isa)
    torch.manual_seed(seed)
    plain = build(config)
    how = quantization(rng, [name for name, p in plain.named_parameters() if p.dim() >= 2])
    plain.save_pretrained(folder / "plain")
    model = octavo.quantize_model(copy.deepcopy(plain), how).to(dtype)
    reference = dequantize_model(copy.deepcopy(model), torch.float32)
    exact = copy.deepcopy(reference).to(torch.float64)
    same_type = reference.to(dtype)
    if hasattr(config, "num_local_experts") or hasattr(config, "num_experts"):
        # The others take no float64, and sizes that are multiples of 16 bytes alone.
        exact.set_experts_implementation("eager")
        same_type.set_experts_implementation("eager")
    tokens = rng.choice([1, 2, 5, 17, 70])
    ids = torch.randint(
        0, VOCABULARY, (rng.choice([1, 2]), tokens), generator=torch.Generator().manual_seed(seed)
    )
    what = f"{name}, {str(dtype)[6:]}, {isa}, {how.codebook}/{how.block_size} {how.scales}, skip {how.skip}, {tuple(ids.shape)}"
    faults = []

    def compare(
        label: str, found: torch.Tensor, naive: torch.Tensor, right: torch.Tensor, times: int = 1
    ) -> None:
        size = right.norm().clamp_min(1e-30)
        ours, theirs = ((each.double() - right).norm() / size for each in (found, naive))
        if not ours <= FACTOR * theirs + times * ALWAYS[dtype]:
            faults.append(f"{label}: error {ours:.2e}, plain {theirs:.2e}")

    with torch.no_grad():
        logits = model(ids).logits
        compare("logits", logits, same_type(ids).logits, exact(ids).logits)
    # A rounding in 16 bits may switch a ReLU.
    gradients = [_gradient(each, ids) for each in (model, same_type, exact)]
    compare("gradients", *gradients, 1 if dtype == torch.float32 else 5)
    if tokens > 1:
        with torch.no_grad():
            past, parts, first = None, [], min(tokens, ONE_BY_ONE)
            for at in range(first):
                out = model(ids[:, at : at + 1], past_key_values=past, use_cache=True)
                past = out.past_key_values
                parts.append(out.logits)
            compare("one by one", torch.cat(parts, 1), logits[:, :first], exact(ids).logits[:, :first])
    model.save_pretrained(folder / "eight")
    convert(folder / "plain", folder / "streamed", how)
    with torch.no_grad():
        for saved in ("eight", "streamed"):
            again = octavo.load(folder / saved, dtype=dtype, device="cpu")
            # Attention of our own is chosen by `octavo.load`: the same arithmetic within a rounding.
            compare(f"loaded from {saved}", again(ids).logits, model(ids).logits, exact(ids).logits)
            for key, value in model.state_dict().items():
                found = again.state_dict().get(key)
                if found is None or type(found) is not type(value) or not _same(found, value):
                    faults.append(f"loaded from {saved}: {key} differs")
                    break
    if octavo.fallbacks():
        faults.append(f"de-quantized whole weights: {octavo.fallbacks()}")
    return what, faults


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    if hasattr(a, "qdata"):
        return all(torch.equal(getattr(a, part), getattr(b, part)) for part in ("qdata", "absmax", "code"))
    return torch.equal(a, b)


def _gradient(model, ids: torch.Tensor) -> torch.Tensor:
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.float().pow(2).mean().backward()
    return embedded.grad


def campaign(
    count: int, seed: int, seconds: float | None = None, say=print
) -> tuple[dict[str, int], list[str]]:
    """Returns (family → cases, faults)."""
    families: Counter = Counter()
    faults = []
    for number in runner.numbers(seed, count, seconds):
        with tempfile.TemporaryDirectory() as folder:
            try:
                what, found = case(number, Path(folder))
            except Exception as error:  # whatever it is, it is a find
                what, found = "", [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
        families[what.split(",")[0] or "failed"] += 1
        for fault in found:
            faults.append(f"--seed {number} --count 1: {what}: {fault}")
            say(faults[-1])
    return dict(families), faults


def main() -> int:
    options = runner.parser(__doc__, 30, "cases").parse_args()
    table, faults = campaign(options.count, options.seed, options.seconds, runner.say)
    runner.say(table)
    return runner.finish(options, table, faults)


if __name__ == "__main__":
    sys.exit(main())
