"""Mistakes at the command line: each is answered by one line that says what to do, before anything heavy is imported.

What can be known from the options and the files alone must come within a second of processor time (not of the clock: the machine
may be busy) and without torch. A handful of mistakes run in processes of their own, as users make them; all of them in forks of
one process that has imported the command and no more.
"""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest

from octavo import demo

# The same as the installed command, and says at its end what it took.
RUN = """
import sys, time
from octavo.cli import main
try:
    main()
finally:
    print("took", time.process_time(), "torch" in sys.modules, file=sys.stderr)
"""
# The same in a fork for each line of standard input: {"arguments", "folder", ...} → exit status. Output goes into two files.
SERVE = """
import json, os, sys, time
from octavo.cli import main
for line in sys.stdin:
    asked = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(asked["folder"])
        for number, name in ((1, asked["out"]), (2, asked["errors"])):
            os.dup2(os.open(name, os.O_WRONLY | os.O_CREAT), number)
        sys.argv = ["octavo", *asked["arguments"]]
        began = time.process_time()
        try:
            main()
        finally:
            print("took", time.process_time() - began, "torch" in sys.modules, file=sys.stderr)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
SECONDS = 1.0
FINETUNE = "finetune {model} --output {new} --data"

# What is typed, and what the line must say (in bounds and numbers, also as typer before 0.29 has it).
MISTAKES = [
    # Commands and options.
    ("quantise {model} {new}", r"No such command 'quantise'.*quantize"),
    ("generate {model}", r"Missing argument 'PROMPT'.*octavo generate --help"),
    ("generate {model} hola --frobnicate", r"No such option: --frobnicate.*octavo generate --help"),
    ("generate {model} hola --max-new-token 3", r"--max-new-token.*--max-new-tokens"),
    ("generate {model} El sentido", r"unexpected extra argument.*sentido.*goes into quotes"),
    ("generate {model} hola --max-new-tokens", r"--max-new-tokens.*requires an argument.*octavo generate"),
    (
        "generate {model} hola --max-new-tokens mil",
        r"--max-new-tokens.*(expected a whole number, found 'mil'|'mil' is not a valid int)",
    ),
    (
        "generate {model} hola --max-new-tokens 0",
        r"--max-new-tokens.*(expected at least 1, found 0|0 is not in the range x>=1)",
    ),
    ("generate {model} hola --dtype int4", r"--dtype.*'int4' is not one of.*float32.*float16.*bfloat16"),
    ("generate {model} hola --device gpu", r"--device.*expected cpu, cuda, or cuda:1.*'gpu'"),
    (
        "generate {model} hola --temperature -1",
        r"--temperature.*(expected at least 0.*, found -1|-1.0 is not in the range x>=0)",
    ),
    (
        "generate {model} hola --top-p 1.5",
        r"--top-p.*(expected at most 1.*, found 1\.5|1\.5 is not in the range)",
    ),
    ("generate {model} hola --no-chat --system x", r"--system and --no-chat.*leave one of them out"),
    # Models.
    ("generate no/such/model hola", r"no/such/model: no such file or folder, and not a hub id of the form"),
    ("generate '' hola", r"MODEL.*expected a name, found an empty one"),
    ("generate {empty_folder} hola", r"empty_folder.*(config\.json|model\.safetensors)"),
    ("generate {encoder} hola", r"BertModel does not continue text.*from transformers import BertModel"),
    (
        "generate {adapter} hola",
        r"is an adapter, which goes on top of the model.*octavo generate some/base --adapter",
    ),
    ("generate {text} hola", r"text\.txt: expected a \.safetensors, \.bin or \.gguf file"),
    ("generate {model} ''", r"the prompt is empty: give at least one word"),
    ("generate {model} '  '", r"the prompt is empty"),
    ("generate {model} hola --adapter no/such/adapter", r"no/such/adapter: no such folder"),
    ("generate {model} hola --adapter {model}", r"expected a PEFT adapter folder, found no adapter_config"),
    # Conversion.
    ("quantize {model} {model}", r"OUT|the source|another"),
    ("quantize {model} {text}", r"text\.txt.*(file|folder)"),
    ("quantize {model} {text}/8bit", r"text\.txt/8bit: .*text\.txt is no folder; give another name"),
    ("demo --out {text}", r"text\.txt is a file; expected a folder to write"),
    ("quantize {model} {taken}", r"taken.*--overwrite"),
    ("quantize {model} {new} --codebook optimal", r"--codebook.*'optimal' is not one of.*fitted.*dynamic"),
    (
        "quantize {model} {new} --block-size 0",
        r"--block-size.*(expected at least 1, found 0|0 is not in the range x>=1)",
    ),
    ("quantize {model} {new} --max-shard-size 5", r"--max-shard-size.*size with its unit, found '5': 5GB\?"),
    ("quantize {model} {new} --max-shard-size huge", r"--max-shard-size.*a size such as.*'huge'"),
    ("quantize {model} {new} --calibrate none.txt", r"--calibrate none\.txt: no such file"),
    ("merge {model} {adapter}", r"Missing argument 'OUT'"),
    ("merge {model} {model} {new}", r"expected a PEFT adapter folder, found no adapter_config\.json"),
    ("merge {model} {adapter} {new} --to float64", r"--to.*'float64' is not one of.*8bit"),
    ("export {model} {folder}", r"is a folder; expected a file"),
    ("export {model} {text}", r"text\.txt is there already.*--overwrite"),
    ("export {model} x.gguf --to q4_0", r"--to.*'q4_0' is not one of.*q8_0"),
    # Data.
    (f"{FINETUNE} none.jsonl", r"--data none\.jsonl: no such file"),
    (f"{FINETUNE} {{empty}}", r"--data .*empty\.txt: the file is empty"),
    (f"{FINETUNE} {{blank}}", r"--data .*blank\.txt: the file holds nothing but blank lines"),
    (f"{FINETUNE} {{folder}}", r"--data .*expected a \.txt, \.jsonl, \.json or \.csv file, found"),
    (f"{FINETUNE} {{markdown}}", r"expected a \.txt, \.jsonl, \.json or \.csv file, found \.md"),
    (f"{FINETUNE} {{broken_json}}", r"broken\.jsonl, line 2: expected a JSON object per line"),
    (
        f"{FINETUNE} {{other_fields}}",
        r"other\.jsonl, line 1: expected `text`.*found \['answer', 'question'\]",
    ),
    (f"{FINETUNE} {{surrogate}}", r"half\.jsonl, line 1, text: holds half of a character \(U\+D83D"),
    (
        f"{FINETUNE} {{latin}}",
        r"latin\.txt: expected text in UTF-8.*iconv -f ISO-8859-1 -t UTF-8 .*latin\.txt",
    ),
    (f"{FINETUNE} {{binary}}", r"binary\.txt: expected text, found NUL bytes: a program, an archive"),
    (f"{FINETUNE} {{quotes}}", r"quotes\.csv, line \d: expected rows of comma-separated values"),
    (f"{FINETUNE} {{text}} --validation none.txt", r"--validation none\.txt: no such file"),
    (f"{FINETUNE} {{text}} --validation-split 2", r"--validation-split.*from 0 to below 1, found 2"),
    (f"{FINETUNE} {{text}} --preset card", r"--preset.*'card' is not.*model-card"),
    (f"{FINETUNE} {{text}} --lora-r 0", r"--lora-r.*0"),
    (f"{FINETUNE} {{text}} --epochs 0", r"--epochs.*0"),
    (
        f"{FINETUNE} {{text}} --learning-rate fast",
        r"--learning-rate.*(expected a number, found 'fast'|'fast' is not a valid float)",
    ),
    (f"{FINETUNE} {{text}} --schedule step", r"--schedule.*'step' is not one of.*cosine"),
    (f"{FINETUNE} {{text}} --optimizer sgd", r"--optimizer.*'sgd' is not one of.*adamw_8bit"),
    (f"{FINETUNE} {{text}} --resume", r"--resume: .*holds no complete checkpoint.*without --resume"),
    (
        "finetune {model} --data {text} --output {text}",
        r"--output .*text\.txt is no folder; give another name",
    ),
    ("finetune {model} --data {text} --output {adapter}", r"holds a run already: --resume.*another folder"),
    ("finetune {encoder} --data {text} --output {new}", r"does not continue text.*nothing to fine-tune"),
    ("finetune {model} --data {text}", r"Missing option '--output'"),
    # Measuring and planning.
    ("evaluate {model}", r"Missing option '--text'"),
    ("evaluate {model} --text none.txt", r"--text none\.txt: no such file"),
    ("evaluate {model} --text {text} --against no/such/base", r"no/such/base: no such file or folder"),
    (
        "evaluate {model} --text {text} --logits none.logits",
        r"--logits none\.logits: no such file.*--save-logits",
    ),
    ("evaluate {model} --text {text} --window 64 --stride 128", r"--stride: expected at most --window, 64"),
    (
        "evaluate {model} --text {text} --report {text}",
        r"--report .*text\.txt: expected a folder, found a file",
    ),
    (
        "evaluate {model} --text {text} --save-logits {folder}",
        r"--save-logits .*is a folder; expected a file",
    ),
    ("evaluate {model} --text {text} --save-logits {text}/x", r"--save-logits .*text\.txt is no folder"),
    ("evaluate {model} --text {text} --adapter {text}", r"text\.txt: expected a PEFT adapter folder"),
    (
        "compare {model} --text {text} --output {text}",
        r"--output .*text\.txt: expected a folder, found a file",
    ),
    ("compare {model} --text {text} --formats fitted-0", r"--formats: expected some of .*'fitted-0'"),
    ("inspect no/such/model", r"no/such/model: no such file or folder"),
    ("inspect {model} --against {empty_folder}", r"empty_folder"),
    ("plan {empty_folder}", r"empty_folder: expected a model's folder with a config\.json, found none"),
    ("plan {model} --memory 0", r"'--memory'.*expected a size such as 11GB"),
    ("plan {model} --memory lots", r"--memory.*expected a size such as 11GB.*'lots'"),
    ("plan {adapter}", r"is an adapter, which goes on top of the model"),
    ("bench {model} --threads 0", r"--threads.*(expected at least 1, found 0|0 is not in the range x>=1)"),
]


@pytest.fixture(scope="module")
def named(tmp_path_factory):
    """Files that are wrong, each in its way."""
    folder = tmp_path_factory.mktemp("mistakes")

    def write(name, content):
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    for name in ("empty_folder", "folder", "encoder", "adapter", "taken"):
        (folder / name).mkdir()
    write("encoder/config.json", json.dumps({"architectures": ["BertModel"], "model_type": "bert"}))
    write("encoder/model.safetensors", b"")
    write("adapter/adapter_config.json", json.dumps({"base_model_name_or_path": "some/base"}))
    write("adapter/adapter_model.safetensors", b"")
    write("taken/notes.txt", "mine")
    return {
        "model": demo.MODEL,
        "new": folder / "new",
        **{name: folder / name for name in ("empty_folder", "folder", "encoder", "adapter", "taken")},
        "text": write("text.txt", "hola que tal\n" * 50),
        "empty": write("empty.txt", ""),
        "blank": write("blank.txt", "\n \n"),
        "markdown": write("notes.md", "hola"),
        "broken_json": write("broken.jsonl", '{"text": "a"}\n{"text": \n'),
        "other_fields": write("other.jsonl", '{"question": "a", "answer": "b"}\n'),
        "surrogate": write("half.jsonl", '{"text": "hola \\ud83d"}\n'),
        "latin": write("latin.txt", "el niño y la niña\n".encode("latin-1")),
        "binary": write("binary.txt", bytes(range(256)) * 9),
        "quotes": write("quotes.csv", 'text\n"una frase" y más\n'),
    }


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}


def arguments_of(typed, named):
    return shlex.split(typed.format(**{name: shlex.quote(str(path)) for name, path in named.items()}))


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    """A function of arguments and a folder: exit status, output, errors."""
    if not hasattr(os, "fork"):
        pytest.skip("this system does not fork")
    out, errors = (tmp_path_factory.mktemp("said") / name for name in ("out", "errors"))
    with subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    ) as server:

        def run(arguments, folder):
            asked = {"arguments": arguments, "folder": str(folder), "out": str(out), "errors": str(errors)}
            server.stdin.write(json.dumps(asked) + "\n")
            server.stdin.flush()
            status = int(server.stdout.readline())
            said = [path.read_text(encoding="utf-8") for path in (out, errors)]
            for path in (out, errors):
                path.unlink()
            return status, *said

        yield run
        server.stdin.close()


def check(status, out, errors, message, named, folder):
    *said, took = errors.strip().splitlines()
    assert status in (1, 2)
    assert out == ""
    assert len(said) == 1, errors
    assert said[0].startswith("error: ")
    assert re.search(message, said[0]), said[0]
    for word in ("Traceback", "Value error", "Input should"):
        assert word not in said[0]
    _, seconds, torch_imported = took.split()
    assert torch_imported == "False"
    assert float(seconds) < SECONDS
    # Nothing was begun.
    assert not named["new"].exists() and not list(folder.iterdir())


@pytest.mark.parametrize(("typed", "message"), MISTAKES, ids=[typed for typed, _ in MISTAKES])
def test_a_mistake_is_one_line_at_once(named, command, tmp_path, typed, message):
    check(*command(arguments_of(typed, named), tmp_path), message, named, tmp_path)


@pytest.mark.parametrize(("typed", "message"), MISTAKES[::20], ids=[typed for typed, _ in MISTAKES[::20]])
def test_so_is_one_in_a_process_of_its_own(named, tmp_path, typed, message):
    run = subprocess.run(
        [sys.executable, "-c", RUN, *arguments_of(typed, named)],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=tmp_path,
        env=ENVIRONMENT,
    )
    check(run.returncode, run.stdout, run.stderr, message, named, tmp_path)


def test_there_are_forty():
    assert len({typed for typed, _ in MISTAKES}) >= 40
