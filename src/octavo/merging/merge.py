"""Merge an adapter into its model's files, one tensor at a time.

A merged model is one more source of a checkpoint: each weight that the adapter changes is read (de-quantized if it is in
8 bits), gets `scale · B A` added in float32 (and for DoRA its magnitudes set); every other one is read as it is. It is written
as `octavo quantize` writes (`checkpoint.writing.writer`): in 8 bits, where only the changed weights get codebooks fitted anew, or
in 16 bits; with a journal, aside, and renamed when it is whole. Memory holds a few times the largest tensor, never the model.
Weights that config.json ties, of which the adapter changes one, are untied on purpose: the copy's config.json says so.

Example:
    >>> result = merge("model-8bit", "poems", "poems-merged")
    >>> result.added_error < 1e-4
    True
"""

import hashlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..checkpoint import open_source
from ..checkpoint.names import map_names
from ..checkpoint.reading.octavo_source import OctavoSource
from ..checkpoint.reading.source import SourceOver, TensorInfo
from ..checkpoint.skeleton import build_skeleton
from ..checkpoint.units import plan_units
from ..checkpoint.writing.output_directory import choose_output_directory
from ..checkpoint.writing.writer import MAX_SHARD_SIZE, CheckpointWriter, Progress
from ..config import OctavoConfig
from ..model import Entry, Plan, holds_transpose
from ..quantizer import Packed
from ..training.prompts import read_prompts
from .adapter_files import Adapter

