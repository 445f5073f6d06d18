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

from .conversation import TEMPLATE, AnyEngine
from .server import serving

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chat_model(tmp_path_factory):
    """The shipped model, in 8 bits, with a chat template."""
    folder = tmp_path_factory.mktemp("serve") / "spanish"
    convert(demo.MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def name():
    return "spanish"


@pytest.fixture(scope="module")
def server(chat_model, tmp_path_factory):
    log = tmp_path_factory.mktemp("log") / "server.log"
    with serving(chat_model, "--engine", "transformers", log=log) as server:
        yield server


class TestTransformers(AnyEngine):
    @pytest.mark.parametrize(
        "options",
        [{"n": 2}, {"logprobs": True}, {"presence_penalty": 1}, {"response_format": {"type": "json_object"}}],
    )
    def test_what_this_engine_lacks_is_refused(self, server, name, options):
        body = {"model": name, "messages": [{"role": "user", "content": "Hola"}], **options}
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body)
        assert answer.status_code == 400
        assert next(iter(options)) in answer.json()["error"]["message"]

    def test_says_its_engine(self, server):
        assert "Engine: transformers" in server.said()
        info = httpx.get(f"{server.url}/info").json()
        assert (info["chat"], info["context"]) == (True, 512)

    def test_transformers_chat(self, server, name, tmp_path):
        """In the terminal: the answer that the API gives."""
        body = {
            "model": name,
            "messages": [{"role": "user", "content": "El sol"}],
            "max_tokens": 8,
            "temperature": 0,
        }
        said = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()["choices"][0]["message"][
            "content"
        ]
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


def test_an_adapter_is_asked_as_it_was_trained(chat_model, tmp_path):
    """A chat model with an adapter that was trained on plain text: one message goes to it as it is."""
    import torch
    from peft import LoraConfig, get_peft_model

    import octavo
    from octavo.training.prompts import Prompts

    folder = tmp_path / "base"
    shutil.copytree(chat_model, folder)
    model = octavo.load(folder, dtype="float32", device="cpu")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj", "fc_in"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "verses")
    Prompts("plain").save(tmp_path / "verses")
    tokenizer = octavo.load_tokenizer(folder)
    inputs = tokenizer("El sol", return_tensors="pt")
    expected = adapted.generate(**inputs, max_new_tokens=8, do_sample=False)[
        0, inputs["input_ids"].shape[-1] :
    ]
    arguments = (folder, "--adapter", tmp_path / "verses", "--engine", "transformers")
    with serving(*arguments, log=tmp_path / "log") as server:
        body = {
            "model": "verses",
            "messages": [{"role": "user", "content": "El sol"}],
            "temperature": 0,
            "max_tokens": 8,
        }
        answer = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == tokenizer.decode(
            expected, skip_special_tokens=True
        )
        body["messages"] *= 2
        refused = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        assert refused.status_code == 400
        assert "plain text" in json.dumps(refused.json())
