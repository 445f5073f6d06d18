"""`octavo serve` on transformers' own server, by the official client."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx2 as httpx
import pytest

from octavo import demo
from octavo.checkpoint import convert

from .conversation import AnyEngine, chat_model, said_in_process
from .server import serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def spanish(tmp_path_factory):
    return chat_model(tmp_path_factory.mktemp("serve") / "spanish")


@pytest.fixture(scope="module")
def name():
    return "spanish"


@pytest.fixture(scope="module")
def server(spanish, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(spanish, "--engine", "transformers", log=log) as server:
        yield server


class TestTransformers(AnyEngine):
    @pytest.mark.parametrize(
        "options",
        [{"n": 2}, {"logprobs": True}, {"presence_penalty": 1}, {"response_format": {"type": "json_object"}}],
    )
    def test_what_this_engine_lacks_is_refused(self, server, name, options):
        answer = server.chat("Hola", model=name, **options)
        assert answer.status_code == 400
        assert next(iter(options)) in answer.json()["error"]["message"]

    def test_says_its_engine(self, server):
        assert "Engine: transformers" in server.said()
        info = httpx.get(f"{server.url}/info").json()
        assert (info["chat"], info["context"]) == (True, 512)

    def test_transformers_chat(self, server, name, tmp_path):
        """In the terminal: the answer that the API gives."""
        answer = server.chat("El sol", model=name, max_tokens=8, temperature=0)
        said = answer.json()["choices"][0]["message"]["content"]
        command = [str(Path(sys.executable).with_name("transformers")), "chat", name, f"{server.url}/v1"]
        command += ["max_new_tokens=8", "do_sample=False"]
        # huggingface_hub's client, which it uses, would take a server on this machine for the hub.
        online = {**os.environ, "HF_HUB_OFFLINE": "0"}
        done = subprocess.run(
            command,
            env=online,
            input="El sol\nn\n!exit\n",
            capture_output=True,
            text=True,
            timeout=120,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        assert "".join(said.split()) in "".join(done.stdout.split())

    def test_sigterm_in_mid_stream(self, server, name):
        self.ends_cleanly(server, name)
        assert "Traceback" not in server.said()


def test_a_model_without_a_chat_template(tmp_path):
    convert(demo.MODEL, tmp_path / "plain")
    with serving(
        tmp_path / "plain", "--engine", "transformers", log=tmp_path / "log", OCTAVO_API_KEY="k"
    ) as server:
        headers = {"authorization": "Bearer k"}
        assert httpx.get(f"{server.url}/info").status_code == 401
        assert httpx.get(f"{server.url}/info", headers=headers).json()["chat"] is False
        body = {"messages": [{"role": "user", "content": "Hola"}]}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, headers=headers)
        assert answer.status_code == 400
        assert "/v1/completions" in answer.json()["error"]["message"]
        # Another model's name comes first, as with models that have a template.
        answer = httpx.post(
            f"{server.url}/v1/chat/completions", json={**body, "model": "another"}, headers=headers
        )
        assert answer.status_code == 404


def test_an_adapter_is_asked_as_it_was_trained(spanish, tmp_path):
    """A chat model with an adapter that was trained on plain text: one message goes to it as it is."""
    import torch
    from peft import LoraConfig, get_peft_model

    import octavo
    from octavo.training.prompts import Prompts

    folder = tmp_path / "base"
    shutil.copytree(spanish, folder)
    model = octavo.load(folder, dtype="float32", device="cpu")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "fc_in"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "verses")
    Prompts("plain").save(tmp_path / "verses")
    tokenizer = octavo.load_tokenizer(folder)
    expected = said_in_process(adapted, tokenizer, "El sol", 8)
    arguments = (folder, "--adapter", tmp_path / "verses", "--engine", "transformers")
    with serving(*arguments, log=tmp_path / "log") as server:
        options = {"model": "verses", "max_tokens": 8, "temperature": 0}
        answer = server.chat("El sol", **options).json()
        assert answer["choices"][0]["message"]["content"] == expected
        refused = server.chat("El sol", "El sol", **options)
        assert refused.status_code == 400
        assert "plain text" in json.dumps(refused.json())
