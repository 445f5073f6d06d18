"""What `octavo export` writes, read back without llama.cpp; what it refuses; how it leaves the disk."""

import numpy as np
import pytest
import torch

import octavo
from octavo import demo
from octavo.checkpoint import convert, open_source
from octavo.export import export_gguf, gguf_file
from octavo.export.pretokenizers import RULES, find_pre_tokenizer, pre_tokenizer

from .models import config, dense
from .models.exported import quantized, random_model
from .models.tokenizers import VOCABULARY, byte_level_tokenizer, sentencepiece_tokenizer
from .test_cli import octavo as run_octavo


def command(*arguments):
    """The command in this process: starting another takes longer than what it does."""
    from typer.testing import CliRunner

    from octavo.cli import app

    return CliRunner().invoke(app, ["export", *map(str, arguments)], catch_exceptions=False)


TANH = {"f16": 2**-11, "bf16": 2**-8, "f32": 0.0}


ENDS = {"vocab_size": VOCABULARY, "eos_token_id": 1}


def llama(**options):
    return config("llama", **{**ENDS, "intermediate_size": 160, "max_position_embeddings": 64, **options})


def gpt2(**options):
    # transformers' GGUF support takes 1024 positions for granted.
    return config("gpt2", **{**ENDS, "n_positions": 1024, **options})


CONFIGS = {"llama": llama, "gpt2": gpt2}


@pytest.fixture(scope="module")
def tokenizer():
    return byte_level_tokenizer(bos=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tokenizer):
    """Name → the quantized model and its folder."""
    found = {}
    for name, make in CONFIGS.items():
        folder = tmp_path_factory.mktemp(name)
        found[name] = quantized(make(), folder, tokenizer), folder
    return found