TYPES = {"8bit": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass
class MergeResult:
    """What a merge did.

    Attributes:
        out: the folder written.
        changed: names of the weights that the adapter changed.
        error, power: sums over those of the squared rounding error of 8 bits, and of the squared merged weights.
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
    overwrite: bool = False,
    max_shard_size: int = MAX_SHARD_SIZE,
    progress: Progress | None = None,
) -> MergeResult:
    """Write a copy of a model with an adapter merged in.

    Args:
        model: a folder or hub id of a model in Octavo's 8 bits.
        adapter: a PEFT LoRA adapter folder.
        out: the folder to write; it appears when it is whole. Until then the work is in `out`.partial, where the same
            call, after an interruption, goes on with it.
        to: "8bit" (the changed weights get codebooks fitted anew, all others keep their bytes), "float16", "bfloat16".
        overwrite: replace `out`, once the new one is whole; and discard unfinished work that does not match.
        max_shard_size: bytes that a file takes at most.
        progress: called with bytes read so far, bytes to read, and the parameter at hand.

    Raises:
        ValueError: on an unknown `to`, or an adapter that does not fit the model.
        octavo.checkpoint.CheckpointError: if the model cannot be read, `out` is in the way, or the disk is full.
    """
    if to not in TYPES:
        raise ValueError(f"--to: expected one of {', '.join(TYPES)}, found {to!r}")
    with open_source(model) as source:
        if not isinstance(source, OctavoSource):
            raise ValueError(
                f"{source.folder}: expected a model in 8 bits, found {source.kind}; `octavo quantize` it first"
            )
        output = choose_output_directory(Path(out), source, overwrite)
        merged = MergedSource(source, Adapter(adapter), TYPES[to])
        units, _ = plan_units(merged.model, merged, merged.options, merged.plan())
        options = {"merge": to, "adapter": merged.adapter_digest()}
        written = CheckpointWriter(
            merged,
            merged.model,
            units,
            output,
            merged.config,
            options,
            overwrite=overwrite,
            max_shard_size=max_shard_size,
        ).run(progress)
    error, power = (sum(getattr(row, key) for row in written.rows) for key in ("error", "power"))
    return MergeResult(output.asked, merged.changed, error, power, merged.untied, written.nbytes)


class MergedSource(SourceOver):
    """A model in Octavo's format with an adapter in it: parameters under the model's names, in the model's layout.

    Args:
        dtype: type of all float tensors; None: each its own, and what is in 8 bits stays so.

    Attributes:
        model: its model, on the meta device.
        changed: names of the parameters that the adapter changes.
        untied: names that shared a tensor and no longer do.

    Raises:
        ValueError: if the adapter changes what the model or its files do not have.
    """

    kind = "merged"

    def __init__(self, inner: OctavoSource, adapter: Adapter, dtype: torch.dtype | None = None):
        super().__init__(inner)
        self.adapter, self.options, self.float_type = adapter, inner.options, dtype
        model_config = inner.model_config()
        del model_config.quantization_config
        self.model = build_skeleton(model_config)
        if adapter.has_stacks:
            adapter.place_on_stacks(build_skeleton(model_config))
        self.untied: list[str] = []
        self._homes = self._find_homes()
        self.changed = [name for name in self._homes if name in adapter.sides or name in adapter.values]
        if self.untied:
            model_config.tie_word_embeddings = False
            self.model = build_skeleton(model_config)
        self.files = [*inner.files, adapter.folder / "adapter_model.safetensors"]
        state = self.model.state_dict()
        for name, home in self._homes.items():
            info = inner.tensors[home]
            kept = self.float_type if info.dtype.is_floating_point and self.float_type else info.dtype
            self.tensors[name] = TensorInfo(name, tuple(state[name].shape), kept, info.nbytes, info.file)
            if home in inner.quantized and self.float_type is None:
                self.quantized[name] = inner.quantized[home]

    def _find_homes(self) -> dict[str, str]:
        """Every parameter and buffer of the merged model → its name in the files."""
        groups = map_names(self.model, self._inner).groups
        homes = {name: group.source_names[0] for group in groups for name in group.outputs}
        changed = set(self.adapter.sides) | set(self.adapter.values)
        known = {name for name, _ in self.model.named_parameters(remove_duplicate=False)}
        unknown = sorted(changed - known)
        if unknown:
            raise ValueError(
                f"{self.adapter.folder}: the adapter changes {unknown[0]}, which this model does not have; it was "
                f"trained on {self.adapter.config.get('base_model_name_or_path')}"
            )
        for group in self._names_of_one():
            home = next((homes[name] for name in group if name in homes), None)
            if len(group) > 1 and home is not None and changed & set(group):
                # The adapter changes one of several names of one tensor: from here on they are several tensors.
                homes.update(dict.fromkeys(group, home))
                self.untied += group
        absent = sorted(changed - homes.keys())
        if absent:
            raise ValueError(
                f"{self.folder}: the adapter changes {absent[0]}, which these files do not hold; write them anew from the "
                "original weights with `octavo quantize`"
            )
        return homes

    def _names_of_one(self) -> list[list[str]]:
        """The names of each parameter of the model: several of one that is tied."""
        names: dict[int, list[str]] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        return list(names.values())

    def save_auxiliary(self, out: Path) -> list[str]:
        """The model's side files, and what the adapter was trained on: the merged model is asked in the same way."""
        copied = super().save_auxiliary(out)
        trained = read_prompts(self.adapter.folder)
        if trained is not None:
            trained.save(out)
        return copied

    def plan(self) -> Plan:
        """What stays in 8 bits is what is in 8 bits: the files say so, whatever a rule would choose today."""
        aliases = {name: [n for n in group if n != name] for group in self._names_of_one() for name in group}
        entries = {}
        for name in self.quantized:
            shape, turned = self.tensors[name].shape, self._is_turned(name)
            entries[name] = Entry(name, shape, turned, tuple(aliases.get(name, ())))
        return Plan(entries)

    def adapter_digest(self) -> str:
        """SHA-256 of the adapter's configuration and weights."""
        digest = hashlib.sha256()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            digest.update((self.adapter.folder / name).read_bytes())
        return digest.hexdigest()

    @cached_property
    def config(self) -> dict[str, Any]:
        """config.json of the merged model."""
        config = dict(self._inner.config)
        if self.float_type is not None:
            del config["quantization_config"]
            config["dtype"] = str(self.float_type).removeprefix("torch.")
        if self.untied:
            config["tie_word_embeddings"] = False
        return config

    def transforms(self, model: Any) -> list[Any]:
        return []

    def refit_config(self, name: str) -> OctavoConfig:
        return OctavoConfig(self.options.codebook, self.quantized[name], scales=self.options.scales)

    def keeps(self, name: str, transposed: bool) -> bool:
        return name not in self.changed

    def read_packed(self, name: str) -> Packed | None:
        return self._inner.read_packed(self._homes[name])

    def _is_turned(self, name: str) -> bool:
        return holds_transpose(self.model.get_submodule(name.rpartition(".")[0]))

    def read(self, name: str) -> torch.Tensor:
        """A parameter with the adapter in it, as the model holds it; float32, or of the type asked for."""
        home, wanted = self._homes[name], self.tensors[name].dtype
        turned = self._is_turned(name)
        if name in self.adapter.values:
            # Trained whole; or an embedding, or a head, that PEFT saves beside what it adds to it.
            value = self.adapter.file.get_tensor(self.adapter.values[name])
        else:
            value = self._inner.read(home)
            if home in self._inner.quantized and turned:
                value = value.mT
        if name in self.adapter.sides:
            # PEFT has layers' weights with outputs as rows, and stacks as the model has them.
            turned = turned and not self.adapter.is_stack(name)
            rows = self.adapter.merged(name, (value.mT if turned else value).float())
            value = rows.mT if turned else rows
        return value.to(wanted).contiguous()

    def release(self, name: str) -> None:
        self._inner.release(self._homes[name])
