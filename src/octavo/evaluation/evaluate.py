"""Measure a model on texts, by itself and against a base, with one model in memory at a time.

    base → predictions in a file → base freed → model → compared window by window with the file

Example:
    >>> from octavo.evaluation.evaluate import evaluate
    >>> found = evaluate("model-8bit", ["book.txt"], against="model")
    >>> round(found.perplexity), found.comparison.kl_mean < 0.01
    (21, True)

`measure` scores one loaded model; `evaluate` does the loading, the file and the statistics around it.
"""

import gc
import math
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.writing.output_directory import check_new_file
from ..config import OctavoConfig
from . import statistics
from .divergence import Divergence, token_divergence
from .logits import About, LogitsReader, LogitsWriter
from .models import load_as_it_is, stored_bits
from .perplexity import Perplexity
from .scoring import check_causal, choose_window, scored, token_nll, window_sizes
from .texts import Tokens, read_texts, tokenize

SIGNIFICANT = 0.05
# Called with what is running, tokens scored so far, and in all.
Progress = Callable[[str, int, int], None]


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


def measure(
    model: Any,
    tokens: Sequence[Tokens],
    window: int,
    stride: int,
    *,
    name: str = "",
    batch_size: int | None = None,
    base: LogitsReader | None = None,
    save: str | Path | None = None,
    progress: Progress | None = None,
) -> Measurement:
    """Score one loaded model.

    Args:
        model: a causal language model.
        tokens: the texts, from `octavo.evaluation.texts.tokenize`.
        window, stride: from `octavo.evaluation.scoring.choose_window`.
        name: what the model is called in results.
        base: another model's predictions on the same tokens, to compare with.
        save: a file to keep the predictions in.

    Raises:
        ValueError: if `base` is of other tokens, windows or another vocabulary, or is damaged; if the model's logits are
            no numbers.
    """
    check_causal(model)
    known = model.get_input_embeddings().weight.shape[0]
    largest = max(int(each.ids.max()) for each in tokens)
    if largest >= known:
        raise ValueError(
            f"{name}: the tokenizer gives token {largest}, the model knows {known}; the two do not belong together"
        )
    if base is not None:
        base.check(tokens, window, stride)
    total = sum(each.scored for each in tokens)
    nll = torch.empty(total, dtype=torch.float64)
    kl, agreed = torch.empty(total, dtype=torch.float64), torch.empty(total, dtype=torch.bool)
    started, at = time.perf_counter(), 0
    about = About.of(name, model, tokens, window, stride)
    with LogitsWriter(save, model, about) if save is not None else nullcontext() as writer:
        for each in tokens:
            for part in scored(model, each.ids, window, stride, batch_size, hidden_states=writer is not None):
                targets = each.ids[part.first : part.stop]
                here = slice(at, at + len(targets))
                nll[here] = token_nll(part.logits, targets)
                if not nll[here].isfinite().all():
                    raise ValueError(
                        f"{name}: its predictions for tokens {part.first} to {part.stop} of {each.name} are not finite; "
                        "try --dtype float32"
                    )
                if writer is not None:
                    writer.add(part, nll[here])
                if base is not None:
                    theirs = _base_rows(base, here, part.logits, targets)
                    kl[here], agreed[here] = token_divergence(theirs, part.logits)
                at = here.stop
                if progress is not None:
                    progress(name, at, total)
    return Measurement(
        name,
        str(model.dtype).removeprefix("torch."),
        str(model.device),
        tokens,
        window,
        stride,
        nll,
        kl if base is not None else None,
        agreed if base is not None else None,
        time.perf_counter() - started,
    )


