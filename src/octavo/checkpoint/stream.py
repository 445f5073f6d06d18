"""Convert a checkpoint to Octavo's format, tensor by tensor.

Which parameters are quantized is decided on a model without weights, exactly as for a live one. What will be
written, and where, is known from shapes before any data is read. Each tensor is then read in its own
precision, quantized, and written straight to
its file: memory holds a few times the largest tensor, never the model.

Work happens in `OUT.partial`, with a journal; only when all is on the disk is the folder renamed to `OUT`.
The same command, started again after a crash, a full disk or Ctrl-C, goes on after the last finished tensor
and ends in the same bytes.

Example:
    >>> from octavo.checkpoint import convert
    >>> convert("path/to/model", "model-8bit").bits_per_weight  # doctest: +SKIP
    8.26
"""

import errno
import hashlib
import json
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import OctavoConfig
from ..model import plan_model
from .adapters import save_peft_adapter
from .encode import Row, write_unit
from .errors import CheckpointError
from .journal import NAME as JOURNAL_NAME
from .journal import InUseError, Journal
from .locate import SAFETENSORS_INDEX
from .open import open_source
from .place import check_out, fingerprint, publish
from .result import ConvertResult
from .safetensors_source import DTYPE_NAMES, DTYPES
from .shards import ShardFile, header_room, plan_shards, shard_names
from .skeleton import build_skeleton
from .source import Source
from .units import Unit, UntiedError, plan_units

if TYPE_CHECKING:
    from ..calibration import Calibration

MAX_SHARD_SIZE = 5_000_000_000
# Where config.json says that, and on what, the codes were calibrated. Information: any reader may ignore it.
CALIBRATION_KEY = "octavo_calibration"
# A unit's line is written once its data is synced; syncing after every norm would cost more than redoing this
# much.
SYNC_EVERY = 64 << 20
# Config files and tokenizer.
ASIDE_BYTES = 64 << 20
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int, str], None]


