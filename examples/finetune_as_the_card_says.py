"""The fine-tuning that the card of `mrm8488/bertin-gpt-j-6B-ES-8bit` describes in words, as a loop one can see.

"All of the large weight-matrices are frozen in 8-bit, and you only train small adapters and optionally 1d tensors (layernorm
scales, biases)", with "gradient checkpoints to store one only activation per layer" and "scalable fine-tuning with LoRA and 8-bit
Adam", starting "with the original hyperparameters from the LoRA paper" (Hu et al. 2021, GPT-2: rank 4, alpha 32, dropout 0.1,
2e-4 with a linear schedule, weight decay 0.01, batches of 8).

    python examples/finetune_as_the_card_says.py                                  # the small model that ships with Octavo
    python examples/finetune_as_the_card_says.py mrm8488/bertin-gpt-j-6B-ES-8bit --text poems.txt --norms-and-biases

Without a checkpoint the shipped GPT-J is first written in the published layout, by bitsandbytes. `octavo finetune MODEL --preset
model-card` is the same in one command, with data sets, resuming and a report.
"""

import argparse
import hashlib
import math
import shutil
from pathlib import Path

import bitsandbytes
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, get_linear_schedule_with_warmup

import octavo
from octavo import demo
from octavo.compat import GPTJForCausalLM

LAYERS = ["q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out", "wte", "lm_head"]
NORMS = ["ln_1", "ln_f"]


def write_published(model_folder: Path, out: Path) -> Path:
    """Write a plain GPT-J as the published checkpoints are: uint8 `weight`, `absmax`, `code`, blocks of 4096, one pickle."""
    from safetensors.torch import load_file

    out.mkdir(parents=True, exist_ok=True)
    state = {}
    for name, weight in load_file(model_folder / "model.safetensors").items():
        if weight.dim() != 2:
            state[name] = weight
            continue
        # The default codebook of bitsandbytes is the dynamic map.
        qdata, how = bitsandbytes.functional.quantize_blockwise(weight.float().contiguous(), blocksize=4096)
        state[name], layer = qdata.view(weight.shape), name.removesuffix(".weight")
        state[f"{layer}.absmax"], state[f"{layer}.code"] = how.absmax, how.code
    torch.save(state, out / "pytorch_model.bin")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder / name, out / name)
    return out


def digest(model) -> str:
    """Of all frozen bytes: the same before and after."""
    found = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters(), key=lambda pair: pair[0]):
        if isinstance(parameter, octavo.OctavoTensor):
            found.update(parameter.qdata.cpu().numpy().tobytes())
    return found.hexdigest()[:12]


def loss_on(model, pieces: torch.Tensor, batch: int) -> float:
    """Mean loss a token, without dropout."""
    model.eval()
    with torch.no_grad():
        losses = [model(ids, labels=ids).loss.item() * len(ids) for ids in pieces.split(batch)]
    model.train()
    return sum(losses) / len(pieces)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "checkpoint",
        nargs="?",
        help="a published 8-bit GPT-J: a hub id or a folder (default: the shipped model)",
    )
    parser.add_argument("--text", type=Path, default=demo.TEXT / "proverbios.txt", help="what to learn")
    parser.add_argument("--output", type=Path, default=Path("card-adapter"), help="a PEFT adapter folder")
    parser.add_argument("--norms-and-biases", action="store_true", help="also train layer norms and biases")
    parser.add_argument("--steps", type=int, default=40, help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, help="pieces of text a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=128, help="tokens a piece (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="default: %(default)s")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    checkpoint = options.checkpoint or write_published(demo.MODEL, options.output / "published-model")

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = GPTJForCausalLM.from_pretrained(checkpoint, low_cpu_mem_usage=True).to(device)
    frozen = digest(model)

    # Freezes everything, turns checkpointing on, and makes gradients reach the first layer's adapters.
    model = octavo.prepare_for_training(model)
    model = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=32,
            lora_dropout=0.1,
            target_modules=LAYERS,
            bias="all" if options.norms_and_biases else "none",
            modules_to_save=NORMS if options.norms_and_biases else None,
        ),
    )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        # float16 would round the small steps of training away.
        parameter.data = parameter.data.float()
    model.print_trainable_parameters()

    text = options.text.read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"])
    pieces = ids[: len(ids) // options.length * options.length].view(-1, options.length).to(device)
    held_out = max(1, len(pieces) // 5)
    if len(pieces) < 2:
        raise SystemExit(f"{options.text}: expected at least {2 * options.length} tokens, found {len(ids)}")
    learned, validation = pieces[:-held_out], pieces[-held_out:]

    optimizer = bitsandbytes.optim.AdamW8bit(trained, lr=options.learning_rate, weight_decay=0.01)
    schedule = get_linear_schedule_with_warmup(optimizer, math.ceil(options.steps / 10), options.steps)
    mixed = torch.autocast(device, dtype=torch.float16, enabled=device == "cuda")
    scaler = torch.amp.GradScaler(device, enabled=device == "cuda")
    with mixed:
        before = loss_on(model, validation, options.batch)
    for step in range(1, options.steps + 1):
        batch = learned[torch.randint(len(learned), (options.batch,), device=device)]
        with mixed:
            loss = model(batch, labels=batch).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0 or step == options.steps:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    with mixed:
        after = loss_on(model, validation, options.batch)

    assert digest(model) == frozen, "a frozen byte has changed"
    model.save_pretrained(options.output)
    print(f"held out, the last fifth of the text: loss {before:.4f} before, {after:.4f} after")
    print(f"the 8-bit weights are as they were ({frozen}); the adapter is in {options.output}")
    print(f"\nNext:  octavo generate {checkpoint} --adapter {options.output} {demo.PROMPT!r}")


if __name__ == "__main__":
    main()
