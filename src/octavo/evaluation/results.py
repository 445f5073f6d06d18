"""What measuring finds: a model's own result, its comparison with a base, both together; in words and as JSON."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from . import statistics
from .divergence import Divergence
from .perplexity import Perplexity
from .scoring import window_sizes
from .texts import Tokens

SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Measurement:
    """What one model did on the texts, token by token.

    Attributes:
        name: the model, as it was named.
        dtype, device: what it computed in, and where.
        tokens: the texts.
        window, stride: as in `octavo.evaluation.scoring`.
        nll: negative log-likelihood of each token scored, float64 [tokens], in nats.
        kl, agreed: against a base: KL(base ‖ model) of each, and whether the likeliest token is the same; else None.
        seconds: time of the run, loading excluded.
    """

    name: str
    dtype: str
    device: str
    tokens: Sequence[Tokens]
    window: int
    stride: int
    nll: torch.Tensor
    kl: torch.Tensor | None = None
    agreed: torch.Tensor | None = None
    seconds: float = 0.0

    @property
    def sizes(self) -> list[int]:
        """Tokens that each window scores."""
        return [n for each in self.tokens for n in window_sizes(len(each.ids), self.window, self.stride)]

    @property
    def perplexity(self) -> Perplexity:
        words, size = sum(t.words for t in self.tokens), sum(t.bytes for t in self.tokens)
        return Perplexity(float(self.nll.sum()), len(self.nll), words, size, self.window, self.stride)


@dataclass(frozen=True)
class Comparison:
    """A model against a base.

    Attributes:
        against: the base.
        base: the base's perplexity.
        difference: of the negative log-likelihoods, model minus base, in nats per token.
        divergence: of the predictions.
        base_dtype: type the base computed in.
    """

    against: str
    base: Perplexity
    difference: statistics.Difference
    divergence: Divergence
    base_dtype: str

    @property
    def p_value(self) -> float | None:
        return self.difference.p_value

    @property
    def kl_mean(self) -> float:
        return self.divergence.kl_mean

    @property
    def verdict(self) -> str:
        """What the test says at 5 %: "better", "worse", "indistinguishable"; "undecided" on too short a text."""
        if self.p_value is None:
            return "undecided"
        if self.p_value >= SIGNIFICANT:
            return "indistinguishable"
        return "worse" if self.difference.mean > 0 else "better"

    @property
    def sentence(self) -> str:
        """The verdict in words, with what the text could not have shown."""
        low, high, p = self.difference.low, self.difference.high, self.p_value
        if low is None or high is None or p is None:
            return (
                f"The text is too short to tell: {self.difference.units} {self.difference.unit}(s), at least "
                f"{statistics.FEWEST_UNITS} are needed."
            )
        change = f"{percent(self.difference.mean)} (95 % interval {percent(low)} to {percent(high)})"
        shown = f"p = {p:.4f}" if p >= 1e-4 else f"p = {p:.1e}"
        if self.verdict == "indistinguishable":
            return (
                f"Indistinguishable from the base on this text: the change of perplexity, {change}, is no more than chance gives "
                f"({shown}). A change within the interval may still be there."
            )
        return f"The model is {self.verdict} than the base on this text: perplexity changes by {change}, {shown}."


@dataclass(frozen=True)
class Evaluation:
    """A model measured, and compared if there was a base.

    Attributes:
        perplexity_interval: of the model itself: how far another text of the same kind might lead; None if the text is too short.
        bits_per_weight: stored bits per weight of its matrices, scales and codebooks included; None if unknown.
    """

    model: str
    measured: Measurement
    interval: statistics.Interval
    comparison: Comparison | None = None
    seed: int = statistics.SEED
    bits_per_weight: float | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        return self.measured.perplexity.perplexity

    @property
    def perplexity_interval(self) -> tuple[float, float] | None:
        return exp_interval(self.interval)

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it: plain keys, one level."""
        result = self.measured.perplexity
        found: dict[str, Any] = {
            "model": self.model,
            "perplexity": result.perplexity,
            "perplexity_interval": self.perplexity_interval,
            "word_perplexity": result.word_perplexity if math.isfinite(result.word_perplexity) else None,
            "bits_per_byte": result.bits_per_byte,
            "nll": result.nll,
            "tokens": result.tokens,
            "words": result.words,
            "bytes": result.bytes,
            "window": result.window,
            "stride": result.stride,
            "protocol": result.protocol,
            "texts": [text.name for text in self.measured.tokens],
            "tokens_sha256": [text.digest for text in self.measured.tokens],
            "dtype": self.measured.dtype,
            "device": self.measured.device,
            "bits_per_weight": self.bits_per_weight,
            "seconds": self.measured.seconds,
            "units": self.interval.units,
            "unit": self.interval.unit,
            "resamples": statistics.RESAMPLES,
            "confidence": statistics.CONFIDENCE,
            "seed": self.seed,
            **self.about,
        }
        if self.comparison is not None:
            found |= comparison_dict(self.comparison)
        return found


def comparison_dict(comparison: Comparison) -> dict[str, Any]:
    """A comparison, as JSON takes it. `difference` and its interval are in nats per token."""
    difference, divergence = comparison.difference, comparison.divergence
    known = difference.low is not None and difference.high is not None
    return {
        "against": comparison.against,
        "base_perplexity": comparison.base.perplexity,
        "base_dtype": comparison.base_dtype,
        "difference": difference.mean,
        "difference_interval": [difference.low, difference.high] if known else None,
        "perplexity_ratio": math.exp(difference.mean),
        "perplexity_ratio_interval": exp_interval(difference),
        "p_value": difference.p_value,
        "test": "sign-flip randomization test, paired by unit; interval by percentile bootstrap over units",
        "verdict": comparison.verdict,
        "kl_mean": divergence.kl_mean,
        "kl_p99": divergence.kl_p99,
        "kl_max": divergence.kl_max,
        "top1_agreement": divergence.top1_agreement,
    }


def exp_interval(found: statistics.Interval) -> tuple[float, float] | None:
    """An interval in nats per token as one of perplexity (or, of a difference, of its ratio)."""
    return None if found.low is None or found.high is None else (math.exp(found.low), math.exp(found.high))


def percent(nats: float) -> str:
    """A difference in nats per token as a change of perplexity in percent, two digits of it."""
    change = 100 * math.expm1(nats)
    digits = 2 if abs(change) >= 0.1 or change == 0 else min(8, 1 - math.floor(math.log10(abs(change))))
    return f"{change:+.{digits}f} %"
