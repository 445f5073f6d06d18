"""`octavo compare`: formats against brute force, and a model's figures against an independent computation."""

import copy
import json
import math
import sys

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import octavo
from octavo.evaluation.compare import compare, compare_model, holm
from octavo.evaluation.formats import USUAL, find_format
from octavo.evaluation.scoring import windows
from octavo.evaluation.texts import Tokens

from .command import run
from .conftest import relative_error
from .models import causal
from .models.published import tiny_gptj

ALL = (*USUAL, "bitsandbytes", "dynamic-64", "int8-48", "fp8-row", "float16", "float32")


def matrix(rows=40, columns=160):
    return (
        torch.randn(rows, columns, generator=torch.Generator().manual_seed(7))
        * torch.logspace(-2, 1, rows)[:, None]
    )


@pytest.mark.parametrize("shape", [(40, 160), (37, 130), (3, 24, 96), (100, 4096)])
def test_published_is_bitsandbytes_but_for_ties(shape):
    pytest.importorskip("bitsandbytes")
    weight = torch.randn(shape)
    ours, theirs = find_format("published")(weight), find_format("bitsandbytes")(weight)
    assert ours.nbytes == theirs.nbytes
    differ = ours.weight != theirs.weight
    assert differ.float().mean() < 5e-3
    # Where they differ the weight lies in the middle between two entries, all but, and ours is the nearer one.
    error, other = (ours.weight - weight).abs()[differ], (theirs.weight - weight).abs()[differ]
    assert (error <= other).all() and (other - error <= 1e-4 * weight.abs().max()).all()


def test_int8_by_row_is_brute_force():
    weight = matrix(8, 20)
    weight[3] = 0.0
    expected = torch.zeros(8, 20, dtype=torch.float64)
    for n in range(8):
        scale = max(abs(value) for value in weight[n].tolist()) / 127
        for k in range(20):
            expected[n, k] = round(weight[n, k].item() / scale) * scale if scale else 0.0
    found = find_format("int8-row")(weight)
    torch.testing.assert_close(found.weight.double(), expected, rtol=1e-6, atol=1e-9)
    assert found.nbytes == 8 * 20 + 8 * 4


def test_int8_blocks_share_float16_scales_and_the_last_may_be_short():
    weight = matrix(5, 100)
    found = find_format("int8-48")(weight)
    assert found.nbytes == 500 + 5 * 3 * 2
    for start, stop in ((0, 48), (48, 96), (96, 100)):
        part = weight[:, start:stop]
        scale = (part.abs().amax(1, keepdim=True) / 127).half().float()
        codes = found.weight[:, start:stop] / scale
        torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-3)
        # Half a step, and what clamping to 127 costs where float16 rounded the scale down.
        assert ((found.weight[:, start:stop] - part).abs() <= scale * (0.5 + 127 * 2**-11) + 1e-12).all()


def test_q8_0_has_blocks_of_32_and_leaves_other_rows_in_float16():
    weight = matrix(6, 64)
    found = find_format("q8_0")(weight)
    assert found.nbytes == 6 * 2 * 34
    step = weight.view(6, 2, 32).abs().amax(-1, keepdim=True) / 127
    assert ((found.weight - weight).view(6, 2, 32).abs() <= step * 0.57).all() and not torch.equal(
        found.weight, weight
    )
    other = matrix(6, 50)
    assert torch.equal(find_format("q8_0")(other).weight, other.half().float())
    assert find_format("q8_0")(other).nbytes == 6 * 50 * 2


def test_plain_types_round_and_nothing_else():
    weight = matrix()
    for name in ("bfloat16", "float16", "float32"):
        found = find_format(name)(weight)
        dtype = getattr(torch, name)
        assert torch.equal(found.weight, weight.to(dtype).float())
        assert found.nbytes == weight.numel() * dtype.itemsize


@pytest.mark.parametrize("name", ALL)
def test_every_format_keeps_shape_zeros_stacks_and_transposes(name):
    if name == "bitsandbytes":
        pytest.importorskip("bitsandbytes")
    encode = find_format(name)
    assert encode.name == name
    stack = torch.randn(3, 32, 64)
    stack[1] = 0.0
    found = encode(stack)
    assert found.weight.shape == stack.shape and found.weight.dtype == torch.float32
    assert not found.weight[1].any()
    # A stack is its matrices, one by one (Octavo's type of scales is one for a whole parameter: here float16 all the same).
    for each, decoded in zip(stack, found.weight, strict=True):
        assert torch.equal(encode(each).weight, decoded)
    assert found.nbytes == sum(encode(each).nbytes for each in stack)
    assert torch.equal(encode(stack.mT, transposed=True).weight, found.weight.mT)
    assert 0 <= relative_error(found.weight, stack) < 0.03
    stack[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"model\.weight holds NaN"):
        encode(stack, name="model.weight")


