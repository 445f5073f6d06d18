"""GGUF files of small models, written with the gguf package."""

import numpy as np
import torch


def permute(weight, heads):
    """The order of rotary halves that llama.cpp keeps queries and keys in (its convert_hf_to_gguf.py)."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def letters(count):
    """A vocabulary for two merges; older transformers take a list of one for its element."""
    return [chr(33 + i) if i < 94 else f"t{i}" for i in range(count - 2)] + ["ab", "cd"]


def write_llama(path, model, *, output=True, quantize=None):
    """A GGUF file of a small Llama, written with the gguf package."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(letters(config.vocab_size))
    writer.add_token_types([1] * config.vocab_size)
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and not output:
            continue
        array = tensor.to(torch.float32).numpy()
        if "q_proj" in name:
            array = permute(array, config.num_attention_heads)
        elif "k_proj" in name:
            array = permute(array, config.num_key_value_heads)
        key = names.get_name(name, try_suffixes=(".weight",))
        if quantize and array.ndim == 2:
            kind = gguf.GGMLQuantizationType[quantize]
            writer.add_tensor(key, gguf.quants.quantize(np.ascontiguousarray(array), kind), raw_dtype=kind)
        else:
            writer.add_tensor(key, np.ascontiguousarray(array))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
