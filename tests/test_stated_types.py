"""The type that config.json states, in every way it may: loading, converting and generating follow it."""

import json

import pytest
import torch

import octavo
from octavo.checkpoint import CheckpointError, convert, open_source

from .models.checkpoints import logits, save

# What config.json says in place of its `dtype` → the type that is meant; the weights themselves are bfloat16.
STATED = {
    "string": ({"dtype": "float32"}, torch.float32),
    "older key": ({"torch_dtype": "float32"}, torch.float32),
    "dictionary": ({"dtype": {"": "float32", "text_config": "bfloat16"}}, torch.float32),
    "dictionary, older key": ({"torch_dtype": {"": "float32"}}, torch.float32),
    "dictionary without a whole": ({"dtype": {"text_config": "float32"}}, torch.float32),
    "null": ({"dtype": None}, torch.bfloat16),
    "nothing": ({}, torch.bfloat16),
    "empty dictionary": ({"dtype": {}}, torch.bfloat16),
}


@pytest.mark.parametrize("how", STATED)
def test_the_stated_type_is_followed(how, tmp_path):
    said, meant = STATED[how]
    save("llama", tmp_path / "plain", dtype=torch.bfloat16)
    path = tmp_path / "plain" / "config.json"
    config = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("dtype", "torch_dtype")}
    path.write_text(json.dumps({**config, **said}))
    with open_source(tmp_path / "plain") as source:
        assert source.dtype == meant
    convert(tmp_path / "plain", tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "torch_dtype" not in written and written["dtype"] not in (None, "auto", {})
    for folder in ("plain", "out"):
        model = octavo.load(tmp_path / folder, device="cpu")
        assert model.dtype == meant and model.model.norm.weight.dtype == meant
        assert model.lm_head.weight.dtype == meant
        assert torch.isfinite(logits(model)).all()


@pytest.mark.parametrize("value", ["auto", "torch.float32", "float31"])
def test_a_type_that_transformers_does_not_read_is_one_error(value, tmp_path):
    save("llama", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "dtype": value}))
    for use in (octavo.load, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError, match=r"config\.json: transformers cannot make a model of this"):
            use(tmp_path)


def test_the_text_models_part_states_it(tmp_path):
    """A configuration of several parts that says nothing at its top."""
    save("llama", tmp_path, dtype=torch.bfloat16)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["dtype"]
    for key in ("dtype", "torch_dtype"):
        path.write_text(json.dumps({**config, "text_config": {key: "float16"}}))
        with open_source(tmp_path) as source:
            assert source.dtype == torch.float16
