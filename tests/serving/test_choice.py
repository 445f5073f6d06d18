"""Which engine is chosen and why, what an adapter's template says, and what requests may ask; without a server."""

import json
import socket
import subprocess
import sys
import time

import jinja2
import pytest

from octavo import demo
from octavo.checkpoint.reading.locate import locate
from octavo.serving import choice
from octavo.serving.templates import served_template
from octavo.serving.vllm_engine import adapter_problem, command
from octavo.training.prompts import Prompts


class Tokenizer:
    chat_template = "{% for m in messages %}[{{ m['role'] }}:{{ m['content'] }}]{% endfor %}"
    bos_token, bos_token_id = "<s>", 1

    def __init__(self, first=5):
        self.first = first

    def __call__(self, text):
        return type("Encoded", (), {"input_ids": [self.first, 9]})


def rendered(template, messages, **variables):
    def fail(message):
        raise jinja2.TemplateError(message)

    environment = jinja2.Environment()
    environment.globals["raise_exception"] = fail
    return environment.from_string(template).render(messages=messages, **variables)


def user(text):
    return {"role": "user", "content": text}


def test_template_of_plain_text():
    template = served_template(Tokenizer(), Prompts("plain"))
    assert rendered(template, [user("El {{ sol }}")]) == "El {{ sol }}"
    with pytest.raises(jinja2.TemplateError, match="expected one message, found 2"):
        rendered(template, [user("a"), user("b")])
    starting = served_template(Tokenizer(first=1), Prompts("plain"))
    assert rendered(starting, [user("a")], bos_token="<s>") == "<s>a"


def test_template_of_conversations():
    assert served_template(Tokenizer(), None) == Tokenizer.chat_template
    other = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"
    assert rendered(served_template(Tokenizer(), Prompts("chat", other)), [user("a")]) == "<user>a"
    system = "Sé «breve»:\n\"sí\" \\ 'no' {{ 1 }} 😀"
    template = served_template(Tokenizer(), Prompts("chat", other, system))
    assert rendered(template, [user("a")]) == f"<system>{system}<user>a"
    own = [{"role": "system", "content": "otro"}, user("a")]
    assert rendered(template, own) == "<system>otro<user>a"


def test_without_vllm(monkeypatch):
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None if name == "vllm" else object())
    chosen = choice.choose("auto", locate(demo.MODEL), None)
    assert (chosen.engine, chosen.why) == ("transformers", "vLLM is not installed")
    with pytest.raises(ImportError, match="not installed"):
        choice.check_installed("vllm")
    monkeypatch.setattr(choice.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"octavo\[serve\]"):
        choice.check_installed("auto")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({}, ""),
        ({"peft_type": "IA3"}, "of type IA3"),
        ({"use_dora": True}, "with DoRA"),
        ({"modules_to_save": ["norm"]}, "that trains norms"),
        ({"bias": "all"}, "that trains norms"),
        ({"target_parameters": ["experts.down_proj"]}, "on stacks of experts"),
        ({"r": 1000}, "of rank 1000"),
    ],
)
def test_adapters_that_vllm_lacks(tmp_path, changes, problem):
    config = {"peft_type": "LORA", "r": 8, "bias": "none", **changes}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert adapter_problem(tmp_path).startswith(problem)
    assert bool(adapter_problem(tmp_path)) == bool(problem)


def test_command_of_vllm(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"r": 12}')
    line = command(
        tmp_path, ["base", "poems"], tmp_path, None, "127.0.0.1", 8000, "float32", 2**40, ["--seed", "1"]
    )
    assert line[line.index("--max-lora-rank") + 1] == "16"
    assert line[line.index("--lora-modules") + 1] == f"poems={tmp_path}"
    assert line[line.index("--kv-cache-memory-bytes") + 1] == str(4 * 2**30)
    assert line[-2:] == ["--seed", "1"]


def test_mistakes_are_told_before_anything_slow():
    def serve(*options):
        started = time.monotonic()
        command = [sys.executable, "-X", "importtime", "-m", "octavo", "serve", str(demo.MODEL), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert time.monotonic() - started < 20
        error = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert "| torch\n" not in done.stderr and "| transformers\n" not in done.stderr
        return done.returncode, error[0]

    status, error = serve("--host", "0.0.0.0")
    assert (status, "--api-key" in error) == (1, True)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        status, error = serve("--port", str(taken.getsockname()[1]))
    assert (status, "choose another" in error) == (1, True)
    assert serve("--api-key", " ")[0] == 1
    assert serve("--max-body", "many")[0] == 2
