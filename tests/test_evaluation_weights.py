"""Errors by layer, codebooks beside the weights' histogram, and the plots of both."""

import numpy as np
import pytest

import octavo
from octavo.checkpoint.inspection import report
from octavo.evaluation import plots, weights

from .models import causal
from .models.published import publish, tiny_gptj


def tiny_gpt2():
    return causal("gpt2", 0, vocab_size=300)


@pytest.fixture(params=["gptj", "gpt2", "published"])
def checkpoints(request, tmp_path):
    """(8-bit folder, plain folder, the plain model, the model holding what the 8 bits stand for)."""
    make = tiny_gpt2 if request.param == "gpt2" else tiny_gptj
    plain, model = make(), make()
    plain.save_pretrained(tmp_path / "plain")
    (tmp_path / "eight").mkdir()
    if request.param == "published":
        decoded = publish(model, tmp_path / "eight")
    else:
        octavo.quantize_model(model, octavo.OctavoConfig(block_size=32)).save_pretrained(tmp_path / "eight")
        decoded = octavo.dequantize_model(model)
    return tmp_path / "eight", tmp_path / "plain", plain, decoded


def test_errors_by_layer_equal_those_of_the_decoded_model(checkpoints):
    eight, path, plain, decoded = checkpoints
    stored = report(eight, path)
    found = weights.by_layer(stored.quantized)
    assert [each.layer for each in found if each.layer is not None] == [0, 1]
    parameters, ours = dict(plain.named_parameters()), dict(decoded.named_parameters())

    def error(names: list[str]) -> float:
        off = sum((parameters[n] - ours[n]).double().square().sum().item() for n in names)
        return off / sum(parameters[n].double().square().sum().item() for n in names)

    for each in found:
        names = [item.name for item in stored.quantized if weights.layer_of(item.name) == each.layer]
        if each.layer is None:
            names = [name for name in names if weights.kind_of(name) == each.name]
        assert each.matrices == len(names) and each.error == pytest.approx(error(names), rel=1e-4)
    assert stored.error == pytest.approx(error([item.name for item in stored.quantized]), rel=1e-4)


def test_histograms_and_entries_are_those_of_the_weights(checkpoints):
    eight, path, plain, _ = checkpoints
    chosen = weights.choose(report(eight, path).quantized)
    assert len({item.stored for item in chosen}) == 4
    parameters = dict(plain.named_parameters())
    for item, found in zip(chosen, weights.codebooks(eight, path, chosen), strict=True):
        assert found.name == item.name and len(found.code) == 256 and (np.diff(found.code) >= 0).all()
        assert found.used.sum() == pytest.approx(1) and found.used.max() < 0.5
        weight = parameters[item.name].detach()
        # Rows are outputs: Conv1D holds its transpose.
        weight = weight.T if tuple(weight.shape) != tuple(item.shape) or "c_" in item.name else weight
        size = (
            item.block_size
            if item.kind == "8-bit" and item.block_size and item.block_size <= weight.shape[1]
            else None
        )
        if size == 32:
            blocks = weight.reshape(weight.shape[0], -1, size)
            # The scale of a block is its largest weight, rounded up to float16.
            scale = blocks.abs().amax(-1, keepdim=True)
            expected, _ = np.histogram((blocks / scale / 1.0005).numpy(), weights.BINS, (-1, 1), density=True)
            assert np.abs(np.cumsum(found.density) - np.cumsum(expected)).max() / weights.BINS * 2 < 0.02
        assert found.density.sum() * (found.edges[1] - found.edges[0]) == pytest.approx(1)
        # What an entry stands for lies where the weights are.
        mean = (found.density * (found.edges[1:] + found.edges[:-1]) / 2).sum() * (
            found.edges[1] - found.edges[0]
        )
        assert (found.code * found.used).sum() == pytest.approx(mean, abs=0.01)
    without = weights.codebooks(eight, None, chosen)
    assert all(each.density is None for each in without)
    np.testing.assert_array_equal(without[0].code, weights.codebooks(eight, path, chosen)[0].code)


def test_plots_are_drawn_with_and_without_a_base(checkpoints, tmp_path):
    eight, path, *_ = checkpoints
    stored = report(eight, path)
    plots.plot_layers(weights.by_layer(stored.quantized), tmp_path / "a.png")
    plots.plot_tensors(stored.quantized, tmp_path / "b.png")
    plots.plot_codebooks(weights.codebooks(eight, path, weights.choose(stored.quantized)), tmp_path / "c.png")
    plots.plot_codebooks(weights.codebooks(eight, None, stored.quantized[:1]), tmp_path / "d.png")
    points = [plots.Point("a format", 8.25, 20.5, 20.4, 20.6), plots.Point("without an interval", 8.0, 20.6)]
    plots.plot_perplexity(points, tmp_path / "e.png", base=("base", 20.4))
    plots.plot_perplexity(points[:1], tmp_path / "f.png")
    for each in "abcdef":
        assert (tmp_path / f"{each}.png").read_bytes()[:4] == b"\x89PNG"


def test_names_tell_layers_and_kinds():
    assert (
        weights.layer_of("model.layers.11.mlp.up_proj.weight") == 11
        and weights.layer_of("lm_head.weight") is None
    )
    assert weights.kind_of("model.layers.11.mlp.up_proj.weight") == "mlp.up_proj"
    assert weights.kind_of("model.layers.3.mlp.experts.7.w1.weight") == "mlp.experts.7.w1"
    assert weights.kind_of("lm_head.weight") == "lm_head"
