"""A llama.cpp file of random Q8_0 weights in the shape of `benchmarks.cpu_engines.SHAPES`: speed does not depend on them.

Example:
    >>> from benchmarks.cpu_gguf import write_gguf  # write_gguf("tiny", Path("model.gguf"))
"""

from pathlib import Path

import gguf
import numpy as np

from .cpu_engines import SHAPES

# A block of Q8_0: a float16 scale and 32 int8.
BLOCK_BYTES, BLOCK_WEIGHTS = 34, 32


def _random_q8_0(generator: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """uint8 [rows, columns / 32 * 34]."""
    blocks = columns // BLOCK_WEIGHTS
    data = generator.integers(0, 256, (rows, blocks, BLOCK_BYTES), dtype=np.uint8)
    data[:, :, :2] = np.frombuffer(np.float16(0.0003).tobytes(), np.uint8)
    return data.reshape(rows, blocks * BLOCK_BYTES)


def write_gguf(shape: str, path: Path) -> None:
    s = SHAPES[shape]
    hidden, ffn, heads, kv = (
        s["hidden_size"],
        s["intermediate_size"],
        s["num_attention_heads"],
        s["num_key_value_heads"],
    )
    head = hidden // heads
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(2048)
    writer.add_embedding_length(hidden)
    writer.add_block_count(s["num_hidden_layers"])
    writer.add_feed_forward_length(ffn)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(s["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    writer.add_tokenizer_model("no_vocab")

    def matrix(name: str, rows: int, columns: int) -> None:
        writer.add_tensor(
            name, _random_q8_0(generator, rows, columns), raw_dtype=gguf.GGMLQuantizationType.Q8_0
        )

    def norm(name: str) -> None:
        writer.add_tensor(name, np.ones(hidden, np.float32))

    matrix("token_embd.weight", s["vocab_size"], hidden)
    norm("output_norm.weight")
    if not s["tie_word_embeddings"]:
        matrix("output.weight", s["vocab_size"], hidden)
    for i in range(s["num_hidden_layers"]):
        norm(f"blk.{i}.attn_norm.weight")
        norm(f"blk.{i}.ffn_norm.weight")
        matrix(f"blk.{i}.attn_q.weight", hidden, hidden)
        matrix(f"blk.{i}.attn_k.weight", kv * head, hidden)
        matrix(f"blk.{i}.attn_v.weight", kv * head, hidden)
        matrix(f"blk.{i}.attn_output.weight", hidden, hidden)
        matrix(f"blk.{i}.ffn_gate.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_up.weight", ffn, hidden)
        matrix(f"blk.{i}.ffn_down.weight", hidden, ffn)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
