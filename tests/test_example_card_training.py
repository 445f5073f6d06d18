"""examples/finetune_as_the_card_says.py: adapters in every large layer of a published checkpoint; norms and biases if asked."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import octavo
from octavo import demo

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

EXAMPLE = Path(__file__).parents[1] / "examples" / "finetune_as_the_card_says.py"
SHORT = ["--steps", "20", "--batch", "4", "--length", "64", "--learning-rate", "1e-3"]
LINES = 200


def held_out_loss(model, text) -> float:
    """Of the last fifth of the text, as the example cuts it, by plain cross-entropy over one batch at a time."""
    ids = torch.tensor(octavo.load_tokenizer(demo.MODEL)(text, verbose=False)["input_ids"])
    pieces = ids[: len(ids) // 64 * 64].view(-1, 64)
    losses = []
    with torch.no_grad():
        for piece in pieces[-max(1, len(pieces) // 5) :]:
            logits = model(piece[None]).logits[0, :-1].double()
            losses.append(torch.nn.functional.cross_entropy(logits, piece[1:]))
    return float(torch.stack(losses).mean())


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "whole",
    [
        pytest.param(False, id="adapters", marks=pytest.mark.slow),
        pytest.param(True, id="norms and biases too"),
    ],
)
def test_the_shipped_model_learns_and_its_bytes_stay(whole, tmp_path):
    text = "\n".join((demo.TEXT / "proverbios.txt").read_text(encoding="utf-8").splitlines()[:LINES])
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    command = [sys.executable, str(EXAMPLE), "--text", "text.txt", *SHORT, *["--norms-and-biases"] * whole]
    run = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    before, after = map(float, re.search(r"loss (\S+) before, (\S+) after", run.stdout).groups())
    assert after < before - 0.02

    published, adapter = tmp_path / "card-adapter" / "published-model", tmp_path / "card-adapter"
    plain = octavo.load(published, device="cpu")
    assert held_out_loss(plain, text) == pytest.approx(before, abs=2e-4)
    loaded = octavo.load(published, device="cpu", adapter=adapter)
    assert held_out_loss(loaded, text) == pytest.approx(after, abs=2e-4)

    adapted = {name.rpartition(".")[0] for name, _ in loaded.named_modules() if name.endswith(".base_layer")}
    large = {
        name.removesuffix(".weight")
        for name, p in plain.named_parameters()
        if isinstance(p, octavo.OctavoTensor)
    }
    assert adapted == large and len(large) == 6 * 6 + 2
    old, new = dict(plain.named_parameters()), dict(loaded.named_parameters())
    for layer in large:
        assert torch.equal(old[f"{layer}.weight"].qdata, new[f"{layer}.base_layer.weight"].qdata)
    norm = loaded.transformer.h[3].ln_1
    changed = not torch.equal(
        getattr(norm, "modules_to_save", {"default": norm})["default"].weight,
        plain.transformer.h[3].ln_1.weight,
    )
    bias = not torch.equal(
        loaded.transformer.h[0].mlp.fc_in.base_layer.bias, plain.transformer.h[0].mlp.fc_in.bias
    )
    assert changed == bias == whole
