"""Write a checkpoint, unit by unit, so that a crash, a kill or a full disk loses nothing.

What will be written, and where, is known from shapes before any data is read. Each unit is then read in its own precision,
encoded, and written straight to its file: memory holds a few times the largest tensor, never the model.

Work happens in a staging folder (`OUT.partial`), with a journal; only when all is on the disk does the folder become `OUT`.
The same work, started again after a crash, a full disk or Ctrl-C, goes on after the last finished unit and ends in the same
bytes. Converting (`convert.py`) and merging (`octavo.merging.merge`) both write through this.

Example:
    >>> from octavo.checkpoint import convert
    >>> result = convert("model", "converted")
    >>> sorted(path.name for path in Path("converted").iterdir())
    ['README.md', 'config.json', 'generation_config.json', 'model.safetensors', 'tokenizer.json', ...]
"""

import errno
import hashlib
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...wording import size
from ..errors import CheckpointError
from ..reading.locate import SAFETENSORS_INDEX
from ..reading.published_adapters import save_peft_adapter
from ..reading.safetensors_source import DTYPE_NAMES, DTYPES
from ..reading.source import Source
from ..units import Unit
from .calibrator import Calibrator
from .durable import write_json
from .in_use import InUseError
from .journal import NAME as JOURNAL_NAME
from .journal import Journal
from .output_directory import OutputDirectory, fingerprint
from .shards import ShardFile, header_room, plan_shards, shard_names
from .unit_writer import Row, write_unit

MAX_SHARD_SIZE = 5_000_000_000
# A unit's line is written once its data is synced; syncing after every norm would cost more than redoing this much.
SYNC_EVERY = 64 << 20
# Config files and tokenizer.
ASIDE_BYTES = 64 << 20
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Progress = Callable[[int, int, str], None]


@dataclass
class Written:
    """What a writer did: a row for each parameter, bytes of the files of weights, units that an earlier run had done."""

    rows: list[Row]
    nbytes: int
    resumed: int


