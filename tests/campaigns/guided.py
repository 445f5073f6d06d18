"""Campaign: files that are changed where it leads to code that no earlier one reached (coverage-guided, by atheris).

    pip install atheris
    python -m tests.campaigns.guided --count 200000           # files of each kind; an hour
    python -m tests.campaigns.guided --only GGUF --count 2000

`hostile` draws its mutations from lists made by hand, and uses whole models; this looks at our own readers alone, some thousand
files per second. Rule: the reader returns, or raises its one documented error on one line; within ten seconds, in less than
2 GB. A fault is printed with the beginning of the file in base64; --json
keeps all of it."""

import base64
import inspect
import json
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import atheris

from octavo import text_files
from octavo.checkpoint.errors import CheckpointError
from octavo.checkpoint.reading import bin_source, gguf_header, index, regular, safetensors_source, source
from octavo.checkpoint.writing import journal
from octavo.merging import adapter_files
from octavo.training import prompts, records

from . import runner
from .sources import SOURCES

# The code whose ways are followed. (atheris' own way, as modules are imported, misses those of an editable installation.)
MODULES = (
    adapter_files,
    bin_source,
    gguf_header,
    index,
    journal,
    prompts,
    records,
    regular,
    safetensors_source,
    source,
    text_files,
)
# The journal of an unfinished conversion is taken up by the conversion that wrote it.
HEAD = {"source": "s", "options": {}, "plan": []}


@dataclass(frozen=True)
class Reader:
    """One kind of file.

    Args:
        name: for the table.
        file: its name; "KIND:FILE" is a file of a kind of source of the other campaign.
        read: (its path).
        whole: one to begin with, if it is none of that campaign's.
        beside: another file that lies there.
    """

    name: str
    file: str
    read: Callable[[Path], Any]
    whole: bytes = b""
    beside: str = ""


def _adapter(path: Path) -> None:
    adapter_files.Adapter(path.parent)


def _journal(path: Path) -> None:
    journal.Journal.resume(path.parent, HEAD).close()


def _records(path: Path) -> None:
    records.read_records([str(path)])


ADAPTER = "LoRA adapter:adapter/"
JOURNAL = (
    json.dumps({"octavo": journal.VERSION, **HEAD})
    + '\n{"unit": 0, "shard": 0, "tensors": [["a_code", "F32", [256], 0, 1024]], "rows": []}\n{"shard": 0, "whole": true}\n'
)
PROMPTS = b'{"prompts": "plain", "chat_template": null, "system": "x", "examples": {"text": 1}}'
RECORDS = (
    b'{"text": "hola"}\n{"prompt": "a", "completion": "b"}\n',
    b'[{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}]',
)
KINDS = [
    Reader("safetensors", "Octavo folder:model.safetensors", safetensors_source.read_header),
    Reader("GGUF", "GGUF:model.gguf", gguf_header.read_gguf_header),
    Reader("bin", "published .bin:pytorch_model.bin", bin_source.load_tensors),
    Reader("index", "shards:model.safetensors.index.json", index.shard_files),
    Reader("config", "Octavo folder:config.json", lambda path: source.read_config(path.parent)),
    Reader(
        "adapter", ADAPTER + "adapter_config.json", _adapter, beside=ADAPTER + "adapter_model.safetensors"
    ),
    Reader("journal", journal.NAME, _journal, JOURNAL.encode()),
    Reader("prompts", prompts.PROMPTS_FILE, lambda path: prompts.read_prompts(path.parent), PROMPTS),
    Reader("JSON lines", "data.jsonl", _records, RECORDS[0]),
    Reader("JSON records", "data.json", _records, RECORDS[1]),
    Reader("CSV records", "data.csv", _records, b'text\nhola\n"a, b"\n'),
    Reader("text", "data.txt", _records, "¿Qué? ñandú\n\nb".encode()),
]


def follow(modules: Sequence[ModuleType]) -> None:
    """Let atheris see each branch of the functions and methods of some modules."""
    for module in modules:
        for owner in (module, *(each for each in vars(module).values() if inspect.isclass(each))):
            for each in list(vars(owner).values()):
                function = inspect.unwrap(getattr(each, "__func__", each))
                if inspect.isfunction(function) and function.__module__ == module.__name__:
                    atheris.instrument_func(function)


