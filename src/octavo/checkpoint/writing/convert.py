"""Convert a checkpoint to Octavo's format, tensor by tensor.

Which parameters are quantized is decided on a model without weights, exactly as for a live one. The writing is
`octavo.checkpoint.writing.writer`'s.

Example:
    >>> from octavo.checkpoint import convert
    >>> f"{convert('model', 'converted').bits_per_weight:.2f}"
    '8.30'
"""

import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

from ...config import OctavoConfig
from ...model import plan_model
from ..errors import CheckpointError
from ..reading.octavo_source import OctavoSource
from ..reading.open import open_source
from ..reading.source import Source
from ..skeleton import build_skeleton
from ..units import Unit, UntiedError, plan_units
from .calibrator import Calibrator
from .output_directory import choose_output_directory
from .result import ConvertResult
from .writer import MAX_SHARD_SIZE, CheckpointWriter, Progress

# Where config.json says that, and on what, the codes were calibrated. Information: any reader may ignore it.
CALIBRATION_KEY = "octavo_calibration"


def convert(
    source: str | Path | Source,
    out: str | Path,
    config: OctavoConfig | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    requantize: bool = False,
    calibration: Calibrator | None = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write an Octavo checkpoint from any supported one.

    Args:
        source: what `open_source` takes, or an open source.
        out: the folder to write. It appears when it is whole; until then the work is in `out`.partial.
        config: how to quantize. Default: `OctavoConfig()`. A published 8-bit checkpoint keeps its own
            codebooks and scales whatever it says, unless `requantize`.
        overwrite: replace `out`, once the new one is whole; and discard an interrupted conversion that does not match.
        max_shard_size: bytes that a file of weights takes at most.
        requantize: de-quantize a published 8-bit checkpoint and quantize it anew as `config` says.
        calibration: chooses codes by the error of each matrix's output on a text; the whole model, in 8 bits, is
            then in memory.
        progress: called with bytes read so far, bytes to read, and the parameter at hand.

    Returns:
        ConvertResult: sizes, error, a row for each parameter.

    Raises:
        CheckpointError: if the source is damaged, holds NaN or infinity, or is in Octavo's format already; if
            `out` is in the way; if the disk is full (what is done stays, to be gone on with).
        octavo.model.CoverageError: if more than 1 % of the matrices would stay in float without having been skipped.
    """
    if not isinstance(source, Source):
        with open_source(source) as opened:
            return convert(
                opened,
                out,
                config,
                overwrite=overwrite,
                max_shard_size=max_shard_size,
                requantize=requantize,
                calibration=calibration,
                progress=progress,
            )
    started = time.monotonic()
    if isinstance(source, OctavoSource):
        raise CheckpointError(f"{source.folder} is already quantized by Octavo; give the original checkpoint")
    output = choose_output_directory(Path(out), source, overwrite)
    config = config or OctavoConfig()
    # What a published checkpoint holds in 8 bits stays as it is, unless it is asked for otherwise.
    config = config if requantize else source.own_config(config)
    config_json: dict[str, Any] = {**source.config, "quantization_config": config.to_dict()}
    options: dict[str, Any] = {**config.to_dict(), "requantize": requantize}
    if calibration is not None:
        calibration.check(source)
        options["calibration"] = config_json[CALIBRATION_KEY] = calibration.to_dict()
    model, units, unexpected = _plan(source, config, config_json, requantize)
    writer = CheckpointWriter(
        source,
        model,
        units,
        output,
        config_json,
        options,
        overwrite=overwrite,
        max_shard_size=max_shard_size,
        calibration=calibration,
        open_calibration=partial(calibration.open, source, config) if calibration is not None else None,
    )
    written = writer.run(progress)
    return ConvertResult(
        output.asked,
        written.rows,
        source.nbytes,
        written.nbytes,
        time.monotonic() - started,
        written.resumed,
        unexpected,
        source.dropped,
        output.asked / "adapter" if source.adapters else None,
    )


def _plan(
    source: Source, config: OctavoConfig, config_json: dict[str, Any], requantize: bool
) -> tuple[Any, list[Unit], list[str]]:
    """The model on the meta device, the units, and names that it has no place for; `config_json` unties what is no tie."""
    model_config = source.model_config()
    for attempt in range(2):
        model = build_skeleton(model_config)
        plan = plan_model(model, config)
        plan.check()
        try:
            return model, *plan_units(model, source, config, plan, requantize=requantize)
        except UntiedError as error:
            if attempt:
                raise
            warnings.warn(f"{error}; both are kept, and the copy's config.json unties them", stacklevel=4)
            model_config.tie_word_embeddings = config_json["tie_word_embeddings"] = False
    raise AssertionError("unreachable: the second attempt returns or raises")
