"""Read GGUF files (llama.cpp) as float32, under transformers' names.

The file is memory-mapped, each tensor is de-quantized when it is read. What differs between llama.cpp and transformers, names
and layouts (permuted heads, offset norms, fused experts), is undone by transformers' own GGUF support, tensor by tensor:
its newer table of weight transforms where that knows the architecture, its tensor processors otherwise.

Example:
    >>> from octavo.checkpoint import open_source
    >>> source = open_source("SmolLM2-135M-Instruct.Q4_1.gguf")  # doctest: +SKIP
    >>> source.read("model.layers.0.self_attn.q_proj.weight").dtype  # doctest: +SKIP
    torch.float32
"""

import mmap
import warnings
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any

import torch

from .errors import CheckpointError
from .source import Source, TensorInfo

MAGIC = b"GGUF"


class GgufSource(Source):
    """A GGUF file.

    `tensors` gives the names that `transforms` start from: transformers' own for most architectures, the file's for those of
    transformers' newer GGUF reader.

    Raises:
        CheckpointError: if the file is damaged, or of an architecture that transformers does not read from GGUF.
    """

    kind = "gguf"

    def __init__(self, path: Path):
        super().__init__(path.parent, [path])
        self.path = path
        self._reader = _open_reader(path)
        field = self._reader.get_field("general.architecture")
        if field is None:
            raise CheckpointError(f"{path}: no general.architecture in its metadata; not a language model")
        self.architecture = field.contents()
        # Converted name → the file's tensors that make it up.
        self._parts: dict[str, list[Any]] = {}
        if self._has_transforms():
            for tensor in self._reader.tensors:
                self._parts[tensor.name] = [tensor]
                self._add(tensor.name, tuple(int(n) for n in reversed(tensor.shape)))
        else:
            self._map_names()

    def _has_transforms(self) -> bool:
        try:
            from transformers.integrations.gguf import GGUF_ARCHS
        except ImportError:  # transformers before 5.20 has the older reader only
            return False
        return self.architecture in GGUF_ARCHS

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        nbytes = sum(int(tensor.n_bytes) for tensor in self._parts[name])
        kinds = "+".join(dict.fromkeys(tensor.tensor_type.name for tensor in self._parts[name]))
        self.tensors[name] = TensorInfo(name, shape, torch.float32, nbytes, self.path.name, kinds)

    def _map_names(self) -> None:
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        from .skeleton import build_skeleton

        model = build_skeleton(self.model_config())
        try:
            self._names = get_gguf_hf_weights_map(model, self._processor)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        for tensor in self._reader.tensors:
            name = self._target(tensor.name)
            if name is None:
                self.dropped.append(tensor.name)
            else:
                self._parts.setdefault(name, []).append(tensor)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for name, parts in self._parts.items():
            if name not in shapes:
                raise CheckpointError(f"{self.path}: tensor {parts[0].name} has no place in a {type(model).__name__}")
            self._add(name, shapes[name])

    def _target(self, name: str) -> str | None:
        # Fused experts are listed without the suffix that the file's names carry.
        return self._names.get(name) or self._names.get(name.removesuffix(".weight"))

    @cached_property
    def _processor(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor, load_gguf_checkpoint

        parsed = load_gguf_checkpoint(str(self.path), return_tensors=False)
        return TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=parsed["config"])

    def model_config(self) -> Any:
        return self._model_config

    @cached_property
    def _model_config(self) -> Any:
        from transformers import AutoConfig

        try:
            config = AutoConfig.from_pretrained(str(self.folder), gguf_file=self.path.name)
        except (ValueError, KeyError, NotImplementedError, OSError) as error:
            raise CheckpointError(
                f"{self.path}: transformers cannot read a GGUF of architecture {self.architecture!r}: {error}"
            ) from error
        config.dtype = _float_type(self._reader)
        return config

    @cached_property
    def config(self) -> dict[str, Any]:
        """A config.json made from the file's metadata."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        config = self._model_config.to_diff_dict()
        if not config.get("architectures"):
            config["architectures"] = [MODEL_FOR_CAUSAL_LM_MAPPING[type(self._model_config)].__name__]
        return config

    def transforms(self, config: Any) -> list[Any] | None:
        if not self._has_transforms():
            return []
        from transformers.integrations.gguf import get_gguf_conversion_mapping

        return get_gguf_conversion_mapping(self.architecture, config)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in float32, de-quantized."""
        import numpy as np

        if self._has_transforms():
            return torch.from_numpy(np.array(self._dequantize(self._parts[name][0])))
        # Processors that put several tensors of the file into one leave it in `gathered`.
        gathered: dict[str, dict[str, torch.Tensor]] = {"tensors": {}}
        for part in self._parts[name]:
            result = self._processor.process(
                weights=self._dequantize(part),
                name=part.name,
                tensor_key_mapping=self._names,
                parsed_parameters=gathered,
            )
            if result.name is not None:
                return torch.from_numpy(np.array(result.weights, dtype=np.float32, order="C"))
        if name not in gathered["tensors"]:
            raise CheckpointError(f"{self.path}: transformers does not read {name} from this GGUF architecture")
        return gathered["tensors"][name]

    def _dequantize(self, part: Any) -> Any:
        from gguf.quants import dequantize

        try:
            return dequantize(part.data, part.tensor_type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {part.name} has the type {part.tensor_type}, which the gguf package cannot "
                "de-quantize; `pip install -U gguf`, or take another quantization of the model"
            ) from error

    def release(self, name: str) -> None:
        mapped = getattr(self._reader.data, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)

    def auxiliary_files(self) -> list[Path]:
        """None: a GGUF carries its tokenizer inside; files beside it may belong to another model."""
        return []

    def save_auxiliary(self, out: Path) -> list[str]:
        """Convert the tokenizer inside the file and save it; a warning if transformers cannot: the weights are good without."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.folder), gguf_file=self.path.name)
        except (ValueError, KeyError, TypeError, NotImplementedError, OSError) as error:
            warnings.warn(
                f"{self.path}: transformers cannot convert its tokenizer ({type(error).__name__}: {error}); copy the original "
                "model's tokenizer.json and tokenizer_config.json beside the converted weights",
                stacklevel=2,
            )
            return []
        return sorted(Path(name).name for name in tokenizer.save_pretrained(str(out)))


def _open_reader(path: Path) -> Any:
    from gguf import GGUFReader

    size = path.stat().st_size
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != MAGIC:
        raise CheckpointError(f"{path}: expected a GGUF file, found one that begins with {magic!r}")
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated at {size} bytes ({error}); download it again"
        ) from error
    for tensor in reader.tensors:
        end = int(tensor.data_offset) + int(tensor.n_bytes)
        if end > size or prod(int(n) for n in tensor.shape) != int(tensor.n_elements):
            raise CheckpointError(
                f"{path} is truncated: tensor {tensor.name} ends at byte {end}, the file has {size}; download it again"
            )
    return reader


def _float_type(reader: Any) -> torch.dtype:
    """The type the model was kept in: that of a file without quantized tensors, else float32."""
    kinds = {tensor.tensor_type.name for tensor in reader.tensors}
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        if kinds <= {name, "F32"} and name in kinds:
            return dtype
    return torch.float32
