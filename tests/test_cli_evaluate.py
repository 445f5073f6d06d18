"""`octavo evaluate` as a user runs it, on the model that ships with Octavo."""

import json
import os
import re
import struct
import subprocess
import sys
from html.parser import HTMLParser

import pytest

from octavo import demo


def octavo(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "octavo", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=500,
        env={**os.environ, "COLUMNS": "120", "NO_COLOR": "1", "OMP_NUM_THREADS": "1"},
    )


TEXT = demo.TEXT / "proverbios.txt"


@pytest.fixture(scope="module")
def eight(tmp_path_factory):
    """The model that ships with Octavo, in 8 bits."""
    out = tmp_path_factory.mktemp("evaluate") / "model-8bit"
    run = octavo("quantize", demo.MODEL, out)
    assert run.returncode == 0, run.stderr
    return out


@pytest.fixture(scope="module")
def report(eight, tmp_path_factory):
    """One run with everything: against the base, with JSON, a report and the base's predictions."""
    folder = tmp_path_factory.mktemp("report")
    run = octavo(
        *("evaluate", eight, "--against", demo.MODEL, "--text", TEXT, "--limit-tokens", 2500, "--json"),
        *(
            "--window",
            128,
            "--stride",
            64,
            "--report",
            folder / "page",
            "--save-logits",
            folder / "base.logits",
        ),
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout), folder


def test_json_has_plain_keys_and_nothing_beside_it(report):
    found, _ = report
    assert found["tokens"] == 2499 and (found["window"], found["stride"]) == (128, 64)
    assert 20 < found["perplexity"] < 70 and found["base_perplexity"] == pytest.approx(
        found["perplexity"], rel=0.01
    )
    assert 8.2 < found["bits_per_weight"] < 8.4 and found["dtype"] == found["base_dtype"] == "float32"
    assert 0 < found["kl_mean"] < found["kl_p99"] <= found["kl_max"] < 0.01
    assert 0.97 < found["top1_agreement"] <= 1 and 0 < found["p_value"] <= 1
    low, high = found["perplexity_ratio_interval"]
    assert 0.99 < low < found["perplexity_ratio"] < high < 1.01
    assert found["words"] > 1000 and found["bytes"] > 8000 and 1 < found["bits_per_byte"] < 2
    assert "sliding window of 128 tokens, stride 64; 2,499 tokens scored" in found["protocol"]


class Page(HTMLParser):
    """Collects what the page is made of."""

    def __init__(self, text):
        super().__init__()
        self.images, self.links, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        if tag == "img":
            self.images.append(found["src"])
        self.links += [found[key] for key in ("href", "src") if key in found]

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_page_that_needs_nothing_else_and_plots(report):
    found, folder = report
    names = {
        "index.html",
        "evaluation.json",
        "perplexity.png",
        "error-by-layer.png",
        "error-by-tensor.png",
        "codebooks.png",
    }
    assert {each.name for each in (folder / "page").iterdir()} == names
    assert json.loads((folder / "page" / "evaluation.json").read_text()) == found
    page = Page((folder / "page" / "index.html").read_text(encoding="utf-8"))
    assert len(page.images) == 4 and all(link.startswith("data:image/png;base64,") for link in page.links)
    words = " ".join(page.text)
    assert f"{found['perplexity']:.4f}" in words and found["protocol"] in words and "p-value" in words
    for each in (folder / "page").glob("*.png"):
        data = each.read_bytes()
        assert data[:8] == b"\x89PNG\r\n\x1a\n"
        width, height = struct.unpack(">II", data[16:24])
        assert width > 800 and height > 300


def test_a_saved_file_gives_the_same_without_the_base(report, eight):
    found, folder = report
    run = octavo(
        "evaluate",
        eight,
        "--logits",
        folder / "base.logits",
        "--text",
        TEXT,
        "--limit-tokens",
        2500,
        "--batch-size",
        3,
    )
    assert run.returncode == 0, run.stderr
    shown = re.search(r"perplexity +([0-9.]+)", run.stdout)
    assert shown and float(shown[1]) == pytest.approx(found["perplexity"], abs=2e-4)
    assert "Indistinguishable" in run.stdout or "than the base" in run.stdout
    assert "Protocol: sliding window of 128 tokens, stride 64; 2,499 tokens scored" in run.stdout
    for expected in (
        "p-value",
        "KL divergence",
        "same likeliest token",
        "per word",
        "bits per byte",
        "10,000 resamples",
    ):
        assert expected in run.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no/such-model", "--text", TEXT), "no/such-model"),
        ((demo.MODEL, "--text", "no-such-file.txt"), "no such file"),
        ((demo.MODEL, "--text", "wikitext-2"), "Salesforce/wikitext"),
        ((demo.MODEL, "--text", TEXT, "--against", demo.MODEL, "--logits", "x"), "give one of them"),
        ((demo.MODEL, "--text", TEXT, "--logits", TEXT), "not a whole safetensors file"),
        ((demo.MODEL, "--text", TEXT, "--logits", "none"), "no such file; make it with --save-logits"),
        ((demo.MODEL, "--text", TEXT, "--save-logits", TEXT / "x"), "is no folder; give another name"),
        ((demo.MODEL, "--text", TEXT, "--report", TEXT), "found a file"),
        ((demo.MODEL, "--text", TEXT, "--window", "1024"), "context is 512 tokens, found 1024"),
        ((demo.MODEL, "--text", TEXT, "--window", "64", "--stride", "64"), "stride"),
        ((demo.MODEL, "--text", TEXT, "--dtype", "int4"), "is not one of"),
    ],
)
def test_what_a_user_can_mend_is_one_line(monkeypatch, capsys, arguments, message):
    from octavo.cli import main

    # In this process: twelve imports of torch would take longer than all the rest.
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(sys, "argv", ["octavo", "evaluate", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == (2 if "--dtype" in arguments else 1)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


def test_a_text_is_required():
    run = octavo("evaluate", demo.MODEL)
    assert run.returncode == 2 and "--text" in run.stderr
