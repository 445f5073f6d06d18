"""Texts as users have them: encodings, halves of characters, very long fields; whichever command reads them."""

import codecs
import csv
import json
import shlex
import subprocess

import pytest

from octavo import demo
from octavo.text_files import decode, read_text
from octavo.training.records import read_records

from .command import run

SPANISH = "El niño soñó con la cigüeña.\nDijo: «¿mañana?»\n"
CHINESE = "天地玄黄\n宇宙洪荒\n"


@pytest.mark.parametrize("text", [SPANISH, CHINESE, "hola", "día 1\n"])
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        ("utf-8", b""),
        ("utf-8", codecs.BOM_UTF8),
        ("utf-16-le", codecs.BOM_UTF16_LE),
        ("utf-16-be", codecs.BOM_UTF16_BE),
        ("utf-16-le", b""),
        ("utf-16-be", b""),
        ("utf-32-le", codecs.BOM_UTF32_LE),
        ("utf-32-be", codecs.BOM_UTF32_BE),
    ],
)
def test_unicode_is_read_in_every_encoding(text, encoding, mark):
    if text == CHINESE and encoding.startswith("utf-16") and not mark:
        text = "天地 玄黄\n"
    assert decode(mark + text.encode(encoding), "--data a.txt") == text


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_every_kind_of_file_gives_the_same_records_in_every_encoding(name, encoding, tmp_path):
    content = {
        "a.txt": SPANISH,
        "a.jsonl": '{"text": "niño"}\n',
        "a.json": '[{"text": "niño"}]',
        "a.csv": "text\nniño\n",
    }[name]
    (tmp_path / name).write_text(content, encoding=encoding)
    (tmp_path / "plain").mkdir()
    (tmp_path / "plain" / name).write_text(content, encoding="utf-8")
    found = read_records([str(tmp_path / name)])
    assert found == read_records([str(tmp_path / "plain" / name)])
    assert found[0]["text"] in (SPANISH, "niño")


@pytest.mark.parametrize("encoding", ["ISO-8859-1", "WINDOWS-1252"])
def test_another_encoding_is_told_with_the_command_that_converts_it(encoding, tmp_path):
    """The command is run as it is printed, and what comes of it is the text."""
    text = SPANISH if encoding == "ISO-8859-1" else SPANISH + "“hola” – dijo\n"
    path = tmp_path / "un texto.txt"
    path.write_bytes(text.encode(encoding))
    with pytest.raises(
        ValueError, match=rf"un texto\.txt: expected text in UTF-8.*iconv -f {encoding}"
    ) as told:
        read_text(path, "--data")
    command = str(told.value).split("convert it: ")[1]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert read_text(tmp_path / "converted.txt", "--data") == text


def test_what_was_converted_from_a_wrong_encoding_is_not_learned_silently(tmp_path):
    """UTF-16 taken for Latin-1; UTF-8 taken for Windows-1252 leaves "niÃ±o"."""
    nul = tmp_path / "nul.txt"
    for text in (SPANISH, SPANISH + "a"):
        nul.write_text(text.encode("utf-16").decode("latin-1"), encoding="utf-8")
        with pytest.raises(
            ValueError, match=r"found UTF-16 that was converted .*give the file it was made from"
        ):
            read_text(nul, "--data")
    twice = tmp_path / "twice.txt"
    # What Python lacks in that encoding, other readers keep: so none of it here.
    twice.write_text("El niño soñó\n".encode().decode("cp1252"), encoding="utf-8")
    with pytest.warns(UserWarning, match="niÃ±o") as told:
        read_text(twice, "--data")
    command = str(told[0].message).split("undo it: ")[1]
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert read_text(tmp_path / "mended.txt", "--data") == "El niño soñó\n"


@pytest.mark.parametrize("data", [bytes(range(256)) * 3, b"\x7fELF\0\0\0\x02\0", b"a\0b", b"\xff\xfea"])
def test_what_is_no_text_is_refused(data):
    with pytest.raises(ValueError, match=r"--data a\.txt: expected text"):
        decode(data, "--data a.txt")


@pytest.mark.parametrize("command", ["finetune", "evaluate", "compare", "quantize"])
def test_every_command_that_reads_a_text_says_the_same(command, tmp_path, monkeypatch, capsys):
    path = tmp_path / "latin.txt"
    path.write_bytes(SPANISH.encode("latin-1"))
    arguments = {
        "finetune": ("--data", path, "--output", tmp_path / "out"),
        "evaluate": ("--text", path),
        "compare": ("--text", path),
        "quantize": (tmp_path / "out", "--calibrate", path),
    }[command]
    status, _, err = run(monkeypatch, capsys, command, demo.MODEL, *arguments)
    assert status == 1
    assert f"iconv -f ISO-8859-1 -t UTF-8 {shlex.quote(str(path))}" in err.strip().splitlines()[-1]


@pytest.mark.parametrize(
    ("name", "content", "place"),
    [
        ("a.jsonl", '{"text": "a"}\n{"text": "hola \\ud83d"}\n', "a.jsonl, line 2, text"),
        ("a.jsonl", '{"prompt": "\\udc00", "completion": "b"}\n', "a.jsonl, line 1, prompt"),
        ("a.jsonl", '{"prompt": "a", "completion": "\\ud83d b"}\n', "a.jsonl, line 1, completion"),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\\ud83d"}]}',
            "a.jsonl, line 1, message 2",
        ),
        (
            "a.jsonl",
            '{"messages": [{"role": "user", "content": [{"type": "text", "text": "\\ud83d"}]}]}',
            "a.jsonl, line 1, message 1",
        ),
        ("a.json", '[{"text": "a"}, {"text": "\\ud83d"}]', "a.json, record 2, text"),
    ],
)
def test_half_a_character_is_told_with_its_place(name, content, place, tmp_path):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=f"{place}: holds half of a character .*; remove it"):
        read_records([str(tmp_path / name)])


def test_a_whole_emoji_in_two_halves_is_one_character(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "hola \\ud83d\\ude00"}')
    assert read_records([str(tmp_path / "a.jsonl")]) == [{"text": "hola 😀"}]


@pytest.mark.parametrize(
    ("prompt", "options"), [("hola \udcff", ()), ("hola", ("--chat", "--system", "\udcff"))]
)
def test_half_a_character_in_a_prompt(prompt, options, monkeypatch, capsys):
    """Python hands bytes of the command line that are no UTF-8 over as lone surrogates."""
    status, _, err = run(monkeypatch, capsys, "generate", demo.MODEL, prompt, *options)
    assert status == 1
    assert "holds half of a character" in err.strip().splitlines()[-1]


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.txt"])
def test_fields_may_be_as_long_as_the_file(name, tmp_path):
    """A book in one field: longer than the csv module's 131,072 characters."""
    long = "una frase larga " * 20_000
    path = tmp_path / name
    with path.open("w", newline="") as file:
        if name == "a.csv":
            csv.writer(file).writerows([["text"], [long], ["otra frase"]])
        else:
            file.write(json.dumps({"text": long}) if name == "a.jsonl" else long)
    before = csv.field_size_limit()
    assert read_records([str(path)])[0]["text"] == long
    # The limit is the process's own, not ours to keep.
    assert csv.field_size_limit() == before


def test_a_number_of_ten_thousand_digits_is_told_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "id": ' + "1" * 10_000 + "}")
    with pytest.raises(ValueError, match=r"a\.jsonl, line 1: expected a JSON object per line"):
        read_records([str(tmp_path / "a.jsonl")])
