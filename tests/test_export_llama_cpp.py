"""What `octavo export` writes, run by llama.cpp: the same logits, the same tokens."""

import pytest
import torch

import octavo
from octavo.export import export_gguf
from octavo.export.pretokenizers import RULES

from .models.exported import difference, llama, llama_logits, logits, quantized, token_ids
from .models.tokenizers import TEXTS, VOCABULARY, byte_level_tokenizer, sentencepiece_tokenizer

pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: pip install 'octavo[bench]'")

SIZES = {"vocab_size": VOCABULARY, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    **SIZES,
}
GROUPED = {**LAYERS, "num_key_value_heads": 2}
# The same context, once stretched as Llama 3 does and once as YaRN does.
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}


def gpt(kind, **options):
    import transformers

    sizes = {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return getattr(transformers, kind)(**{**sizes, "bos_token_id": 0, "eos_token_id": 1, **options})


def of(kind, **options):
    import transformers

    return getattr(transformers, kind)(**options)


CONFIGS = {
    "llama": lambda: of("LlamaConfig", **GROUPED),
    "llama-tied-biased": lambda: of(
        "LlamaConfig", **GROUPED, tie_word_embeddings=True, attention_bias=True, mlp_bias=True
    ),
    "llama-wide-heads": lambda: of("LlamaConfig", **GROUPED, head_dim=32),
    "llama3": lambda: of("LlamaConfig", **GROUPED, rope_parameters=LLAMA3),
    "llama-yarn": lambda: of("LlamaConfig", **GROUPED, rope_parameters=YARN),
    "llama-linear": lambda: of("LlamaConfig", **GROUPED, rope_parameters=LINEAR),
    "mistral": lambda: of("MistralConfig", **GROUPED, sliding_window=None),
    "mixtral": lambda: of("MixtralConfig", **GROUPED, num_local_experts=4),
    "qwen2": lambda: of("Qwen2Config", **GROUPED),
    "qwen3": lambda: of("Qwen3Config", **GROUPED, head_dim=32),
    "qwen3-moe": lambda: of(
        "Qwen3MoeConfig",
        **GROUPED,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        norm_topk_prob=True,
        head_dim=16,
    ),
    "gemma": lambda: of("GemmaConfig", **GROUPED, head_dim=32),
    "gpt2": lambda: gpt("GPT2Config"),
    "gpt2-untied": lambda: gpt("GPT2Config", tie_word_embeddings=False),
    "gptj": lambda: gpt("GPTJConfig", rotary_dim=8),
    "gpt-neox": lambda: of("GPTNeoXConfig", **LAYERS, rotary_pct=0.5, hidden_act="gelu_new"),
    "gpt-neox-sequential-tied": lambda: of(
        "GPTNeoXConfig",
        **LAYERS,
        use_parallel_residual=False,
        tie_word_embeddings=True,
        hidden_act="gelu_new",
    ),
    "phi": lambda: of("PhiConfig", **LAYERS),
}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer()


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_gives_the_same_logits(name, tokenizer, tmp_path):
    """In float32 what is left are other orders of summation, and llama.cpp's table for GELU, in float16."""
    model = quantized(CONFIGS[name](), tmp_path / "model", tokenizer)
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    ids = token_ids()
    table = name.startswith(("g", "phi"))
    assert difference(llama_logits(tmp_path / "m.gguf", ids), logits(model, ids)) < (1e-3 if table else 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gptj"])
def test_each_type_is_as_near_as_it_can_be(name, tokenizer, tmp_path):
    model = quantized(CONFIGS[name](), tmp_path / "model", tokenizer)
    ids = token_ids()
    expected, found = logits(model, ids), {}
    for to in ("f32", "f16", "bf16", "q8_0"):
        result = export_gguf(tmp_path / "model", tmp_path / f"{to}.gguf", to)
        found[to] = difference(llama_logits(tmp_path / f"{to}.gguf", ids), expected)
        assert result.narrow == []
    print(name, found)
    # llama.cpp rounds activations as the weights are: to 2^-12, to 2^-9, to 1/254 of the largest of 32.
    assert found["f32"] < 1e-3 and found["f16"] < 2e-3 and found["bf16"] < 1.5e-2 and found["q8_0"] < 4e-2
    assert found["f16"] < found["bf16"] < found["q8_0"]


@pytest.mark.parametrize(("name", "part"), [("llama", "Llama"), ("gptj", "GptJ"), ("gpt-neox", "GptNeoX")])
def test_rows_in_the_wrong_order_are_noticed(name, part, tokenizer, tmp_path, monkeypatch):
    from octavo.export import architectures

    model = quantized(CONFIGS[name](), tmp_path / "model", tokenizer)
    monkeypatch.setattr(getattr(architectures, part), "order", lambda *_: None)
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    ids = token_ids()
    assert difference(llama_logits(tmp_path / "m.gguf", ids), logits(model, ids)) > 0.05


def agree(folder, path):
    """Ids of each text by transformers and by llama.cpp, where they differ."""
    tokenizer = octavo.load_tokenizer(folder)
    with llama(path, vocab_only=True, logits_all=False) as instance:
        pairs = [
            (text, tokenizer(text)["input_ids"], instance.tokenize(text.encode(), add_bos=True, special=True))
            for text in TEXTS
        ]
    return [pair for pair in pairs if pair[1] != pair[2]]


@pytest.mark.parametrize("rule", RULES)
def test_tokens_are_the_same_under_every_rule(rule, tmp_path):
    config = of("LlamaConfig", **{**GROUPED, "num_hidden_layers": 1})
    quantized(config, tmp_path / "model", byte_level_tokenizer(rule, bos=True))
    result = export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert result.vocabulary.pre == rule
    assert agree(tmp_path / "model", tmp_path / "m.gguf") == []


def write_pieces(path, folder):
    """The SentencePiece model that a tokenizer.json could have come from."""
    from transformers.convert_slow_tokenizer import import_protobuf

    tokenizer = octavo.load_tokenizer(folder)
    model = import_protobuf().ModelProto()
    for number in range(len(tokenizer)):
        piece = tokenizer.convert_ids_to_tokens(number)
        kind = 2 if number == 0 else 3 if number < 3 else 6 if number < 259 else 1
        model.pieces.add(piece=piece, score=0.0 if number < 259 else 258.0 - number, type=kind)
    path.write_bytes(model.SerializeToString())


@pytest.mark.parametrize("pieces", [False, True])
def test_sentencepiece_tokens_are_the_same(pieces, tmp_path):
    tokenizer = sentencepiece_tokenizer()
    config = of("LlamaConfig", **{**GROUPED, "num_hidden_layers": 1, "bos_token_id": 1, "eos_token_id": 2})
    quantized(config, tmp_path / "model", tokenizer)
    if pieces:
        write_pieces(tmp_path / "model" / "tokenizer.model", tmp_path / "model")
    result = export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert result.vocabulary.kind == "llama"
    assert agree(tmp_path / "model", tmp_path / "m.gguf") == []


def test_a_published_checkpoint_and_its_adapters(tmp_path):
    """De-quantized, the adapters added: the plain model that holds their sum."""
    pytest.importorskip("bitsandbytes")
    from .models.published import publish, tiny_gptj

    expected = publish(tiny_gptj(), tmp_path, adapters=True)
    byte_level_tokenizer(vocabulary=300).save_pretrained(tmp_path)
    export_gguf(tmp_path, tmp_path / "m.gguf", "f32")
    ids = token_ids(vocabulary=300)
    assert difference(llama_logits(tmp_path / "m.gguf", ids), logits(expected, ids)) < 1e-3


def test_llama_cpp_goes_on_where_transformers_would(tokenizer, tmp_path):
    model = quantized(CONFIGS["llama"](), tmp_path / "model", tokenizer)
    export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    ids = tokenizer("Two spaces")["input_ids"]
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 1}
    expected = model.generate(torch.tensor([ids]), **options)[0, len(ids) :].tolist()
    with llama(tmp_path / "m.gguf") as instance:
        found = []
        for token in instance.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            found.append(token)
            if len(found) == len(expected):
                break
    assert found == expected
