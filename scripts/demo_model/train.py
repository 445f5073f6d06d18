"""Train the demonstration model: a Spanish GPT-J of 7 million parameters, with its tokenizer, on a CPU.

It reads what `prepare_text.py` wrote, makes a byte-level BPE of 4096 tokens from the training text, and
trains transformers' own `GPTJForCausalLM` with a plain PyTorch loop. Two cores take it to readable Spanish in
about an hour:

    python scripts/demo_model/train.py --text build/demo_text/train.txt --work build/demo_model --minutes 60

The learning rate warms up, stays, and comes down to zero over the last part of the budget. The budget is
`--tokens` or `--minutes`, whichever ends first, so that a machine shared with others still lands on time. A
run can be stopped at any moment (SIGINT and SIGTERM save a checkpoint first) and continued with `--resume`;
with `--resume --cooldown` the learning rate starts to come down at once and reaches zero at the end of the
budget:

    python scripts/demo_model/train.py ... --resume --cooldown --minutes 80

`--export-only` writes the model folder from the last checkpoint: float16 weights, configurations, tokenizer.
"""

import argparse
import json
import math
import random
import signal
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, GenerationConfig, GPTJConfig, GPTJForCausalLM, PreTrainedTokenizerFast

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "octavo" / "demo"
END = "<|endoftext|>"
VOCABULARY = 4096
CONTEXT = 512