def _base_rows(base: LogitsReader, here: slice, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The base's logits for the tokens in `here`, checked."""
    if base.about.vocabulary != logits.shape[1]:
        raise ValueError(
            f"--logits {base.path}: made by a model with {base.about.vocabulary} tokens in its vocabulary, found "
            f"{logits.shape[1]}; the models must share one"
        )
    theirs = base.rows(here.start, here.stop, logits.device)
    base.check_rows(here.start, token_nll(theirs, targets))
    return theirs


def compare_with(measured: Measurement, base: LogitsReader, seed: int = statistics.SEED) -> Comparison:
    """The statistics of a model that was measured with `base`."""
    assert measured.kl is not None and measured.agreed is not None
    ours = measured.perplexity
    theirs = Perplexity(float(base.nll.sum()), ours.tokens, ours.words, ours.bytes, ours.window, ours.stride)
    difference = statistics.compare(measured.nll.numpy(), base.nll.numpy(), measured.sizes, seed)
    divergence = Divergence.of(measured.kl, measured.agreed)
    return Comparison(base.about.model, theirs, difference, divergence, base.about.dtype)


def evaluate(
    model: str | Path,
    texts: Sequence[str],
    *,
    against: str | Path | None = None,
    logits: str | Path | None = None,
    save_logits: str | Path | None = None,
    adapter: str | Path | None = None,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    limit_tokens: int | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    config: OctavoConfig | None = None,
    seed: int = statistics.SEED,
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a model on texts, against a base if one is given. Both are loaded as they are, one after the other.

    Args:
        model, against: anything `octavo.load` takes; plain ones are not quantized.
        texts: files, or ids of data sets: see `octavo.evaluation.texts`.
        logits: a base's predictions from an earlier run, in place of `against`.
        adapter: a PEFT adapter to put onto `model`.
        save_logits: keep predictions here: the base's with `against`, else the model's.
        window, stride: Default: the model's longest context, at most 2048, and half of it; with `logits`, those of the file.
        limit_tokens: read only that many tokens of the texts.
        config: quantize `model`, which must be plain, in this way while it loads.
        seed: of the resampling.

    Raises:
        ValueError, OSError: on what the user can mend.
    """
    from .. import load_tokenizer

    if against is not None and logits is not None:
        raise ValueError("--against and --logits: give one of them: the base, or its saved predictions")
    if logits is not None and save_logits is not None:
        raise ValueError(
            "--logits and --save-logits: give one of them: the base's predictions are in a file already"
        )
    name = str(model) if adapter is None else f"{model} with {adapter}"
    bits = stored_bits(model) if config is None else None
    saved = LogitsReader(logits) if logits is not None else None
    if saved is not None:
        window, stride = window or saved.about.window, stride or saved.about.stride
    if save_logits is not None:
        check_new_file(save_logits, f"--save-logits {save_logits}", overwrite=True)
        Path(save_logits).parent.mkdir(parents=True, exist_ok=True)
    tokens = tokenize(read_texts(texts), load_tokenizer(model), limit_tokens)

    def run(
        src: str | Path,
        base: LogitsReader | None,
        save: str | Path | None,
        how: OctavoConfig | None = None,
        on_top: str | Path | None = None,
    ):
        # The model lives in here only.
        network = load_as_it_is(src, dtype, device, how, on_top)
        check_causal(network)
        return measure(
            network,
            tokens,
            *choose_window(network, window, stride),
            name=str(src) if on_top is None else name,
            batch_size=batch_size,
            base=base,
            save=save,
            progress=progress,
        )

    with tempfile.TemporaryDirectory(prefix="octavo-evaluate-") as scratch:
        if against is not None:
            kept = save_logits or Path(scratch) / "base.logits"
            first = run(against, None, kept)
            window, stride = first.window, first.stride
            free()
            saved, save_logits = LogitsReader(kept), None
        measured = run(model, saved, save_logits, config, adapter)
        comparison = compare_with(measured, saved, seed) if saved is not None else None
        del saved
    interval = statistics.interval(measured.nll.numpy(), measured.sizes, seed)
    return Evaluation(name, measured, interval, comparison, seed, bits)


def free() -> None:
    """Give a model's memory back, once nothing refers to it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
