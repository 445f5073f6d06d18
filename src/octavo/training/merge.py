"""Merge an adapter into its model's files, one tensor at a time.

Each weight that the adapter changes is read (de-quantized if it is in 8 bits), gets `scale · B A` added in
float32 (and for DoRA its magnitudes set), and is written again: in 8 bits with a codebook fitted anew, or in 16
bits. Every other tensor is copied. Memory holds a few times the largest tensor, never the model. Weights that
config.json ties, of which the adapter changes one, are untied on purpose: the copy's config.json says so.

Example:
    >>> result = merge("model-8bit", "poems", "poems-merged")  # doctest: +SKIP
    >>> result.added_error                                      # doctest: +SKIP
    2.9e-05
"""

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import open_source
from ..checkpoint.locate import SAFETENSORS_INDEX
from ..checkpoint.shards import ShardFile, header_room, shard_names
from ..checkpoint.skeleton import build_skeleton
from ..checkpoint.units import Piece, piece_nbytes
from ..config import OctavoConfig, stored_block_size
from ..model import Entry, holds_transpose, plan_model
from ..quantizer import Packed, quantize_parameter
from ..tensor import SUFFIXES, OctavoTensor
from .adapter_files import Adapter

TYPES = {"8bit": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
MAX_SHARD_SIZE = 5_000_000_000


@dataclass
class MergeResult:
    """What a merge did.

    Attributes:
        out: the folder written.
        changed: names of the weights that the adapter changed.
        error, power: sums over those of the squared rounding error of 8 bits, and of the squared merged
            weights.
        untied: names of weights that no longer share one tensor.
        nbytes: bytes of the files of weights.
    """

    out: Path
    changed: list[str] = field(default_factory=list)
    error: float = 0.0
    power: float = 0.0
    untied: list[str] = field(default_factory=list)
    nbytes: int = 0

    @property
    def added_error(self) -> float:
        """‖merged − stored‖² / ‖merged‖² over the changed weights: what storing them in 8 bits adds."""
        return self.error / self.power if self.power else 0.0


def merge(
    model: str | Path,
    adapter: str | Path,
    out: str | Path,
    to: str = "8bit",
    *,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Callable[[int, int, str], None] | None = None,
) -> MergeResult:
    """Write a copy of a model with an adapter merged in.

    Args:
        model: a folder or hub id of a model in Octavo's 8 bits.
        adapter: a PEFT LoRA adapter folder.
        out: the folder to write; it appears when it is whole.
        to: "8bit" (the changed weights get codebooks fitted anew, all others keep their bytes), "float16",
            "bfloat16".
        max_shard_size: bytes a file takes at most.
        progress: called with tensors done, tensors in all, and the one at hand.

    Raises:
        ValueError: on an unknown `to`, an `out` that is in the way, an adapter that does not fit the model.
        octavo.checkpoint.CheckpointError: if the model cannot be read.
    """
    if to not in TYPES:
        raise ValueError(f"--to: expected one of {', '.join(TYPES)}, found {to!r}")
    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} is not empty: give another folder, or remove it")
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with open_source(model) as source:
            result = _Merge(source, Adapter(adapter), partial, TYPES[to]).run(max_shard_size, progress)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if out.exists():
        out.rmdir()
    os.replace(partial, out)
    result.out = out
    return result


