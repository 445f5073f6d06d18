"""A file of JSON that holds anything else ends in a refusal or is left aside: never another error."""

import json

import pytest

from octavo.checkpoint.errors import CheckpointError
from octavo.checkpoint.reading.side_files import sentence_parts
from octavo.checkpoint.reading.source import read_config
from octavo.checkpoint.writing import journal
from octavo.cli.checks import architecture
from octavo.json_files import read_object
from octavo.merging.adapter_files import Adapter
from octavo.training import folder, prompts

DEEP = '{"a": ' * 50_000
OTHERS = (DEEP, "2", "[1]", "null", '"x"', "\xff", "", "{", '{"a": 1')
HEAD = {"source": "s", "options": {}, "plan": []}
# file → what reads it, and what it raises (None: it takes the file for one that is not there).
READERS = {
    "config.json": (read_config, CheckpointError),
    "adapter_config.json": (Adapter, ValueError),
    prompts.PROMPTS_FILE: (prompts.read_prompts, ValueError),
    journal.NAME: (lambda f: journal.Journal.resume(f, HEAD), CheckpointError),
    "octavo-options.json": (folder.marks, None),
    "modules.json": (lambda f: sentence_parts(f / "modules.json"), None),
    "architecture of config.json": (architecture, None),
}


@pytest.mark.parametrize("text", OTHERS, ids=lambda text: text[:8])
@pytest.mark.parametrize("name", READERS)
def test_a_file_that_holds_something_else(name, text, tmp_path):
    read, error = READERS[name]
    (tmp_path / name.rpartition(" ")[2]).write_bytes(text.encode("latin-1"))
    (tmp_path / "beside").touch()
    if error is None:
        assert not read(tmp_path)
        return
    with pytest.raises(error) as caught:
        read(tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("line", [{"unit": []}, {"unit": 0}, {"shard": "x"}, {"x": 1}, 5])
def test_a_line_of_a_journal_that_is_none_ends_it(line, tmp_path):
    """What follows it counts as not written, as after a line that is cut in half."""
    lines = [{"octavo": journal.VERSION, **HEAD}, {"unit": 7, "shard": 0}, line, {"unit": 8, "shard": 0}]
    (tmp_path / journal.NAME).write_text("".join(json.dumps(each) + "\n" for each in lines))
    found = journal.Journal.resume(tmp_path, HEAD)
    found.close()
    assert set(found.units) == {7} and not found.whole
    assert (tmp_path / journal.NAME).read_text() == "".join(json.dumps(each) + "\n" for each in lines[:2])


def test_an_object(tmp_path):
    (tmp_path / "a.json").write_text('{"ñ": 1}', encoding="utf-8")
    assert read_object(tmp_path / "a.json") == {"ñ": 1}
