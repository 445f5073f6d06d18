"""vLLM's mixture-of-experts layers over weights in 8 bits.

The layer holds a stack for each projection, E experts of one rank: `gate` and `up` [E, I, H], `down` [E, H, I]; where the file
holds gate and up as one matrix with one codebook they stay one, `gate_up` [E, 2 I, H]. Tokens are grouped by expert, and each
group is one product per projection.

Example: `VllmOctavoConfig.get_quant_method` gives this to vLLM's experts.
"""

from typing import Any

import torch
from torch.nn import Parameter
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.fused_moe.activation import apply_moe_activation
from vllm.model_executor.layers.fused_moe.config import FusedMoEConfig, FusedMoEQuantConfig
from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.platforms import current_platform

from ... import ops
from ...tensor import OctavoTensor
from ...wording import few
from .layers import joined
from .weights import inside_rows, own_copy

# vLLM's names of the three projections.
PROJECTIONS = {"w1": "gate", "w3": "up", "w2": "down"}


class ExpectedExperts(Parameter):
    """Stands for the experts' weights of one kind until they are loaded: has their shape and no memory.

    Attributes:
        pieces: (projection, this rank's number of the expert) → its weight.
    """

    def __new__(cls, shape, dtype, layer, name):
        return super().__new__(cls, torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)

    def __init__(self, shape, dtype, layer, name: str):
        self.weight_name = name
        self.pieces: dict[tuple[str, int], torch.Tensor] = {}
        self.target = torch.empty(0).device
        # As functions of the layer, so that the layer is no submodule of its own parameter.
        self.local_number = layer._map_global_expert_id_to_local_expert_id
        self.rank = layer.moe_config.moe_parallel_config.tp_rank
        self.part = layer.moe_config.intermediate_size_per_partition

    def weight_loader(
        self, param, loaded_weight, weight_name, shard_id, expert_id, return_success=False
    ) -> bool | None:
        """vLLM calls this for each expert and projection. Returns whether the expert is one of this rank's."""
        number = self.local_number(expert_id)
        if number == -1:
            return False if return_success else None
        if isinstance(loaded_weight, OctavoTensor) and loaded_weight.transposed:
            raise NotImplementedError(
                f"{weight_name}: Octavo's plugin for vLLM does not serve experts that a file holds with inputs as rows"
            )
        start = self.rank * self.part
        if shard_id == "w2":
            own = inside_rows(loaded_weight, start, self.part, self.weight_name)
        else:
            own = loaded_weight.narrow(0, start, self.part)
        self.pieces[PROJECTIONS[shard_id], number] = own_copy(own, self.target, self.dtype)
        return True if return_success else None


