"""An Octavo checkpoint under EleutherAI's lm-evaluation-harness: an ordinary `hf` model, with the figures of our own scoring.

The harness is `pip install 'octavo[eval]'`, which `make test-all` does. Without it its tests are skipped, unless
OCTAVO_REQUIRE_LM_EVAL is set.
"""

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import octavo
from octavo import demo
from octavo.evaluation.perplexity import token_nlls

EXAMPLE = Path(__file__).parents[1] / "examples" / "lm_eval"
DOCUMENTS = 6

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None and not os.environ.get("OCTAVO_REQUIRE_LM_EVAL"),
    reason="lm-eval is not installed: pip install 'octavo[eval]' (`make test-all` does)",
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The model that ships with Octavo, in 8 bits, with its tokenizer."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("lm_eval") / "model-8bit"
    model = AutoModelForCausalLM.from_pretrained(demo.MODEL, quantization_config=octavo.OctavoConfig())
    model.save_pretrained(folder)
    octavo.load_tokenizer(demo.MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(checkpoint):
    return octavo.load(checkpoint, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return octavo.load_tokenizer(checkpoint)


def loglikelihood(model, tokenizer, text: str, given: str = "") -> float:
    """Of a text after the start token and what is given, in one window, by our own scoring."""
    ids = [tokenizer.bos_token_id] * (not given) + tokenizer(given + text)["input_ids"]
    assert len(ids) <= 512
    scored = len(tokenizer(given + text)["input_ids"]) - (len(tokenizer(given)["input_ids"]) if given else 0)
    return -token_nlls(model, torch.tensor(ids), window=len(ids), stride=len(ids) - 1)[-scored:].sum().item()


def rows(name: str) -> list[dict]:
    return [json.loads(line) for line in (EXAMPLE / name).read_text(encoding="utf-8").splitlines()]


def test_a_program_that_never_imports_octavo_loads_its_folders(checkpoint):
    code = (
        "import sys; from transformers import AutoModelForCausalLM\n"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1])\n"
        "print(type(model.lm_head.weight).__name__)"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)], capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout.split() == ["OctavoTensor"]


def test_importing_torch_alone_imports_nothing_heavy_of_ours():
    code = "import sys, torch; print(*sorted(name for name in sys.modules if name.startswith(('octavo', 'transformers'))))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert found.stdout.split() == ["octavo", "octavo.integrations", "octavo.integrations.registration"], (
        found.stderr
    )


def test_the_data_are_those_of_the_shipped_text(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLE))
    import make_data

    monkeypatch.setattr(make_data, "HERE", tmp_path)
    make_data.main()
    for name in ("proverbios.jsonl", "finales.jsonl"):
        assert (tmp_path / name).read_bytes() == (EXAMPLE / name).read_bytes()
    assert len(rows("proverbios.jsonl")) == 31
    for row in rows("finales.jsonl"):
        assert len(set(row["finales"])) == 4
    whole = (demo.TEXT / "proverbios.txt").read_text(encoding="utf-8")
    assert all(f"{row['comienzo']} {row['finales'][row['propio']]}" in whole for row in rows("finales.jsonl"))


@needs_harness
def test_the_command_scores_documents_as_we_do(checkpoint, model, tokenizer, tmp_path):
    out = tmp_path / "results"
    command = Path(sys.executable).with_name("lm_eval")
    run = subprocess.run(
        [
            *(str(command), "--model", "hf", "--model_args", f"pretrained={checkpoint},dtype=float32"),
            *("--include_path", str(EXAMPLE), "--tasks", "proverbios", "--limit", str(DOCUMENTS)),
            *("--device", "cpu", "--batch_size", "4", "--output_path", str(out), "--log_samples"),
        ],
        capture_output=True,
        text=True,
        timeout=500,
        cwd=tmp_path,
    )
    assert run.returncode == 0, run.stderr
    samples = [
        json.loads(line) for line in next(out.rglob("samples_*.jsonl")).read_text("utf-8").splitlines()
    ]
    samples.sort(key=lambda sample: sample["doc_id"])
    texts = [row["texto"] for row in rows("proverbios.jsonl")[:DOCUMENTS]]
    assert [sample["doc"]["texto"] for sample in samples] == texts
    ours = [loglikelihood(model, tokenizer, text) for text in texts]
    theirs = [float(sample["filtered_resps"][0]) for sample in samples]
    assert theirs == pytest.approx(ours, rel=2e-6)
    result = json.loads(next(out.rglob("results_*.json")).read_text("utf-8"))["results"]["proverbios"]
    size = sum(len(text.encode("utf-8")) for text in texts)
    assert result["bits_per_byte,none"] == pytest.approx(-sum(ours) / size / math.log(2), rel=2e-6)
    assert 1.2 < result["bits_per_byte,none"] < 2.0


@needs_harness
def test_a_model_in_memory_is_scored_as_we_do(model, tokenizer):
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    octavo.reset_fallbacks()
    found = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=["proverbios_finales"],
        task_manager=TaskManager(include_path=str(EXAMPLE), include_defaults=False),
        limit=DOCUMENTS,
        bootstrap_iters=0,
    )
    assert octavo.fallbacks() == {}
    samples = sorted(found["samples"]["proverbios_finales"], key=lambda sample: sample["doc_id"])
    right = 0
    for row, sample in zip(rows("finales.jsonl")[:DOCUMENTS], samples, strict=True):
        ours = [loglikelihood(model, tokenizer, f" {end}", given=row["comienzo"]) for end in row["finales"]]
        theirs = [float(resps[0][0]) for resps in sample["resps"]]
        assert theirs == pytest.approx(ours, rel=1e-5)
        right += ours.index(max(ours)) == row["propio"]
    assert found["results"]["proverbios_finales"]["acc,none"] == pytest.approx(right / DOCUMENTS)


@needs_harness
def test_a_document_longer_than_the_window(model, tokenizer):
    """The harness's windows do not overlap: `--window` one longer than its `max_length`, `--stride` equal to it."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    ids = tokenizer((demo.TEXT / "proverbios.txt").read_text(encoding="utf-8")[:2000])["input_ids"][: 3 * 64]
    text = tokenizer.decode(ids)
    assert tokenizer(text)["input_ids"] == ids
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, max_length=64)
    request = Instance(request_type="loglikelihood_rolling", doc={}, arguments=(text,), idx=0)
    (theirs,) = harness.loglikelihood_rolling([request], disable_tqdm=True)
    ours = token_nlls(model, torch.tensor([tokenizer.bos_token_id, *ids]), window=65, stride=64)
    assert theirs == pytest.approx(-ours.sum().item(), rel=2e-6)
