"""How far a model's predictions are from another's: Kullback-Leibler divergence over a text.

Example:
    >>> result = divergence(model, base, ids, window=256)
    >>> result.kl_mean < 0.01, result.top1_agreement > 0.9
    (True, True)
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .scoring import row_chunks


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

    @classmethod
    def of(cls, kl: torch.Tensor, agreed: torch.Tensor) -> "Divergence":
        """From each token's divergence [tokens] and whether both models agree on it [tokens]."""
        # numpy's, since torch's quantile takes 16 million values at most.
        p99 = float(np.quantile(kl.numpy(), 0.99))
        return cls(kl.mean().item(), p99, kl.max().item(), agreed.double().mean().item(), len(kl))


def token_divergence(base: torch.Tensor, ours: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Compare predictions row by row, in float64.

    Args:
        base, ours: logits [n, vocabulary].

    Returns:
        KL(base ‖ ours) in nats, float64 [n], and whether both find the same token likeliest, bool [n]; on the CPU.
    """
    kl, agreed = [], []
    for part in row_chunks(*ours.shape):
        ours_log = ours[part].double().log_softmax(-1)
        base_log = base[part].double().log_softmax(-1)
        agreed.append((ours_log.argmax(-1) == base_log.argmax(-1)).cpu())
        share = base_log.exp()
        # A token that the base rules out (a logit of -inf) adds nothing.
        kl.append(torch.where(share > 0, share * (base_log - ours_log), 0.0).sum(-1).cpu())
    return torch.cat(kl), torch.cat(agreed)


def divergence(model: Any, base: Any, ids: torch.Tensor, window: int) -> Divergence:
    """Compare the predictions of two models, both in memory, at every token of a text.

    `octavo.evaluation.evaluate` does so with one model in memory at a time, and by sliding window.

    Args:
        model, base: causal language models with one vocabulary.
        ids: int [tokens]; cut into windows of `window` tokens that do not overlap.
    """
    found = []
    with torch.inference_mode():
        for start in range(0, len(ids), window):
            inputs = ids[None, start : start + window]
            ours = model(inputs.to(model.device), use_cache=False).logits[0]
            theirs = base(inputs.to(base.device), use_cache=False).logits[0]
            found.append(token_divergence(theirs.to(ours.device), ours))
    kl, agreed = zip(*found, strict=True)
    return Divergence.of(torch.cat(kl), torch.cat(agreed))