def fields(path):
    """The file's metadata, by the library that llama.cpp's project publishes."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    return {key: field.contents() for key, field in reader.fields.items()}, reader.tensors


@pytest.mark.parametrize("to", ["f32", "f16", "bf16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_weights_come_back_through_our_own_reader(name, to, saved, tmp_path):
    """transformers' GGUF support, under our source, undoes what llama.cpp's layout does to them."""
    model, folder = saved[name]
    export_gguf(folder, tmp_path / "m.gguf", to)
    expected = dense(model)
    with open_source(tmp_path / "m.gguf") as source:
        assert set(source.tensors) == set(expected)
        for parameter, value in expected.items():
            found = source.read(parameter)
            bound = value.abs() * TANH[to] + (2**-25 if to == "f16" else 0.0)
            assert found.shape == value.shape and ((found - value).abs() <= bound).all(), parameter
        config = source.config
    assert config["vocab_size"] == VOCABULARY and config["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("name", CONFIGS)
def test_q8_0_is_within_half_a_step(name, saved, tmp_path):
    model, folder = saved[name]
    result = export_gguf(folder, tmp_path / "m.gguf", "q8_0")
    assert set(result.types) == {"Q8_0", "F32"} and result.narrow == []
    with open_source(tmp_path / "m.gguf") as source:
        for parameter, value in dense(model).items():
            found = source.read(parameter)
            if source.tensors[parameter].stored == "F32":
                assert torch.equal(found, value), parameter
                continue
            # Blocks of 32 along the file's rows: Conv1D's are columns here.
            rows, stored = (value.mT, found.mT) if ".c_" in parameter else (value, found)
            step = rows.reshape(-1, 32).abs().amax(1, keepdim=True) / 127
            # The step itself is rounded to float16, which the largest entries see 127 times.
            bound = (0.5 + 127 * 2**-11 + 1e-3) * step
            assert ((stored.reshape(-1, 32) - rows.reshape(-1, 32)).abs() <= bound).all(), parameter


def test_metadata(saved, tokenizer, tmp_path):
    _, folder = saved["llama"]
    result = export_gguf(folder, tmp_path / "m.gguf", "q8_0", name="Quijote")
    found, tensors = fields(tmp_path / "m.gguf")
    assert result.nbytes == (tmp_path / "m.gguf").stat().st_size
    expected = {
        "general.architecture": "llama",
        "general.name": "Quijote",
        "general.file_type": 7,
        "general.quantization_version": 2,
        "llama.block_count": 2,
        "llama.context_length": 64,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 160,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.dimension_count": 16,
        "llama.vocab_size": VOCABULARY,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": "{{ messages[0]['content'] }}",
    }
    assert {key: found.get(key) for key in expected} == expected
    tokens, types = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    keep = tokenizer.convert_tokens_to_ids("<keep>")
    # 1 normal, 3 control, 4 found in texts, 5 rows of the embedding that no token has.
    assert (types[0], types[1], types[2], types[keep]) == (3, 3, 1, 4)
    assert tokens[-1] == f"[PAD{VOCABULARY - 1}]" and types[-1] == 5
    assert {t.name for t in tensors} >= {
        "token_embd.weight",
        "blk.1.attn_q.weight",
        "output_norm.weight",
        "output.weight",
    }


def test_rows_that_are_no_multiple_of_32_stay_in_float16(tokenizer, tmp_path):
    quantized(llama(intermediate_size=200), tmp_path / "model", tokenizer)
    run = command(tmp_path / "model", tmp_path / "m.gguf", "--to", "q8_0")
    assert run.exit_code == 0, run.stderr
    assert "2 matrices are in F16" in run.stdout and "blk.0.ffn_down.weight" in run.stdout
    kinds = {t.name: t.tensor_type.name for t in fields(tmp_path / "m.gguf")[1]}
    assert kinds["blk.0.ffn_down.weight"] == "F16" and kinds["blk.0.ffn_up.weight"] == "Q8_0"


def test_every_source_gives_the_same_file(tokenizer, tmp_path):
    """A model saved from memory, one converted on disk, and plain ones that hold their weights."""
    model = random_model(llama())
    model.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    quantized(llama(), tmp_path / "live", tokenizer)
    convert(tmp_path / "plain", tmp_path / "converted")
    live = octavo.load(tmp_path / "converted", dtype="float32", device="cpu")
    octavo.dequantize_model(live).save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    written = []
    for folder in ("live", "converted", "dense"):
        export_gguf(tmp_path / folder, tmp_path / f"{folder}.gguf", "f32", name="same")
        written.append((tmp_path / f"{folder}.gguf").read_bytes())
    assert written[0] == written[1] == written[2]


def test_panels_change_nothing_and_bound_what_is_read(saved, tmp_path, monkeypatch):
    from octavo.export.parameters import Parameters

    _, folder = saved["gpt2"]
    export_gguf(folder, tmp_path / "whole.gguf", "q8_0", name="same")
    asked = []
    rows = Parameters.rows
    monkeypatch.setattr(gguf_file, "PANEL_WEIGHTS", 640)
    monkeypatch.setattr(
        Parameters,
        "rows",
        lambda self, name, index, matrix=0: asked.append(len(index)) or rows(self, name, index, matrix),
    )
    export_gguf(folder, tmp_path / "panels.gguf", "q8_0", name="same")
    assert (tmp_path / "panels.gguf").read_bytes() == (tmp_path / "whole.gguf").read_bytes()
    assert max(asked) * 64 <= 640 * 64 and sum(count == 10 for count in asked) > 10


def test_a_dynamic_codebook_and_an_untouched_matrix(tokenizer, tmp_path):
    model = quantized(
        llama(), tmp_path / "model", tokenizer, codebook="dynamic", block_size=4096, skip=["down_proj"]
    )
    export_gguf(tmp_path / "model", tmp_path / "m.gguf", "f32")
    with open_source(tmp_path / "m.gguf") as source:
        for parameter, value in dense(model).items():
            assert torch.equal(source.read(parameter), value), parameter


def test_the_shipped_model_becomes_a_phi2(tmp_path):
    result = export_gguf(demo.MODEL, tmp_path / "m.gguf")
    assert result.architecture == "phi2"
    _, tensors = fields(tmp_path / "m.gguf")
    by_name = {tensor.name: tensor for tensor in tensors}
    assert not by_name["blk.0.attn_output.bias"].data.any()
    assert by_name["blk.5.attn_output.bias"].shape.tolist() == [256]


@pytest.mark.filterwarnings("ignore:1 of the tokenizer")  # transformers adds its default to GPT-2's kind
def test_gguf_in_gguf_out(saved, tmp_path):
    model, folder = saved["llama"]
    export_gguf(folder, tmp_path / "a.gguf", "f32")
    export_gguf(tmp_path / "a.gguf", tmp_path / "b.gguf", "f32")
    with open_source(tmp_path / "b.gguf") as source:
        for parameter, value in dense(model).items():
            assert torch.equal(source.read(parameter), value), parameter


@pytest.mark.parametrize(
    ("written", "found"),
    [
        (
            lambda pre: pre.Sequence(
                [pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]
            ),
            "smollm",
        ),
        (lambda pre: pre.ByteLevel(add_prefix_space=False), "gpt-2"),
        (
            lambda pre: pre.Sequence(
                [pre.Digits(individual_digits=False), pre.ByteLevel(add_prefix_space=False)]
            ),
            None,
        ),
        (lambda pre: pre.Sequence([pre.Whitespace(), pre.ByteLevel(add_prefix_space=False)]), None),
    ],
)
def test_a_rule_is_known_by_what_it_does(written, found):
    from tokenizers import pre_tokenizers

    assert find_pre_tokenizer(written(pre_tokenizers), ignore_merges=False) == found


def test_llama_3s_rule_with_merges_has_another_name():
    assert find_pre_tokenizer(pre_tokenizer("llama-bpe"), ignore_merges=True) == "llama-bpe"
    assert find_pre_tokenizer(pre_tokenizer("llama-bpe"), ignore_merges=False) == "smaug-bpe"


def test_rules_differ_on_the_probe():
    from octavo.export.pretokenizers import _pieces

    assert len({tuple(_pieces(name)) for name in RULES}) == len(RULES)


def test_an_unknown_pre_tokenizer_is_a_warning(tmp_path):
    from tokenizers import pre_tokenizers

    odd = byte_level_tokenizer()
    odd.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    quantized(llama(), tmp_path / "model", odd)
    with pytest.warns(UserWarning, match="names 'default', and some texts will get other tokens"):
        result = export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert result.vocabulary.pre == "default"


def test_tokens_beyond_the_embedding_are_left_out(tmp_path):
    quantized(llama(vocab_size=500), tmp_path / "model", byte_level_tokenizer())
    with pytest.warns(UserWarning, match=r"98 of the tokenizer's tokens .* are beyond the 500 rows"):
        result = export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    assert result.vocabulary.tokens == 500


def test_sentencepiece_scores_follow_the_merges(tmp_path):
    tokenizer = sentencepiece_tokenizer()
    quantized(llama(bos_token_id=1, eos_token_id=2), tmp_path / "model", tokenizer)
    export_gguf(tmp_path / "model", tmp_path / "m.gguf")
    found, _ = fields(tmp_path / "m.gguf")
    assert found["tokenizer.ggml.model"] == "llama" and found["tokenizer.ggml.add_space_prefix"] is True
    scores = dict(zip(found["tokenizer.ggml.tokens"], found["tokenizer.ggml.scores"], strict=True))
    types = found["tokenizer.ggml.token_type"]
    assert types[:3] == [2, 3, 3] and types[3:259] == [6] * 256
    ranked = [token for token in sorted(scores, key=scores.get, reverse=True) if scores[token] > -1e6]
    assert ranked[0] == tokenizer.convert_ids_to_tokens(tokenizer.convert_tokens_to_ids(ranked[0]))
    assert scores[ranked[0]] == 0.0 and len(ranked) > 100


def test_what_cannot_be_exported_is_one_clear_error(saved, tokenizer, tmp_path):
    from transformers import BloomConfig

    _, folder = saved["llama"]
    with pytest.raises(ValueError, match=r"--to: expected one of f16, q8_0, bf16, f32, found 'q4_0'"):
        export_gguf(folder, tmp_path / "m.gguf", "q4_0")
    with pytest.raises(ValueError, match=r"expected a file name that ends in \.gguf"):
        export_gguf(folder, tmp_path / "m.bin")
    with pytest.raises(OSError, match=r"no such folder to write m\.gguf to"):
        export_gguf(folder, tmp_path / "nowhere" / "m.gguf")
    bloom = BloomConfig(vocab_size=VOCABULARY, hidden_size=64, n_layer=1, n_head=4)
    quantized(bloom, tmp_path / "bloom", tokenizer)
    with pytest.raises(
        ValueError, match=r"no export to GGUF for models of type 'bloom'; there is one for llama, .*gptj"
    ):
        export_gguf(tmp_path / "bloom", tmp_path / "m.gguf")
    quantized(llama(hidden_act="relu"), tmp_path / "relu", tokenizer)
    with pytest.raises(ValueError, match=r"activation: llama.cpp computes with silu, this model has relu"):
        export_gguf(tmp_path / "relu", tmp_path / "m.gguf")
    quantized(llama(), tmp_path / "mute", tokenizer)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "mute" / file).unlink()
    with pytest.raises(ValueError, match="holds no tokenizer"):
        export_gguf(tmp_path / "mute", tmp_path / "m.gguf")
    assert not list(tmp_path.glob("*.gguf*"))


def test_beyond_float16_is_an_error_and_the_old_file_stays(tokenizer, tmp_path):
    model = random_model(llama())
    model.model.layers[1].mlp.up_proj.weight.data *= 1e6
    octavo.quantize_model(model).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    out = tmp_path / "m.gguf"
    out.write_bytes(b"old")
    with pytest.raises(OSError, match="--overwrite to replace it"):
        export_gguf(tmp_path / "model", out)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight.*beyond float16's range.*bf16"):
        export_gguf(tmp_path / "model", out, overwrite=True)
    assert out.read_bytes() == b"old" and list(tmp_path.glob("*.partial")) == []
    export_gguf(tmp_path / "model", out, "bf16", overwrite=True)
    assert out.stat().st_size > 100_000


def test_a_full_disk_is_said_before_anything_is_written(saved, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 1000))
    with pytest.raises(OSError, match="the disk is full"):
        export_gguf(saved["llama"][1], tmp_path / "m.gguf")
    assert list(tmp_path.iterdir()) == []


def test_command(saved, tmp_path):
    _, folder = saved["gpt2"]
    out = tmp_path / "m.gguf"
    run = command(folder, out, "--name", "Sancho")
    assert run.exit_code == 0, run.stderr
    assert (
        "architecture gpt2" in run.stdout and "in F16" in run.stdout and f"{VOCABULARY} tokens" in run.stdout
    )
    assert fields(out)[0]["general.name"] == "Sancho"
    assert command(folder, out, "--overwrite", "--to", "q8_0").exit_code == 0
    assert fields(out)[0]["general.file_type"] == 7
    explained = command("--help")
    assert (
        "llama.cpp" in explained.stdout
        and "octavo export" in explained.stdout
        and "--overwrite" in explained.stdout
    )
    again = run_octavo("export", folder, out)
    assert again.returncode == 1 and again.stderr.startswith("error: ") and "--overwrite" in again.stderr


def test_progress_reaches_the_end(saved, tmp_path):
    steps = []
    _, folder = saved["llama"]
    export_gguf(
        folder, tmp_path / "m.gguf", progress=lambda done, total, what: steps.append((done, total, what))
    )
    assert [done for done, _, _ in steps] == sorted(done for done, _, _ in steps)
    assert steps[0][0] == 0 and steps[-1][2] and steps[-1][0] < steps[-1][1]
    data = sum(tensor.n_bytes for tensor in fields(tmp_path / "m.gguf")[1])
    assert steps[0][1] == data and np.isfinite(data)
