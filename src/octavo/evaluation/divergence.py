"""How far a model's predictions are from another's: Kullback-Leibler divergence over a text.

Example:
    >>> result = divergence(model, base, ids, window=512)  # doctest: +SKIP
    >>> result.kl_mean, result.top1_agreement              # doctest: +SKIP
    (0.0015, 0.981)
"""

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Divergence:
    """Divergence of a model from a base, over the tokens of a text.

    Attributes:
        kl_mean, kl_p99, kl_max: KL(base ‖ model) in nats: mean, 99th percentile, maximum.
        top1_agreement: share of tokens at which both find the same token likeliest.
        tokens: tokens compared.
    """

    kl_mean: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    tokens: int


def divergence(model: Any, base: Any, ids: torch.Tensor, window: int) -> Divergence:
    """Compare the predictions of two models at every token.

    Args:
        model, base: causal language models with one vocabulary, both in memory.
        ids: int [tokens]; cut into windows of `window` tokens that do not overlap.
    """
    found, agreed = [], 0
    with torch.inference_mode():
        for start in range(0, len(ids), window):
            inputs = ids[None, start : start + window]
            ours = model(inputs.to(model.device), use_cache=False).logits[0].double().log_softmax(-1).cpu()
            theirs = base(inputs.to(base.device), use_cache=False).logits[0].double().log_softmax(-1).cpu()
            found.append((theirs.exp() * (theirs - ours)).sum(-1))
            agreed += int((ours.argmax(-1) == theirs.argmax(-1)).sum())
    kl = torch.cat(found)
    return Divergence(kl.mean().item(), kl.quantile(0.99).item(), kl.max().item(), agreed / len(kl), len(kl))