class OctavoExpertsMethod(FusedMoEMethodBase):
    """For a layer's routed experts, whole ones or split inside each expert."""

    def __init__(self, moe: FusedMoEConfig, name: str):
        super().__init__(moe)
        self.name = name
        if moe.has_bias:
            raise NotImplementedError(f"{name}: Octavo's plugin for vLLM does not serve experts with a bias")
        if not current_platform.is_cpu() and not get_current_vllm_config().model_config.enforce_eager:
            raise ValueError(
                "a mixture of experts in 8 bits runs one product per expert that has tokens, which CUDA graphs cannot hold: "
                "start vLLM with --enforce-eager"
            )

    def create_weights(
        self,
        layer: Any,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        halves = 2 if self.moe.is_act_and_mul else 1
        shapes = {
            "w13_weight": (num_experts, halves * intermediate_size_per_partition, hidden_size),
            "w2_weight": (num_experts, hidden_size, intermediate_size_per_partition),
        }
        for name, shape in shapes.items():
            layer.register_parameter(name, ExpectedExperts(shape, params_dtype, layer, f"{self.name}.{name}"))

    def process_weights_after_loading(self, layer: Any) -> None:
        if not isinstance(layer.w13_weight, ExpectedExperts):
            return
        pieces = {**layer.w13_weight.pieces, **layer.w2_weight.pieces}
        names = ["gate", "up", "down"] if self.moe.is_act_and_mul else ["gate", "down"]
        experts = range(layer.w13_weight.shape[0])
        missing = [f"{name} of expert {e}" for name in names for e in experts if (name, e) not in pieces]
        if missing:
            raise ValueError(f"{self.name}: the checkpoint lacks {len(missing)} weights: {few(missing)}")
        if not any(isinstance(piece, OctavoTensor) for piece in pieces.values()):
            self._become_float(layer, pieces, names)
            return
        both = {}
        if "up" in names:
            both = {e: joined(pieces["gate", e], pieces["up", e]) for e in experts}
        if both and all(isinstance(piece, OctavoTensor) for piece in both.values()):
            pieces.update({("gate_up", e): piece for e, piece in both.items()})
            names = ["gate_up", "down"]
        del layer._parameters["w13_weight"], layer._parameters["w2_weight"]
        layer.block_sizes = {name: _hold(layer, name, [pieces[name, e] for e in experts]) for name in names}
        # vLLM's LoRA layers ask it for its device.
        layer.w2_qweight = layer.down_qdata

    def _become_float(
        self, layer: Any, pieces: dict[tuple[str, int], torch.Tensor], names: list[str]
    ) -> None:
        """The file holds these experts in floats: vLLM's own method."""
        method = UnquantizedFusedMoEMethod(layer.moe_config)
        for name, projections in {"w13_weight": names[:-1], "w2_weight": names[-1:]}.items():
            expected = layer._parameters.pop(name)
            rows = [
                torch.cat([pieces[projection, expert] for projection in projections])
                for expert in range(expected.shape[0])
            ]
            layer.register_parameter(name, Parameter(torch.stack(rows), requires_grad=False))
        layer._replace_quant_method(method)
        method.process_weights_after_loading(layer)

    def get_fused_moe_quant_config(self, layer: Any) -> FusedMoEQuantConfig | None:
        return FusedMoEQuantConfig.make()

    def apply(
        self,
        layer: Any,
        x: torch.Tensor,
        topk_weights: torch.Tensor,
        topk_ids: torch.Tensor,
        shared_experts: Any = None,
        shared_experts_input: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x [T, H], weights and numbers of each token's experts [T, k] → [T, H]."""
        ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]
        # 16-bit sums of k experts would round k times.
        out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in torch.unique(ids).tolist():
            if expert == -1:  # another rank's
                continue
            tokens, places = torch.where(ids == expert)
            weights = topk_weights[tokens, places].unsqueeze(-1)
            rows = x[tokens]
            if layer.apply_router_weight_on_input:
                rows = rows * weights.to(x.dtype)
            hidden = _times(layer, "down", expert, _activated(layer, expert, rows))
            out.index_add_(0, tokens, hidden if layer.apply_router_weight_on_input else hidden * weights)
        return out.to(x.dtype)


def _hold(layer: Any, name: str, pieces: list[torch.Tensor]) -> int:
    """Stack one projection of all experts onto the layer; its block size."""
    weights = [piece for piece in pieces if isinstance(piece, OctavoTensor)]
    sizes = {weight.block_size for weight in weights}
    if len(weights) < len(pieces) or len(sizes) > 1:
        raise ValueError(
            f"{name}: some of its experts are in 8 bits and some are not, or their block sizes differ ({sizes})"
        )
    # float16 scales are exact in float32.
    scales = torch.float32 if any(w.absmax.dtype == torch.float32 for w in weights) else torch.float16
    stacks = {
        "qdata": torch.stack([weight.qdata for weight in weights]),
        "absmax": torch.stack([weight.absmax.to(scales) for weight in weights]),
        "code": torch.stack([weight.code for weight in weights]),
    }
    for part, stack in stacks.items():
        layer.register_parameter(f"{name}_{part}", Parameter(stack, requires_grad=False))
    return sizes.pop()


def _times(layer: Any, name: str, expert: int, x: torch.Tensor) -> torch.Tensor:
    qdata, absmax, code = (getattr(layer, f"{name}_{part}")[expert] for part in ("qdata", "absmax", "code"))
    return ops.direct.linear(x, qdata, absmax, code, layer.block_sizes[name])


def _activated(layer: Any, expert: int, x: torch.Tensor) -> torch.Tensor:
    """act(gate) · up, by vLLM's own function for the layer's activation."""
    names = [name for name in layer.block_sizes if name != "down"]
    hidden = torch.cat([_times(layer, name, expert, x) for name in names], dim=-1)
    width = layer.moe_config.intermediate_size_per_partition
    out = torch.empty(x.shape[0], width, dtype=x.dtype, device=x.device)
    return apply_moe_activation(layer.activation, out, hidden)
