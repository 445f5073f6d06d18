"""Attention of one token with shared keys: the numbers are those of transformers' own "sdpa"."""

import ast
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from transformers import LlamaForCausalLM, StaticCache

import octavo
from octavo.integrations import attention

from .models import causal


def llama(kv_heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> LlamaForCausalLM:
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 8}
    return causal("llama", 0, num_key_value_heads=kv_heads, **sizes).to(dtype)


@pytest.fixture
def counted(monkeypatch):
    """How often one token took the grouped way: calls of scaled_dot_product_attention from this module."""
    calls = []
    real = torch.nn.functional.scaled_dot_product_attention

    class Counting:
        @staticmethod
        def scaled_dot_product_attention(query, *args, **kwargs):
            calls.append(tuple(query.shape))
            return real(query, *args, **kwargs)

    monkeypatch.setattr(attention, "F", Counting)
    return calls


@torch.inference_mode()
def decoded(model, ids, mask=None, cache=None, steps: int = 6) -> torch.Tensor:
    """Logits of the prompt's last token and of `steps` tokens after it."""
    out = model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)
    logits = [out.logits[:, -1]]
    for step in range(steps):
        token = (ids[:, step : step + 1] + 1) % 256
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        out = model(token, attention_mask=mask, past_key_values=out.past_key_values, use_cache=True)
        logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", ["one", "padded", "static"])
def test_the_numbers_are_those_of_sdpa(dtype, case, counted):
    model = llama(dtype=dtype)
    ids = torch.randint(0, 256, (2 if case == "padded" else 1, 9))
    mask = torch.ones_like(ids) if case == "padded" else None
    if mask is not None:
        mask[0, :4] = 0

    def cache():
        return StaticCache(config=model.config, max_cache_len=32) if case == "static" else None

    expected = decoded(model, ids, mask, cache())
    assert not counted
    attention.use_grouped_attention(model)
    assert model.config._attn_implementation == attention.NAME
    found = decoded(model, ids, mask, cache())
    assert counted == [(len(ids), 2, 4, 16)] * 12  # two layers, six tokens; the prompt goes the usual way
    # Float32 sums may come in another order.
    torch.testing.assert_close(found, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)


def test_generate_gives_the_same_tokens():
    model = llama()
    ids = torch.randint(0, 256, (1, 9))
    options = dict(max_new_tokens=20, do_sample=False, pad_token_id=0)
    expected = model.generate(ids, **options)
    attention.use_grouped_attention(model)
    assert torch.equal(model.generate(ids, **options), expected)


def test_models_that_share_no_keys_or_are_not_sdpa_are_left_alone():
    alone = llama(kv_heads=8)
    attention.use_grouped_attention(alone)
    assert alone.config._attn_implementation == "sdpa"
    eager = llama()
    eager.set_attn_implementation("eager")
    attention.use_grouped_attention(eager)
    assert eager.config._attn_implementation == "eager"


def test_models_whose_layers_differ_in_their_heads_are_left_alone():
    model = llama()
    model.config.per_layer_config = {1: {"num_attention_heads": 4}}
    attention.use_grouped_attention(model)
    assert model.config._attn_implementation == "sdpa"


def test_load_asks_for_it_and_saving_forgets_it(tmp_path):
    llama().save_pretrained(tmp_path / "plain")
    model = octavo.load(tmp_path / "plain")
    assert model.config._attn_implementation == attention.NAME
    model.save_pretrained(tmp_path / "saved")
    assert attention.NAME not in (tmp_path / "saved" / "config.json").read_text()
    again = LlamaForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config._attn_implementation == "sdpa"
    assert octavo.load(tmp_path / "saved").config._attn_implementation == attention.NAME


@pytest.mark.parametrize(
    ("first", "autoload"),
    [
        ("import torch", "1"),
        ("import torch", "0"),
        ("import octavo", "1"),
        ("import transformers.modeling_utils", "1"),
        ("import transformers.modeling_utils", "0"),
        ("import octavo, transformers.models.llama.modeling_llama", "1"),
        ("import octavo.integrations.attention", "1"),
    ],
)
def test_a_pickled_model_runs_in_a_process_that_only_unpickles_it(first, autoload, tmp_path):
    model = llama(dtype=torch.float32)
    model.save_pretrained(tmp_path / "plain")
    model = octavo.load(tmp_path / "plain")
    assert model.config._attn_implementation == attention.NAME
    torch.save(model, tmp_path / "model.pt")
    code = (
        f"{first}\nimport sys, torch\n"
        "model = torch.load(sys.argv[1], weights_only=False)\n"
        "ids = torch.arange(1, 9)[None]\n"
        "torch.save(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), sys.argv[2])"
    )
    command = [sys.executable, "-c", code, tmp_path / "model.pt", tmp_path / "ids.pt"]
    env = {**os.environ, "TORCH_DEVICE_BACKEND_AUTOLOAD": autoload}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(1, 9)[None]
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(torch.load(tmp_path / "ids.pt"), expected)


@pytest.mark.parametrize("tokens", [1, 5])
def test_asking_for_the_attention_weights_gives_transformers_own_warning(tokens, monkeypatch):
    from transformers.integrations import sdpa_attention

    said = []
    # transformers says it once in a process.
    monkeypatch.setattr(sdpa_attention.logger, "warning_once", said.append, raising=False)
    model = llama()
    model(torch.arange(tokens)[None], output_attentions=True)
    expected = list(said)
    attention.use_grouped_attention(model)
    said.clear()
    model(torch.arange(tokens)[None], output_attentions=True)
    assert said == expected and "eager" in said[0]


def asking_for_sdpa() -> list[str]:
    """transformers' modules of models that compare the name of their attention with "sdpa"."""

    def asks(node: ast.AST) -> bool:
        if not isinstance(node, ast.Compare):
            return False
        parts = [ast.unparse(part) for part in (node.left, *node.comparators)]
        return any("_attn_implementation" in part for part in parts) and any("'sdpa'" in p for p in parts)

    root = Path(transformers.__file__).parent
    found = []
    for path in sorted(root.glob("models/*/modeling_*.py")):
        text = path.read_text()
        if "sdpa" in text and "_attn_implementation" in text and any(map(asks, ast.walk(ast.parse(text)))):
            found.append(".".join(("transformers", *path.relative_to(root).with_suffix("").parts)))
    return found


def test_models_that_ask_for_sdpa_by_name_are_left_alone():
    names = asking_for_sdpa()
    assert len(names) >= 5
    for name in names:
        module = importlib.import_module(name)
        classes = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == name]
        assert not attention._follows_the_interface(classes[0]), name
