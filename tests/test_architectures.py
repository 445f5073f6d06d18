"""Every text architecture that the installed transformers offers, small and random, in 8 bits.

What is checked of one is in `architectures/check.py`; how it is made small, in `architectures/shrink.py`; those that the plain
model does not run either, in `architectures/exceptions.py`. A few run in `make test`; all of them in `make test-all`, which
prints the count. docs/MODELS.md holds the table.
"""

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
import transformers

from .architectures.check import TASKS, PlainFailsError, architectures, check, plain_model
from .architectures.exceptions import PLAIN_FAILS
from .architectures.table import render_page

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "architectures.json"
# One of each kind: dense with tied and untied heads, Conv1D, fused and split projections, several mixtures of experts, low-rank
# attention, state-space and recurrent layers, encoders, sequence to sequence.
QUICK = [
    ("causal", "bloom"),
    ("causal", "deepseek_v3"),
    ("causal", "deepseek_v4"),
    ("causal", "gemma3_text"),
    ("causal", "gpt2"),
    ("causal", "gpt_oss"),
    ("causal", "gptj"),
    ("causal", "jamba"),
    ("causal", "laguna"),
    ("causal", "llama"),
    ("causal", "mamba2"),
    ("causal", "mixtral"),
    ("causal", "phi3"),
    ("causal", "qwen3_moe"),
    ("causal", "recurrent_gemma"),
    ("causal", "rwkv"),
    ("masked", "bert"),
    ("masked", "nomic_bert"),
    ("seq2seq", "bart"),
    ("seq2seq", "t5"),
]
ALL = [(task, kind) for task in TASKS for kind in architectures(task)]
found: dict[tuple[str, str], str] = {}


@pytest.fixture(autouse=True)
def _quiet():
    """transformers has a word to say about many a random model."""
    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    # The results' threads: sums are then those of the sweep.
    torch.set_num_threads(1)
    yield
    transformers.logging.set_verbosity(level)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "kind"), QUICK, ids=lambda value: value)
def test_one_of_each_kind(task, kind, tmp_path):
    row = check(kind, task, tmp_path)
    assert row["coverage"] >= 0.99
    # PEFT adds its product to a whole stack of experts; nothing else here has no path.
    assert set(row["fallbacks"]) <= {"aten.baddbmm.default"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("task", "kind"), ALL, ids=lambda value: value)
def test_every_architecture(task, kind, tmp_path):
    if (task, kind) in PLAIN_FAILS:
        found[task, kind] = "plain"
        _, message = PLAIN_FAILS[task, kind]
        # As soon as it runs, it belongs among the others. Other versions of transformers say it otherwise.
        with pytest.raises(PlainFailsError, match=message if is_of_the_table() else ""):
            check(kind, task, tmp_path)
        return
    found[task, kind] = "fails"
    try:
        check(kind, task, tmp_path)
    except PlainFailsError as error:
        if is_of_the_table():
            raise
        pytest.skip(f"the plain model fails in this transformers: {error}")
    found[task, kind] = "works"


@pytest.mark.slow
def test_the_count(capsys):
    """Printed at the end of a whole run; the committed table says the same."""
    if len(found) < len(ALL):
        pytest.skip("counts need every architecture: run the whole file")
    if not is_of_the_table():
        pytest.skip(f"the table is of transformers {results()['transformers']}")
    with capsys.disabled():
        for task in TASKS:
            print(f"\n{task}: {dict(Counter(found[key] for key in ALL if key[0] == task))}", end="")
    assert found == {(row["task"], row["architecture"]): row["outcome"] for row in results()["rows"]}


def results():
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def is_of_the_table() -> bool:
    return transformers.__version__ == results()["transformers"]


def test_the_page_shows_what_the_sweep_found():
    page = (ROOT / "docs" / "MODELS.md").read_text(encoding="utf-8")
    assert render_page(page, results()) == page, "run `python scripts/architecture_table.py table`"


def test_exceptions_are_those_of_the_sweep():
    failing = {(row["task"], row["architecture"]) for row in results()["rows"] if row["outcome"] == "plain"}
    assert failing == set(PLAIN_FAILS)
    assert [row for row in results()["rows"] if row["outcome"] == "fails"] == []


def test_small_models_are_small_and_have_what_large_ones_have():
    """The generic shrinker keeps one layer of each kind and every kind of matrix."""
    model = plain_model("jamba", "causal")
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000
    layers = {type(layer).__name__ for layer in model.model.layers}
    assert len(layers) == 2 and len(model.model.layers) >= 2
    with pytest.raises(PlainFailsError, match="cannot be built small"):
        plain_model("musicgen", "causal")
