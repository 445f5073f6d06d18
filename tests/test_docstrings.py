"""Every example in a docstring runs and gives what it says.

Examples run in a folder that holds `model` (the demonstration's, in float), `model-8bit` (the same in Octavo's format),
`published` (a tiny GPT-J in the published cards' format), `model.gguf` (a tiny Llama), `poems` (a LoRA adapter of the model),
`poems.txt` and `book.txt`. They find these names without importing them: `octavo`, `torch`, `Path`, `model` (model-8bit,
loaded), `base` (the float one), `tokenizer`, `text`, `ids` (the text's first 300 tokens) and `source` (`model`, open).
"..." in what is expected stands for anything.
"""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import octavo

ROOT = Path(octavo.__file__).parent
# Where an example cannot run in a test, and why.
NOT_RUN = {
    "hub_datasets": "needs the hub",
    "integrations.vllm": "needs vLLM (make test-vllm)",
    "serving.transformers_engine": "would serve until it is stopped",
    "serving.vllm_engine": "needs vLLM",
    "integrations.vllm.config": "needs vLLM",
    "integrations.vllm.weights": "needs vLLM",
    "integrations.cuda_graph": "needs a GPU",
    "ops.gpu": "needs a GPU",
    "ops.gpu.nvrtc": "needs a GPU",
    "ops.gpu.kernels.cuda_decode": "needs a GPU",
    "ops.gpu.triton_tables": "lines of a kernel",
    "ops.gpu.kernels.triton_decode": "needs a GPU",
    "ops.gpu.kernels.triton_encode": "needs a GPU",
    "ops.gpu.kernels.triton_gemm": "needs a GPU",
    "ops.gpu.kernels.triton_gemv": "needs a GPU",
}
# Examples that measure or compare whole models: seconds each.
SLOW = {
    "bench.process",
    "bench.turns",
    "evaluation.compare",
    "evaluation.compare_plot",
    "evaluation.evaluate",
    "evaluation.page",
    "planning.memory",
    "training.finetune",
}
OPTIONS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


def file_of(name: str) -> Path:
    path = ROOT.joinpath(*name.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def modules() -> list[str]:
    """Every module with an example, by its name below `octavo`."""
    found = []
    for path in sorted(ROOT.rglob("*.py")):
        if ">>>" in path.read_text():
            parts = path.relative_to(ROOT).with_suffix("").parts
            found.append(".".join(parts[:-1] if parts[-1] == "__init__" else parts))
    return found


def save_llama(folder: Path, tokenizer) -> None:
    """A tiny Llama: transformers reads its GGUF file, of GPT-J's it does not."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=4096, hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=4
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_adapter(model: Path, folder: Path) -> None:
    """A LoRA adapter that changes something."""
    from peft import LoraConfig, get_peft_model

    from octavo.evaluation.models import load_as_it_is

    adapted = get_peft_model(
        load_as_it_is(model), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)
    )
    adapted.save_pretrained(folder)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory):
    """The folder, and the names that examples find."""
    from octavo import demo
    from octavo.checkpoint import convert, open_source
    from octavo.evaluation.models import load_as_it_is
    from octavo.export import export_gguf

    from .models.published import publish, tiny_gptj

    folder = tmp_path_factory.mktemp("examples")
    (folder / "model").symlink_to(demo.MODEL)
    convert(folder / "model", folder / "model-8bit")
    tokenizer = octavo.load_tokenizer(folder / "model")
    save_llama(folder / "llama", tokenizer)
    export_gguf(folder / "llama", folder / "model.gguf", "f16")
    save_adapter(folder / "model", folder / "poems")
    (folder / "poems.txt").write_text("Verde que te quiero verde.")
    (folder / "published").mkdir()
    publish(tiny_gptj(), folder / "published")
    text = (demo.TEXT / "heldout.txt").read_text()[:4000]
    (folder / "book.txt").write_text(text)
    with open_source(folder / "model") as source:
        names = {
            "octavo": octavo,
            "torch": torch,
            "Path": Path,
            "model": octavo.load(folder / "model-8bit", device="cpu"),
            "base": load_as_it_is(folder / "model"),
            "tokenizer": tokenizer,
            "text": text,
            "ids": torch.tensor(tokenizer(text)["input_ids"][:300]),
            "source": source,
        }
        yield folder, names


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
        for name in modules()
        if name not in NOT_RUN
    ],
)
def test_examples(name, workshop, tmp_path, monkeypatch):
    module = importlib.import_module(f"octavo.{name}" if name else "octavo")
    folder, names = workshop
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    tests = [test for test in doctest.DocTestFinder().find(module, extraglobs=names) if test.examples]
    assert tests, f"{name}: no example was found"
    assert not any(doctest.SKIP in each.options for test in tests for each in test.examples)
    for test in tests:
        output: list[str] = []
        runner = doctest.DocTestRunner(optionflags=OPTIONS)
        runner.run(test, out=output.append)
        assert runner.failures == 0, "".join(output)


@pytest.mark.parametrize("name", NOT_RUN)
def test_what_does_not_run_says_so(name):
    assert "# doctest: +SKIP" in file_of(name).read_text()


def test_a_wrong_example_is_found():
    test = doctest.DocTestParser().get_doctest(
        ">>> octavo.no_such_function()", {"octavo": octavo}, "x", None, 0
    )
    runner = doctest.DocTestRunner(optionflags=OPTIONS)
    runner.run(test, out=[].append)
    assert runner.failures == 1
