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
from collections.abc import Iterator
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
    **dict.fromkeys(("projector_input_dim", "projector_output_dim", "output_dim", "adapter_*_dim", "adapter_input_size"), HIDDEN),
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


# What some configurations leave open though their models need it.
OPEN = {
    "head_dim": HEAD,
    "num_experts_per_tok": 2,
    "n_routed_experts": 4,
    "num_key_value_heads": HEADS,
    "n_shared_experts": 1,
}


class CannotShrink(Exception):
    """An architecture's configuration cannot be made small."""


def small_config(kind: str, task: str = "causal") -> Any:
    """The small configuration of a model type ("llama"); `task`: "causal", "seq2seq" or "masked".

    Raises:
        CannotShrink: if the configuration refuses it, saying why.
    """
    config_class = _config_class(kind)
    try:
        return shrunk(config_class, {**NEEDS.get(kind, {}), **_role(config_class, task)})
    except Exception as error:
        raise CannotShrink(f"{type(error).__name__}: {error}") from error


def default_configs(kind: str, task: str) -> Iterator[Any]:
    """The configuration of an architecture in its own size; then, should no model be made of that, with what it leaves open."""
    config_class = _config_class(kind)
    role = _role(config_class, task)
    default = config_class(**role)
    yield default
    names = {field.name for field in dataclasses.fields(config_class)}
    open_fields = {
        name: value for name, value in OPEN.items() if name in names and getattr(default, name) is None
    }
    if "head_dim" in open_fields:
        open_fields["head_dim"] = default.hidden_size // default.num_attention_heads
    yield config_class(**{**open_fields, **role})
    yield config_class(**{**NEEDS.get(kind, {}), **open_fields, **role})


def _config_class(kind: str) -> type:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return CONFIG_MAPPING[kind]


def _role(config_class: type, task: str) -> dict[str, Any]:
    """What makes a decoder of a model that may also be an encoder."""
    names = {field.name for field in dataclasses.fields(config_class)}
    return {"is_decoder": True} if task == "causal" and "is_decoder" in names else {}


def shrunk(config_class: type, needs: dict[str, Any]) -> Any:
    """An instance of a configuration's class with small sizes. `needs`: values of fields that win over the rules."""
    try:
        probe = config_class()
    except Exception:
        probe = config_class(**needs)
    options: dict[str, Any] = {}
    fields = {field.name: _value(probe, field) for field in dataclasses.fields(config_class)}
    for name, value in fields.items():
        if hasattr(value, "to_dict"):
            options[name] = shrunk(type(value), NEEDS.get(value.model_type, {}))
        elif (small := _small(name, value)) is not None:
            options[name] = small
        elif value is None and name in OPEN:
            options[name] = OPEN[name]
    _shrink_tokens(fields, options)
    _agree(fields, options)
    _cut_layers(fields, options)
    return config_class(**{**options, **needs})


def _value(probe: Any, field: dataclasses.Field) -> Any:
    try:
        return getattr(probe, field.name)
    except Exception:
        # What may differ between layers is not to be read as one value.
        return field.default


def _small(name: str, value: Any) -> int | None:
    if not isinstance(value, int) or isinstance(value, bool):
        return None
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
        if keys in options and fields.get(heads) is not None and fields[heads] == fields[keys]:
            options[keys] = options.get(heads, fields[heads])
    # With low-rank attention it follows from the parts that do and do not rotate.
    if "qk_rope_head_dim" in fields:
        options.pop("qk_head_dim", None)
        if options.pop("head_dim", None) and fields.get("head_dim") == fields["qk_rope_head_dim"]:
            options["head_dim"] = options["qk_rope_head_dim"]
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
    shared = fields.get("num_kv_shared_layers")
    if len(chosen) == 1 or shared:
        # The second half takes the keys and values of the first, where layers share them.
        options.update({"num_kv_shared_layers": len(chosen)} if shared else {})
        chosen *= 2
    options[name] = len(chosen)
    for key, value in lists.items():
        options[key] = [_small(key, each) or each for each in (value[index] for index in chosen)]


# What an architecture needs besides, by its type or the type of a configuration inside it.
NEEDS: dict[str, dict[str, Any]] = {
    # Where the kinds of layers are made from other fields: one of each.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    # Tables of hashed groups of bytes have half a million rows.
    "blt": {"encoder_hash_byte_group_vocab": 64},
    # Its default leaves out what its layers turn by.
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10000.0}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 10000.0}},
    # Its vocabulary is that of a tokenizer.
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    # The kinds of layers in another form.
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2},
    # Heads of the state, whose sizes multiply to twice the hidden one.
    "mamba2": {"num_heads": 8},
    # Sizes under names of its own.
    "perceiver": {"d_model": 128, "d_latents": 128, "num_latents": 16, "num_self_attends_per_block": 2},
    # The indexer has no defaults.
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    # Positions are a product of two tables; a fixed seed makes its hashes, and so its logits, repeatable.
    "reformer": {
        "attn_layers": ["local", "lsh"],
        "axial_pos_shape": [8, 16],
        "axial_pos_embds_dim": [64, 64],
        "max_position_embeddings": 128,
        "hash_seed": 0,
    },
    # Each stage doubles the width of the one before.
    "vibevoice_acoustic_tokenizer_encoder": {"num_filters": 2, "hidden_size": 64, "depths": [1] * 7},
    "xmod": {"default_language": "en_XX"},
    # Later hybrid layers share the first one's weights, so it takes two.
    "zamba": {
        "attention_head_dim": 64,
        "attention_hidden_size": 256,
        "num_hidden_layers": 5,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"],
    },
}
