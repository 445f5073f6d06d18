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
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
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
from .results import Comparison, Evaluation, Measurement
from .scoring import check_causal, choose_window, scored, token_nll
from .texts import Tokens, read_texts, tokenize

# Called with what is running, tokens scored so far, and in all.
Progress = Callable[[str, int, int], None]


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
