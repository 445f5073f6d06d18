"""Small random models, one for each shape of checkpoint, and how they are saved; used by the other checkpoint tests."""

import pytest
import torch

VOCABULARY = 160


def _llama(**options):
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **options,
    )


def _gpt2():
    from transformers import GPT2Config

    return GPT2Config(vocab_size=VOCABULARY, n_embd=96, n_layer=2, n_head=4, n_positions=64)


def _gptj(**options):
    from transformers import GPTJConfig

    sizes = {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "rotary_dim": 8,
        "n_positions": 64,
    }
    return GPTJConfig(**{**sizes, **options})


def _mixtral():
    from transformers import MixtralConfig

    return MixtralConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=64,
    )


def _gpt_oss():
    from transformers import GptOssConfig

    return GptOssConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
        max_position_embeddings=64,
        layer_types=["full_attention", "full_attention"],
    )


CONFIGS = {
    "llama": _llama,
    "llama-tied": lambda: _llama(tie_word_embeddings=True),
    "gpt2": _gpt2,
    "gptj": _gptj,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
}


def build(config, dtype=torch.float32):
    """A model of this config with random weights, norms and biases included."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    for parameter in model.parameters():
        parameter.data += torch.randn_like(parameter) * 0.05
    return model.eval()


def save(kind, folder, dtype=torch.float32, **options):
    """Build a model, save it to `folder`; returns the model."""
    model = build(CONFIGS[kind](), dtype)
    model.save_pretrained(folder, **options)
    return model


def logits(model):
    """float32 [2, 12, vocabulary] for fixed tokens."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=generator)
    with torch.no_grad():
        return model(ids).logits.float()


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_tensor_of_a_saved_model_finds_its_place(kind, tmp_path):
    """A checkpoint's names lead to the model's own parameters, with its values."""
    from octavo.checkpoint import open_source
    from octavo.checkpoint.names import map_names
    from octavo.checkpoint.skeleton import build_skeleton

    model = save(kind, tmp_path)
    with open_source(tmp_path) as source:
        skeleton = build_skeleton(source.model_config())
        names = map_names(skeleton, source)
        assert names.unexpected == []
        found = {}
        for group in names.groups:
            found.update(group.realize(skeleton, source.read))
    expected = {name: value for name, value in model.state_dict().items() if name in found}
    assert set(dict(model.named_parameters())) <= set(found)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
