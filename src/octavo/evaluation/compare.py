"""One model, one text, several formats: what each costs, so that a format can be chosen with one's own model and text.

    model in float → its predictions in a file → for each format: decoded weights into the model → scored against the file

Every format is measured in the same way, by a float model that holds the weights which the format gives back: the format alone
counts, not the kernels behind it. What is encoded is exactly what `octavo.quantize_model` quantizes, tied weights once.

Memory: the model in float, and a copy of its matrices in the same type on the CPU (what each format starts from): twice the float
model at most, and a few times its largest matrix while that is encoded. The base's predictions lie in a temporary file.

Example:
    >>> from octavo.evaluation.compare import compare
    >>> found = compare("model", ["book.txt"], formats=["fitted-64", "int8-row"])
    >>> [(row.format.name, round(row.bits_per_weight, 2)) for row in found.rows]
    [('fitted-64', 8.3), ('int8-row', 8.1)]
"""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..config import OctavoConfig
from ..model import Plan, plan_model
from . import statistics
from .evaluate import Progress, compare_with, measure
from .formats import USUAL, Format, find_format
from .logits import LogitsReader
from .models import load_as_it_is
from .perplexity import Perplexity
from .results import SIGNIFICANT, Comparison, Measurement, comparison_dict, exp_interval, percent
from .scoring import check_causal, choose_window
from .texts import Tokens, read_texts, tokenize


@dataclass(frozen=True)
class Row:
    """A format on the text.

    Attributes:
        format: which.
        bits_per_weight: of the matrices it holds, scales and tables included.
        nbytes: of the whole model in this format, its other parameters in the checkpoint's own type.
        weight_error: ‖w − ŵ‖² / ‖w‖², pooled over the matrices.
        perplexity: of the text.
        comparison: with the model in float.
        kl_interval: bootstrap interval of the mean KL divergence, in nats; None if the text is too short.
    """

    format: Format
    bits_per_weight: float
    nbytes: int
    weight_error: float
    perplexity: Perplexity
    comparison: Comparison
    kl_interval: tuple[float, float] | None

    @property
    def kl_mean(self) -> float:
        return self.comparison.divergence.kl_mean

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: plain keys."""
        compared = comparison_dict(self.comparison)
        # The same for all rows: said once, above them.
        for name in ("against", "base_perplexity", "base_dtype", "test"):
            del compared[name]
        return {
            "format": self.format.name,
            "title": self.format.title,
            "bits_per_weight": self.bits_per_weight,
            "bytes": self.nbytes,
            "weight_error": self.weight_error,
            "perplexity": self.perplexity.perplexity,
            "bits_per_byte": self.perplexity.bits_per_byte,
            **compared,
            "kl_mean_interval": self.kl_interval,
        }


@dataclass(frozen=True)
class FormatComparison:
    """Formats compared on a text.

    Attributes:
        model: as the user named it.
        base: the model in float on the text.
        interval: of its mean negative log-likelihood.
        weights: weights in the matrices that the formats hold.
        parameters: of the whole model, tied ones once.
        own_type: type of the checkpoint.
        rows: one per format, in the order asked for.
    """

    model: str
    base: Measurement
    interval: statistics.Interval
    weights: int
    parameters: int
    own_type: str
    rows: list[Row]

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON takes it."""
        result = self.base.perplexity
        return {
            "model": self.model,
            "own_type": self.own_type,
            "weights": self.weights,
            "parameters": self.parameters,
            "dtype": self.base.dtype,
            "device": self.base.device,
            "texts": [text.name for text in self.base.tokens],
            "protocol": result.protocol,
            "tokens": result.tokens,
            "window": result.window,
            "stride": result.stride,
            "perplexity": result.perplexity,
            "perplexity_interval": exp_interval(self.interval),
            "units": self.interval.units,
            "unit": self.interval.unit,
            "confidence": statistics.CONFIDENCE,
            "test": "sign-flip randomization test, paired by unit; intervals by percentile bootstrap over units",
            "told_apart": None if self.told_apart is None else [row.format.name for row in self.told_apart],
            "formats": [row.to_dict() for row in self.rows],
        }

    @property
    def told_apart(self) -> list[Row] | None:
        """Formats whose perplexity the text tells from the float model's, all formats' tests taken together (Holm's correction);
        None if the text is too short."""
        if any(row.comparison.p_value is None for row in self.rows):
            return None
        adjusted = holm([row.comparison.p_value or 0.0 for row in self.rows])
        return [row for row, p in zip(self.rows, adjusted, strict=True) if p < SIGNIFICANT]

    @property
    def sentence(self) -> str:
        """What the perplexities tell, in words."""
        found = self.told_apart
        if found is None:
            return "The text is too short to tell perplexities apart."
        if not found:
            return (
                "By perplexity this text tells none of them from the float model; KL divergence, which sees every prediction, is "
                "what to choose by."
            )
        names = ", ".join(f"{row.format.name} ({percent(row.comparison.difference.mean)})" for row in found)
        return f"By perplexity this text tells from the float model: {names}."