class _Merge:
    """One run of `merge`: what is written, decided from names and shapes, then tensor by tensor."""

    def __init__(self, source: Any, adapter: Adapter, out: Path, dtype: torch.dtype | None):
        if source.kind != "octavo":
            raise ValueError(
                f"{source.folder}: expected a model in 8 bits, found {source.kind}; `octavo quantize` it first"
            )
        self.source, self.adapter, self.out, self.dtype = source, adapter, out, dtype
        self.config = OctavoConfig.from_dict(dict(source.config["quantization_config"]))
        model_config = source.model_config()
        del model_config.quantization_config
        self.model = build_skeleton(model_config)
        if adapter.has_stacks:
            adapter.place_on_stacks(build_skeleton(model_config))
        self.entries = plan_model(self.model, self.config).entries
        self.result = MergeResult(out)
        self.homes = self._homes()

    def _homes(self) -> dict[str, str]:
        """Every parameter and buffer to write → the one in the source that it comes from."""
        stored = (name.removesuffix("_qdata") for name in self.source.tensors)
        homes = {name: name for name in stored if not name.endswith(("_absmax", "_code"))}
        changed = set(self.adapter.sides) | set(self.adapter.values)
        known = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        unknown = sorted(changed - known)
        if unknown:
            raise ValueError(
                f"{self.adapter.folder}: the adapter changes {unknown[0]}, which this model does not have; it was "
                f"trained on {self.adapter.config.get('base_model_name_or_path')}"
            )
        for entry in self.entries.values():
            group = (entry.name, *entry.aliases)
            home = next((name for name in group if name in homes), None)
            if entry.aliases and home is not None and changed & set(group):
                # The adapter changes one of several names of one tensor: from here on they are several
                # tensors.
                homes.update(dict.fromkeys(group, home))
                self.result.untied += group
        elsewhere = sorted(changed - homes.keys())
        if elsewhere:
            raise ValueError(
                f"{self.source.folder}: the adapter changes {elsewhere[0]}, which these files hold under other names or in "
                "parts, as transformers' save_pretrained writes some models. Write them anew from the original weights "
                "with `octavo quantize`, which keeps the model's own names"
            )
        return homes

    def run(self, max_shard_size: int, progress: Callable[[int, int, str], None] | None) -> MergeResult:
        shards: list[list[str]] = [[]]
        filled = 0
        for name in self.homes:
            size = sum(piece_nbytes(piece) for piece in self._planned(name))
            if shards[-1] and filled + size > max_shard_size:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
        files = shard_names(len(shards))
        weight_map: dict[str, str] = {}
        total = done = 0
        for file, names in zip(files, shards, strict=True):
            room = header_room(piece for name in names for piece in self._planned(name))
            shard = ShardFile(self.out / file, room)
            for name in names:
                if progress is not None:
                    progress(done, len(self.homes), name)
                for piece, tensor in self._made(name).items():
                    shard.write(shard.reserve(piece, tensor.dtype, tuple(tensor.shape)), tensor)
                    weight_map[piece] = file
                    total += tensor.nbytes
                self._release(self.homes[name])
                done += 1
            shard.finish()
        self.result.nbytes = sum((self.out / file).stat().st_size for file in files)
        if len(files) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
            (self.out / SAFETENSORS_INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        self._write_config()
        self.source.save_auxiliary(self.out)
        return self.result

    def _release(self, home: str) -> None:
        for stored in [f"{home}_{suffix}" for suffix in SUFFIXES] if self._is_packed(home) else [home]:
            self.source.release(stored)

    def _is_packed(self, home: str) -> bool:
        return f"{home}_qdata" in self.source.tensors

    def _planned(self, name: str) -> list[Piece]:
        """Names, types and shapes of what is written for a parameter; scales may turn out narrower."""
        home = self.homes[name]
        tensors = self.source.tensors
        if not self._is_packed(home):
            info = tensors[home]
            floating = info.dtype.is_floating_point
            dtype = self.dtype if self.dtype is not None and floating else info.dtype
            return [(name, dtype, info.shape)]
        if self.dtype is not None:
            return [(name, self.dtype, tensors[f"{home}_qdata"].shape)]
        parts = [(suffix, tensors[f"{home}_{suffix}"]) for suffix in SUFFIXES]
        wide = {"absmax": torch.float32}
        return [(f"{name}_{suffix}", wide.get(suffix, info.dtype), info.shape) for suffix, info in parts]

    def _made(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of a parameter as they are written, the adapter merged in."""
        home = self.homes[name]
        if name in self.adapter.values:
            self.result.changed.append(name)
            value = self.adapter.file.get_tensor(self.adapter.values[name])
            kept = self.source.tensors[home].dtype
            return {name: value.to(self.dtype or kept)}
        changed = name in self.adapter.sides
        if not self._is_packed(home):
            value = self.source.read(home)
            if changed:
                self.result.changed.append(name)
                module = self.model.get_submodule(name.rpartition(".")[0])
                turned = holds_transpose(module) and not self.adapter.is_stack(name)
                value = self._merged(name, value.float(), turned).to(value.dtype)
            return {name: value.to(self.dtype) if self.dtype and value.is_floating_point() else value}
        qdata, absmax, code = (self.source.read(f"{home}_{suffix}") for suffix in SUFFIXES)
        if not changed and self.dtype is None:
            return {f"{name}_{suffix}": t for suffix, t in zip(SUFFIXES, (qdata, absmax, code), strict=True)}
        block_size = stored_block_size(qdata.shape[-1], absmax.shape[-1], self.config.block_size or 64)
        weight = OctavoTensor.from_packed(Packed(qdata, absmax, code, block_size), torch.float32)
        dense = weight.dequantize()
        if changed:
            self.result.changed.append(name)
            # Rows of what is stored are outputs, as PEFT's are for layers; it takes stacks as the model has them.
            dense = self._merged(name, dense, self.adapter.is_stack(name) and self._entry(name).transposed)
        if self.dtype is not None:
            return {name: self._as_in_the_model(name, dense).to(self.dtype)}
        return self._packed_anew(name, dense, block_size)

    def _merged(self, name: str, weight: torch.Tensor, turned: bool) -> torch.Tensor:
        """A float32 weight with the adapter in it; `turned`: the adapter has it the other way round."""
        rows = self.adapter.merged(name, weight.mT if turned else weight)
        return rows.mT.contiguous() if turned else rows

    def _entry(self, name: str) -> Entry:
        return next(e for e in self.entries.values() if name in (e.name, *e.aliases))

    def _as_in_the_model(self, name: str, dense: torch.Tensor) -> torch.Tensor:
        return dense.mT.contiguous() if self._entry(name).transposed else dense

    def _packed_anew(self, name: str, dense: torch.Tensor, block_size: int) -> dict[str, torch.Tensor]:
        config = OctavoConfig(self.config.codebook, block_size, scales=self.config.scales)
        packed = quantize_parameter(dense, config, name)
        stored = OctavoTensor.from_packed(packed, torch.float32).dequantize()
        self.result.error += float((stored - dense).double().square().sum())
        self.result.power += float(dense.double().square().sum())
        return {f"{name}_{suffix}": t for suffix, t in zip(SUFFIXES, packed[:3], strict=True)}

    def _write_config(self) -> None:
        config = dict(self.source.config)
        if self.dtype is not None:
            del config["quantization_config"]
            config["dtype"] = str(self.dtype).removeprefix("torch.")
            config.pop("torch_dtype", None)
        if self.result.untied:
            config["tie_word_embeddings"] = False
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (self.out / "config.json").write_text(text, encoding="utf-8")
