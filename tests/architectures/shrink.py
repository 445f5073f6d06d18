"""A small configuration of any architecture, made from its own defaults.

Sizes are set by the names that configurations give them; lists with one value a layer are cut down to one layer of each
kind; a configuration inside another one is shrunk too. What an architecture needs besides is in `NEEDS`, with the reason.

Example:
    >>> from tests.architectures.shrink import small_config
    >>> small_config("llama").hidden_size  # doctest: +SKIP
    128
"""

import dataclasses
import fnmatch
from typing import Any

HIDDEN, HEADS, HEAD, WIDE, VOCABULARY = 128, 4, 32, 192, 320

# The first pattern that matches the name of a field sets its value, where the default is a larger number.
SIZES: dict[str, int] = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input", "*_vocab_size"), VOCABULARY),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "depth"), 2),
    **dict.fromkeys(("*encoder_layers", "*decoder_layers", "num_layers_per_stack", "conf_num_hidden_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads"), HEADS),
    **dict.fromkeys(("*encoder_attention_heads", "*decoder_attention_heads", "*_num_attention_heads"), HEADS),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "*_num_key_value_heads"), 2),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads", "linear_num_heads"), HEADS),
    **dict.fromkeys(("head_dim", "*_head_dim", "kv_channels", "dim_head", "d_kv", "d_head"), HEAD),
    **dict.fromkeys(("attention_head_size", "attention_head_dim"), HEAD),
    **dict.fromkeys(("expert_ffn_hidden_size", "moe_intermediate_size"), 64),
    **dict.fromkeys(("*intermediate_size", "*intermediate_size_mlp", "ffn_hidden_size", "feed_forward_size"), WIDE),
    **dict.fromkeys(("ffn_dim", "*_ffn_dim", "d_ff", "dim_ff", "dff", "d_inner", "n_inner", "mlp_dim"), WIDE),
    **dict.fromkeys(("hidden_size_per_layer_input", "ple_embed_dim"), 64),
    **dict.fromkeys(("hidden_size", "*_hidden_size", "d_model", "n_embd", "emb_dim", "embedding_dim"), HIDDEN),
    **dict.fromkeys(("embedding_size", "*_embedding_size", "hidden_dim", "word_embed_proj_dim", "lru_width"), HIDDEN),
    **dict.fromkeys(("*_embed_dim", "embed_dim", "mamba_d_ssm", "hidden_size_global", "out_hidden_size"), HIDDEN),
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "output_dim", "adapter_*_dim"), HIDDEN),
    **dict.fromkeys(("mamba_n_heads", "mamba_num_heads"), 8),
    **dict.fromkeys(("mamba_d_head", "mamba_d_state", "state_size", "ssm_state_size"), 32),
    **dict.fromkeys(("time_step_rank", "mamba_dt_rank"), 8),
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "o_lora_rank", "adapter_rank", "laurel_rank"), 64),
    **dict.fromkeys(("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("first_k_dense_replace", "num_dense_layers", "n_group", "topk_group", "zero_expert_num"), 1),
    **dict.fromkeys(("attn_layer_period", "expert_layer_period", "decoder_sparse_step", "encoder_sparse_step"), 2),
    **dict.fromkeys(("attn_layer_offset", "expert_layer_offset"), 1),
    **dict.fromkeys(("num_sparse_encoder_layers", "num_sparse_decoder_layers"), 1),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "context_length"), 128),
    **dict.fromkeys(("max_*_positions", "max_*_position_embeddings"), 128),
    **dict.fromkeys(("sliding_window", "sliding_window_size", "attention_window_size", "local_attention"), 8),
    **dict.fromkeys(("chunk_size", "mamba_chunk_size", "attention_chunk_size", "local_radius"), 8),
    **dict.fromkeys(("attention_window", "index_topk", "rotary_dim"), 8),
}  # fmt: skip


class CannotShrink(Exception):
    """An architecture's configuration cannot be made small."""


