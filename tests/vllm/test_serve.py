"""`octavo serve` on vLLM, by the official client: the same as on transformers' server."""

import importlib.util
import os

import pytest

import octavo
from octavo import demo
from octavo.checkpoint import convert

from ..serving.conversation import TEMPLATE, AnyEngine
from ..serving.server import serving

pytestmark = pytest.mark.skipif(
    not os.environ.get("OCTAVO_REQUIRE_VLLM") and importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: `make test-vllm` does that",
)


@pytest.fixture(scope="module")
def name():
    return "spanish"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    convert(demo.MODEL, folder / "spanish")
    (folder / "spanish" / "chat_template.jinja").write_text(TEMPLATE)
    options = ["--", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28)]
    with serving(folder / "spanish", *options, log=folder / "log", seconds=240) as server:
        yield server


class TestVllm(AnyEngine):
    def test_says_its_engine(self, server):
        assert "Engine: vLLM" in server.said() or "Engine: vLLM" in server.log.read_text()
        assert "knows GPTJForCausalLM" in server.log.read_text()

    def test_as_transformers_says(self, client, server, name):
        tokenizer = octavo.load_tokenizer(demo.MODEL)
        model = octavo.load(server.folder, dtype="float32", device="cpu")
        inputs = tokenizer("El sentido de la vida es", return_tensors="pt")
        ids = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, inputs["input_ids"].shape[-1] :]
        prompt = "El sentido de la vida es"
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=16, temperature=0)
        assert answer.choices[0].text == tokenizer.decode(ids, skip_special_tokens=True)

    def test_sigterm_in_mid_stream(self, server, name):
        self.ends_cleanly(server, name)
