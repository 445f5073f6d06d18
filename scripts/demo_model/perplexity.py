"""Measure the perplexity of a causal model on text files, by a protocol that the output states.

The file is tokenized whole, as it is, with no token added before it. A window of 512 tokens moves over it
by 256: the first window scores all of its tokens but the first of the file, each later one its last 256
(the last window, what is left). So every token but the first is scored once, with at least 256 tokens
before it from the second window on. Stored weights are computed with in float32.

Printed: the loss per token in nats; its exponential, the perplexity per token; the exponential of the loss a
byte (comparable between tokenizers); and bits per byte.

    python scripts/demo_model/perplexity.py src/octavo/demo/model src/octavo/demo/text/*.txt
"""

import argparse
import math
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="folder of a model with its tokenizer")
    parser.add_argument("texts", type=Path, nargs="+", help="UTF-8 text files")
    parser.add_argument("--window", type=int, default=512, help="tokens (default: %(default)s)")
    parser.add_argument("--stride", type=int, default=256, help="tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2, help="default: %(default)s")
    options = parser.parse_args()
    if not 0 < options.stride < options.window:
        parser.error(
            f"--stride must lie between 1 and {options.window - 1} (--window - 1), found {options.stride}"
        )

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).eval()
    print(f"{options.model}: stored weights in float32, window {options.window}, stride {options.stride}\n")
    print(
        "| text | bytes | tokens scored | loss per token | perplexity per token | per byte | bits per byte |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for file in options.texts:
        text = file.read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
        if len(ids) < 2:
            raise SystemExit(f"{file} has {len(ids)} tokens: at least two are needed to score one")
        nats, scored = score(model, ids, options.window, options.stride)
        size = len(text.encode())
        print(
            f"| {file.name} | {size:,} | {scored:,} | {nats / scored:.4f} | {math.exp(nats / scored):.3f} "
            f"| {math.exp(nats / size):.4f} | {nats / size / math.log(2):.4f} |"
        )


@torch.inference_mode()
def score(model: torch.nn.Module, ids: Tensor, window: int, stride: int) -> tuple[float, int]:
    """(Sum of the losses in nats, number of tokens scored) of the ids, [tokens], by the protocol above."""
    nats, done = 0.0, 1
    for start in range(0, len(ids), stride):
        end = min(start + window, len(ids))
        logits = (
            model(input_ids=ids[None, start:end], use_cache=False).logits[0].float()
        )  # [window, vocabulary]
        losses = functional.cross_entropy(logits[done - start - 1 : -1], ids[done:end], reduction="none")
        nats += losses.double().sum().item()
        done = end
        if end == len(ids):
            break
    return nats, done - 1


if __name__ == "__main__":
    main()