def small_config(kind: str) -> Any:
    """The small configuration of a model type ("llama").

    Raises:
        CannotShrink: if the configuration refuses it, saying why.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        return shrunk(CONFIG_MAPPING[kind], NEEDS.get(kind, {}))
    except Exception as error:
        raise CannotShrink(f"{type(error).__name__}: {error}") from error


def shrunk(config_class: type, needs: dict[str, Any]) -> Any:
    """An instance of a configuration's class with small sizes. `needs`: values of fields that win over the rules."""
    probe = config_class(**{name: value for name, value in needs.items() if value is not dataclasses.MISSING})
    options: dict[str, Any] = {}
    fields = {field.name: _value(probe, field) for field in dataclasses.fields(config_class)}
    for name, value in fields.items():
        if hasattr(value, "to_dict"):
            options[name] = shrunk(type(value), {})
        elif isinstance(value, int) and not isinstance(value, bool):
            small = _small(name, value)
            if small is not None:
                options[name] = small
    _shrink_tokens(fields, options)
    _agree(fields, options)
    _cut_layers(fields, options)
    options.update(needs)
    return config_class(
        **{name: value for name, value in options.items() if value is not dataclasses.MISSING}
    )


def _value(probe: Any, field: dataclasses.Field) -> Any:
    try:
        return getattr(probe, field.name)
    except Exception:
        # What may differ between layers is not to be read as one value.
        return field.default


def _small(name: str, value: int) -> int | None:
    small = next((small for pattern, small in SIZES.items() if fnmatch.fnmatchcase(name, pattern)), None)
    return small if small is not None and value > small else None


def _shrink_tokens(fields: dict[str, Any], options: dict[str, Any]) -> None:
    """Numbers of special tokens that the small vocabulary lacks."""
    first = {"pad": 0, "bos": 1, "eos": 2, "decoder_start": 0}
    last = VOCABULARY - 1
    for name, value in fields.items():
        if not name.endswith(("_token_id", "_token_index")):
            continue
        largest = max(value, default=0) if isinstance(value, (list, tuple)) else value
        if isinstance(largest, int) and largest >= VOCABULARY - 32:
            role = name.removesuffix("_token_id")
            options[name] = first.get(role, last)
            last -= role not in first


def _agree(fields: dict[str, Any], options: dict[str, Any]) -> None:
    """Sizes that belong together."""
    # As many heads of keys as of queries stay so.
    for heads, keys in (("num_attention_heads", "num_key_value_heads"), ("num_heads", "num_key_value_heads")):
        if keys in options and fields.get(heads) == fields.get(keys):
            options[keys] = options.get(heads, fields[heads])
    # With low-rank attention it follows from the parts that do and do not rotate.
    if "qk_rope_head_dim" in fields:
        options.pop("head_dim", None)
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and "mrope_section" in rope:
        options["rope_parameters"] = {
            **rope,
            "mrope_section": _scaled(rope["mrope_section"], fields, options),
        }


def _scaled(sections: list[int], fields: dict[str, Any], options: dict[str, Any]) -> list[int]:
    """Sections of a rotary embedding for smaller heads: in proportion, and adding up."""
    before = fields.get("head_dim") or sum(sections) * 2
    total = sum(sections) * options.get("head_dim", before) // before
    small = [section * total // sum(sections) for section in sections]
    small[0] += total - sum(small)
    return small


def _cut_layers(fields: dict[str, Any], options: dict[str, Any]) -> None:
    """One layer of each kind, where lists say for each layer what it is."""
    name = next((name for name in ("num_hidden_layers", "n_layer", "num_layers") if fields.get(name)), None)
    if name is None:
        return
    lists = {
        key: value
        for key, value in fields.items()
        if isinstance(value, (list, tuple)) and len(value) == fields[name] > 2
    }
    kinds = {
        tuple(map(str, each)): index
        for index, each in reversed(list(enumerate(zip(*lists.values(), strict=True))))
    }
    if not lists:
        return
    chosen = sorted(kinds.values())[:4]
    if len(chosen) == 1:
        chosen *= 2
    options[name] = len(chosen)
    options.update({key: [value[index] for index in chosen] for key, value in lists.items()})


# What an architecture needs besides; MISSING leaves a field out.
NEEDS: dict[str, dict[str, Any]] = {}
