"""Codes chosen by a layer's output: the arithmetic against an independent one, what is observed, and the texts."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import octavo
from octavo.calibration.feedback import DAMPING, output_error, recode
from octavo.calibration.observe import Enough, Observer
from octavo.calibration.text import read_windows
from octavo.quantizer import quantize_parameter

from .conftest import brute_dequantize


def inputs(count, columns, seed=0):
    """Inputs whose columns go up and down together, some much stronger than others: float32 [count, columns]."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns // 4, columns, generator=torch.Generator().manual_seed(99))
    x = torch.randn(count, columns // 4, generator=generator) @ mixing
    strength = torch.logspace(-1, 1, columns)[
        torch.randperm(columns, generator=torch.Generator().manual_seed(98))
    ]
    return (x + 0.2 * torch.randn(count, columns, generator=generator)) * strength


def brute_recode(weight, plain, gram, damping):
    """Optimal Brain Surgeon, column by column in float64, the inverse of what is left computed anew each time.

    Returns the codes, the columns in the order taken, and how much nearer the nearest code is than the next [N, K].
    """
    work, gram = weight.double().clone(), gram.double().clone()
    power = gram.diagonal().clone()
    gram.diagonal().mul_(1 + damping)
    code = plain.code.double()
    qdata, margin = torch.empty_like(plain.qdata), torch.empty_like(work)
    order = left = power.argsort(descending=True, stable=True).tolist()
    while left:
        inverse = torch.linalg.inv(gram[left][:, left])
        column = left[0]
        scale = plain.absmax[:, column // plain.block_size].double()
        distance = (work[:, column, None] - code[None] * scale[:, None]).abs()
        nearest = distance.argmin(1)
        first, second = distance.topk(2, largest=False).values.T
        margin[:, column] = (second - first) / scale
        qdata[:, column] = nearest.to(torch.uint8)
        error = work[:, column] - code[nearest] * scale
        work[:, left] -= error[:, None] * inverse[0] / inverse[0, 0]
        left = left[1:]
    return qdata, order, margin


@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("damping", [DAMPING, 2.0])
def test_equals_column_by_column_in_float64(block_size, damping):
    weight, x = torch.randn(24, 168), inputs(1000, 168)
    plain = quantize_parameter(weight, octavo.OctavoConfig(block_size=block_size))
    found = recode(weight, plain, x.T @ x, damping)
    expected, order, margin = brute_recode(weight, plain, x.T @ x, damping)
    differs = (found.qdata != expected)[:, order]
    assert differs.any(1).float().mean() < 0.2
    for row in differs.any(1).nonzero().flatten().tolist():
        # A weight halfway between two codes falls to either side, and the rest of its row follows.
        column = order[int(differs[row].float().argmax())]
        assert margin[row, column] < 1e-4
    assert (found.qdata != plain.qdata).float().mean() > 0.2


@pytest.mark.parametrize("codebook", ["fitted", "dynamic"])
def test_output_error_falls_on_other_inputs(codebook):
    weight, x, others = torch.randn(64, 256), inputs(4000, 256), inputs(4000, 256, seed=5)
    plain = quantize_parameter(weight, octavo.OctavoConfig(codebook=codebook, block_size=64))
    found = recode(weight, plain, x.T @ x)
    expected = others.double() @ weight.double().T

    def error(packed):
        kept = brute_dequantize(packed.qdata, packed.absmax, packed.code, packed.block_size)
        return ((others.double() @ kept.T - expected).norm() / expected.norm()).square().item()

    assert error(found) < 0.5 * error(plain)
    measured, power = output_error(weight, found, others.T @ others)
    assert measured / power == pytest.approx(error(found), rel=1e-2)


def test_codebook_and_scales_are_kept():
    weight, x = torch.randn(16, 128), inputs(500, 128)
    weight[3, 64:] = 0
    plain = quantize_parameter(weight, octavo.OctavoConfig())
    found = recode(weight, plain, x.T @ x)
    assert torch.equal(found.code, plain.code) and torch.equal(found.absmax, plain.absmax)
    assert found.qdata.dtype == torch.uint8 and found.qdata.shape == plain.qdata.shape
    assert found.qdata.is_contiguous()
    tensor = octavo.OctavoTensor.from_packed(found, torch.float32)
    # A block of zeros stays one.
    assert (tensor.dequantize()[3, 64:] == 0).all()


def test_inputs_that_never_come():
    """Columns whose input is always 0 get their nearest codes, and no other column's error."""
    weight, x = torch.randn(16, 128), inputs(500, 128)
    x[:, 10:20] = 0
    plain = quantize_parameter(weight, octavo.OctavoConfig())
    found = recode(weight, plain, x.T @ x)
    assert torch.equal(found.qdata[:, 10:20], plain.qdata[:, 10:20])


def test_inputs_without_correlation_change_nothing():
    weight = torch.randn(16, 128)
    plain = quantize_parameter(weight, octavo.OctavoConfig())
    assert torch.equal(recode(weight, plain, torch.eye(128)).qdata, plain.qdata)


def test_inputs_that_cannot_be_used():
    weight = torch.randn(16, 128)
    plain = quantize_parameter(weight, octavo.OctavoConfig())
    with pytest.raises(ValueError, match="NaN or infinity"):
        recode(weight, plain, torch.full((128, 128), float("nan")))
    with pytest.raises(ValueError, match=r"expected \[128, 128\], found \[64, 64\]"):
        recode(weight, plain, torch.eye(64))


class Attention(nn.Module):
    """Three matrices with one input, one with another, and a head tied to the embedding."""

    def __init__(self, linear):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.q, self.k, self.v, self.o = (linear() for _ in range(4))
        self.head = nn.Linear(64, 100, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        x = self.embed(ids)
        self.first = x.detach().clone()
        y = self.q(x) * self.k(x) + self.v(x)
        self.second = y.detach().clone()
        # Changed in place: another input, though the same tensor.
        x.add_(self.o(y))
        self.third = x.detach().clone()
        return self.head(x)


@pytest.mark.parametrize(
    "linear", [lambda: nn.Linear(64, 64), lambda: Conv1D(64, 64)], ids=["linear", "conv1d"]
)
@pytest.mark.parametrize("quantized", [False, True])
def test_observes_what_is_multiplied(linear, quantized):
    model = Attention(linear)
    if quantized:
        octavo.quantize_model(model)
    transposed = isinstance(model.q, Conv1D)
    weights = {
        id(model.get_parameter(f"{name}.weight")): (name, transposed and name != "embed")
        for name in ("q", "k", "v", "o", "embed")
    }
    with torch.no_grad(), Observer(weights) as seen:
        sums = {name: torch.zeros(64, 64) for name in ("first", "second", "third")}
        for seed in range(3):
            ids = torch.randint(0, 100, (2, 9), generator=torch.Generator().manual_seed(seed))
            model(ids)
            for name, total in sums.items():
                rows = getattr(model, name).view(-1, 64)
                total += rows.T @ rows
    # Conv1D flattens its input: a tensor of its own each time.
    first = "k" if transposed else "q"
    assert seen.shared["q"] == "q" and seen.shared["k"] == first
    assert seen.shared["o"] == "o" and seen.shared["embed"] == "embed"
    assert seen.embeddings == {"embed"}
    for name, expected in {"q": "first", "v": "first", "o": "second", "embed": "third"}.items():
        torch.testing.assert_close(seen.gram(name), sums[expected], rtol=1e-4, atol=1e-4)
        assert seen.tokens(name) == 3 * 2 * 9


def test_observes_only_what_is_wanted_and_stops():
    model = Attention(lambda: nn.Linear(64, 64))
    weights = {id(model.get_parameter(f"{name}.weight")): (name, False) for name in ("q", "o", "embed")}
    ids = torch.arange(9)[None]
    with pytest.raises(Enough), torch.no_grad(), Observer(weights, wanted={"o"}, stop_after="o") as seen:
        model(ids)
    assert list(seen.shared) == ["o"] and not hasattr(model, "third")
    with torch.no_grad(), Observer(weights, sizes_only=True) as seen:
        model(ids)
    assert list(seen.shared) == ["q", "o", "embed"] and seen.columns["o"] == 64
    with pytest.raises(KeyError):
        seen.gram("o")


class Words:
    """A tokenizer that numbers words and puts a start token."""

    def __call__(self, text, truncation, max_length):
        return {
            "input_ids": [0, *(int(word.strip("w")) for word in text.split() if word.strip("w"))][:max_length]
        }


def test_windows_are_spread_over_each_text(tmp_path):
    for name, first in (("a", 1000), ("b", 50000)):
        text = " ".join(f"w{first + i}" for i in range(20000))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
    windows = read_windows([tmp_path / "a.txt", tmp_path / "b.txt"], Words(), 4096, 256)
    assert len(windows) == 16 and all(len(window) == 256 and window[0] == 0 for window in windows)
    middles = [int(window[100]) for window in windows]
    assert middles == sorted(middles)
    assert sum(middle < 50000 for middle in middles) == 8
    # From the beginning to the end.
    assert middles[0] < 2000 and 17000 < middles[7] < 21000


def test_texts_that_cannot_be_used(tmp_path):
    (tmp_path / "short.txt").write_text("w1 w2 w3")
    with pytest.raises(ValueError, match=r"short.txt: expected text of at least 1,024 tokens, found 4"):
        read_windows([tmp_path / "short.txt"], Words(), 4096, 256)
    (tmp_path / "latin.txt").write_bytes("w1 ñ".encode("latin-1"))
    with pytest.raises(ValueError, match="expected text in UTF-8, found byte 0xf1 at 3"):
        read_windows([tmp_path / "latin.txt"], Words(), 4096, 256)
    with pytest.raises(FileNotFoundError, match=r"none.txt: no such file"):
        read_windows([tmp_path / "none.txt"], Words(), 4096, 256)
    with pytest.raises(ValueError, match="found a folder"):
        read_windows([tmp_path], Words(), 4096, 256)
