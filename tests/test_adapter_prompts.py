"""An adapter is asked as it was trained: what it was trained on is kept with it, and generating and evaluating follow it.

Ten answers are learned by heart on the model that ships with Octavo, with a chat template put on it, as plain prompts and as
conversations. Then `octavo generate --adapter`, as the run prints it, must give each of them back.
"""

import json
import shlex

import pytest

from octavo import demo, load_tokenizer
from octavo.checkpoint import convert
from octavo.cli.evaluate import evaluate
from octavo.cli.finetune import finetune
from octavo.cli.generate import generate
from octavo.training.prompts import PROMPTS_FILE, Prompts, encode, read_prompts

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
NAMES = ["Ana", "Luis", "Eva", "Juan", "Rosa", "Pedro", "Marta", "Hugo", "Elena", "Pablo"]
THINGS = ["pan", "vino", "aceite", "trigo", "miel", "leche", "agua", "sal", "higos", "uvas"]
PAIRS = [(f"¿Qué trae {name}?", f"{name} trae {thing}.") for name, thing in zip(NAMES, THINGS, strict=True)]
SYSTEM = {"role": "system", "content": "Responde."}


def conversation(asked, answer, *before):
    return [*before, {"role": "user", "content": asked}, {"role": "assistant", "content": answer}]


