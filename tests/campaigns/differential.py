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
    merged             a random LoRA adapter merged into the folder of 8 bits: weights that it does not touch stay,
                       the others are PEFT's own merge of the plain float32 model, within what their type costs
    exported           to GGUF in float32, and read back: the same weights, bit for bit (architectures that transformers reads)

A fault is printed with the seed that repeats it, and the exit status is 1.
"""

import copy
import random
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import octavo
from octavo.checkpoint import convert, open_source
from octavo.export import export_gguf
from octavo.merging.merge import merge
from octavo.model import dequantize_model
from octavo.ops import cpu

from ..models import dense, move_adapters
from ..models.checkpoints import build
from ..models.tokenizers import byte_level_tokenizer
from . import runner

VOCABULARY = 97
# Tokens of a text that are also decoded one after another.
ONE_BY_ONE = 20
# How much farther from float64 than the plain model's own error, and what is always allowed, relative to the size of the logits.
FACTOR = 2.0
ALWAYS = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
# Architectures that `octavo export` writes and transformers reads.
EXPORTED = ("llama", "mistral", "qwen2", "gpt2")
# What storing merged weights may add, as a squared error relative to the weights, by the type that they are merged to. Adapters
# are so large that a wrong merge is ten times beyond.
MERGED = {"8bit": 1e-3, "float16": 1e-6, "bfloat16": 3e-5}


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
    # transformers' GGUF support takes 1024 positions for granted.
    gpt = {"vocab_size": VOCABULARY, "n_embd": width, "n_layer": layers, "n_head": heads, "n_positions": 1024}
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
            **llama, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48,
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
    same_type = copy.deepcopy(reference).to(dtype)
    if hasattr(config, "num_local_experts") or hasattr(config, "num_experts"):
        # The others take no float64, and sizes that are multiples of 16 bytes alone.
        for each in (exact, same_type, *([model] if "experts" in how.skip else [])):
            each.set_experts_implementation("eager")
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
    # A rounding in 16 bits may switch a ReLU: of few tokens a tenth of the gradient (OPT, seed 1866: one of 600 units, whose
    # input is -2.3e-4, known to 1e-3).
    gradients = [_gradient(each, ids) for each in (model, same_type, exact)]
    compare("gradients", *gradients, 1 if dtype == torch.float32 else 50 if name == "opt" else 5)
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
            if "experts" in how.skip:
                again.set_experts_implementation("eager")
            # Attention of our own is chosen by `octavo.load`: the same arithmetic within a rounding.
            compare(f"loaded from {saved}", again(ids).logits, model(ids).logits, exact(ids).logits)
            for key, value in model.state_dict().items():
                found = again.state_dict().get(key)
                if found is None or type(found) is not type(value) or not _same(found, value):
                    faults.append(f"loaded from {saved}: {key} differs")
                    break
    if octavo.fallbacks():
        faults.append(f"de-quantized whole weights: {octavo.fallbacks()}")
    to = rng.choice(list(MERGED))
    faults += [f"merged to {to}: {fault}" for fault in merged(folder, reference, to, rng)]
    # Nor does it read biases of attention where the architecture's own models have none.
    if config.model_type in EXPORTED and not getattr(config, "attention_bias", False):
        faults += [f"exported: {fault}" for fault in exported(folder, reference)]
    return what, faults


def merged(folder: Path, reference, to: str, rng: random.Random) -> list[str]:
    """The faults of an adapter merged into `folder`/eight, whose weights `reference` holds in float32."""
    from peft import LoraConfig, get_peft_model

    ends = (reference.get_input_embeddings(), reference.get_output_embeddings())
    # PEFT merges into what is tied, and so changes both; Octavo unties.
    leaves = sorted(
        {
            name.rpartition(".")[2]
            for name, module in reference.named_modules()
            if hasattr(module, "weight")
            and module.weight.dim() == 2
            and not (reference.config.tie_word_embeddings and module in ends)
        }
    )
    options = LoraConfig(
        r=rng.choice([1, 4, 7]),
        lora_alpha=rng.choice([4, 16]),
        use_rslora=rng.random() < 0.3,
        target_modules=rng.sample(leaves, rng.randint(1, len(leaves))),
        bias=rng.choice(["none", "none", "all"]),
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(copy.deepcopy(reference).float(), options)
    move_adapters(model, seed=rng.randrange(1000), scale=0.2)
    model.save_pretrained(folder / "adapter")
    merge(folder / "eight", folder / "adapter", folder / "merged", to)
    right = dict(model.merge_and_unload().named_parameters())
    plain, faults = dict(reference.named_parameters()), []
    before = dense(octavo.load(folder / "eight", dtype="float32", device="cpu"))
    load = octavo.load if to == "8bit" else AutoModelForCausalLM.from_pretrained
    after = dense(load(folder / "merged", dtype=torch.float32))
    for name, value in right.items():
        if to == "8bit" and torch.equal(value, plain[name]):
            if not torch.equal(after[name], before[name]):
                faults.append(f"{name} was not touched, and is another")
            continue
        error = ((after[name] - value).norm() / value.norm().clamp_min(1e-30)).square()
        if not error <= MERGED[to]:
            faults.append(f"{name}: squared error {error:.1e}")
    return faults


def exported(folder: Path, reference) -> list[str]:
    """The faults of `folder`/eight, whose weights `reference` holds in float32, as a GGUF file."""
    _tokenizer().save_pretrained(folder / "eight")
    export_gguf(folder / "eight", folder / "exported.gguf", "f32")
    with open_source(folder / "exported.gguf") as source:
        right = dict(reference.named_parameters())
        if missing := right.keys() ^ source.tensors.keys():
            return [f"other parameters: {sorted(missing)}"]
        return [
            f"{name} differs" for name, value in right.items() if not torch.equal(source.read(name), value)
        ]


@cache
def _tokenizer():
    return byte_level_tokenizer()


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
