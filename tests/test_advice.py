"""What a command says to do next is right for the kind of model at hand, and can be run as it is printed."""

import pytest
import torch
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from octavo.cli.checks import continues_text

from .command import run
from .models import config
from .models.checkpoints import CONFIGS, build
from .models.gguf_files import write_llama

ENCODERS = [AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification]


@pytest.mark.parametrize("kind", ENCODERS, ids=lambda kind: kind.__name__)
def test_after_an_encoder_the_lines_that_load_it(kind, tmp_path, monkeypatch, capsys):
    kind.from_config(config("bert", vocab_size=160)).save_pretrained(tmp_path / "a model")
    out = tmp_path / "8 bits"
    status, shown, _ = run(monkeypatch, capsys, "quantize", tmp_path / "a model", out)
    assert status == 0 and "octavo generate" not in shown
    lines = shown.split("Next, in Python: ")[1].strip()
    found = {}
    exec(lines.rpartition("; ")[0] + "; model = " + lines.rpartition("; ")[2], found)
    assert type(found["model"]).__name__ in lines
    assert found["model"].get_memory_footprint() < 0.5 * 4 * found["model"].num_parameters()
    for command in (("generate", out, "hola"), ("bench", out)):
        status, _, told = run(monkeypatch, capsys, *command)
        assert status == 1 and "does not continue text" in told and lines in told


def test_a_class_that_continues_text_is_told_by_its_name():
    from transformers.models.auto import modeling_auto

    for name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        # transformers counts some encoders among them, which are made to generate for the decoder of a pair.
        names = name if isinstance(name, tuple) else (name,)
        assert all(map(continues_text, names)), name
    for names in (
        modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
        modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
    ):
        for name in names.values():
            if name.endswith(("ForMaskedLM", "Classification", "Answering")):
                assert not continues_text(name), name


@pytest.mark.parametrize(("kind", "narrow"), [("Q4_0", True), ("Q8_0", False), (None, False)])
def test_a_source_of_few_bits_is_told_that_8_bits_win_nothing_back(
    kind, narrow, tmp_path, monkeypatch, capsys
):
    write_llama(tmp_path / "m.gguf", build(CONFIGS["llama"]()), quantize=kind)
    status, _, told = run(monkeypatch, capsys, "quantize", tmp_path / "m.gguf", tmp_path / "out")
    assert status == 0
    assert (
        "m.gguf holds 4.5 bits per weight. In 8 bits it will be larger, and no better"
        in " ".join(told.split())
    ) == narrow


def test_an_adapter_says_what_it_is_for(tmp_path, monkeypatch, capsys):
    from peft import LoraConfig, get_peft_model

    model = build(CONFIGS["llama"]())
    model.save_pretrained(tmp_path / "the base")
    model.name_or_path = str(tmp_path / "the base")
    folder = tmp_path / "adapter"
    get_peft_model(model, LoraConfig(target_modules="all-linear")).save_pretrained(folder)
    for command in (
        ("generate", folder, "hola"),
        ("quantize", folder, tmp_path / "out"),
        ("inspect", folder),
    ):
        status, _, told = run(monkeypatch, capsys, *command)
        assert status == 1
        assert (
            f"octavo generate '{tmp_path}/the base' --adapter {folder} PROMPT; octavo merge makes one model of both"
            in told
        )
        assert len(told.strip().splitlines()) == 1


def test_plan_is_for_this_machine_unless_asked(tmp_path, monkeypatch, capsys):
    build(CONFIGS["llama"]()).config.save_pretrained(tmp_path)
    here = "cuda" if torch.cuda.is_available() else "cpu"
    _, shown, _ = run(monkeypatch, capsys, "plan", tmp_path)
    assert f"on {here}" in " ".join(shown.split())
    assert ("--device cuda plans for one" in " ".join(shown.split())) == (here == "cpu")
    _, shown, _ = run(monkeypatch, capsys, "plan", tmp_path, "--device", "cuda")
    assert "computing in bfloat16 on cuda" in " ".join(shown.split())
