"""vLLM's linear layers, embeddings and output heads over weights in 8 bits.

A layer of vLLM may be several matrices of a file, one above the other (q, k, v; gate, up), and each has a codebook of its own. So
a layer holds a list of shards, in the order of its rows: plain tensors `qdata_0`, `absmax_0`, `code_0`, `qdata_1`, ..., or
`float_0` where the file has floats. A product is one call of `ops.linear` for each shard.

Example: `VllmOctavoConfig.get_quant_method` gives these to vLLM's layers.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn import Module, Parameter
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    ReplicatedLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.model_executor.parameter import BasevLLMParameter

from ... import ops
from ...tensor import OctavoTensor
from .weights import inside_rows, own_copy, rows_as_outputs


class Expected(BasevLLMParameter):
    """Stands for a layer's weight until it is loaded: has its shape and no memory, and keeps the shards that arrive.

    The `load_...` methods are those that vLLM's second weight loader calls. They cut out this rank's part as vLLM's own
    parameters do.

    Attributes:
        shards: row at which a shard begins → its weight, an `OctavoTensor` or floats.
    """

    output_dim, input_dim = 0, 1

    def __new__(cls, shape, dtype, **kwargs):
        return super().__new__(cls, torch.empty(shape, dtype=dtype, device="meta"))

    def __init__(self, shape, dtype, *, weight_loader, name: str):
        super().__init__(self.data, weight_loader)
        self.weight_name = name
        self.shards: dict[int, torch.Tensor] = {}
        # vLLM builds a model with the device as torch's default.
        self.target = torch.empty(0).device

    def keep(self, weight: torch.Tensor, row: int = 0) -> None:
        self.shards[row] = own_copy(weight, self.target, self.dtype)

    def load_column_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        rows = self.shape[0]
        self.keep(loaded_weight.narrow(0, self.tp_rank * rows, rows))

    def load_row_parallel_weight(self, loaded_weight: torch.Tensor) -> None:
        columns = self.shape[1]
        self.keep(inside_rows(loaded_weight, self.tp_rank * columns, columns, self.weight_name))

    def load_merged_column_weight(self, loaded_weight: torch.Tensor, **where: Any) -> None:
        rows = where["shard_size"]
        self.keep(loaded_weight.narrow(0, self.tp_rank * rows, rows), where["shard_offset"])

    def load_qkv_weight(self, loaded_weight: torch.Tensor, **where: Any) -> None:
        rows = where["shard_size"]
        # Where there are fewer heads of keys than ranks, neighbours hold the same head.
        rank = self.tp_rank if where["shard_id"] == "q" else self.tp_rank // where["num_heads"]
        self.keep(loaded_weight.narrow(0, rank * rows, rows), where["shard_offset"])

    def arrived(self) -> list[torch.Tensor]:
        """The shards in the order of rows, neighbours joined that were one matrix in the file.

        Raises:
            ValueError: if rows are missing, or their length is not the layer's.
        """
        kept: list[torch.Tensor] = []
        row = 0
        for start, shard in sorted(self.shards.items()):
            if start != row or shard.shape[1] != self.shape[1]:
                break
            row += shard.shape[0]
            both = joined(kept[-1], shard) if kept else None
            kept = [*kept[:-1], both] if both is not None else [*kept, shard]
        if row != self.shape[0]:
            found = {start: tuple(shard.shape) for start, shard in sorted(self.shards.items())}
            raise ValueError(
                f"{self.weight_name}: expected a weight of shape {tuple(self.shape)}, found {found or 'none'} in the checkpoint. "
                "Either the file is not complete, or this class of vLLM's loads its weights in a way of its own that Octavo's "
                "plugin does not know"
            )
        return kept


def joined(upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor | None:
    """One weight of two, if they share a codebook, a block size and a type of scales; None otherwise."""
    quantized = [isinstance(shard, OctavoTensor) for shard in (upper, lower)]
    if not any(quantized):
        return torch.cat([upper, lower])
    if not (isinstance(upper, OctavoTensor) and isinstance(lower, OctavoTensor)):
        return None
    alike = upper.block_size == lower.block_size and upper.absmax.dtype == lower.absmax.dtype
    if not alike or not torch.equal(upper.code, lower.code):
        return None
    qdata, absmax = torch.cat([upper.qdata, lower.qdata]), torch.cat([upper.absmax, lower.absmax])
    return OctavoTensor(qdata, absmax, upper.code, upper.block_size, upper.dtype)


def hold(layer: Any, shards: list[torch.Tensor]) -> None:
    """Give a layer its shards, as parameters of plain tensors: what vLLM counts, moves and compiles."""
    layer.block_sizes = []
    for index, shard in enumerate(shards):
        quantized = isinstance(shard, OctavoTensor)
        parts = ("qdata", "absmax", "code") if quantized else ("float",)
        for part in parts:
            value = getattr(shard, part) if quantized else shard
            layer.register_parameter(f"{part}_{index}", Parameter(value, requires_grad=False))
        layer.block_sizes.append(shard.block_size if isinstance(shard, OctavoTensor) else None)
    # vLLM's LoRA layers ask one of these for its device; code that knows no quantization may use the first as a weight.
    if len(shards) == 1:
        layer.weight = shards[0]
    else:
        layer.qweight = getattr(layer, "qdata_0", None) if layer.block_sizes[0] else layer.float_0


def product(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] times the layer's weight, plus bias → [..., N]."""
    out, row = [], 0
    for index, block_size in enumerate(layer.block_sizes):
        weight = getattr(layer, f"float_{index}" if block_size is None else f"qdata_{index}")
        rows = weight.shape[0]
        part = None if bias is None else bias[row : row + rows]
        if block_size is None:
            out.append(F.linear(x, weight, part))
        else:
            absmax, code = getattr(layer, f"absmax_{index}"), getattr(layer, f"code_{index}")
            out.append(ops.direct.linear(x, weight, absmax, code, block_size, part))
        row += rows
    return out[0] if len(out) == 1 else torch.cat(out, dim=-1)


