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
import os
import shutil
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..config import OctavoConfig
from ..model import plan_model
from .adapters import save_peft_adapter
from .encode import Row, write_unit
from .errors import CheckpointError
from .journal import NAME as JOURNAL_NAME
from .journal import Journal
from .locate import SAFETENSORS_INDEX
from .result import ConvertResult
from .safetensors_source import DTYPE_NAMES, DTYPES
from .shards import ShardFile, header_room, plan_shards, shard_names
from .skeleton import build_skeleton
from .source import Source, open_source
from .units import Unit, UntiedError, plan_units

MAX_SHARD_SIZE = 5_000_000_000
# A unit's line is written once its data is synced; syncing after every norm would cost more than redoing this
# much.
SYNC_EVERY = 64 << 20
# Config files and tokenizer.
ASIDE_BYTES = 64 << 20
SAMPLES = 16
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
                progress=progress,
            )
    return _Conversion(source, Path(out), config, overwrite, max_shard_size, requantize).run(progress)


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
    ):
        if source.kind == "octavo":
            raise CheckpointError(
                f"{source.folder} is already quantized by Octavo; give the original checkpoint"
            )
        self.source, self.out, self.overwrite = source, out, overwrite
        self.partial = out.with_name(out.name + ".partial")
        self._check_out()
        config = config or OctavoConfig()
        if source.kind == "published" and not requantize:
            config = OctavoConfig(codebook="dynamic", skip=config.skip)
        self.config = config
        self.config_json = dict(source.config)
        self._plan(requantize)
        self.shards = plan_shards(self.units, max_shard_size)
        self.files = shard_names(len(self.shards))
        pieces = [[o.pieces(torch.float32) for unit in shard for o in unit.outputs] for shard in self.shards]
        self.rooms = [header_room(piece for group in shard for piece in group) for shard in pieces]
        self.head = {
            "source": fingerprint(source),
            "options": {**config.to_dict(), "max_shard_size": max_shard_size, "requantize": requantize},
            "plan": hashlib.sha256(repr(pieces).encode()).hexdigest(),
        }

    def _check_out(self) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise CheckpointError(f"{self.out} is a file; expected a folder to write")
        here = self.out.resolve()
        if here == self.source.folder.resolve() or here in self.source.folder.resolve().parents:
            raise CheckpointError(f"{self.out} holds the source itself; give another folder to write")
        if self.out.is_dir() and any(self.out.iterdir()) and not self.overwrite:
            raise CheckpointError(
                f"{self.out} is not empty; give another folder, or --overwrite to replace it"
            )

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
        self.journal = self._open_journal()
        resumed = len(self.journal.units)
        self._check_space()
        total = sum(unit.source_bytes for unit in self.units)
        rows: list[Row] = []
        done = first = 0
        try:
            for number, units in enumerate(self.shards):
                for row, step in self._write_shard(number, units, first):
                    if progress is not None:
                        progress(done, total, row.name)
                    done += step
                    rows.append(row)
                first += len(units)
            if progress is not None:
                progress(total, total, "")
            nbytes = self._write_aside(rows)
        except OSError as error:
            if error.errno in FULL_DISK:
                raise self._full_disk() from error
            raise
        except (ValueError, ArithmeticError):
            # The source itself is at fault: going on would end at the same place.
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        self._publish()
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

    def _open_journal(self) -> Journal:
        if self.partial.exists():
            try:
                return Journal.resume(self.partial, self.head)
            except CheckpointError:
                if not self.overwrite:
                    raise
                shutil.rmtree(self.partial)
        return Journal.create(self.partial, self.head)

    def _needed(self) -> int:
        """Bytes still to be written, with the scales' likely type."""
        left = [unit for number, unit in enumerate(self.units_in_order) if number not in self.journal.units]
        return ASIDE_BYTES + sum(output.nbytes(torch.float16) for unit in left for output in unit.outputs)

    @property
    def units_in_order(self) -> list[Unit]:
        return [unit for shard in self.shards for unit in shard]

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

    def _write_shard(self, number: int, units: list[Unit], first: int):
        """Write one file; yields each parameter's row and the source bytes it took."""
        path = self.partial / self.files[number]
        lines = {i: self.journal.units.get(first + i) for i in range(len(units))}
        done = {
            name: (DTYPES[dtype], tuple(shape), begin, end)
            for line in lines.values()
            if line
            for name, dtype, shape, begin, end in line["tensors"]
        }
        whole = number in self.journal.whole
        shard = None if whole else ShardFile(path, self.rooms[number], done)
        synced = shard.position if shard else 0
        try:
            for i, unit in enumerate(units):
                line = lines[i]
                if line is None:
                    assert shard is not None
                    line = self._write_unit(first + i, number, unit, shard)
                    if shard.position - synced >= SYNC_EVERY:
                        self._commit(shard)
                        synced = shard.position
                for position, row in enumerate(line["rows"]):
                    yield Row(**{**row, "shape": tuple(row["shape"])}), 0 if position else unit.source_bytes
            if shard is not None:
                self._commit(shard)
                shard.finish()
                self.journal.add({"shard": number, "whole": True})
                self.journal.commit()
                shard = None
        except KeyboardInterrupt:
            if shard is not None:
                self._commit(shard)
            raise
        finally:
            if shard is not None:
                shard.close()

    def _write_unit(self, index: int, number: int, unit: Unit, shard: ShardFile) -> dict[str, Any]:
        before = set(shard.rows)
        rows = write_unit(unit, shard, self.source, self.model)
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

    def _write_aside(self, rows: list[Row]) -> int:
        """Everything but the weights; returns the bytes of the files of weights."""
        self._write_config(rows)
        self.source.save_auxiliary(self.partial)
        if self.source.adapters:
            save_peft_adapter(self.source.adapters, self.partial / "adapter", str(self.out))
        files = [self.partial / name for name in self.files]
        if len(files) > 1:
            self._write_index()
        return sum(path.stat().st_size for path in files)

    def _write_config(self, rows: list[Row]) -> None:
        # Where it was read from is nobody else's business.
        config = {key: value for key, value in self.config_json.items() if not key.endswith("_name_or_path")}
        dtype = config.pop("dtype", None) or config.pop("torch_dtype", None) or self._float_type()
        config.pop("torch_dtype", None)
        config["dtype"] = str(dtype).removeprefix("torch.")
        config["quantization_config"] = self.config.to_dict()
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (self.partial / "config.json").write_text(text, encoding="utf-8")

    def _float_type(self) -> str:
        """The type most of the source's float tensors have."""
        kinds = Counter(
            str(info.dtype) for info in self.source.tensors.values() if info.dtype.is_floating_point
        )
        return kinds.most_common(1)[0][0] if kinds else "float32"

    def _write_index(self) -> None:
        lines = self.journal_lines()
        weight_map = {t[0]: self.files[line["shard"]] for line in lines for t in line["tensors"]}
        size = sum(t[4] - t[3] for line in lines for t in line["tensors"])
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (self.partial / SAFETENSORS_INDEX).write_text(text, encoding="utf-8")

    def journal_lines(self) -> list[dict[str, Any]]:
        """Every unit's line, of this run and of those before."""
        return list(Journal.resume(self.partial, self.head).units.values())

    def _publish(self) -> None:
        """Give the finished folder its name; an old one of that name goes only then."""
        (self.partial / JOURNAL_NAME).unlink()
        for path in (*self.partial.rglob("*"), self.partial):
            _sync(path)
        old = None
        if self.out.exists():
            old = self.out.with_name(self.out.name + ".replaced")
            shutil.rmtree(old, ignore_errors=True)
            self.out.rename(old)
        self.partial.rename(self.out)
        _sync(self.out.parent)
        if old is not None:
            shutil.rmtree(old)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def fingerprint(source: Source) -> str:
    """A hash that tells sources apart: config, tensors' names, shapes and types, sizes of files, and samples of their bytes."""
    digest = hashlib.sha256(json.dumps(source.config, sort_keys=True, default=str).encode())
    for info in source.tensors.values():
        digest.update(repr((info.name, info.shape, str(info.dtype), info.file)).encode())
    for path in source.files:
        size = path.stat().st_size
        digest.update(repr((path.name, size)).encode())
        with path.open("rb") as file:
            for sample in range(SAMPLES):
                file.seek(sample * max(size - 4096, 0) // (SAMPLES - 1))
                digest.update(file.read(4096))
    return digest.hexdigest()


def _mb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"
