"""Encoders and sequence-to-sequence models: `octavo.load` finds the right class, they are streamed, and compute what they should.

The sentence embeddings need real weights: OCTAVO_TEST_MINILM=path/to/all-MiniLM-L6-v2's model.safetensors, its tokenizer beside
it; `make test-all` fetches it.
"""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM
from typer.testing import CliRunner

import octavo
from octavo.checkpoint import convert

from .conftest import relative_error
from .models import config

IDS = torch.arange(5, 17)[None]
SMALL = {"vocab_size": 160, "d_model": 64, "max_position_embeddings": 64}
T5 = {**SMALL, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    **SMALL,
    **{
        f"{side}_{name}": value
        for side in ("encoder", "decoder")
        for name, value in (("layers", 2), ("ffn_dim", 96))
    },
    **{f"{side}_attention_heads": 4 for side in ("encoder", "decoder")},
}
MODELS = {
    "t5": (AutoModelForSeq2SeqLM, T5, "T5ForConditionalGeneration"),
    "bart": (AutoModelForSeq2SeqLM, BART, "BartForConditionalGeneration"),
    "bert": (AutoModel, {}, "BertModel"),
    "bert, masked": (AutoModelForMaskedLM, {}, "BertForMaskedLM"),
    "t5, base": (AutoModel, T5, "T5Model"),
}


def outputs(model) -> torch.Tensor:
    options = {"decoder_input_ids": IDS[:, :5]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=IDS, **options)[0]


@pytest.fixture(params=MODELS)
def case(request, tmp_path):
    """A folder with a small random model, and the name of its class."""
    auto, options, class_name = MODELS[request.param]
    kind = request.param.partition(",")[0]
    configuration = config(kind, vocab_size=160) if kind == "bert" else AutoConfig.for_model(kind, **options)
    model = auto.from_config(configuration).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "plain")
    return tmp_path, class_name


def test_encoders_and_sequence_to_sequence(case):
    """Loaded, streamed and saved models are one; outputs and generated tokens are the de-quantized model's."""
    folder, class_name = case
    model = octavo.load(folder / "plain", device="cpu")
    assert type(model).__name__ == class_name
    assert sum(isinstance(weight, octavo.OctavoTensor) for weight in model.parameters()) >= 10
    octavo.reset_fallbacks()
    found = outputs(model)
    assert octavo.fallbacks() == {}
    convert(folder / "plain", folder / "streamed")
    model.save_pretrained(folder / "saved")
    for name in ("streamed", "saved"):
        again = octavo.load(folder / name, device="cpu")
        assert type(again).__name__ == class_name and torch.equal(outputs(again), found)
    tokens = None
    if model.can_generate():
        tokens = model.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=2)
    twin = octavo.dequantize_model(model)
    assert relative_error(found, outputs(twin)) < 1e-5
    if tokens is not None:
        expected = twin.generate(IDS, max_new_tokens=12, min_new_tokens=12, do_sample=False, num_beams=2)
        assert torch.equal(tokens, expected) and tokens.shape[1] == 13


def test_commands_convert_and_inspect_them(case):
    from octavo.cli import app

    folder, _ = case
    run = CliRunner().invoke(app, ["quantize", str(folder / "plain"), str(folder / "eight")])
    assert run.exit_code == 0, run.output
    run = CliRunner().invoke(app, ["inspect", str(folder / "eight"), "--json"])
    assert run.exit_code == 0, run.output
    found = json.loads(run.stdout)
    assert found["coverage"] == 1.0 and not found["left"]


MINILM = os.environ.get("OCTAVO_TEST_MINILM")


@pytest.mark.slow
@pytest.mark.skipif(not MINILM, reason="OCTAVO_TEST_MINILM names no file; `make test-all` fetches it")
def test_sentence_embeddings_of_real_weights_stay():
    """all-MiniLM-L6-v2: each sentence's embedding (mean over its tokens) keeps its direction."""
    from pydoc_data.topics import topics

    from transformers import AutoTokenizer

    text = re.sub(r"\s+", " ", " ".join(topics[name] for name in sorted(topics))[50_000:80_000])
    sentences = [each for each in re.split(r"(?<=[.?!]) (?=[A-Z])", text) if 20 < len(each) < 300][:64]
    folder = Path(MINILM).parent
    batch = AutoTokenizer.from_pretrained(folder)(sentences, padding=True, return_tensors="pt")

    def embeddings(model) -> torch.Tensor:
        with torch.no_grad():
            hidden = model(**batch).last_hidden_state
        mask = batch["attention_mask"][..., None]
        return (hidden * mask).sum(1) / mask.sum(1)

    eight = octavo.load(folder, dtype="float32", device="cpu")
    assert type(eight).__name__ == "BertModel"
    octavo.reset_fallbacks()
    found = embeddings(eight)
    assert octavo.fallbacks() == {}
    expected = embeddings(AutoModel.from_pretrained(folder, dtype=torch.float32).eval())
    cosine = torch.nn.functional.cosine_similarity(found, expected)
    print(f"{len(sentences)} sentences: cosine at least {cosine.min():.6f}, mean {cosine.mean():.6f}")
    assert len(sentences) == 64 and cosine.min() >= 0.9995
