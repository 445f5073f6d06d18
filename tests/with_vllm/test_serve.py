"""`octavo serve` on vLLM, by the official client: the same as on transformers' server."""

import importlib.util
import os

import pytest

import octavo
from octavo import demo
from octavo.checkpoint import convert

from ..serving.conversation import AnyEngine, chat_model, said_in_process
from ..serving.server import serving
from .models import finetune, random_model

pytestmark = pytest.mark.skipif(
    not os.environ.get("OCTAVO_REQUIRE_VLLM") and importlib.util.find_spec("vllm") is None,
    reason="vLLM is not installed: `make test-vllm` does that",
)
FOR_VLLM = ["--", "--enforce-eager", "--kv-cache-memory-bytes", str(2**28)]


@pytest.fixture(scope="module")
def name():
    return "spanish"


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    chat_model(folder / "spanish")
    with serving(folder / "spanish", *FOR_VLLM, log=folder / "log", seconds=240) as server:
        yield server


class TestVllm(AnyEngine):
    def test_says_its_engine(self, server):
        assert "Engine: vLLM" in server.said() or "Engine: vLLM" in server.log.read_text()
        assert "knows GPTJForCausalLM" in server.log.read_text()

    def test_as_transformers_says(self, client, server, name):
        tokenizer = octavo.load_tokenizer(demo.MODEL)
        model = octavo.load(server.folder, dtype="float32", device="cpu")
        prompt = "El sentido de la vida es"
        answer = client.completions.create(model=name, prompt=prompt, max_tokens=16, temperature=0)
        assert answer.choices[0].text == said_in_process(model, tokenizer, prompt, 16)

    def test_sigterm_in_mid_stream(self, server, name):
        self.ends_cleanly(server, name)


def test_adapter(tmp_path):
    """By the adapter's name the adapter answers, by the base's name the base; plain text, as it was trained."""
    import httpx2 as httpx

    random_model("llama", vocab_size=4096, max_position_embeddings=512).save_pretrained(tmp_path / "float")
    base = tmp_path / "base"
    convert(tmp_path / "float", base)
    finetune(base, tmp_path / "verses")
    tokenizer = octavo.load_tokenizer(base)
    expected = {}
    for name, adapter in (("base", None), ("verses", tmp_path / "verses")):
        model = octavo.load(base, adapter=adapter, dtype="float32", device="cpu")
        expected[name] = said_in_process(model, tokenizer, "El viento", 8)
    assert expected["base"] != expected["verses"]
    options = ["--dtype", "float32", "--adapter", tmp_path / "verses", *FOR_VLLM]
    with serving(base, *options, log=tmp_path / "log", seconds=240) as server:
        for name in expected:
            body = {"model": name, "prompt": "El viento", "max_tokens": 8, "temperature": 0}
            answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()
            assert answer["choices"][0]["text"] == expected[name]
        # Trained on plain text: one message is the text, without a template's marks.
        answer = server.chat("El viento", model="verses", max_tokens=8, temperature=0).json()
        assert answer["choices"][0]["message"]["content"] == expected["verses"]


def test_what_vllm_cannot_serve_goes_to_transformers(tmp_path):
    from octavo.checkpoint.reading.locate import locate
    from octavo.serving.choice import choose

    convert(demo.MODEL, tmp_path / "gptj")
    (tmp_path / "adapter").mkdir()
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text('{"peft_type": "LORA", "r": 8, "bias": "none"}')
    found = locate(tmp_path / "gptj")
    assert choose("auto", found, None).engine == "vllm"
    chosen = choose("auto", found, tmp_path / "adapter")
    assert (chosen.engine, "no adapter on GPTJForCausalLM" in chosen.why) == ("transformers", True), chosen
    with pytest.raises(ValueError, match="GPTJForCausalLM"):
        choose("vllm", found, tmp_path / "adapter")
    assert choose("auto", locate(demo.MODEL), None).engine == "transformers"