def main() -> None:
    options = parse_options()
    torch.manual_seed(options.seed)
    torch.set_num_threads(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    checkpoint_file = options.work / "checkpoint.pt"

    documents = options.text.read_text(encoding="utf-8").strip().split("\n\n")
    tokenizer = load_or_train_tokenizer(documents, options.work / "tokenizer")
    train = [document + [tokenizer.eos_token_id] for document in tokenizer(documents)["input_ids"]]
    held_out = held_out_windows(options.held_out, tokenizer)
    epoch_tokens = sum(map(len, train))
    model = GPTJForCausalLM(configuration(options))
    for block in model.transformer.h:
        block.attn._attn = causal_attention  # twice the speed of transformers' own
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {epoch_tokens:,} training tokens an epoch", flush=True)

    optimizer = make_optimizer(model, options.weight_decay)
    state = {"step": 0, "seconds": 0.0, "cooldown_from": options.cooldown_from}
    if options.resume or options.export_only:
        if not checkpoint_file.exists():
            raise SystemExit(f"there is no {checkpoint_file} to go on from: run without --resume first")
        saved = torch.load(checkpoint_file, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        state = saved["state"]
    if options.export_only:
        return export(model, tokenizer, options.export)

    batch_tokens = options.batch * CONTEXT
    total_steps = options.tokens // batch_tokens
    spent = state["seconds"]
    began = time.monotonic()

    def progress() -> float:
        state["seconds"] = spent + time.monotonic() - began
        return max(state["step"] / total_steps, state["seconds"] / 60 / options.minutes)

    if options.cooldown:
        state["cooldown_from"] = min(state["cooldown_from"], progress())

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: stop.append(True))

    loss_of = torch.compile(loss) if options.compile else loss
    windows = Windows(train, options.batch, options.seed)
    model.train()
    first_step = state["step"]
    while (done := progress()) < 1 and not stop:
        rate = options.learning_rate * schedule(state["step"], done, options.warmup, state["cooldown_from"])
        for group in optimizer.param_groups:
            group["lr"] = rate
        batch = windows.batch(state["step"])  # [batch, CONTEXT + 1]
        total = 0.0
        for part in batch.split(options.micro_batch):
            part_loss = loss_of(model, part) * (len(part) / len(batch))
            part_loss.backward()
            total += part_loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        state["step"] += 1
        if not math.isfinite(total):
            raise SystemExit(f"the loss is {total} at step {state['step']}: --resume, --learning-rate lower")

        seen = state["step"] * batch_tokens
        if state["step"] % 10 == 0:
            speed = (state["step"] - first_step) * batch_tokens / (time.monotonic() - began)
            print(
                f"step {state['step']:5d}  tokens {seen / 1e6:6.2f}M  epoch {seen / epoch_tokens:5.2f}  "
                f"progress {done:5.1%}  lr {rate:.2e}  "
                f"loss {total:.4f}  {speed:6.0f} tokens/s",
                flush=True,
            )
        if state["step"] % options.save_every == 0:
            print(f"step {state['step']:5d}  held-out loss {evaluate(model, held_out):.4f}", flush=True)
            save(checkpoint_file, model, optimizer, state)

    progress()
    save(checkpoint_file, model, optimizer, state)
    export(model, tokenizer, options.export)
    tokens = state["step"] * batch_tokens
    record = {
        "parameters": parameters,
        "steps": state["step"],
        "tokens_seen": tokens,
        "epoch_tokens": epoch_tokens,
        "epochs": round(tokens / epoch_tokens, 2),
        "minutes": round(state["seconds"] / 60, 1),
        "finished": not stop,
        "held_out_loss": round(evaluate(model, held_out), 4),
        "options": {name: str(value) for name, value in vars(options).items()},
    }
    (options.work / "record.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record, indent=2), flush=True)


def parse_options() -> argparse.Namespace:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--text", type=Path, required=True, help="train.txt from prepare_text.py")
    parser.add_argument("--work", type=Path, required=True, help="folder of the tokenizer and the checkpoint")
    parser.add_argument(
        "--held-out",
        type=Path,
        default=PACKAGE / "text" / "heldout.txt",
        help="text for the held-out loss in the log (default: the package's own)",
    )
    parser.add_argument(
        "--export",
        type=Path,
        default=PACKAGE / "model",
        help="folder of the finished model (default: the package's own, src/octavo/demo/model)",
    )
    parser.add_argument("--export-only", action="store_true", help="write it from the last checkpoint, stop")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --work")
    parser.add_argument("--cooldown", action="store_true", help="bring the learning rate down from now on")
    parser.add_argument("--tokens", type=int, default=20_000_000, help="end at (default: %(default)s)")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="or after, earlier runs counted (default: no limit)"
    )
    parser.add_argument(
        "--cooldown-from", type=float, default=0.65, help="part before the cooldown (default: %(default)s)"
    )
    parser.add_argument("--warmup", type=int, default=100, help="steps of warm-up (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=1.5e-3, help="highest (default: %(default)s)")
    parser.add_argument("--weight-decay", type=float, default=0.1, help="of matrices (default: %(default)s)")
    parser.add_argument("--dropout", type=float, default=0.1, help="of the residuals (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="windows a step (default: %(default)s)")
    parser.add_argument("--micro-batch", type=int, default=8, help="windows at once (default: %(default)s)")
    parser.add_argument("--width", type=int, default=256, help="default: %(default)s")
    parser.add_argument("--layers", type=int, default=6, help="default: %(default)s")
    parser.add_argument("--heads", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--save-every", type=int, default=100, help="steps (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1909, help="default: %(default)s")
    parser.add_argument("--compile", action="store_true", help="use torch.compile (needs a C++ compiler)")
    return parser.parse_args()


def configuration(options: argparse.Namespace) -> GPTJConfig:
    """The architecture of GPT-J, small. The token `<|endoftext|>` begins, ends and pads."""
    return GPTJConfig(
        vocab_size=VOCABULARY,
        n_positions=CONTEXT,
        n_embd=options.width,
        n_layer=options.layers,
        n_head=options.heads,
        rotary_dim=options.width // options.heads // 2,
        resid_pdrop=options.dropout,
        embd_pdrop=options.dropout,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
        tie_word_embeddings=False,
    )


def load_or_train_tokenizer(documents: list[str], folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer in `folder`, or a new one trained on the documents and saved there."""
    if not (folder / "tokenizer.json").exists():
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=[END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        bpe.train_from_iterator(documents, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=bpe,
            bos_token=END,
            eos_token=END,
            pad_token=END,
            clean_up_tokenization_spaces=False,
        ).save_pretrained(folder)
        # Releases of transformers disagree about the name of this class; all of them know this one.
        settings = json.loads((folder / "tokenizer_config.json").read_text())
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


class Windows:
    """Batches of windows over the documents: every epoch in a new order, which the seed and the epoch fix."""

    def __init__(self, documents: list[list[int]], batch: int, seed: int) -> None:
        self.documents, self.size, self.seed = documents, batch, seed
        tokens = sum(map(len, documents))
        # One window fewer than fit: an epoch starts at a random offset, so that windows never fall alike.
        self.steps = ((tokens - 1) // CONTEXT - 1) // batch
        if self.steps < 1:
            raise SystemExit(f"{tokens} tokens are too few for a batch of {batch} windows: lower --batch")
        self._epoch: tuple[int, Tensor] | None = None

    def batch(self, step: int) -> Tensor:
        """The windows of a step, [batch, CONTEXT + 1]: each token predicts the one after it."""
        epoch, index = divmod(step, self.steps)
        if self._epoch is None or self._epoch[0] != epoch:
            generator = random.Random(f"{self.seed} {epoch}")
            order = generator.sample(self.documents, len(self.documents))
            stream = torch.tensor([token for document in order for token in document])
            offset = generator.randrange(CONTEXT)
            windows = stream[offset:].unfold(0, CONTEXT + 1, CONTEXT)
            self._epoch = epoch, windows[generator.sample(range(len(windows)), self.steps * self.size)]
        return self._epoch[1][index * self.size : (index + 1) * self.size]


def held_out_windows(file: Path, tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """About 30,000 tokens spread over the held-out text, [windows, CONTEXT + 1]. Only for the log."""
    documents = tokenizer(file.read_text(encoding="utf-8").strip().split("\n\n"))["input_ids"]
    stream = torch.tensor([token for document in documents for token in (*document, tokenizer.eos_token_id)])
    windows = stream.unfold(0, CONTEXT + 1, CONTEXT)
    return windows[:: max(1, len(windows) // 60)][:64].clone()


def make_optimizer(model: GPTJForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices, not biases and norms."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=True)


def schedule(step: int, progress: float, warmup: int, cooldown_from: float) -> float:
    """The factor on the learning rate: linear warm-up, then 1, then linear to 0 at the end of the budget."""
    if progress > cooldown_from:
        return max(0.0, (1 - progress) / (1 - cooldown_from))
    return min(1.0, (step + 1) / warmup)


def causal_attention(
    query: Tensor, key: Tensor, value: Tensor, attention_mask: object = None
) -> tuple[Tensor, None]:
    """Attention over [batch, heads, tokens, features]; without padding the mask is always the causal one."""
    query, key = query.to(value.dtype), key.to(value.dtype)
    return functional.scaled_dot_product_attention(query, key, value, is_causal=True), None


def loss(model: GPTJForCausalLM, windows: Tensor) -> Tensor:
    """Mean cross-entropy a token, in nats, of windows [batch, CONTEXT + 1]."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.inference_mode()
def evaluate(model: GPTJForCausalLM, windows: Tensor) -> float:
    """The mean loss over all windows, without dropout."""
    model.eval()
    parts = [loss(model, part).item() * len(part) for part in windows.split(16)]
    model.train()
    return sum(parts) / len(windows)


def save(file: Path, model: GPTJForCausalLM, optimizer: torch.optim.AdamW, state: dict) -> None:
    """Write the checkpoint beside its place, then move it: a stop in between leaves the earlier one whole."""
    partial = file.with_suffix(".partial")
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "state": state}, partial)
    partial.replace(file)


def export(model: GPTJForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model folder: configurations, model.safetensors in float16, the tokenizer."""
    half = GPTJForCausalLM(model.config)
    half.load_state_dict(model.state_dict())
    half = half.half()
    half.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=0, pad_token_id=0, do_sample=True, temperature=0.8, top_p=0.95
    )
    half.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((Path(tokenizer.name_or_path) / name).read_bytes())
    (folder / "model.safetensors").chmod(0o644)
    print(f"wrote {folder}", flush=True)


if __name__ == "__main__":
    main()