RECORDS = {
    "plain": [{"prompt": asked, "completion": f" {answer}"} for asked, answer in PAIRS],
    "chat": [{"messages": conversation(*pair)} for pair in PAIRS],
    "chat with a system text": [{"messages": conversation(*pair, SYSTEM)} for pair in PAIRS],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """The shipped model in 8 bits with a chat template, in a folder whose name a shell would cut."""
    folder = tmp_path_factory.mktemp("prompts") / "a model"
    convert(demo.MODEL, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": TEMPLATE}))
    return folder


# One kind in `make test`: learning by heart takes a while.
KINDS = [kind if kind == "plain" else pytest.param(kind, marks=pytest.mark.slow) for kind in RECORDS]


@pytest.fixture(scope="module", params=KINDS)
def adapter(request, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("learned")
    data = folder / "data.jsonl"
    data.write_text("\n".join(map(json.dumps, RECORDS[request.param])))
    finetune(
        str(model),
        [str(data)],
        str(folder / "out"),
        max_steps=40,
        learning_rate=5e-3,
        batch_size=10,
        validation_split=0.0,
        evaluations=1,
    )
    return request.param, folder / "out"


def test_generate_gives_every_learned_answer_back(model, adapter, capsys):
    for asked, answer in PAIRS:
        generate(str(model), asked, greedy=True, max_new_tokens=12, adapter=str(adapter[1]))
        said = capsys.readouterr()
        assert said.out.strip() == answer
        assert "note" not in said.err


def test_a_checkpoint_of_the_run_is_asked_in_the_same_way(model, adapter, capsys):
    generate(
        str(model), PAIRS[3][0], greedy=True, max_new_tokens=12, adapter=str(adapter[1] / "checkpoint-40")
    )
    assert capsys.readouterr().out.strip() == PAIRS[3][1]


def test_asking_otherwise_is_said(model, adapter, capsys):
    kind, folder = adapter
    generate(
        str(model), PAIRS[0][0], greedy=True, max_new_tokens=4, chat=kind == "plain", adapter=str(folder)
    )
    # Lines are wrapped at the terminal's width.
    said = " ".join(capsys.readouterr().err.split())
    trained, asked = ("plain text", "conversation") if kind == "plain" else ("conversations", "plain text")
    assert f"was trained on {trained}" in said and asked in said


def test_what_is_kept(model, adapter):
    kind, folder = adapter
    kept = read_prompts(folder)
    assert kept.prompts == ("plain" if kind == "plain" else "chat")
    assert kept.chat_template == (None if kind == "plain" else TEMPLATE)
    assert kept.system == ("Responde." if "system" in kind else None)
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model.resolve())


def test_the_card_tells_base_data_settings_losses_and_use(model, adapter):
    from huggingface_hub import ModelCard

    for folder in (adapter[1], adapter[1] / "checkpoint-40"):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == "peft"
        command = f"octavo generate {shlex.quote(str(model.resolve()))} PROMPT --adapter"
        for expected in (command, "data.jsonl", "| `learning_rate` | 0.005 |", "training loss", "plain text"):
            assert expected in card.text or (expected == "plain text" and adapter[0] != "plain")
        assert "[More Information Needed]" not in card.text
        assert "chat template" in card.text


def test_a_merged_model_is_asked_as_its_adapter_was(model, adapter, tmp_path, capsys):
    from octavo.merging.merge import merge

    merge(model, adapter[1], tmp_path / "merged")
    generate(str(tmp_path / "merged"), PAIRS[5][0], greedy=True, max_new_tokens=12)
    assert capsys.readouterr().out.strip() == PAIRS[5][1]


def test_evaluate_measures_with_the_adapter(model, adapter, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("\n".join(f"{asked} {answer}" for asked, answer in PAIRS))
    found = {}
    for name, on_top in (("with", str(adapter[1])), ("without", None)):
        evaluate(str(model), [str(text)], adapter=on_top, as_json=True, dtype="float32")
        said = capsys.readouterr()
        found[name] = json.loads(said.out)
        assert ("conversations" in " ".join(said.err.split())) == (
            on_top is not None and adapter[0] != "plain"
        )
    assert found["with"]["perplexity"] < found["without"]["perplexity"]
    assert str(adapter[1]) in found["with"]["model"]


def test_an_adapter_that_says_nothing_is_asked_as_the_model_wants_and_that_is_said(model, tmp_path):
    tokenizer = load_tokenizer(model)
    assert read_prompts(tmp_path) is None
    encoded = encode(tokenizer, "hola", adapter=True)
    assert "--no-chat" in encoded.notes[0]
    assert tokenizer.decode(encoded.inputs["input_ids"][0]) == "<user>hola\n<assistant>"
    assert encode(tokenizer, "hola").notes == ()


def test_the_template_of_the_training_is_used_and_another_one_of_the_model_is_said(model):
    tokenizer = load_tokenizer(model)
    trained = Prompts("chat", "{% for m in messages %}[{{ m.content }}]{% endfor %}", "S")
    encoded = encode(tokenizer, "hola", trained=trained)
    assert tokenizer.decode(encoded.inputs["input_ids"][0]) == "[S][hola]"
    assert "not the model's own" in encoded.notes[0]
    own = encode(tokenizer, "hola", system="T", trained=trained)
    assert tokenizer.decode(own.inputs["input_ids"][0]) == "[T][hola]"


def test_a_servers_messages(model):
    tokenizer = load_tokenizer(model)
    plain = Prompts("plain")
    turn = {"role": "user", "content": "hola"}
    assert tokenizer.decode(encode(tokenizer, [turn], trained=plain).inputs["input_ids"][0]) == "hola"
    with pytest.raises(ValueError, match="expected one message, found 2"):
        encode(tokenizer, [turn, turn], trained=plain)
    chat = Prompts("chat", TEMPLATE, "Responde.")
    asked = encode(tokenizer, [turn], trained=chat).inputs["input_ids"][0]
    assert tokenizer.decode(asked) == "<system>Responde.\n<user>hola\n<assistant>"
    given = [{"role": "system", "content": "Otra."}, turn]
    assert "<system>Otra.\n<user>" in tokenizer.decode(
        encode(tokenizer, given, trained=chat).inputs["input_ids"][0]
    )


def test_a_mixture_is_asked_as_most_of_it_was():
    tokenizer = load_tokenizer(demo.MODEL)
    texts = [{"text": "a"}] * 3
    talks = [{"messages": conversation("a", "b")}] * 2
    assert Prompts.of(texts + talks, tokenizer).prompts == "plain"
    assert Prompts.of(texts[:1] + talks, tokenizer).prompts == "chat"


def test_a_damaged_file_is_an_error(tmp_path):
    (tmp_path / PROMPTS_FILE).write_text("{")
    with pytest.raises(ValueError, match=r"octavo_prompts\.json: expected what `octavo finetune` writes"):
        read_prompts(tmp_path)
