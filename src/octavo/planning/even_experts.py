"""A mixture of experts for `octavo plan`: tokens spread evenly over the experts.

Which expert a token goes to depends on values, which a plan has not. What the experts compute together does not:
each token goes to `top_k` of them, so that their inputs and outputs have `tokens · top_k` rows however they are spread.
This is transformers' own "grouped_mm" with groups of equal size.

Example:
    >>> from octavo.checkpoint.skeleton import build_skeleton
    >>> from transformers import MixtralConfig
    >>> config = MixtralConfig(num_hidden_layers=1)
    >>> use_even(config)
    >>> skeleton = build_skeleton(config)
"""

from typing import Any

import torch
import torch.nn.functional as F

from ..tensor import Adapted, OctavoTensor

NAME = "octavo_even"


def use_even(config: Any) -> None:
    """Make the model that is built from a configuration use this; without experts it changes nothing."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(NAME, forward)
    for each in (config, config.get_text_config()):
        each._experts_implementation = NAME


def forward(module: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """What transformers' experts functions take and give.

    Args:
        module: holds the stacks [experts, out, in] ([experts, in, out] where `is_transposed`).
        hidden: [tokens, dim]. index, weights: [tokens, top_k].
    """
    order = torch.argsort(index.reshape(-1))
    rows = hidden[order // index.shape[-1]]  # [tokens · top_k, dim]
    out = _product(module, rows, "gate_up_proj" if module.has_gate else "up_proj")
    out = module._apply_gate(out) if module.has_gate else module.act_fn(out)
    out = _product(module, out, "down_proj")
    if getattr(module, "has_post_expert_norm", False):  # older transformers have no such experts
        out = module.post_expert_norm(out)
    out = out * weights.reshape(-1)[order].unsqueeze(-1)
    # Back into the order of the tokens.
    out = out[torch.argsort(order)]
    return out.view(hidden.shape[0], index.shape[-1], -1).sum(dim=1).to(hidden.dtype)


def _product(module: Any, rows: torch.Tensor, name: str) -> torch.Tensor:
    """Each expert's part of the rows times its matrix: [rows, in] → [rows, out]."""
    stack = getattr(module, name)
    count, rows = stack.shape[0], rows.to(stack.dtype)
    if isinstance(stack, OctavoTensor | Adapted):
        weights = (stack[expert] for expert in range(count))
        parts = zip(rows.tensor_split(count), weights, strict=True)
        out = torch.cat([F.linear(part, w.mT if module.is_transposed else w) for part, w in parts])
    else:
        # A float stack: its gradient is made at once, as by grouped_mm.
        padded = F.pad(rows, (0, 0, 0, -rows.shape[0] % count)).view(count, -1, rows.shape[1])
        product = torch.bmm(padded, stack if module.is_transposed else stack.mT)
        out = product.view(-1, product.shape[-1])[: rows.shape[0]]
    if not module.has_bias:
        return out
    bias = getattr(module, f"{name}_bias")
    return out + bias[torch.arange(rows.shape[0], device=rows.device) * count // rows.shape[0]]
