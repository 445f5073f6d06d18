"""Octavo as one of vLLM's quantization methods: which of its layers get which of our methods.

Example:
    >>> VllmOctavoConfig.from_config({"quant_method": "octavo"}).octavo.block_size  # doctest: +SKIP
    64
"""

from typing import Any

import torch
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.core_model_loading import WeightRenaming
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from ...config import OctavoConfig
from ...ops.schema import COMPUTE_DTYPES
from .experts import OctavoExpertsMethod
from .layers import OctavoEmbeddingMethod, OctavoLinearMethod
from .weights import Assembling

NAME = "octavo"
# Of Mixtral and its kin: transformers' names → those that vLLM's classes have kept.
CHECKPOINT_NAMES = {
    ".mlp.": ".block_sparse_moe.",
    ".experts.gate_up_proj": ".experts.w13",
    ".experts.down_proj": ".experts.w2",
}


class VllmOctavoConfig(QuantizationConfig):
    """vLLM's view of config.json's `quantization_config`.

    Attributes:
        octavo: the same, as the rest of Octavo knows it. What `skip` names needs no look-up here: such weights
            arrive as floats, and a layer that gets floats computes in floats.
    """

    def __init__(self, octavo: OctavoConfig):
        super().__init__()
        self.octavo = octavo
        self.renaming = WeightsMapper()

    def __repr__(self) -> str:
        # vLLM logs it, and names its cache of compiled graphs by it.
        return f"{type(self).__name__}({self.octavo.to_dict()})"

    @classmethod
    def get_name(cls) -> str:
        return NAME

    @classmethod
    def get_supported_act_dtypes(cls) -> list[torch.dtype]:
        return list(COMPUTE_DTYPES)

    @classmethod
    def get_min_capability(cls) -> int:
        # What Triton itself needs.
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> "VllmOctavoConfig":
        return cls(OctavoConfig.from_dict(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Octavo's files have the names of transformers' modules; where those differ from published checkpoints (Mixtral), vLLM
        has kept the names of the checkpoints."""
        rules = get_checkpoint_conversion_mapping(getattr(hf_config, "model_type", None)) or []
        renamed = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        if any(".block_sparse_moe." in rule.source_patterns[0].replace("\\", "") for rule in renamed):
            self.renaming = WeightsMapper(orig_to_new_substr=CHECKPOINT_NAMES)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """vLLM asks for renamings here; ours also puts the three parts of a weight together."""
        return Assembling(self.octavo, self.renaming)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        if isinstance(layer, LinearBase):
            return OctavoLinearMethod(prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return OctavoEmbeddingMethod(prefix)
        if isinstance(layer, RoutedExperts):
            return OctavoExpertsMethod(layer.moe_config, prefix)
        return None
