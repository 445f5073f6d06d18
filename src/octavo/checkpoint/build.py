"""A model in memory from a checkpoint that transformers does not read as it is: published 8-bit ones, those
packed by other methods, and GGUF files.

transformers' own `from_pretrained` builds the model; what it is given in place of a file is a dictionary of `Lazy` tensors
under the names that an Octavo file would have, each read, and quantized if need be, when it is asked for.

Example:
    >>> from octavo.checkpoint import open_source
    >>> from octavo.checkpoint.build import build_model
    >>> with open_source("published") as source:
    ...     model = build_model(source, octavo.OctavoConfig(), torch.float32, "cpu")
"""

import threading
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch

from ..config import OctavoConfig
from ..model import Plan, plan_model
from ..quantizer import Packed, quantize_parameter
from ..tensor import SUFFIXES
from .reading.source import Source
from .skeleton import build_skeleton, model_class_of
from .units import Unit, plan_units


def build_model(
    source: Source,
    config: OctavoConfig | None,
    dtype: torch.dtype,
    device_map: Any,
    *,
    model_config: Any = None,
    changes: dict[str, Any] | None = None,
    arguments: Iterable[Any] = (),
    **options: Any,
) -> Any:
    """Build the model of a checkpoint, its matrices in 8 bits.

    Args:
        source: an open checkpoint; weights that it holds in 8 bits keep their bytes.
        config: how the other matrices are quantized; None: nothing is, and the model is a float one.
        dtype: compute dtype, also that of the parameters that stay in float.
        device_map: as transformers takes it: a device, or modules → devices.
        model_config: a transformers configuration in place of the checkpoint's own.
        changes: options of the user that also change the generation's configuration, where they are some of it.
        arguments, options: further ones of transformers' `from_pretrained`.

    Returns:
        What `from_pretrained` returns: the model, or with `output_loading_info` a tuple of it and a dictionary.

    Raises:
        CheckpointError: if the checkpoint and its config.json do not fit together.
        ValueError: on NaN or infinity in a weight, naming it.
    """
    model_config = source.model_config() if model_config is None else model_config
    if config is not None:
        config = source.own_config(config)
    skeleton = build_skeleton(model_config)
    plan = plan_model(skeleton, config) if config is not None else Plan()
    plan.check()
    units, _ = plan_units(skeleton, source, config or OctavoConfig(), plan)
    state: dict[str, Lazy] = {}
    for unit in units:
        reader = UnitReader(unit, source, skeleton)
        for output in unit.outputs:
            if output.entry is None:
                state[output.stored] = Lazy(partial(reader.plain, output))
            else:
                for index, suffix in enumerate(SUFFIXES):
                    state[f"{output.stored}_{suffix}"] = Lazy(partial(reader.part, output, index))
    if config is not None:
        model_config.quantization_config = config.to_dict()
    loaded = model_class_of(model_config).from_pretrained(
        None, *arguments, config=model_config, state_dict=state, dtype=dtype, device_map=device_map, **options
    )
    model = loaded[0] if isinstance(loaded, tuple) else loaded
    given = options.get("generation_config") is not None
    if (
        model.can_generate()
        and not given
        and source.folder / "generation_config.json" in source.auxiliary_files()
    ):
        from transformers import GenerationConfig

        model.generation_config = GenerationConfig.from_pretrained(str(source.folder), **(changes or {}))
    return loaded


class Lazy:
    """A tensor that is made when `lazy[...]` asks for it, as transformers does while it loads."""

    def __init__(self, make: Callable[[], torch.Tensor]):
        self.make = make

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self.make()[index]

    def is_floating_point(self) -> bool:
        # Only asked to decide about a cast, which the loading of our parts decides for itself.
        return True


class UnitReader:
    """Reads one unit of a checkpoint. Its quantized outputs are kept until each of their three parts has been
    asked for.

    transformers loads from several threads at once; one lock per unit keeps them from quantizing it twice.
    """

    def __init__(self, unit: Unit, source: Source, skeleton: Any):
        self.unit = unit
        self.source = source
        self.skeleton = skeleton
        self.lock = threading.Lock()
        self.kept: dict[str, tuple[Packed, int]] = {}

    def packed(self, output: Any) -> Packed:
        """The parts of a quantized output. Each call counts as one part handed out."""
        with self.lock:
            packed, left = self.kept.pop(output.name, (None, len(SUFFIXES)))
            if packed is None:
                packed = self._pack(output)
            if left > 1:
                self.kept[output.name] = (packed, left - 1)
            return packed

    def part(self, output: Any, index: int) -> torch.Tensor:
        """One of the three parts of a quantized output."""
        return self.packed(output)[:3][index]

    def plain(self, output: Any) -> torch.Tensor:
        """A parameter or buffer that stays in float."""
        value = self._read(output).clone()
        self._release()
        return value

    def _pack(self, output: Any) -> Packed:
        packed = self.source.read_packed(self.unit.group.source_names[0]) if output.exact else None
        if packed is None:
            value = self._read(output)
            stored = value.mT if output.entry.transposed else value
            packed = quantize_parameter(stored, output.config, output.name)
        else:
            # The file's own memory is mapped: a model must not depend on the file staying as it is.
            qdata, absmax, code, block_size = packed
            packed = Packed(qdata.clone(), absmax.clone(), code.clone(), block_size)
        self._release()
        return packed

    def _read(self, output: Any) -> torch.Tensor:
        return self.unit.group.realize(self.skeleton, self.source.read)[output.made]

    def _release(self) -> None:
        for name in self.unit.group.source_names:
            self.source.release(name)