class _OverShards:
    """What layers and embeddings do alike once their weights are there.

    Attributes:
        plain: vLLM's own method, which takes over a layer whose weight is one matrix of floats.
    """

    plain: type

    def __init__(self, name: str):
        self.name = name

    def process_weights_after_loading(self, layer: Any) -> None:
        expected = layer.weight if "weight" in layer._parameters else None
        if not isinstance(expected, Expected):
            return
        shards = expected.arrived()
        del layer._parameters["weight"]
        if len(shards) == 1 and not isinstance(shards[0], OctavoTensor):
            layer.register_parameter("weight", Parameter(shards[0], requires_grad=False))
            layer.quant_method = self.plain()
            layer.quant_method.process_weights_after_loading(layer)
            return
        hold(layer, shards)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return product(layer, x, bias)


@register_weight_loader_v2_supported_method
class OctavoLinearMethod(_OverShards, LinearMethodBase):
    """For every linear layer that was given the quantization configuration, split by rows, inside rows, or not at all."""

    plain = UnquantizedLinearMethod

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        load = extra_weight_attrs["weight_loader"]
        if isinstance(layer, ReplicatedLinear):
            load = Expected.keep
        shape = (sum(output_partition_sizes), input_size_per_partition)

        def load_rows(parameter, loaded_weight, *shard):
            load(parameter, rows_as_outputs(loaded_weight), *shard)

        layer.register_parameter(
            "weight", Expected(shape, params_dtype, weight_loader=load_rows, name=f"{self.name}.weight")
        )


class OctavoEmbeddingMethod(_OverShards, QuantizeMethodBase):
    """For embeddings and output heads, split by rows; rows that only fill up a rank's part are zeros."""

    plain = UnquantizedEmbeddingMethod

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        rows = sum(output_partition_sizes)
        name = f"{self.name or type(layer).__name__}.weight"

        def load(parameter, loaded_weight):
            vocabulary = layer.shard_indices
            start = vocabulary.org_vocab_start_index
            if loaded_weight.shape[0] != layer.org_vocab_size:
                raise ValueError(
                    f"{name}: expected {layer.org_vocab_size} rows, found {loaded_weight.shape[0]}"
                )
            own = loaded_weight.narrow(0, start, vocabulary.org_vocab_end_index - start)
            parameter.keep(_filled_up(own, rows))

        shape = (rows, input_size_per_partition)
        layer.register_parameter("weight", Expected(shape, params_dtype, weight_loader=load, name=name))

    def embedding(self, layer: Any, input_: torch.Tensor) -> torch.Tensor:
        parts = (layer.qdata_0, layer.absmax_0, layer.code_0)
        return ops.embedding(input_, *parts, layer.block_sizes[0], layer.params_dtype)

    def tie_weights(self, layer: Any, embed_tokens: Module) -> Module:
        """The embedding is the head: one set of tensors, whatever they turn out to be."""
        return embed_tokens


def _filled_up(weight: torch.Tensor, rows: int) -> torch.Tensor:
    """`rows` rows, zeros below the given ones: scales of 0 decode to zeros."""
    missing = (0, 0, 0, rows - weight.shape[0])
    if not isinstance(weight, OctavoTensor):
        return F.pad(weight, missing)
    qdata, absmax = F.pad(weight.qdata, missing), F.pad(weight.absmax, missing)
    return OctavoTensor(qdata, absmax, weight.code, weight.block_size, weight.dtype)