class CheckpointWriter:
    """Writes one checkpoint.

    Args:
        source: what is read.
        model: its model, on the meta device.
        units: what is written, `octavo.checkpoint.units.plan_units`.
        output: where to, `octavo.checkpoint.writing.output_directory.choose_output_directory`.
        config_json: the contents of config.json; `dtype` is filled in.
        options: what, besides source and units, decides the bytes that are written: unfinished work of other options is
            not gone on with.
        overwrite: discard unfinished work that does not match.
        max_shard_size: bytes that a file of weights takes at most.
        calibration: chooses codes by the error of each matrix's output on a text.
        open_calibration: called with the names of the matrices still to be written.
    """

    def __init__(
        self,
        source: Source,
        model: Any,
        units: list[Unit],
        output: OutputDirectory,
        config_json: dict[str, Any],
        options: dict[str, Any],
        *,
        overwrite: bool = False,
        max_shard_size: int = MAX_SHARD_SIZE,
        calibration: Calibrator | None = None,
        open_calibration: Callable[[list[str]], None] | None = None,
    ):
        self.source, self.model, self.units, self.output = source, model, units, output
        self.partial = output.partial
        self.config_json, self.overwrite = config_json, overwrite
        self.calibration, self.open_calibration = calibration, open_calibration
        self.shards = plan_shards(units, max_shard_size)
        self.files = shard_names(len(self.shards))
        pieces = [[o.pieces(torch.float32) for unit in shard for o in unit.outputs] for shard in self.shards]
        self.rooms = [header_room(piece for group in shard for piece in group) for shard in pieces]
        self.head = {
            "source": fingerprint(source),
            "options": {**options, "max_shard_size": max_shard_size},
            "plan": hashlib.sha256(repr(pieces).encode()).hexdigest(),
        }
        self.journal: Any = None  # a Journal, once `run` has begun
        self.done, self.total = 0, sum(unit.source_bytes for unit in units)

    def run(self, progress: Progress | None = None) -> Written:
        """Write everything; the folder appears under its name at the end.

        Raises:
            CheckpointError: if the source is damaged or holds NaN or infinity, the disk is full (what is done stays, to be
                gone on with), or unfinished work is in the way.
        """
        self.progress = progress or (lambda done, total, name: None)
        try:
            self.journal = self._open_journal()
            resumed = len(self.journal.units)
            try:
                rows, nbytes = self._write_all()
                self.output.publish()
            finally:
                # No other process may take what is finished for what is left to be done.
                self.journal.close()
        except OSError as error:
            if error.errno in FULL_DISK:
                raise self._full_disk() from error
            raise
        (self.output.out / JOURNAL_NAME).unlink()
        return Written(rows, nbytes, resumed)

    def _write_all(self) -> tuple[list[Row], int]:
        """Write every file; returns the table, and the bytes of the files of weights."""
        self._check_space()
        try:
            self._prepare()
            lines = [line for number in range(len(self.shards)) for line in self._write_shard(number)]
            self.progress(self.total, self.total, "")
            nbytes = self._write_aside()
            self.source.check_unchanged()
        except ValueError:
            # The source itself is at fault: going on would end at the same place.
            shutil.rmtree(self.partial, ignore_errors=True)
            raise
        return [
            Row(**{**row, "shape": tuple(row["shape"])}) for line in lines for row in line["rows"]
        ], nbytes

    def _prepare(self) -> None:
        """Let calibration load the model that it runs, if any matrix is still to be written."""
        units = enumerate(unit for shard in self.shards for unit in shard)
        left = [output for index, unit in units if index not in self.journal.units for output in unit.outputs]
        names = [output.name for output in left if output.entry is not None]
        if self.calibration is None or self.open_calibration is None or not names:
            return
        self.progress(self.done, self.total, "loading the model that calibration runs")
        self.calibration.progress = lambda done, windows: self.progress(
            self.done, self.total, f"running the model on the text: window {done + 1} of {windows}"
        )
        self.open_calibration(names)

    def _open_journal(self) -> Journal:
        if self.partial.exists():
            try:
                journal = Journal.resume(self.partial, self.head)
            except CheckpointError as error:
                if not self.overwrite or isinstance(error, InUseError):
                    raise
            else:
                if self._holds(journal):
                    return journal
                journal.close()
            shutil.rmtree(self.partial)
        return Journal.create(self.partial, self.head)

    def _holds(self, journal: Journal) -> bool:
        """Whether the unfinished files have what the journal says of them."""
        for line in journal.units.values():
            path = self.partial / self.files[line["shard"]]
            end = 8 + self.rooms[line["shard"]] + max((tensor[4] for tensor in line["tensors"]), default=0)
            if not path.exists() or path.stat().st_size < end:
                return False
        return True

    def _needed(self) -> int:
        """Bytes still to be written, with the scales' likely type."""
        done = self.journal.units if self.journal is not None else ()
        left = [unit for number, unit in enumerate(self.units) if number not in done]
        return ASIDE_BYTES + sum(output.nbytes(torch.float16) for unit in left for output in unit.outputs)

    def _check_space(self) -> None:
        free = shutil.disk_usage(self.partial).free
        if free < self._needed():
            if not self.journal.units:
                shutil.rmtree(self.partial)
            raise self._full_disk(free)

    def _full_disk(self, free: int | None = None) -> CheckpointError:
        free = shutil.disk_usage(self.output.disk).free if free is None else free
        kept = f" What is done is kept in {self.partial}." if self.partial.exists() else ""
        return CheckpointError(
            f"{self.output.out}: the disk is full: {size(self._needed())} more are needed, {size(free)} are free.{kept} Make "
            "room and run the same command again, or write to another disk"
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
            save_peft_adapter(self.source.adapters, self.partial / "adapter", str(self.output.out))
        files = [self.partial / name for name in self.files]
        if len(files) > 1:
            self._write_index()
        return sum(path.stat().st_size for path in files)

    def _write_config(self) -> None:
        # Where it was read from is nobody else's business.
        config = {key: value for key, value in self.config_json.items() if not key.endswith("_name_or_path")}
        older = config.pop("torch_dtype", None)
        dtype = config.pop("dtype", None) or older
        if dtype in (None, "auto"):
            dtype = self.source.dtype
        # A dictionary gives each part of a composite model its own.
        config["dtype"] = dtype if isinstance(dtype, dict) else str(dtype).removeprefix("torch.")
        write_json(self.partial / "config.json", config, sort_keys=True)

    def _write_index(self) -> None:
        lines = self.journal.units.values()
        weight_map = {t[0]: self.files[line["shard"]] for line in lines for t in line["tensors"]}
        total = sum(t[4] - t[3] for line in lines for t in line["tensors"])
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_json(self.partial / SAFETENSORS_INDEX, index, sort_keys=True)
