"""`octavo.compat`: the published card's own text runs to its end, and `from_pretrained` takes what transformers' own takes."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

import octavo
from octavo.checkpoint import CheckpointError, convert
from octavo.compat import GPTJForCausalLM

from .models.published import publish, tiny_gptj

CARD = Path(__file__).parent / "data" / "model-card-snippet.txt"
NAME = "mrm8488/bertin-gpt-j-6B-ES-8bit"
IDS = torch.arange(3, 15)[None]


def logits(model, ids=IDS):
    with torch.no_grad():
        return model.eval()(ids).logits.float()


def add_tokenizer(folder):
    """A tokenizer of bytes, in the files that GPT-J's has."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<|endoftext|>": 0, **{letter: i + 1 for i, letter in enumerate(alphabet)}}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer, backend.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    ).save_pretrained(folder)


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_the_cards_own_text(tied, adapters, tmp_path):
    """The card's text, its import line replaced, on a checkpoint that bitsandbytes made; then its model is looked at."""
    folder = tmp_path / NAME
    folder.mkdir(parents=True)
    expected = publish(tiny_gptj(tie_word_embeddings=tied), folder, adapters=adapters)
    add_tokenizer(folder)
    text = CARD.read_text(encoding="utf-8")
    line = "from Utils import GPTJBlock, GPTJForCausalLM"
    assert text.count(line) == 1
    (tmp_path / "card.py").write_text(text.replace(line, line.replace("Utils", "octavo.compat")))
    look = (
        "exec(open('card.py').read())\n"
        "with torch.no_grad():\n    torch.save(model(**prompt).logits, 'logits.pt')\n"
        "torch.save((out, prompt['input_ids'], model.config.pad_token_id, model.generation_config.pad_token_id), 'out.pt')"
    )
    run = subprocess.run([sys.executable, "-c", look], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("El sentido de la vida es")
    out, ids, *padding = torch.load(tmp_path / "out.pt")
    assert padding == [0, 0] and 24 < out.shape[1] <= 64 and torch.equal(out[:, : ids.shape[1]], ids)
    found = torch.load(tmp_path / "logits.pt")
    torch.testing.assert_close(found, logits(expected, ids), rtol=0, atol=1e-4)


@pytest.fixture
def both(tmp_path):
    """A published checkpoint, and the plain one of the same weights, for transformers' own class."""
    (tmp_path / "published").mkdir()
    plain = publish(tiny_gptj(), tmp_path / "published")
    plain.save_pretrained(tmp_path / "plain")
    return tmp_path / "published", tmp_path / "plain"


CHANGES = [
    {},
    {"pad_token_id": 7, "low_cpu_mem_usage": True},
    {"output_hidden_states": True, "use_cache": False},
    {"resid_pdrop": 0.25, "bos_token_id": 5},
    {"torch_dtype": torch.float32},
    {"dtype": "float32"},
    {"torch_dtype": "auto"},
    {"dtype": torch.bfloat16},
    {"attn_implementation": "eager"},
    {"device_map": "cpu"},
    {"device_map": {"": "cpu"}},
    {"device_map": "auto"},
    {"local_files_only": True, "trust_remote_code": False, "weights_only": True},
    {"revision": "main", "use_safetensors": None, "token": None, "cache_dir": None},
    {"generation_config": transformers.GenerationConfig(max_length=33)},
]


@pytest.mark.parametrize("options", CHANGES, ids=str)
def test_options_do_what_they_do_in_transformers(options, both):
    """Configuration, generation's configuration, types and numbers are those of transformers' own on the plain weights."""
    published, plain = both
    ours = GPTJForCausalLM.from_pretrained(published, **options)
    theirs = transformers.GPTJForCausalLM.from_pretrained(plain, **options)
    left_out = ("architectures", "quantization_config", "_name_or_path", "transformers_version")
    configs = [{k: v for k, v in m.config.to_dict().items() if k not in left_out} for m in (ours, theirs)]
    assert configs[0] == configs[1]
    for key in ("pad_token_id", "bos_token_id", "eos_token_id", "max_length", "use_cache"):
        assert getattr(ours.generation_config, key) == getattr(theirs.generation_config, key), key
    assert ours.dtype == theirs.dtype and not ours.training
    assert isinstance(ours.transformer.h[0].mlp.fc_in.weight, octavo.OctavoTensor)
    tolerance = 1e-5 if ours.dtype == torch.float32 else 0.05
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=0, atol=tolerance)


