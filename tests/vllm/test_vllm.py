"""vLLM serves Octavo's folders: the same greedy tokens and log-probabilities as transformers on the same folder.

Needs vLLM; `make test-vllm` installs it in an environment of its own. Each run of vLLM is a process (`answer.py`).
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import octavo
from octavo.checkpoint import convert

from .models import random_model

pytestmark = pytest.mark.skipif(
    not os.environ.get("OCTAVO_REQUIRE_VLLM") and importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: `make test-vllm` does that",
)
PROMPTS = [[1, 17, 42, 9, 33, 140, 7, 7, 91], [1, 5]]
TOKENS = 12


def vllm_run(model, prompts=None, adapter=None, env=None, **options):
    asked = {
        "model": str(model),
        "prompts": prompts or PROMPTS,
        "tokens": TOKENS,
        "options": options,
        "adapter": adapter and str(adapter),
    }
    command = [sys.executable, str(Path(__file__).with_name("answer.py")), json.dumps(asked)]
    environment = {"OMP_NUM_THREADS": "1", **os.environ, **(env or {})}
    return subprocess.run(command, capture_output=True, text=True, timeout=400, env=environment)


def ask_vllm(*arguments, **options) -> dict:
    done = vllm_run(*arguments, **options)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    return json.loads(done.stdout.splitlines()[-1])


@torch.inference_mode()
def ask_transformers(model, prompts=None) -> list[dict]:
    """The same question, by transformers' own forward passes without a cache."""
    answers = []
    for prompt in prompts or PROMPTS:
        ids = list(prompt)
        for _ in range(TOKENS):
            logits = model(torch.tensor([ids])).logits[0].float()
            ids.append(int(logits[-1].argmax()))
        table = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        logprobs = [float(table[place, token]) for place, token in enumerate(ids[1:])]
        answers.append({"tokens": ids[len(prompt) :], "logprobs": logprobs})
    return answers


# vLLM's attention on a CPU is not as exact as transformers'. The same holds for its float models: Gemma 2 differs by 3.3e-3 there,
# and vLLM on an Octavo folder from vLLM on the same weights in floats by 2e-6.
TOLERANCE = 5e-3


def assert_same(found: list[dict], expected: list[dict], tolerance: float = TOLERANCE) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["tokens"] == other["tokens"]
        assert one["logprobs"] == pytest.approx(other["logprobs"], abs=tolerance)


def folder(tmp_path: Path, name: str, **options) -> Path:
    random_model(name).save_pretrained(tmp_path / name)
    convert(tmp_path / name, tmp_path / f"{name}-8bit", **options)
    return tmp_path / f"{name}-8bit"


def load(path: Path):
    return octavo.load(path, dtype=torch.float32, device="cpu")


# Which matrices have to be floats: those that vLLM's classes build without a quantization configuration, and routers.
FLOATS = {
    "llama": [],
    "llama-tied": [],
    "gpt-neox": [],
    "gpt2": ["transformer.wte.weight", "transformer.wpe.weight"],
    "gemma2": ["model.embed_tokens.weight"],
    "phi3": [],
    "qwen3-moe": ["mlp.gate.weight"],
    "mixtral": ["block_sparse_moe.gate.weight"],
}


@pytest.mark.parametrize("name", FLOATS)
def test_architectures(name, tmp_path):
    path = folder(tmp_path, name)
    found = ask_vllm(path)
    assert_same(found["answers"], ask_transformers(load(path)))
    (held,) = found["held"]
    assert held["8 bits"]
    assert [other for other in held["floats"] if not other.endswith(tuple(FLOATS[name]))] == []


