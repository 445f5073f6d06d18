"""Attention of one new token on a CPU, where several heads share keys and values (grouped-query attention).

PyTorch's `scaled_dot_product_attention` on a CPU converts the keys and values of a shared head once for each head that
shares them. For one token those heads can be rows of one query instead, [batch, kv heads, heads a kv head, size], and the
keys and values are gone through once: the same arithmetic, in bfloat16 the same bits. Everything else goes to transformers' own
"sdpa" function. This one is registered beside it, by transformers' public interface, under the name `NAME`, whenever
transformers' models are imported (`octavo.integrations.registration`): a pickled model knows its attention by that name.

Measured on two cores of a Zen 4, bfloat16, 32 heads on 8, size 64, µs per layer, theirs / ours, torch 2.13:
40 tokens in the cache 93 / 26, 500 tokens 890 / 96, 2000 tokens 3990 / 380.

Example:
    >>> import octavo
    >>> model = octavo.load("model-8bit")
    >>> model.config._attn_implementation     # "octavo_sdpa" for models with fewer heads for keys than for queries, on CPUs
    'eager'

`octavo.load` asks for it; a model from `from_pretrained` keeps transformers' own, which its continuous batching insists on, until
`use_grouped_attention(model)`.
"""

import inspect
import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

NAME = "octavo_sdpa"
# Code that asks which attention it has. What it does for "sdpa" would not be done for `NAME`.
ASKS_FOR_SDPA = re.compile(r"_attn_implementation\b.*(==|!=|\bin\b).*[\"']sdpa[\"']")


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' `sdpa_attention_forward`, which it calls for all but one token on a CPU with shared keys.

    Args:
        query: [batch, heads, tokens, size]; key, value: [batch, kv heads, cached, size], kv heads a divisor of heads.
        attention_mask: None, or bool or float [batch, 1, tokens, cached].

    Returns:
        [batch, tokens, heads, size], and None for the weights.
    """
    batch, heads, tokens, size = query.shape
    groups = heads // key.shape[1]
    if (
        tokens != 1
        or groups == 1
        or not query.is_cpu
        or (attention_mask is not None and attention_mask.shape[1] != 1)
        # Softcaps, position biases, paged caches: theirs to do, or to refuse.
        or any(kwargs.get(name) is not None for name in ("softcap", "position_bias", "cache"))
        # They warn that there will be none.
        or kwargs.get("output_attentions")
    ):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    rows = query.reshape(batch, key.shape[1], groups, size)
    out = F.scaled_dot_product_attention(
        rows, key, value, attn_mask=attention_mask, dropout_p=dropout, scale=scaling
    )
    return out.reshape(batch, 1, heads, value.shape[-1]), None


def use_grouped_attention(model: Any) -> None:
    """Let a model that is loaded on a CPU and uses "sdpa" attend by `attention` while it decodes, where that is any different.

    Left alone: models that do not share keys, those made of several models, those whose layers differ in their heads, and those
    whose code asks for the name "sdpa".
    """
    config = model.config
    try:
        heads = getattr(config, "num_attention_heads", None)
        shared = getattr(config, "num_key_value_heads", None)
    except RuntimeError:  # what transformers raises where layers differ
        return
    if (
        model.device.type != "cpu"
        or config._attn_implementation != "sdpa"
        or getattr(config, "sub_configs", None)
        or not isinstance(heads, int)
        or not isinstance(shared, int)
        or heads <= shared
        or not _follows_the_interface(type(model))
    ):
        return
    model.set_attn_implementation(NAME)


def _follows_the_interface(model_class: type) -> bool:
    """Whether the class finds its attention by name, through transformers' interface alone."""
    try:
        source = inspect.getsource(sys.modules[model_class.__module__])
    except (OSError, TypeError, KeyError):
        return False
    return "ALL_ATTENTION_FUNCTIONS.get_interface(" in source and not ASKS_FOR_SDPA.search(source)


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
