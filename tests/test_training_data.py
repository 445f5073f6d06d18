"""Examples from files: what is read, what is learned, where texts end, what is refused."""

import json

import pytest
import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from octavo.training.data import collate, tokenize
from octavo.training.records import read_records, split_records

from .models.tokenizers import byte_tokenizer

CHAT = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


def learned(example, tokenizer=TOKENIZER):
    return tokenizer.decode([label for label in example["labels"] if label != -100])


def write_lines(path, records):
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return str(path)


def test_a_text_file_is_packed_and_ends_with_the_end_token(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 5, encoding="utf-8")
    result = tokenize(read_records([str(path)]), TOKENIZER, 16)
    assert [len(example["input_ids"]) for example in result.examples] == [16, 16, 16, 3]
    joined = [token for example in result.examples for token in example["input_ids"]]
    assert joined[-1] == END and TOKENIZER.decode(joined[:-1]) == "abcdefghij" * 5
    assert all(example["labels"] == example["input_ids"] for example in result.examples)


def test_json_lines_of_text_stay_apart_unless_packed(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"text": "one"}, {"text": "three"}, {"text": ""}])
    records = read_records([path])
    apart = tokenize(records, TOKENIZER, 64)
    assert [learned(example) for example in apart.examples] == ["one<end>", "three<end>"]
    assert apart.dropped == 1
    packed = tokenize(records, TOKENIZER, 64, packing=True)
    assert [learned(example) for example in packed.examples] == ["one<end>three<end><end>"]


def test_only_the_completion_is_learned(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"prompt": "2+2=", "completion": "4"}])
    (example,) = tokenize(read_records([path]), TOKENIZER, 64).examples
    assert TOKENIZER.decode(example["input_ids"]) == "2+2=4<end>"
    assert learned(example) == "4<end>"
    assert example["labels"][:4] == [-100] * 4


def test_csv_columns(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text('prompt,completion\n"a, b",c\n', encoding="utf-8-sig")
    (example,) = tokenize(read_records([str(path)]), TOKENIZER, 64).examples
    assert TOKENIZER.decode(example["input_ids"]) == "a, bc<end>" and learned(example) == "c<end>"


def test_only_the_assistant_is_learned_in_a_conversation(tmp_path):
    tokenizer = byte_tokenizer(CHAT)
    turns = [("user", "hi"), ("assistant", "hello"), ("user", "bye"), ("assistant", "goodbye")]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    (example,) = tokenize(read_records([path]), tokenizer, 200).examples
    assert tokenizer.decode(example["input_ids"]).count("<end>") == 2
    assert learned(example, tokenizer) == "hello<end>goodbye<end>"


def test_a_conversation_without_a_template_says_what_to_do(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": "user", "content": "hi"}]}])
    with pytest.raises(ValueError, match=r"need a chat template.*prompt"):
        tokenize(read_records([path]), TOKENIZER, 64)


def test_long_examples_are_cut_and_prompts_that_leave_nothing_dropped():
    records = [{"text": "x" * 100}, {"prompt": "p" * 100, "completion": "c"}]
    result = tokenize(records, TOKENIZER, 32)
    assert (len(result.examples), result.truncated, result.dropped) == (1, 2, 1)
    assert len(result.examples[0]["input_ids"]) == 32


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a"}\n{"body": "b"}\n', r"a.jsonl, line 2: expected `text`.*found \['body'\]"),
        ("a.jsonl", "not json\n", r"a.jsonl, line 1: expected a JSON object"),
        ("a.csv", "title\nx\n", r"a.csv, line 2: expected `text`"),
        ("a.pdf", "x", r"expected a .txt, .jsonl, .json or .csv file, found .pdf"),
    ],
)
def test_what_is_no_data_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        read_records([str(tmp_path / name)])


