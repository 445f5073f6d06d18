"""`octavo quantize --calibrate`: models small enough to calibrate in a second, converted, loaded and compared."""

import json

import pytest
import torch
import typer
from safetensors.torch import load_file
from transformers import BertModel
from typer.testing import CliRunner

import octavo
from octavo.calibration import Calibration
from octavo.checkpoint import CheckpointError, convert
from octavo.cli.quantize import quantize

from .models import config
from .models.checkpoints import CONFIGS, VOCABULARY, build
from .models.published import publish, tiny_gptj
from .models.tokenizers import word_tokenizer


def tokenizer():
    return word_tokenizer([f"w{i}" for i in range(VOCABULARY)])


def words(count, seed):
    """Numbers of words, some of them far more frequent than others, each drawing others near it after it."""
    generator = torch.Generator().manual_seed(seed)
    jumps = torch.randint(0, VOCABULARY, (count,), generator=generator)
    steps = torch.randint(-2, 3, (count,), generator=generator)
    found, at = [], 0
    for jump, step in zip(jumps.tolist(), steps.tolist(), strict=True):
        at = jump // 4 if jump % 4 == 0 else (at + step) % VOCABULARY
        found.append(at)
    return found


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(" ".join(f"w{i}" for i in words(6000, 1)), encoding="utf-8")
    return path


def save(configuration, folder):
    model = build(configuration)
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return model


def output_error(model, base):
    ids = torch.tensor(words(960, 2)).view(-1, 48)
    with torch.no_grad():
        found, expected = model(ids)[0].double(), base(ids)[0].double()
    return ((found - expected).norm() / expected.norm()).square().item()


@pytest.mark.parametrize("kind", ["llama-tied", "gpt2", "mixtral"])
def test_output_error_on_other_text_falls(kind, text, tmp_path):
    base = save(CONFIGS[kind](), tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "eight")
    calibration = Calibration([text], tokens=2048)
    convert(tmp_path / "plain", tmp_path / "calibrated", calibration=calibration)
    plain = load_file(tmp_path / "eight" / "model.safetensors")
    better = load_file(tmp_path / "calibrated" / "model.safetensors")
    assert {k: (v.shape, v.dtype) for k, v in plain.items()} == {
        k: (v.shape, v.dtype) for k, v in better.items()
    }
    changed = {name for name in plain if not torch.equal(plain[name], better[name])}
    assert changed == {f"{name}_qdata" for name in calibration.errors}
    quantized = {name.removesuffix("_qdata") for name in plain if name.endswith("_qdata")}
    assert quantized == set(calibration.errors) | set(calibration.left_out)
    # Embeddings that are not heads, and experts, are left plain, and nothing else.
    assert all(
        "emb" in name or "wte" in name or "wpe" in name or "experts" in name for name in calibration.left_out
    )
    assert all(after < before for before, after in calibration.errors.values())
    before = output_error(octavo.load(tmp_path / "eight", device="cpu"), base)
    after = output_error(octavo.load(tmp_path / "calibrated", device="cpu"), base)
    # Most of a mixture's weights are experts.
    assert after < (0.98 if kind == "mixtral" else 0.85) * before


def test_encoder(text, tmp_path):
    torch.manual_seed(0)
    base = BertModel(config("bert", vocab_size=VOCABULARY, max_position_embeddings=64)).eval()
    for parameter in base.encoder.parameters():
        # As large as the embeddings', or their error would be all there is.
        parameter.data += torch.randn_like(parameter) * 0.15
    base.save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "eight")
    calibration = Calibration([text], tokens=2048)
    convert(tmp_path / "plain", tmp_path / "calibrated", calibration=calibration)
    assert len(calibration.errors) == 13
    before, after = (
        output_error(octavo.load(tmp_path / name, device="cpu"), base) for name in ("eight", "calibrated")
    )
    assert after < 0.85 * before