def fuzz(
    reader: Reader, folder: Path, count: int, seed: int, report: Path, seconds: float | None = None
) -> None:
    """Read files of one kind, so many or for so long; each new fault goes into the report, a line of JSON. Ends the process."""
    corpus, room = folder / "corpus", folder / "room"
    corpus.mkdir()
    room.mkdir()
    whole = reader.whole or _file_of(folder, reader.file)
    (corpus / "whole").write_bytes(whole)
    if reader.beside:
        (room / Path(reader.beside).name).write_bytes(_file_of(folder, reader.beside))
    path = room / Path(reader.file.rpartition(":")[2]).name
    seen: set[str] = set()
    follow(MODULES)

    def read(data: bytes) -> None:
        path.write_bytes(data)
        try:
            reader.read(path)
        except (CheckpointError, ValueError, FileNotFoundError) as error:
            if isinstance(error, UnicodeError) or "\n" in str(error).strip():
                tell(error, data)
        except Exception as error:
            tell(error, data)

    def tell(error: Exception, data: bytes) -> None:
        last = traceback.extract_tb(error.__traceback__)[-1]
        where = f"{type(error).__name__} in {Path(last.filename).name}, line {last.lineno}"
        if where not in seen:
            seen.add(where)
            fault = {
                "kind": reader.name,
                "fault": f"{where}: {str(error)[:200]}",
                "file": base64.b64encode(data).decode(),
            }
            with report.open("a") as out:
                out.write(json.dumps(fault) + "\n")

    options = [
        f"-runs={count}",
        f"-seed={seed}",
        f"-max_len={4 * len(whole)}",
        # 0: as long as it takes.
        f"-max_total_time={round(seconds or 0)}",
        "-timeout=10",
        "-rss_limit_mb=2048",
        "-print_final_stats=1",
    ]
    os.chdir(folder)
    atheris.Setup([sys.argv[0], *options, str(corpus)], read)
    atheris.Fuzz()


def _file_of(folder: Path, name: str) -> bytes:
    """A file of a source of the other campaign, whose name is KIND:FILE."""
    kind, _, file = name.partition(":")
    made = folder / "sources" / kind.replace(" ", "_")
    if not made.exists():
        made.mkdir(parents=True)
        next(each for each in SOURCES if each.name == kind).make(made)
    return (made / file).read_bytes()


def campaign(
    count: int, seed: int, only: str | None = None, seconds: float | None = None, say=print
) -> tuple[dict[str, dict[str, int]], list[dict]]:
    """Returns (kind of file → files read, ways through the code that were found), the faults."""
    table, faults = {}, []
    for reader in KINDS:
        if only and only.lower() not in reader.name.lower():
            continue
        with tempfile.TemporaryDirectory(dir=runner.SCRATCH) as folder:
            report, log = Path(folder) / "faults", Path(folder) / "log"
            report.touch()
            child = os.fork()
            if not child:
                os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT), 2)
                os.dup2(2, 1)
                fuzz(reader, Path(folder), count, seed, report, seconds)
                os._exit(0)
            _, status = os.waitpid(child, 0)
            found = [json.loads(line) for line in report.read_text().splitlines()]
            told = log.read_text(errors="replace")
            if status:
                # libFuzzer ends the process where a file takes too long or too much, or kills it.
                found.append({"kind": reader.name, "fault": f"status {status}: {told[-1500:]}", "file": ""})
        stats = dict(
            line.removeprefix("stat::").split(":") for line in told.splitlines() if line.startswith("stat::")
        )
        table[reader.name] = {
            "read": int(stats.get("number_of_executed_units", 0)),
            "found to be new": int(stats.get("new_units_added", 0)),
        }
        for fault in found:
            say(f"{fault['kind']}: {fault['fault']}\n    {fault['file'][:400]}")
        faults += found
        say(f"{reader.name}: {table[reader.name]}")
    return table, faults


def main() -> int:
    parser = runner.parser(__doc__, 2000, "files of each kind")
    parser.add_argument("--only", help="one kind: part of its name")
    options = parser.parse_args()
    return runner.finish(
        options, *campaign(options.count, options.seed, options.only, options.seconds, runner.say)
    )


if __name__ == "__main__":
    sys.exit(main())