def holm(p_values: Sequence[float]) -> list[float]:
    """P-values of several tests, adjusted so that 5 % is the chance of any false alarm among them (Holm, 1979)."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def compare(
    model: str | Path,
    texts: Sequence[str],
    formats: Sequence[str] = USUAL,
    *,
    window: int | None = None,
    stride: int | None = None,
    batch_size: int | None = None,
    limit_tokens: int | None = None,
    dtype: torch.dtype | str = "float32",
    device: torch.device | str | None = None,
    progress: Progress | None = None,
) -> FormatComparison:
    """Measure formats on texts.

    Args:
        model: a model in float: anything `octavo.load` takes that is not quantized by Octavo. A GGUF file is de-quantized first.
        texts: files, or ids of data sets: see `octavo.evaluation.texts`.
        formats: names, see `octavo.evaluation.formats`.
        window, stride: Default: the model's longest context, at most 2048, and half of it.
        limit_tokens: read only that many tokens of the texts.
        dtype: type to compute in, and of the weights that a format gives back. float32 measures the format alone.
        progress: called with what is being measured, tokens scored so far, and in all.

    Raises:
        ValueError: on an unknown format, a model that is quantized already, or is no causal language model.
        OSError: if something is not found, or the disk is full.
    """
    from ..checkpoint import open_source
    from ..loading import load_tokenizer

    chosen = [find_format(name) for name in formats]
    if len({each.name for each in chosen}) < len(chosen) or not chosen:
        raise ValueError(f"formats: expected at least one, each once, found {', '.join(formats) or 'none'}")
    with open_source(model) as source:
        if source.eight_bit:
            raise ValueError(
                f"{model} is quantized already; formats are compared from float weights: give the original model"
            )
        own = source.dtype
    tokens = tokenize(read_texts(texts), load_tokenizer(model), limit_tokens)
    network = load_as_it_is(model, dtype, device)
    check_causal(network)
    sizes = choose_window(network, window, stride)
    return compare_model(
        network, tokens, chosen, *sizes, name=str(model), own=own, batch_size=batch_size, progress=progress
    )


def compare_model(
    model: Any,
    tokens: Sequence[Tokens],
    formats: Sequence[Format],
    window: int,
    stride: int,
    *,
    name: str = "base",
    own: torch.dtype = torch.float32,
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> FormatComparison:
    """Measure formats on a loaded float model, which has its own weights again afterwards.

    Args:
        model: a causal language model in float.
        tokens: the texts, from `octavo.evaluation.texts.tokenize`.
        own: type of the checkpoint, that of the parameters in no matrix when sizes are counted.
    """
    plan = plan_model(model, OctavoConfig())
    plan.check()
    matrices = {entry.name: model.get_parameter(entry.name) for entry in plan.entries.values()}
    weights = sum(matrix.numel() for matrix in matrices.values())
    parameters = sum(each.numel() for each in model.parameters())
    rest = (parameters - weights) * own.itemsize
    with tempfile.TemporaryDirectory(prefix="octavo-compare-") as scratch:
        kept = Path(scratch) / "base.logits"
        base = measure(
            model, tokens, window, stride, name=name, batch_size=batch_size, save=kept, progress=progress
        )
        reader = LogitsReader(kept, model.device)
        originals = {name: matrix.detach().cpu().clone() for name, matrix in matrices.items()}
        rows = []
        try:
            for each in formats:
                nbytes, error = _write_decoded(each, plan, originals, matrices)
                measured = measure(
                    model,
                    tokens,
                    window,
                    stride,
                    name=each.name,
                    batch_size=batch_size,
                    base=reader,
                    progress=progress,
                )
                rows.append(_row(each, measured, reader, 8 * nbytes / weights, nbytes + rest, error))
        finally:
            for each_name, original in originals.items():
                matrices[each_name].data.copy_(original)
            del reader
    interval = statistics.interval(base.nll.numpy(), base.sizes)
    return FormatComparison(name, base, interval, weights, parameters, str(own).removeprefix("torch."), rows)


def _write_decoded(
    format: Format, plan: Plan, originals: dict[str, torch.Tensor], matrices: dict[str, torch.nn.Parameter]
) -> tuple[int, float]:
    """Put what a format gives back in place of each matrix. Returns the bytes it takes, and its pooled error."""
    nbytes, error, power = 0, 0.0, 0.0
    for entry in plan.entries.values():
        original = originals[entry.name].to(matrices[entry.name].device).float()
        decoded, size = format(original, entry.transposed, entry.name)
        matrices[entry.name].data.copy_(decoded)
        nbytes += size
        error += (original - decoded).square().sum(dtype=torch.float64).item()
        power += original.square().sum(dtype=torch.float64).item()
    return nbytes, error / power if power else 0.0


def _row(
    format: Format, measured: Measurement, base: LogitsReader, bits: float, nbytes: int, error: float
) -> Row:
    assert measured.kl is not None
    comparison = compare_with(measured, base)
    kl = statistics.interval(measured.kl.numpy(), measured.sizes)
    between = None if kl.low is None or kl.high is None else (kl.low, kl.high)
    return Row(format, bits, nbytes, error, measured.perplexity, comparison, between)
