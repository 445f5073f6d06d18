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
from octavo import demo
from octavo.checkpoint import convert

from .models import finetune, random_model

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
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"answers"')))


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


# vLLM's attention on a CPU is not as exact as transformers'. The same holds for its float models: Gemma 2 differs by 3.3e-3, and
# vLLM on an Octavo folder from vLLM on the same weights in floats by 2e-6.
TOLERANCE = 5e-3


def assert_same(found: list[dict], expected: list[dict], tolerance: float = TOLERANCE) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one["tokens"] == other["tokens"]
        # With an adapter, those of new tokens alone.
        expected_logprobs = other["logprobs"][-len(one["logprobs"]) :]
        assert one["logprobs"] == pytest.approx(expected_logprobs, abs=tolerance)


def folder(tmp_path: Path, name: str, **changes) -> Path:
    random_model(name, **changes).save_pretrained(tmp_path / name)
    convert(tmp_path / name, tmp_path / f"{name}-8bit")
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
    "mixtral": ["model.embed_tokens.weight", "block_sparse_moe.gate.weight"],
}


@pytest.mark.parametrize("name", FLOATS)
def test_architectures(name, tmp_path):
    path = folder(tmp_path, name)
    found = ask_vllm(path)
    assert_same(found["answers"], ask_transformers(load(path)))
    (held,) = found["held"]
    assert held["8 bits"]
    assert [other for other in held["floats"] if not other.endswith(tuple(FLOATS[name]))] == []


def test_gemma2_as_its_weights_in_floats(tmp_path):
    """Much closer than to transformers: vLLM's own arithmetic is the same on both sides."""
    path = folder(tmp_path, "gemma2")
    model, floats = load(path), random_model("gemma2")
    with torch.no_grad():
        for name, parameter in floats.named_parameters():
            parameter.copy_(model.get_parameter(name))
    floats.save_pretrained(tmp_path / "floats")
    assert_same(ask_vllm(path)["answers"], ask_vllm(tmp_path / "floats")["answers"], 1e-4)


def test_shipped_model(tmp_path):
    """GPT-J: vLLM builds its embedding without a quantization configuration, so that one is floats."""
    convert(demo.MODEL, tmp_path / "gptj-8bit")
    prompts = [[11, 1017, 402, 93, 330], [5]]
    found = ask_vllm(tmp_path / "gptj-8bit", prompts)
    assert_same(found["answers"], ask_transformers(load(tmp_path / "gptj-8bit"), prompts))
    (held,) = found["held"]
    assert held["floats"] == ["transformer.wte.weight"]


@pytest.mark.slow
@pytest.mark.skipif("OCTAVO_TEST_GGUF" not in os.environ, reason="OCTAVO_TEST_GGUF names no file")
def test_smollm2(tmp_path):
    convert(os.environ["OCTAVO_TEST_GGUF"], tmp_path / "smollm2-8bit")
    prompts = [octavo.load_tokenizer(tmp_path / "smollm2-8bit")("The capital of France is")["input_ids"]]
    found = ask_vllm(tmp_path / "smollm2-8bit", prompts)
    assert_same(found["answers"], ask_transformers(load(tmp_path / "smollm2-8bit"), prompts))
    (held,) = found["held"]
    assert held["floats"] == []


def test_compiled(tmp_path):
    """vLLM's own way: traced by Dynamo, compiled by Inductor."""
    path = folder(tmp_path, "llama")
    env = {"VLLM_CACHE_ROOT": str(tmp_path / "cache"), "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    found = ask_vllm(path, env=env, enforce_eager=False)
    assert_same(found["answers"], ask_transformers(load(path)))
    compiled = [file.read_text() for file in (tmp_path / "cache").rglob("*.py")]
    assert any("torch.ops.octavo.linear" in source for source in compiled)


def test_adapter_of_finetune(tmp_path):
    """An adapter that `octavo finetune` has written, through --enable-lora: the answers of transformers with PEFT."""
    base = folder(tmp_path, "llama", vocab_size=4096)
    finetune(base, tmp_path / "adapter")
    with_adapter = octavo.load(base, adapter=tmp_path / "adapter", dtype=torch.float32, device="cpu")
    found = ask_vllm(base, adapter=tmp_path / "adapter", enable_lora=True, max_lora_rank=8)["answers"]
    assert_same(found, ask_transformers(with_adapter))
    alone = ask_transformers(load(base))
    assert [one["tokens"] for one in found] != [one["tokens"] for one in alone]


# vLLM gives each rank the cores of a NUMA node of its own, where it is not told: here one core each, by number.
TWO_RANKS = {"VLLM_CPU_OMP_THREADS_BIND": "|".join(map(str, sorted(os.sched_getaffinity(0))[:2]))}


@pytest.mark.parametrize("name", ["llama-tied", "qwen3-moe"])
def test_two_ranks(name, tmp_path):
    """Inner layers of 192, 96 for a rank: blocks of 64 are cut to 32, their scales repeated."""
    path = folder(tmp_path, name)
    found = ask_vllm(path, env=TWO_RANKS, tensor_parallel_size=2)
    assert_same(found["answers"], ask_transformers(load(path)))


def test_split_inside_a_block(tmp_path):
    """176 inputs, 88 for a rank: blocks would shrink to 8 weights."""
    done = vllm_run(folder(tmp_path, "llama", intermediate_size=176), env=TWO_RANKS, tensor_parallel_size=2)
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert (
        "down_proj.weight: rows of 176 weights in blocks of 64 cannot be split among ranks at every 88"
        in said
    )
    assert "--tensor-parallel-size" in said
