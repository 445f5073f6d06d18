"""Read GGUF files (llama.cpp) as float32, under transformers' names.

The file is memory-mapped, each tensor is de-quantized when it is read. What differs between llama.cpp and transformers, names
and layouts (permuted heads, offset norms, fused experts), is undone by transformers' own GGUF support, tensor by tensor: its
newer table of weight transforms where that knows the architecture, its tensor processors otherwise.

Example:
    >>> from octavo.checkpoint import open_source
    >>> source = open_source("model.gguf")
    >>> source.read("model.layers.0.self_attn.q_proj.weight").dtype
    torch.float32
"""

import mmap
import warnings
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...wording import one_line
from ..errors import CheckpointError, library_errors
from .gguf_header import GgufHeader, GgufTensor, read_gguf_header
from .source import Source, TensorInfo, check_layers


class GgufSource(Source):
    """A GGUF file.

    `tensors` gives the names that `transforms` start from: transformers' own for most architectures, the
    file's for those of transformers' newer GGUF reader.

    Raises:
        CheckpointError: if the file is damaged, or of an architecture that transformers does not read from GGUF.
    """

    kind = "gguf"
    native = False

    def __init__(self, path: Path):
        super().__init__(path.parent, [path])
        self.path = path
        self.header = read_gguf_header(path)
        architecture = self.header.metadata.get("general.architecture")
        if not isinstance(architecture, str):
            raise CheckpointError(f"{path}: no general.architecture in its metadata; not a language model")
        self.architecture: str = architecture
        self._bytes = np.memmap(path, mode="r", dtype=np.uint8)
        # Converted name → the file's tensors that make it up.
        self._parts: dict[str, list[GgufTensor]] = {}
        if self._has_transforms():
            for tensor in self.header.tensors:
                self._parts[tensor.name] = [tensor]
                self._add(tensor.name, tensor.shape)
        else:
            self._map_names()

    def _has_transforms(self) -> bool:
        try:
            from transformers.integrations.gguf import GGUF_ARCHS
        except ImportError:  # transformers before 5.20 has the older reader only
            return False
        return self.architecture in GGUF_ARCHS

    def _add(self, name: str, shape: tuple[int, ...]) -> None:
        nbytes = sum(tensor.nbytes for tensor in self._parts[name])
        kinds = "+".join(dict.fromkeys(tensor.type.name for tensor in self._parts[name]))
        self.tensors[name] = TensorInfo(name, shape, torch.float32, nbytes, self.path.name, kinds)

    def _map_names(self) -> None:
        from transformers.modeling_gguf_pytorch_utils import get_gguf_hf_weights_map

        from ..skeleton import build_skeleton

        model = build_skeleton(self.model_config())
        try:
            self._names = get_gguf_hf_weights_map(_Outline(model, model.config), self._processor)
        except NotImplementedError as error:
            raise CheckpointError(f"{self.path}: {error}") from error
        for tensor in self.header.tensors:
            name = self._target(tensor.name)
            if name is None:
                self.dropped.append(tensor.name)
            else:
                self._parts.setdefault(name, []).append(tensor)
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        for name, parts in self._parts.items():
            if name not in shapes:
                raise CheckpointError(
                    f"{self.path}: tensor {parts[0].name} has no place in a {type(model).__name__}"
                )
            self._add(name, shapes[name])

    def _target(self, name: str) -> str | None:
        # Fused experts are listed without the suffix that the file's names carry.
        return self._names.get(name) or self._names.get(name.removesuffix(".weight"))

    @cached_property
    def _parsed_config(self) -> dict[str, Any]:
        """The configuration that transformers' older reader makes of the metadata. Slow: it reads the vocabulary too."""
        from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

        return load_gguf_checkpoint(str(self.path), return_tensors=False)["config"]

    @cached_property
    def _processor(self) -> Any:
        from transformers.modeling_gguf_pytorch_utils import TENSOR_PROCESSORS, TensorProcessor

        return TENSOR_PROCESSORS.get(self.architecture, TensorProcessor)(config=self._parsed_config)

    def model_config(self) -> Any:
        return self._model_config

    @cached_property
    def _model_config(self) -> Any:
        from transformers import AutoConfig

        try:
            if self._has_transforms():
                config = AutoConfig.from_pretrained(str(self.folder), gguf_file=self.path.name)
            else:
                config = AutoConfig.for_model(**self._parsed_config)
            check_layers(config, len(self.header.tensors), self.path)
        except CheckpointError:
            raise
        except library_errors() as error:
            raise CheckpointError(
                f"{self.path}: transformers cannot read a GGUF of architecture {self.architecture!r}: {one_line(error)}"
            ) from error
        config.dtype = _float_type(self.header)
        return config

    @cached_property
    def config(self) -> dict[str, Any]:
        """A config.json made from the file's metadata."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

        config = self._model_config.to_diff_dict()
        if not config.get("architectures"):
            model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(self._model_config)]
            config["architectures"] = [model_class.__name__]
        return config

    @property
    def place(self) -> Path:
        return self.path

    @property
    def pretrained_options(self) -> dict[str, str]:
        return {"gguf_file": self.path.name}

    def transforms(self, model: Any) -> list[Any] | None:
        if not self._has_transforms():
            return []
        from transformers.integrations.gguf import get_gguf_conversion_mapping

        return get_gguf_conversion_mapping(self.architecture, model.config)

    def read(self, name: str) -> torch.Tensor:
        """The tensor in float32, de-quantized."""
        tensor = self._read(name)
        expected = self.tensors[name].shape
        if tuple(tensor.shape) != expected:
            raise CheckpointError(
                f"{self.path}: {name}: expected shape {list(expected)}, found {list(tensor.shape)}; transformers does "
                "not take all it needs from this GGUF's metadata: convert the original checkpoint instead"
            )
        return tensor

    def _read(self, name: str) -> torch.Tensor:
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
            raise CheckpointError(
                f"{self.path}: transformers does not read {name} from this GGUF architecture"
            )
        return gathered["tensors"][name]

    def _dequantize(self, part: GgufTensor) -> np.ndarray:
        """float32 of the tensor's shape."""
        from gguf.quants import dequantize

        packed = self._bytes[part.offset : part.offset + part.nbytes]
        try:
            return dequantize(packed.reshape(*part.shape[:-1], -1), part.type)
        except NotImplementedError as error:
            raise CheckpointError(
                f"{self.path}: tensor {part.name} has the type {part.type.name}, which the gguf package cannot "
                "de-quantize; `pip install -U gguf`, or take another quantization of the model"
            ) from error

    def release(self, name: str) -> None:
        mapped = getattr(self._bytes, "_mmap", None)
        if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)

    def auxiliary_files(self) -> list[Path]:
        """None: a GGUF carries its tokenizer inside; files beside it may belong to another model."""
        return []

    def save_auxiliary(self, out: Path) -> list[str]:
        """Convert the tokenizer inside the file and save it.

        A warning if transformers cannot: the weights are good without it.
        """
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(str(self.folder), gguf_file=self.path.name)
        except Exception as error:  # the tokenizers library raises no narrower class
            warnings.warn(
                f"{self.path}: transformers cannot convert its tokenizer ({type(error).__name__}: {error}); "
                "copy the original model's tokenizer.json and tokenizer_config.json beside the converted weights",
                stacklevel=2,
            )
            return []
        return sorted(Path(name).name for name in tokenizer.save_pretrained(str(out)))


class _Outline:
    """A model as transformers' mapping of names looks at it, without the layers one by one.

    It asks each module of a model in turn, and for each makes the table of all names anew: 49 s for 80 layers, so 0.4 s (one core
    of a Zen 4). No name is found in a layer that is not found above it.
    """

    def __init__(self, module: Any, config: Any = None):
        self.module, self.config = module, config

    def state_dict(self) -> dict[str, Any]:
        return self.module.state_dict()

    def named_children(self) -> list[tuple[str, "_Outline"]]:
        if isinstance(self.module, torch.nn.ModuleList):
            return []
        return [(name, _Outline(child)) for name, child in self.module.named_children()]


def _float_type(header: GgufHeader) -> torch.dtype:
    """The type the model was kept in: that of a file without quantized tensors, else float32."""
    kinds = {tensor.type.name for tensor in header.tensors}
    for name, dtype in (("BF16", torch.bfloat16), ("F16", torch.float16)):
        if kinds <= {name, "F32"} and name in kinds:
            return dtype
    return torch.float32