@pytest.mark.parametrize("name", ["fitted-0", "fitted-", "fitted", "int4-row", "", "fitted-64 ", "int8-1e3"])
def test_unknown_formats_are_told(name):
    with pytest.raises(ValueError, match=r"expected one of .*fitted-B.*found"):
        find_format(name)


def tokens(length=150, vocabulary=300, name="a"):
    ids = torch.randint(0, vocabulary, (length,), generator=torch.Generator().manual_seed(3))
    return Tokens(name, ids, length, length)


def tied_llama():
    return causal("llama", vocab_size=300, tie_word_embeddings=True)


def gpt2():
    return causal("gpt2", vocab_size=300)


@pytest.mark.parametrize("make", [tiny_gptj, tied_llama, gpt2])
def test_figures_are_those_of_the_quantized_model(make):
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text, window, stride = tokens(), 32, 16
    found = compare_model(
        model, [text], [find_format("fitted-32"), find_format("dynamic-64")], window, stride, batch_size=3
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for row, config in zip(
        found.rows, (octavo.OctavoConfig(block_size=32), octavo.OctavoConfig("dynamic", 64)), strict=True
    ):
        quantized = octavo.quantize_model(copy.deepcopy(model), config)
        packed = {
            name: each for name, each in quantized.named_parameters() if isinstance(each, octavo.OctavoTensor)
        }
        count = sum(each.numel() for each in packed.values())
        nbytes = sum(each.nbytes_stored for each in packed.values())
        assert found.weights == count
        assert row.bits_per_weight == pytest.approx(8 * nbytes / count, rel=1e-12)
        assert row.nbytes == nbytes + 4 * (sum(each.numel() for each in model.parameters()) - count)
        plain = octavo.dequantize_model(quantized)
        error = power = 0.0
        for name in packed:
            error += (model.get_parameter(name) - plain.get_parameter(name)).double().square().sum().item()
            power += model.get_parameter(name).double().square().sum().item()
        assert row.weight_error == pytest.approx(error / power, rel=1e-6)
        ours, base, kl, agreed = brute_force(plain, model, text.ids, window, stride)
        assert row.perplexity.perplexity == pytest.approx(math.exp(ours), rel=1e-5)
        assert found.base.perplexity.perplexity == pytest.approx(math.exp(base), rel=1e-5)
        assert row.comparison.difference.mean == pytest.approx(ours - base, abs=1e-6)
        assert row.kl_mean == pytest.approx(kl, rel=1e-3)
        assert row.comparison.divergence.top1_agreement == pytest.approx(agreed)
        assert row.kl_interval[0] <= row.kl_mean <= row.kl_interval[1]


@torch.no_grad()
def brute_force(model, base, ids, window, stride):
    """Mean negative log-likelihoods of both models, mean divergence, and agreement, token by token."""
    nll, base_nll, kl, agreed = [], [], [], []
    for start, stop, first in windows(len(ids), window, stride):
        ours, theirs = (
            each(ids[None, start:stop]).logits[0].double().log_softmax(-1) for each in (model, base)
        )
        for position in range(first, stop):
            p, q = theirs[position - 1 - start], ours[position - 1 - start]
            nll.append(-q[ids[position]].item())
            base_nll.append(-p[ids[position]].item())
            kl.append((p.exp() * (p - q)).sum().item())
            agreed.append(float(p.argmax() == q.argmax()))
    return np.mean(nll), np.mean(base_nll), np.mean(kl), np.mean(agreed)


def test_float32_costs_nothing_and_bfloat16_little():
    model = tied_llama()
    found = compare_model(
        model, [tokens(), tokens(80, name="b")], [find_format("float32"), find_format("bfloat16")], 32, 16
    )
    same, close = found.rows
    assert (same.weight_error, same.bits_per_weight, same.comparison.divergence.top1_agreement) == (
        0.0,
        32.0,
        1.0,
    )
    assert abs(same.kl_mean) < 1e-9 and same.perplexity.nll == pytest.approx(
        found.base.perplexity.nll, rel=1e-9
    )
    assert 0 < close.weight_error < 2**-16 and close.bits_per_weight == 16.0
    assert same.kl_mean < close.kl_mean
    assert found.base.perplexity.tokens == 149 + 79


def test_smaller_blocks_are_closer():
    # Weights with outliers: what blocks are for.
    model = tied_llama()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter[torch.rand(parameter.shape) > 0.99] *= 8
    names = ["published", "fitted-4096", "fitted-64", "fitted-16"]
    found = compare_model(model, [tokens(400)], [find_format(name) for name in names], 32, 16)
    errors = [row.weight_error for row in found.rows]
    assert errors == sorted(errors, reverse=True)
    assert found.rows[0].kl_mean > 2 * found.rows[2].kl_mean > 0
    assert found.rows[1].bits_per_weight < found.rows[2].bits_per_weight < found.rows[3].bits_per_weight


def test_holm():
    # By hand: sorted 0.01, 0.02, 0.04 times 3, 2, 1, never falling.
    assert holm([0.04, 0.01, 0.02]) == pytest.approx([0.04, 0.03, 0.04])
    assert holm([0.9, 0.6]) == [1.0, 1.0]


def test_what_the_text_tells():
    model = tied_llama()
    found = compare_model(model, [tokens()], [find_format("float32"), find_format("fitted-64")], 32, 16)
    assert found.told_apart is not None and found.rows[0] not in found.told_apart
    short = compare_model(model, [tokens(20)], [find_format("fitted-64")], 32, 16)
    assert short.told_apart is None and "too short" in short.sentence
    assert json.loads(json.dumps(short.to_dict()))["formats"][0]["p_value"] is None
    # A model that a format breaks is told apart.
    broken = find_format("int8-row")
    object.__setattr__(broken, "encode", lambda weight: (torch.zeros_like(weight), weight.numel()))
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(50)
    found = compare_model(model, [tokens(400)], [broken, find_format("float32")], 32, 16)
    assert [row.format for row in found.told_apart] == [broken]
    assert "tells from the float model: int8-row (" in found.sentence


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny plain model with a tokenizer, and a text."""
    from octavo import demo, load_tokenizer

    where = tmp_path_factory.mktemp("compare")
    model = causal("llama", 0, vocab_size=4096, num_hidden_layers=1, max_position_embeddings=64)
    model.save_pretrained(where / "model")
    load_tokenizer(demo.MODEL).save_pretrained(where / "model")
    (where / "text.txt").write_text(
        (demo.TEXT / "proverbios.txt").read_text(encoding="utf-8")[:3000], encoding="utf-8"
    )
    return where


def test_the_command(folder, monkeypatch, capsys, tmp_path):
    from PIL import Image

    arguments = (folder / "model", "--text", folder / "text.txt", "--limit-tokens", 300)
    status, out, err = run(monkeypatch, capsys, "compare", *arguments, "--output", tmp_path / "new" / "out")
    assert status == 0, err
    for name in USUAL:
        assert name in out
    # Nothing is cut short on a narrow terminal, and no line of a table is wider.
    assert "…" not in out and "top-1" in out and "sliding window of 64 tokens" in out
    written = json.loads((tmp_path / "new" / "out" / "compare.json").read_text(encoding="utf-8"))
    assert [row["format"] for row in written["formats"]] == list(USUAL)
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == [
        "compare.json",
        "compare.png",
    ]
    with Image.open(tmp_path / "new" / "out" / "compare.png") as image:
        image.load()
        assert min(image.size) > 600
    status, out, err = run(
        monkeypatch, capsys, "compare", *arguments, "--formats", "fitted-64, bfloat16", "--json"
    )
    assert status == 0, err
    found = json.loads(out)
    row = next(row for row in written["formats"] if row["format"] == "fitted-64")
    assert [each["format"] for each in found["formats"]] == ["fitted-64", "bfloat16"]
    for key in ("perplexity", "kl_mean", "kl_p99", "top1_agreement", "p_value", "bits_per_weight", "bytes"):
        assert found["formats"][0][key] == pytest.approx(row[key])
    assert found["tokens"] == 299 and found["window"] == 64


def test_the_command_and_the_library_agree_on_what_is_usual():
    assert ",".join(USUAL) == sys.modules["octavo.cli.compare"].USUAL


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--formats", "fitted-64,fp4"), "found 'fp4'"),
        (("--formats", "fitted-64,fitted-64"), "each once"),
        (("--formats", ","), "found none"),
        (("--text", "missing.txt"), "missing.txt: no such file"),
        (("--window", "65"), "context is 64"),
        (("--dtype", "int8"), "'int8' is not one of"),
    ],
)
def test_what_is_wrong_is_told_in_one_line(folder, monkeypatch, capsys, options, expected):
    text = () if "--text" in options else ("--text", folder / "text.txt")
    status, out, err = run(monkeypatch, capsys, "compare", folder / "model", *text, *options)
    assert (
        status == (2 if "--dtype" in options else 1)
        and out == ""
        and expected in err
        and err.strip().startswith("error: ")
    )
    assert len(err.strip().splitlines()) == 1


def test_a_quantized_model_is_refused(folder, tmp_path):
    model = LlamaForCausalLM.from_pretrained(folder / "model", quantization_config=octavo.OctavoConfig())
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="quantized already"):
        compare(tmp_path, [str(folder / "text.txt")])