def test_lines_of_json_end_with_newlines_alone(tmp_path):
    path = tmp_path / "a.jsonl"
    texts = ["a\u2028b", "c\x85d", "e"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    assert read_records([str(path)]) == [{"text": text} for text in texts]


@pytest.mark.parametrize("message", ["hola", {"x": "user"}, {"role": 1, "content": "a"}, {"role": "user"}])
def test_messages_that_are_none_are_named(message, tmp_path):
    good = {"role": "user", "content": "hi"}
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [good]}, {"messages": [good, message]}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 2, message 2: expected \{\"role\""):
        read_records([path])


def test_blank_texts_and_broken_arrays_are_named_by_their_option(tmp_path):
    (tmp_path / "a.txt").write_text("\n \n\n")
    with pytest.raises(ValueError, match=r"--validation .*a.txt: the file holds nothing but blank lines"):
        read_records([str(tmp_path / "a.txt")], "--validation")
    (tmp_path / "a.json").write_text('[{"text": "a"},')
    with pytest.raises(ValueError, match=r"a.json: expected a JSON array of records"):
        read_records([str(tmp_path / "a.json")])


def test_an_answers_first_token_may_begin_with_the_templates_space(tmp_path):
    template = CHAT.replace("<assistant>{% endif %}", "<assistant> {% endif %}").replace(
        "<{{ m.role }}>{{ m.content }}", "<{{ m.role }}> {{ m.content }}"
    )
    tokenizer = byte_tokenizer(template)
    # One token for a space and an "h".
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend["model"]["vocab"]["\u0120h"] = len(backend["model"]["vocab"])
    backend["added_tokens"] = []
    backend["model"]["merges"] = [["\u0120", "h"]]
    joined = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)), eos_token="<end>"
    )
    joined.chat_template = template
    turns = [("user", "hi"), ("assistant", "hello")]
    path = write_lines(tmp_path / "a.jsonl", [{"messages": [{"role": r, "content": c} for r, c in turns]}])
    (example,) = tokenize(read_records([path]), joined, 200).examples
    assert learned(example, joined) == " hello<end>"


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match=r"--data nowhere.txt: no such file"):
        read_records(["nowhere.txt"])


def test_a_data_set_of_the_hub_gives_its_train_split(monkeypatch):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "2+2=", "completion": "4", "id": 7}] * 2)
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return table

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read_records(["someone/sums"]) == [{"prompt": "2+2=", "completion": "4"}] * 2
    assert asked == [(("someone/sums", None), {"split": "train"})]
    table = datasets.Dataset.from_list([{"body": "x"}])
    with pytest.raises(ValueError, match=r"someone/sums, record 1: expected `text`.*found \['body'\]"):
        read_records(["someone/sums"])


def test_a_hub_that_does_not_answer_is_one_line(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(*names, **options):
        raise ConnectionError("Couldn't reach 'someone/sums' on the Hub\n  (offline)\n  more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"neither a file here nor a data set .*Couldn't reach") as found:
        read_records(["someone/sums"])
    assert len(str(found.value).splitlines()) == 1


def test_validation_is_drawn_by_seed_and_from_the_end_of_a_text():
    records = [{"text": str(number)} for number in range(100)]
    train, held = split_records(records, 0.1, seed=1)
    assert (len(train), len(held)) == (90, 10)
    assert split_records(records, 0.1, seed=1) == (train, held) != split_records(records, 0.1, seed=2)
    poem = {"text": "".join(f"line {number}\n" for number in range(10)), "packed": True}
    (train,), (held,) = split_records([poem], 0.2, seed=1)
    assert held["text"] == "line 8\nline 9\n" and train["text"] + held["text"] == poem["text"]


def test_a_batch_is_padded_on_the_right_and_masked_only_if_needed():
    short, long = {"input_ids": [1, 2], "labels": [1, 2]}, {"input_ids": [3, 4, 5], "labels": [-100, 4, 5]}
    batch = collate([short, long], pad=9)
    assert batch["input_ids"].tolist() == [[1, 2, 9], [3, 4, 5]]
    assert batch["labels"].tolist() == [[1, 2, -100], [-100, 4, 5]]
    assert batch["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]
    assert set(collate([long, long])) == {"input_ids", "labels"}
    assert collate([long])["labels"].dtype == torch.int64