def convert(
    source: str | Path | Source,
    out: str | Path,
    config: OctavoConfig | None = None,
    *,
    overwrite: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    requantize: bool = False,
    calibration: "Calibration | None" = None,
    progress: Progress | None = None,
) -> ConvertResult:
    """Write an Octavo checkpoint from any supported one.

    Args:
        source: what `open_source` takes, or an open source.
        out: the folder to write. It appears when it is whole; until then the work is in `out`.partial.
        config: how to quantize. Default: `OctavoConfig()`. A published 8-bit checkpoint keeps its own
            codebooks and scales whatever it says, unless `requantize`.
        overwrite: replace `out`, once the new one is whole; and discard an interrupted conversion that does
            not match.
        max_shard_size: bytes a file of weights takes at most.
        requantize: de-quantize a published 8-bit checkpoint and quantize it anew as `config` says.
        calibration: chooses codes by the error of each matrix's output on a text; the whole model, in 8 bits, is
            then in memory.
        progress: called with bytes read so far, bytes to read, and the parameter at hand.

    Returns:
        ConvertResult: sizes, error, a row for each parameter.

    Raises:
        CheckpointError: if the source is damaged, holds NaN or infinity, or is in Octavo's format already; if
            `out` is in the way; if the disk is full (what is done stays, to be gone on with).
        octavo.model.CoverageError: if more than 1 % of the matrices would stay in float without having been
        skipped.
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
    conversion = _Conversion(source, Path(out), config, overwrite, max_shard_size, requantize, calibration)
    return conversion.run(progress)


class _Conversion:
    """One run of `convert`: the plan, made first, and the steps."""

    def __init__(
        self,
        source: Source,
        out: Path,
        config: OctavoConfig | None,
        overwrite: bool,
        max_shard_size: int,
        requantize: bool,
        calibration: "Calibration | None" = None,
    ):
        if source.kind == "octavo":
            raise CheckpointError(
                f"{source.folder} is already quantized by Octavo; give the original checkpoint"
            )
        self.source, self.out, self.overwrite = source, out, overwrite
        self.partial = out.with_name(out.name + ".partial")
        check_out(out, source, overwrite)
        config = config or OctavoConfig()
        if source.kind == "published" and not requantize:
            config = OctavoConfig(codebook="dynamic", skip=config.skip)
        self.config = config
        self.config_json = dict(source.config)
        self.calibration = calibration
        if calibration is not None:
            calibration.check(source)
            self.config_json[CALIBRATION_KEY] = calibration.to_dict()
        self._plan(requantize)
        self.shards = plan_shards(self.units, max_shard_size)
        self.files = shard_names(len(self.shards))
        pieces = [[o.pieces(torch.float32) for unit in shard for o in unit.outputs] for shard in self.shards]
        self.rooms = [header_room(piece for group in shard for piece in group) for shard in pieces]
        options = {**config.to_dict(), "max_shard_size": max_shard_size, "requantize": requantize}
        if calibration is not None:
            options["calibration"] = calibration.to_dict()
        self.head = {
            "source": fingerprint(source),
            "options": options,
            "plan": hashlib.sha256(repr(pieces).encode()).hexdigest(),
        }

    def _plan(self, requantize: bool) -> None:
        model_config = self.source.model_config()
        for attempt in range(2):
            self.model = build_skeleton(model_config)
            plan = plan_model(self.model, self.config)
            plan.check()
            try:
                self.units, self.unexpected = plan_units(
                    self.model, self.source, self.config, plan, requantize=requantize
                )
                return
            except UntiedError as error:
                if attempt:
                    raise
                warnings.warn(f"{error}; both are kept, and the copy's config.json unties them", stacklevel=4)
                model_config.tie_word_embeddings = False
                self.config_json["tie_word_embeddings"] = False

    def run(self, progress: Progress | None) -> ConvertResult:
        started = time.monotonic()
        self.progress = progress or (lambda done, total, name: None)
        self.done, self.total = 0, sum(unit.source_bytes for unit in self.units)
        try:
            self.journal = self._open_journal()
            resumed = len(self.journal.units)
            try:
                rows, nbytes = self._write_all()
            finally:
                self.journal.close()
            publish(self.partial, self.out)
        except OSError as error:
            if error.errno in FULL_DISK:
                raise self._full_disk() from error
            raise
        (self.out / JOURNAL_NAME).unlink()
        return ConvertResult(
            self.out,
            rows,
            self.source.nbytes,
            nbytes,
            time.monotonic() - started,
            resumed,
            self.unexpected,
            self.source.dropped,
            self.out / "adapter" if self.source.adapters else None,
        )

    def _write_all(self) -> tuple[list[Row], int]:
        """Write every file; returns the table, and the bytes of the files of weights."""
        self._check_space()
        try:
            self._open_calibration()
            lines = [line for number in range(len(self.shards)) for line in self._write_shard(number)]
            self.progress(self.total, self.total, "")
            nbytes = self._write_aside()
        except ValueError:
            # The source itself is at fault: going on would end at the same place.
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        return [
            Row(**{**row, "shape": tuple(row["shape"])}) for line in lines for row in line["rows"]
        ], nbytes

    def _open_calibration(self) -> None:
        """Load the model that calibration runs, if any matrix is still to be written."""
        units = enumerate(unit for shard in self.shards for unit in shard)
        left = [output for index, unit in units if index not in self.journal.units for output in unit.outputs]
        names = [output.name for output in left if output.entry is not None]
        if self.calibration is None or not names:
            return
        self.progress(self.done, self.total, "loading the model that calibration runs")
        self.calibration.progress = lambda done, windows: self.progress(
            self.done, self.total, f"running the model on the text: window {done + 1} of {windows}"
        )
        self.calibration.open(self.source, self.config, names)

    def _open_journal(self) -> Journal:
        if self.partial.exists():
            try:
                return Journal.resume(self.partial, self.head)
            except CheckpointError as error:
                if not self.overwrite or isinstance(error, InUseError):
                    raise
                shutil.rmtree(self.partial)
        return Journal.create(self.partial, self.head)

    def _needed(self) -> int:
        """Bytes still to be written, with the scales' likely type."""
        left = [unit for number, unit in enumerate(self.units) if number not in self.journal.units]
        return ASIDE_BYTES + sum(output.nbytes(torch.float16) for unit in left for output in unit.outputs)

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.partial).free
        if free < self._needed():
            if not self.journal.units:
                shutil.rmtree(self.partial)
            raise self._full_disk(free)

    def _full_disk(self, free: int | None = None) -> CheckpointError:
        free = shutil.disk_usage(self.partial.parent).free if free is None else free
        kept = f" What is done is kept in {self.partial}." if self.partial.exists() else ""
        return CheckpointError(
            f"{self.out}: the disk is full: {_mb(self._needed())} more are needed, {_mb(free)} are "
            f"free.{kept} Make room "
            "and run the same command again, or write to another disk"
        )

    def _write_shard(self, number: int) -> list[dict[str, Any]]:
        """Write one file, or what is left of it; returns its units' lines of the journal."""
        first = sum(len(units) for units in self.shards[:number])
        indices = range(first, first + len(self.shards[number]))
        if number in self.journal.whole:
            self.done += sum(unit.source_bytes for unit in self.shards[number])
            return [self.journal.units[index] for index in indices]
        lines = [self.journal.units[index] for index in indices if index in self.journal.units]
        finished = {
            name: (DTYPES[dtype], tuple(shape), begin, end)
            for line in lines
            for name, dtype, shape, begin, end in line["tensors"]
        }
        shard = ShardFile(self.partial / self.files[number], self.rooms[number], finished)
        synced = shard.position
        try:
            for index, unit in zip(indices, self.shards[number], strict=True):
                self.progress(self.done, self.total, unit.outputs[0].name)
                if index not in self.journal.units:
                    lines.append(self._write_unit(index, number, unit, shard))
                self.done += unit.source_bytes
                if shard.position - synced >= SYNC_EVERY:
                    self._commit(shard)
                    synced = shard.position
            self._commit(shard)
            shard.finish()
            self.journal.add({"shard": number, "whole": True})
            self.journal.commit()
        except KeyboardInterrupt:
            self._commit(shard)
            raise
        finally:
            shard.close()
        return lines

    def _write_unit(self, index: int, number: int, unit: Unit, shard: ShardFile) -> dict[str, Any]:
        before = set(shard.rows)
        rows = write_unit(unit, shard, self.source, self.model, self.calibration)
        tensors = [
            [name, DTYPE_NAMES[dtype], list(shape), begin, end]
            for name, (dtype, shape, begin, end) in shard.rows.items()
            if name not in before
        ]
        line = {"unit": index, "shard": number, "tensors": tensors, "rows": [row.to_dict() for row in rows]}
        self.journal.add(line)
        return line

    def _commit(self, shard: ShardFile) -> None:
        shard.sync()
        self.journal.commit()

    def _write_aside(self) -> int:
        """Everything but the weights; returns the bytes of the files of weights."""
        self._write_config()
        self.source.save_auxiliary(self.partial)
        if self.source.adapters:
            save_peft_adapter(self.source.adapters, self.partial / "adapter", str(self.out))
        files = [self.partial / name for name in self.files]
        if len(files) > 1:
            self._write_index()
        return sum(path.stat().st_size for path in files)

    def _write_config(self) -> None:
        # Where it was read from is nobody else's business.
        config = {key: value for key, value in self.config_json.items() if not key.endswith("_name_or_path")}
        dtype = config.pop("dtype", None) or config.pop("torch_dtype", None) or self._float_type()
        config.pop("torch_dtype", None)
        # A dictionary gives each part of a composite model its own.
        config["dtype"] = dtype if isinstance(dtype, dict) else str(dtype).removeprefix("torch.")
        config["quantization_config"] = self.config.to_dict()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (self.partial / "config.json").write_text(text, encoding="utf-8")

    def _float_type(self) -> str:
        """The type most of the source's float tensors have."""
        kinds = Counter(
            str(info.dtype)
            for info in self.source.tensors.values()
            if info.dtype.is_floating_point and not info.stored
        )
        return kinds.most_common(1)[0][0] if kinds else "float32"

    def _write_index(self) -> None:
        lines = self.journal.units.values()
        weight_map = {t[0]: self.files[line["shard"]] for line in lines for t in line["tensors"]}
        size = sum(t[4] - t[3] for line in lines for t in line["tensors"])
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.partial / SAFETENSORS_INDEX).write_text(text, encoding="utf-8")


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