def test_a_generation_configuration_in_the_folder_is_changed_as_well(both):
    for folder in both:
        (folder / "generation_config.json").write_text(json.dumps({"top_k": 3, "pad_token_id": 1}))
    ours = GPTJForCausalLM.from_pretrained(both[0], pad_token_id=9)
    theirs = transformers.GPTJForCausalLM.from_pretrained(both[1], pad_token_id=9)
    for model in (ours, theirs):
        assert (model.generation_config.top_k, model.generation_config.pad_token_id) == (3, 9)


def test_a_configuration_in_place_of_the_folders(both, tmp_path):
    changed = transformers.GPTJConfig.from_pretrained(
        both[0], output_attentions=True, attn_implementation="eager"
    )
    changed.save_pretrained(tmp_path / "other")
    changed.name_or_path = "no longer/there"
    for config in (changed, str(tmp_path / "other"), tmp_path / "other"):
        model = GPTJForCausalLM.from_pretrained(both[0], config=config, attn_implementation="eager")
        assert model.config.output_attentions and len(model(IDS).attentions) == 2
    assert not hasattr(changed, "quantization_config")  # the caller's own object is left alone


def test_loading_info(both):
    model, info = GPTJForCausalLM.from_pretrained(both[0], output_loading_info=True)
    assert isinstance(model, transformers.GPTJForCausalLM)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]


def test_a_subfolder_and_the_hubs_cache(both, tmp_path):
    """A repository in the hub's cache, laid out as huggingface_hub does, with the model in a sub-folder of a revision."""
    repository = tmp_path / "cache" / "models--someone--some-model"
    commit = "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(both[0], repository / "snapshots" / commit / "inner")
    (repository / "refs").mkdir()
    (repository / "refs" / "v2").write_text(commit)
    options = {"cache_dir": tmp_path / "cache", "local_files_only": True, "token": False}
    model = GPTJForCausalLM.from_pretrained("someone/some-model", subfolder="inner", revision="v2", **options)
    torch.testing.assert_close(logits(model), logits(GPTJForCausalLM.from_pretrained(both[0])))
    assert model.name_or_path == "someone/some-model"
    with pytest.raises(CheckpointError, match=r"local_files_only is set, and its cache does not hold it"):
        GPTJForCausalLM.from_pretrained("someone/some-model", subfolder="inner", revision="v3", **options)
    (tmp_path / "local").mkdir()
    shutil.copytree(both[0], tmp_path / "local" / "inner")
    local = GPTJForCausalLM.from_pretrained(tmp_path / "local", subfolder="inner")
    assert torch.equal(logits(local), logits(model))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantization_config": octavo.OctavoConfig()},
            "quantization_config cannot be honoured.*kept as they are",
        ),
        ({"variant": "fp16"}, "variant cannot be honoured"),
        ({"ignore_mismatched_sizes": True}, "ignore_mismatched_sizes cannot be honoured"),
        ({"tp_plan": "auto"}, "tp_plan cannot be honoured"),
        ({"use_safetensors": True}, r"use_safetensors: .* holds pytorch_model\.bin instead"),
        ({"no_such_option": 1}, "no_such_option"),
        ({"load_in_8bit": True}, "load_in_8bit"),
    ],
)
def test_what_cannot_be_honoured_is_said(options, message, both):
    with pytest.raises(TypeError, match=message):
        GPTJForCausalLM.from_pretrained(both[0], **options)


def test_plain_and_octavo_folders_through_the_same_name(both, tmp_path):
    convert(both[1], tmp_path / "octavo")
    plain = transformers.GPTJForCausalLM.from_pretrained(both[1])
    for folder in (both[1], tmp_path / "octavo"):
        model = GPTJForCausalLM.from_pretrained(folder, pad_token_id=4, low_cpu_mem_usage=True)
        assert model.config.pad_token_id == 4
        assert isinstance(model.lm_head.weight, octavo.OctavoTensor)
        error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
        assert 0 < error < 0.02


def test_weights_in_memory_are_refused_clearly(tmp_path):
    publish(tiny_gptj(), tmp_path)
    with pytest.raises(TypeError, match="state_dict: this class loads weights from files"):
        GPTJForCausalLM.from_pretrained(tmp_path, state_dict={})
