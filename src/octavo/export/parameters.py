"""The parameters of a checkpoint, whatever its kind, as float32 rows.

Rows are outputs: what the model holds transposed (`Conv1D`) is read as [out, in]. A matrix in 8 bits is de-quantized
only where it is asked for, so memory holds some rows, not a matrix. Low-rank adapters inside published
checkpoints are added to their weights.

Example:
    >>> from octavo.checkpoint import open_source
    >>> from octavo.checkpoint.skeleton import build_skeleton
    >>> with open_source("model-8bit") as source:
    ...     parameters = Parameters(source, build_skeleton(source.model_config()))
    ...     parameters.rows("lm_head.weight", torch.arange(4)).shape
    torch.Size([4, 256])
"""

from typing import Any

import torch

from ..checkpoint import CheckpointError, Source
from ..checkpoint.names import map_names
from ..checkpoint.reading.octavo_source import rows_of
from ..checkpoint.reading.published_adapters import is_embedding_adapter
from ..model import holds_transpose
from ..quantizer import Packed


class Parameters:
    """What `source` holds of `model`.

    Args:
        source: an open checkpoint of any kind.
        model: its model, on the meta device.

    Raises:
        CheckpointError: if a parameter of the model is not in the checkpoint.
    """

    def __init__(self, source: Source, model: Any):
        self.source, self.model = source, model
        self._kept: tuple[str, torch.Tensor | Packed] | None = None
        self._groups = {name: group for group in map_names(model, source).groups for name in group.outputs}
        parameters = dict(model.named_parameters(remove_duplicate=False))
        tied = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._homes: dict[str, str] = {}
        for name in parameters:
            # Under another name than its own where weights are tied.
            partners = [tied.get(name), *(alias for alias, first in tied.items() if first == name)]
            home = next((each for each in (name, *partners) if each in self._groups), None)
            if home is None:
                raise CheckpointError(
                    f"{source.folder}: {name} is not in the checkpoint; config.json belongs to another model, or files "
                    "are missing"
                )
            self._homes[name] = home

    @property
    def names(self) -> list[str]:
        """The model's parameters; of those tied to each other, the first."""
        return [name for name, _ in self.model.named_parameters()]

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape with outputs as rows: [n], [out, in], or [experts, out, in]."""
        shape = tuple(self.model.get_parameter(name).shape)
        return (*shape[:-2], shape[-1], shape[-2]) if self._transposed(name) else shape

    def _transposed(self, name: str) -> bool:
        parameter = self.model.get_parameter(name)
        module = self.model.get_submodule(name.rpartition(".")[0])
        return parameter.dim() > 1 and holds_transpose(module)

    def rows(self, name: str, index: torch.Tensor, matrix: int = 0) -> torch.Tensor:
        """Rows of a matrix, or entries of a vector.

        Args:
            name: the parameter.
            index: int64 [n], which rows.
            matrix: which matrix of a stack (experts).

        Returns:
            float32 [n, in], or [n] for a vector.
        """
        home = self._homes[name]
        value = self._read(home)
        if isinstance(value, Packed):
            values = rows_of(value, index, matrix)
        else:
            if value.dim() == 3:
                value = value[matrix]
            values = (value.mT if self._transposed(name) else value)[index].to(torch.float32)
        return self._adapted(home, index, values)

    def _read(self, home: str) -> torch.Tensor | Packed:
        """A parameter as it is stored. The last one is kept: its rows are asked for panel by panel."""
        if self._kept is None or self._kept[0] != home:
            self._kept = (home, self._read_packed(home) or self._read_float(home))
        return self._kept[1]

    def _read_packed(self, home: str) -> Packed | None:
        group = self._groups[home]
        if group.converter is not None or group.source_names[0] not in self.source.quantized:
            return None
        # None where its blocks cannot be cut along rows: it is then de-quantized as a whole.
        return self.source.read_packed(group.source_names[0])

    def _read_float(self, home: str) -> torch.Tensor:
        return self._groups[home].realize(self.model, self.source.read)[home]

    def _adapted(self, home: str, index: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`values` with the published adapter of their module, if it has one, added: scaling is 1."""
        sides = self.source.adapters.get(home.removesuffix(".weight"))
        if sides is None:
            return values
        down, up = (side.to(torch.float32) for side in sides)
        delta = down[index] @ up.T if is_embedding_adapter(down, up) else up[index] @ down
        return values + delta

    def release(self, name: str) -> None:
        """Let go of a parameter's memory."""
        home = self._homes[name]
        self._kept = None
        for stored in self._groups[home].source_names:
            self.source.release(stored)
