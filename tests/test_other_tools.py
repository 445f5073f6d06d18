"""The lines of docs/TOOLS.md, as they stand: each tool gives the tokens that `octavo.load` gives, from weights in 8 bits.

Needs real weights (OCTAVO_TEST_GGUF, OCTAVO_TEST_MINILM) and the tools: `make test-all` brings both. Without them its tests
are skipped, unless OCTAVO_REQUIRE_TOOLS is set.
"""

import importlib.util
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import torch

import octavo
from octavo.checkpoint import convert

PAGE = (Path(__file__).parents[1] / "docs" / "TOOLS.md").read_text(encoding="utf-8")
QUESTION, START = "What is the capital of France?", "The capital of France is"
TOOLS = (
    "openai",
    "uvicorn",
    "langchain_openai",
    "langchain_huggingface",
    "smolagents",
    "sentence_transformers",
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not os.environ.get("OCTAVO_REQUIRE_TOOLS") and not all(map(importlib.util.find_spec, TOOLS)),
        reason="the tools are not installed: `make test-all` does that",
    ),
]


def block(heading: str, language: str = "python") -> str:
    """The one block of code of a section of the page."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    (found,) = re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)
    return found


def weights(variable: str) -> Path:
    path = Path(os.environ.get(variable, ""))
    if not path.is_file():
        pytest.skip(f"{variable} names no file; `make test-all` fetches it")
    return path


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder that holds SmolLM2 as my-model-8bit: where the page's lines are run."""
    place = tmp_path_factory.mktemp("tools")
    convert(weights("OCTAVO_TEST_GGUF"), place / "my-model-8bit")
    return place


@pytest.fixture(scope="module")
def expected(place):
    """What `octavo.load` answers, greedily: (to the question in the chat template, to the plain start of a sentence)."""
    model = octavo.load(place / "my-model-8bit", dtype=torch.float32, device="cpu")
    tokenizer = octavo.load_tokenizer(place / "my-model-8bit")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": QUESTION}], add_generation_prompt=True, tokenize=False
    )
    answers = []
    for text in (chat, START):
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=text is START)
        out = model.generate(**ids, max_new_tokens=24, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True))
    return tuple(answers)


@pytest.fixture(scope="module")
def port(place):
    """The page's server, on a port that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = block("transformers serve and the openai client", "bash").replace("8000", str(port)).split()
    command[0] = str(Path(sys.executable).with_name(command[0]))
    with open(place / "server.log", "w") as log:
        server = subprocess.Popen(command, cwd=place, stdout=log, stderr=log)
    try:
        for _ in range(120):
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (urllib.error.URLError, ConnectionError):
                assert server.poll() is None, (place / "server.log").read_text()
                time.sleep(1)
        else:
            pytest.fail(f"the server does not answer: {(place / 'server.log').read_text()}")
        yield port
    finally:
        server.terminate()
        server.wait(timeout=60)


# Printed last: whether what the tool holds is 8-bit weights.
HELD = "\nimport gc, octavo\nprint('held:', any(isinstance(each, octavo.OctavoTensor) for each in gc.get_objects()))"


def run(code: str, place: Path) -> str:
    # A request to nowhere would only wait: the page's tools may not need the hub.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "LANGSMITH_TRACING": "false"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_openai_client(port, place, expected):
    chat, text = expected
    code = block("transformers serve and the openai client").replace("8000", str(port))
    assert run(code, place) == f"{chat}\n{chat}\n{text}\n"


def test_langchain_over_the_server(port, place, expected):
    code = block("LangChain, over the server").replace("8000", str(port))
    assert run(code, place) == f"{expected[0]}\n{expected[0]}\n"


def test_smolagents_over_the_server(port, place, expected):
    code = block("smolagents, over the server").replace("8000", str(port))
    assert run(code, place) == f"{expected[0]}\n"


def test_langchain(place, expected):
    chat, text = expected
    assert run(block("LangChain") + HELD, place) == f"{chat}\n{text}\nheld: True\n"


def test_smolagents(place, expected):
    assert run(block("smolagents") + HELD, place) == f"{expected[0]}\nheld: True\n"


def test_sentence_transformers(tmp_path):
    convert(weights("OCTAVO_TEST_MINILM").parent, tmp_path / "minilm-8bit")
    code = block("sentence-transformers") + "\nprint((vectors ** 2).sum(1))" + HELD
    lines = run(code, tmp_path).splitlines()
    numbers = [float(number) for number in re.findall(r"-?\d+\.\d*", " ".join(lines))]
    # [[1, c], [c, 1]] and the two squared lengths.
    assert len(numbers) == 6 and lines[-1] == "held: True"
    assert [numbers[i] for i in (0, 3, 4, 5)] == pytest.approx([1] * 4, abs=1e-4)
    assert 0.2 < numbers[1] == pytest.approx(numbers[2], abs=1e-6) and numbers[1] < 0.95
