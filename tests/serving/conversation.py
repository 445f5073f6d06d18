"""What a chat model answers, tried by the official client: the same for each engine."""

import json
import os
import signal
import threading
import time

import httpx2 as httpx
import openai
import pytest

from octavo import demo
from octavo.checkpoint import convert

TEMPLATE = (
    "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MESSAGES = [{"role": "user", "content": "El sentido de la vida es"}]


def chat_model(folder):
    """The shipped model, in 8 bits, with a chat template."""
    convert(demo.MODEL, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def said_in_process(model, tokenizer, text, tokens):
    """What `model` says after `text`, without a server, by its likeliest tokens."""
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)[0, inputs["input_ids"].shape[-1] :]
    return tokenizer.decode(ids, skip_special_tokens=True)


class AnyEngine:
    """Tests over a fixture `server` that serves a chat model named `name`; subclasses are collected."""

    @pytest.fixture
    def client(self, server):
        return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120)

    def chat(self, client, name, **options):
        options = {"temperature": 0, "max_tokens": 12, **options}
        return client.chat.completions.create(
            model=name, messages=options.pop("messages", MESSAGES), **options
        )

    def test_models(self, client, name):
        assert name in [model.id for model in client.models.list()]

    def test_chat(self, client, name):
        answer = self.chat(client, name)
        assert answer.choices[0].message.role == "assistant"
        assert answer.choices[0].finish_reason == "length"
        assert answer.usage.completion_tokens == 12
        assert answer.usage.total_tokens == answer.usage.prompt_tokens + 12
        assert self.chat(client, name).choices[0].message.content == answer.choices[0].message.content

    def test_chat_stream(self, client, name):
        whole = self.chat(client, name).choices[0].message.content
        chunks = list(self.chat(client, name, stream=True, stream_options={"include_usage": True}))
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
        assert "".join(pieces) == whole
        assert len([piece for piece in pieces if piece]) > 3
        assert chunks[-1].usage.completion_tokens == 12
        assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"

    def test_last_event(self, server, name):
        body = {"model": name, "messages": MESSAGES, "max_tokens": 2, "stream": True}
        text = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text
        assert text.rstrip().endswith("data: [DONE]")

    def test_completion(self, client, name):
        options = {"model": name, "prompt": "El sentido de la vida es", "max_tokens": 8, "temperature": 0}
        whole = client.completions.create(**options)
        assert whole.usage.completion_tokens == 8
        streamed = client.completions.create(stream=True, **options)
        assert "".join(chunk.choices[0].text for chunk in streamed if chunk.choices) == whole.choices[0].text

    @pytest.mark.parametrize("stream", [False, True])
    def test_stop_strings(self, client, name, stream):
        """The text ends before the stop string, which may lie across tokens."""
        whole = self.chat(client, name, max_tokens=16).choices[0].message.content
        stop = whole[len(whole) // 2 : len(whole) // 2 + 4]
        answer = self.chat(client, name, max_tokens=16, stop=["never seen here", stop], stream=stream)
        if stream:
            chunks = list(answer)
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
            finish = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1]
        else:
            text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
        assert text == whole[: whole.index(stop)]
        assert finish == "stop"

    def test_seed_and_temperature(self, client, name):
        def said(**options):
            return self.chat(client, name, **{"temperature": 1.5, **options}).choices[0].message.content

        assert said(seed=7) == said(seed=7)
        assert len({said(seed=seed) for seed in range(6)}) > 1
        assert said(temperature=0, seed=1) == said(temperature=0, seed=2)

    def test_answers_do_not_mix(self, client, name):
        prompts = [f"Había una vez {word}" for word in ("un rey", "una reina", "un perro", "el mar")]
        alone = [self.said_to(client, name, prompt) for prompt in prompts]
        together: dict[int, str] = {}

        def ask(number):
            together[number] = self.said_to(client, name, prompts[number % 4])

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [together[number] for number in range(8)] == alone * 2

    def said_to(self, client, name, prompt):
        messages = [{"role": "user", "content": prompt}]
        return self.chat(client, name, messages=messages).choices[0].message.content

    def test_errors(self, client, server, name):
        """Errors of the API's own kind, and the server goes on."""
        url = f"{server.url}/v1/chat/completions"
        with pytest.raises(openai.NotFoundError):
            self.chat(client, "no-such-model")
        with pytest.raises(openai.BadRequestError, match="512"):
            self.chat(client, name, messages=[{"role": "user", "content": "muy largo " * 600}])
        with pytest.raises(openai.BadRequestError):
            self.chat(client, name, messages=[])
        with pytest.raises(openai.BadRequestError):
            self.chat(client, name, temperature=-1)
        malformed = httpx.post(url, content=b'{"model": ', headers={"content-type": "application/json"})
        assert malformed.status_code == 400
        assert malformed.json()["error"]["message"]
        large = httpx.post(
            url, content=b" " * 100_000_000, headers={"content-type": "application/json"}, timeout=60
        )
        assert large.status_code == 413
        assert large.json()["error"]["code"] == "request_too_large"
        for path in ("/reset", "/v1/load_lora_adapter", "/docs", "/etc/passwd"):
            assert httpx.post(server.url + path, json={"model": "/etc"}).status_code == 404
        assert self.chat(client, name).choices

    def test_a_client_that_leaves_frees_its_place(self, client, server, name):
        body = {"model": name, "messages": MESSAGES, "max_tokens": 450, "temperature": 1, "stream": True}
        for stream in (True, False) * 3:
            try:
                with httpx.stream(
                    "POST", f"{server.url}/v1/chat/completions", json={**body, "stream": stream}, timeout=0.3
                ) as answer:
                    next(answer.iter_bytes())
            except (httpx.TimeoutException, StopIteration):
                pass
        started = time.monotonic()
        self.chat(client, name, max_tokens=4)
        assert time.monotonic() - started < 5

    def test_page(self, server):
        answer = httpx.get(server.url)
        assert "<title>Octavo</title>" in answer.text
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "sha256-" in answer.headers["content-security-policy"]

    def ends_cleanly(self, server, name):
        """For the last test: the stream ends as a client can read, the process with status 0."""
        body = {"model": name, "messages": MESSAGES, "max_tokens": 450, "temperature": 1, "stream": True}
        texts = []

        def read():
            url = f"{server.url}/v1/chat/completions"
            with httpx.stream("POST", url, json=body, timeout=60) as answer:
                texts.append("".join(answer.iter_text()))

        # More than one engine ends within its time of grace.
        readers = [threading.Thread(target=read) for _ in range(8)]
        for reader in readers:
            reader.start()
        time.sleep(0.5)
        os.kill(server.process.pid, signal.SIGTERM)
        for reader in readers:
            reader.join()
        assert len(texts) == 8
        for text in texts:
            events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
            assert text.rstrip().endswith("[DONE]") or "error" in events[-1]
        assert server.terminate() == 0
