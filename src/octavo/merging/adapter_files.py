"""A LoRA adapter folder as PEFT writes it: what it adds to which weight, without a model.

Example:
    >>> adapter = Adapter("poems")
    >>> name = "transformer.h.0.attn.q_proj.weight"
    >>> adapter.delta(name).shape, len(adapter.sides)
    (torch.Size([256, 256]), 6)
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ..checkpoint.reading.safetensors_source import check_adapter_file
from ..json_files import read_object

PREFIX = "base_model.model."
SIDES = ("lora_A.weight", "lora_B.weight", "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector")


@dataclass
class Stack:
    """How an adapter lies on a stack of experts' matrices.

    Attributes:
        scale: what B A is multiplied by.
        experts: number of matrices; 1 for a parameter that is one matrix.
        outputs_first: whether the model has [experts, out, in], else [experts, in, out].
    """

    scale: float
    experts: int
    outputs_first: bool


class Adapter:
    """A LoRA adapter folder of PEFT, read lazily.

    Attributes:
        sides: name of a weight → the tensors in the file that change it, by kind (SIDES). Adapters on stacks of experts are
            only there after `place_on_stacks`.
        values: name of a parameter that was trained whole → its tensor in the file. Also of an embedding or a head in float that
            has an adapter on it: PEFT saves it as it was, and the adapter is added to that.

    Raises:
        ValueError: if the folder holds none, or one of a kind that cannot be merged tensor by tensor.
    """

    def __init__(self, folder: str | Path):
        from safetensors import safe_open

        self.folder = Path(folder)
        check_adapter_file(self.folder)
        try:
            self.config = read_object(self.folder / "adapter_config.json")
            self.file = safe_open(self.folder / "adapter_model.safetensors", "pt")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"{folder}: expected a PEFT adapter folder with adapter_config.json and adapter_model.safetensors ({error})"
            ) from error
        asked = "trainable_token_indices" if self.config.get("trainable_token_indices") else "no"
        if self.config.get("peft_type") != "LORA" or asked != "no":
            raise ValueError(
                f"{folder}: expected a LoRA adapter, found {self.config.get('peft_type')} with {asked} special options. "
                "Load it with PEFT and call merge_and_unload(), which holds the whole model in memory"
            )
        self.sides: dict[str, dict[str, str]] = {}
        self.values: dict[str, str] = {}
        self._stacks: dict[str, Stack] = {}
        for key in self.file.keys():  # noqa: SIM118  (no dictionary)
            name = key.removeprefix(PREFIX)
            side = next((side for side in SIDES if name.endswith(f".{side}")), None)
            if side is not None:
                self.sides.setdefault(f"{name.removesuffix(f'.{side}')}.weight", {})[side] = key
            elif ".original_module." not in name:
                # A norm or a bias that was trained whole; PEFT wraps the layers that adapters sit on.
                self.values[name.replace(".base_layer.", ".").replace(".modules_to_save.", ".")] = key

    @property
    def has_stacks(self) -> bool:
        """Whether some of it lies on parameters that are no layer's weight: fused experts."""
        return bool(self.config.get("target_parameters"))

    def place_on_stacks(self, model: nn.Module) -> None:
        """Find out which parameter each adapter on a stack belongs to.

        The file does not say: PEFT wraps a module once for each of its parameters and numbers nothing. So PEFT wraps a model
        in the same way again, and is asked.

        Args:
            model: the adapter's base model; it may be on the meta device. It is changed: do not use it afterwards.
        """
        from peft import LoraConfig, get_peft_model
        from peft.tuners.lora.layer import ParamWrapper

        wrapped = get_peft_model(model, LoraConfig.from_pretrained(str(self.folder)), low_cpu_mem_usage=True)
        for name, module in wrapped.named_modules():
            if not isinstance(module, ParamWrapper):
                continue
            path = name.removeprefix(PREFIX)
            keys = self.sides.pop(f"{path}.weight", None)
            if keys is None:
                raise ValueError(
                    f"{self.folder}: adapter_config.json names {module.parameter_name} in target_parameters, but "
                    f"adapter_model.safetensors has no {PREFIX}{path}.lora_A.weight; the two are not of one adapter"
                )
            parameter = f"{path.replace('.base_layer', '')}.{module.parameter_name}"
            stacked = module.get_param().dim() == 3
            outputs_first = not stacked or not getattr(module.get_base_layer(), "is_transposed", False)
            self._stacks[parameter] = Stack(module.scaling["default"], module.num_experts, outputs_first)
            self.sides[parameter] = keys

    def is_stack(self, name: str) -> bool:
        """Whether a name is that of a parameter that is no layer's weight."""
        return name in self._stacks

    def delta(self, name: str) -> torch.Tensor:
        """What is added to a weight, float32: [out, in] for layers, [num, dim] for embeddings, a stack as the model has it."""
        keys = self.sides[name]
        if name in self._stacks:
            return self._delta_of_stack(self._stacks[name], keys)
        module = name.removesuffix(".weight")
        rank = self._pattern("rank_pattern", module, self.config["r"])
        alpha = self._pattern("alpha_pattern", module, self.config["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)
        if "lora_embedding_A" in keys:
            down, up = (self.file.get_tensor(keys[f"lora_embedding_{side}"]).float() for side in "AB")
            return scale * (up @ down).T
        down, up = (self.file.get_tensor(keys[f"lora_{side}.weight"]).float() for side in "AB")
        return scale * (up @ down)

    def _delta_of_stack(self, stack: Stack, keys: dict[str, str]) -> torch.Tensor:
        down, up = (self.file.get_tensor(keys[f"lora_{side}.weight"]).float() for side in "AB")
        if stack.experts == 1:
            return stack.scale * (up @ down)
        # PEFT has A's rows expert by expert, and B's columns rank by rank.
        down = down.view(stack.experts, -1, down.shape[-1])
        up = up.view(up.shape[0], -1, stack.experts).permute(2, 0, 1)
        delta = torch.bmm(up, down).mul_(stack.scale)
        return delta if stack.outputs_first else delta.mT

    def merged(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """A weight, float32, in the shape that `delta` has, with the adapter in it.

        DoRA (Liu et al. 2024, arXiv:2402.09353): `m · (W + ΔW) / ‖W + ΔW‖`, the norm over what an output sums over; of
        an embedding PEFT takes the norm over the vocabulary.
        """
        weight = weight + self.delta(name)
        keys = self.sides[name]
        if "lora_magnitude_vector" not in keys:
            return weight
        over = 0 if "lora_embedding_A" in keys else 1
        magnitude = self.file.get_tensor(keys["lora_magnitude_vector"]).float().reshape(-1)
        return weight * (magnitude / torch.linalg.norm(weight, dim=over)).unsqueeze(over)

    def _pattern(self, table: str, module: str, default: float) -> float:
        """PEFT's own rule: the first pattern that the module's name ends with."""
        for pattern, value in (self.config.get(table) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return default