def test_too_few_inputs(text, tmp_path):
    """An encoder's pooler sees one token a window."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 1, "max_position_embeddings": 64}
    BertModel(config("bert", vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    calibration = Calibration([text], tokens=1100)
    convert(tmp_path / "plain", tmp_path / "out", calibration=calibration)
    assert "pooler.dense.weight" not in calibration.errors and len(calibration.errors) == 6
    assert (
        calibration.left_out["pooler.dense.weight"]
        == "was given 17 inputs, too few for its rows of 128 weights"
    )


def test_little_memory_means_more_runs_and_the_same_bytes(text, tmp_path):
    save(CONFIGS["llama"](), tmp_path / "plain")
    written, runs = [], []
    for memory in (None, 1):
        calibration = Calibration([text], tokens=1100, memory=memory)
        calibration.progress = lambda done, total: None
        out = tmp_path / str(memory)
        convert(tmp_path / "plain", out, calibration=calibration)
        runs.append(len(calibration._groups))
        written.append((out / "model.safetensors").read_bytes())
    # With no room, each matrix has a run of its own.
    assert runs == [1, 11]
    assert written[0] == written[1]


def test_interrupted_and_gone_on_with(text, tmp_path):
    save(CONFIGS["llama"](), tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "whole", calibration=Calibration([text], tokens=2048))

    def stop(done, total, name):
        if name.startswith("model.layers.1.mlp"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(
            tmp_path / "plain", tmp_path / "out", calibration=Calibration([text], tokens=2048), progress=stop
        )
    with pytest.raises(CheckpointError, match="with other options"):
        convert(tmp_path / "plain", tmp_path / "out", calibration=Calibration([text], tokens=3072))
    result = convert(tmp_path / "plain", tmp_path / "out", calibration=Calibration([text], tokens=2048))
    assert result.resumed
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_command(text, tmp_path):
    save(CONFIGS["llama"](), tmp_path / "plain")
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command()(quantize)
    arguments = [tmp_path / "plain", tmp_path / "out", "--calibrate", text, "--calibrate-tokens", 2048]
    result = CliRunner().invoke(app, [str(each) for each in arguments])
    assert result.exit_code == 0, result.output
    assert "their output error on the text" in result.output and "→" in result.output
    record = json.loads((tmp_path / "out" / "config.json").read_text())["octavo_calibration"]
    assert record["tokens"] == 2048 and len(record["text_sha256"]) == 64
    assert (
        "calibration" not in json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    )


def test_what_cannot_be_calibrated(text, tmp_path):
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "d_ff": 128,
        "d_kv": 16,
        "num_layers": 1,
        "num_heads": 4,
    }
    T5ForConditionalGeneration(T5Config(**sizes)).save_pretrained(tmp_path / "t5")
    with pytest.raises(ValueError, match="this is an encoder-decoder"):
        convert(tmp_path / "t5", tmp_path / "out", calibration=Calibration([text]))
    (tmp_path / "published").mkdir()
    publish(tiny_gptj(), tmp_path / "published")
    with pytest.raises(ValueError, match="needs the float checkpoint"):
        convert(tmp_path / "published", tmp_path / "out", calibration=Calibration([text]))
    save(CONFIGS["llama"](), tmp_path / "plain")
    with pytest.raises(FileNotFoundError, match=r"none.txt: no such file"):
        convert(tmp_path / "plain", tmp_path / "out", calibration=Calibration([tmp_path / "none.txt"]))
    (tmp_path / "short.txt").write_text("w1 w2")
    with pytest.raises(ValueError, match=r"short.txt: expected text of at least 1,024 tokens"):
        convert(tmp_path / "plain", tmp_path / "out", calibration=Calibration([tmp_path / "short.txt"]))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_activations_that_overflow_are_an_error(text, tmp_path):
    model = build(CONFIGS["llama"]())
    # Finite weights whose products are not; float32 scales hold them.
    model.model.layers[0].mlp.up_proj.weight.data *= 1e30
    model.model.layers[0].mlp.gate_proj.weight.data *= 1e30
    model.save_pretrained(tmp_path / "plain")
    tokenizer().save_pretrained(tmp_path / "plain")
    with pytest.raises(CheckpointError, match=r"--calibrate: .*weight: the layer's inputs hold NaN or inf"):
        convert(tmp_path / "plain", tmp_path / "out", calibration=Calibration([text], tokens=2048))
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()
