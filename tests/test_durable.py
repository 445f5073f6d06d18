"""What is left when the power fails: bytes before names, marks behind both, and unfinished work that says nothing is begun anew.

The whole of it, with every write of every command, is a campaign (tests/campaigns/powerloss.py)."""

import json
import os
import shutil

import pytest

from octavo.checkpoint import CheckpointError, convert
from octavo.checkpoint.writing import writer
from octavo.checkpoint.writing.durable import put_in_place, write_json
from octavo.checkpoint.writing.journal import NAME
from octavo.training.folder import MARK, MARKED, OPTIONS_FILE, mark, newest_checkpoint, refuse_to_overwrite

from .models.checkpoints import digest, save


@pytest.fixture
def steps(monkeypatch):
    """What was synced and renamed, in order: names of files."""
    found = []
    fsync, replace = os.fsync, os.replace

    def synced(handle):
        found.append(("synced", os.path.basename(os.readlink(f"/proc/self/fd/{handle}"))))
        fsync(handle)

    def replaced(old, new):
        found.append(("renamed", os.path.basename(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", replaced)
    return found


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="looks an open file's name up in /proc")
def test_bytes_are_synced_before_the_name_and_the_name_after_it(tmp_path, steps):
    (tmp_path / "a.partial").write_text("new")
    (tmp_path / "a").write_text("old")
    put_in_place(tmp_path / "a.partial", tmp_path / "a")
    assert steps == [("synced", "a.partial"), ("renamed", "a"), ("synced", tmp_path.name)]
    assert (tmp_path / "a").read_text() == "new"


def test_a_small_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    write_json(tmp_path / "a", "old")

    def fails(*_):
        raise OSError("the disk is gone")

    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(OSError, match="gone"):
        write_json(tmp_path / "a", "new")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a": '"old"\n'}


@pytest.mark.parametrize("left", ["nothing", "an empty journal", "half a line"])
def test_unfinished_work_that_says_nothing_is_begun_anew(left, tmp_path):
    save("llama", tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "right")
    partial = tmp_path / "out.partial"
    partial.mkdir()
    if left != "nothing":
        (partial / NAME).write_text('{"octavo": 1, "sou' if left == "half a line" else "")
    convert(tmp_path / "plain", tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "right")


def test_a_folder_of_that_name_that_is_not_ours_stays(tmp_path):
    save("llama", tmp_path / "plain")
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "precious").write_text("mine")
    with pytest.raises(CheckpointError, match="journal cannot be read"):
        convert(tmp_path / "plain", tmp_path / "out")
    assert (tmp_path / "out.partial" / "precious").read_text() == "mine"


@pytest.mark.parametrize("lost", ["a file", "the end of a file"])
def test_a_journal_that_says_more_than_the_files_hold_is_not_believed(lost, tmp_path, monkeypatch):
    """The missing bytes would be zeros in a model that looks whole."""
    save("llama", tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "right")
    monkeypatch.setattr(writer, "SYNC_EVERY", 1)
    unit, done = writer.write_unit, []

    def stops(*arguments):
        if len(done) == 8:
            raise KeyboardInterrupt
        done.append(arguments)
        return unit(*arguments)

    monkeypatch.setattr(writer, "write_unit", stops)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "plain", tmp_path / "out")
    monkeypatch.undo()
    shard = next((tmp_path / "out.partial").glob("*.safetensors"))
    if lost == "a file":
        shard.unlink()
    else:
        os.truncate(shard, shard.stat().st_size // 2)
    convert(tmp_path / "plain", tmp_path / "out")
    assert digest(tmp_path / "out") == digest(tmp_path / "right")


def checkpoint(output, step: int, whole: bool) -> None:
    folder = output / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    (folder / "adapter_config.json").write_text("{}")
    if whole:
        mark(folder)


def test_a_checkpoint_counts_once_it_is_on_the_disk(tmp_path):
    (tmp_path / OPTIONS_FILE).write_text(json.dumps({MARKED: True}))
    checkpoint(tmp_path, 1, True)
    checkpoint(tmp_path, 2, False)
    assert newest_checkpoint(tmp_path).name == "checkpoint-1"
    with pytest.raises(ValueError, match="holds a run already"):
        refuse_to_overwrite(tmp_path)


def test_a_run_without_a_whole_checkpoint_may_be_started_again(tmp_path):
    """--resume says to start without it: then that must be possible."""
    (tmp_path / OPTIONS_FILE).write_text(json.dumps({MARKED: True}))
    checkpoint(tmp_path, 1, False)
    with pytest.raises(FileNotFoundError, match="start without --resume"):
        newest_checkpoint(tmp_path)
    refuse_to_overwrite(tmp_path)


def test_checkpoints_of_runs_without_marks_count_as_before(tmp_path):
    checkpoint(tmp_path, 2, False)
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    with pytest.raises(ValueError, match="holds a run already"):
        refuse_to_overwrite(tmp_path)
    shutil.rmtree(tmp_path / "checkpoint-2")
    (tmp_path / OPTIONS_FILE).write_text("{}")
    checkpoint(tmp_path, 3, False)
    assert (
        newest_checkpoint(tmp_path).name == "checkpoint-3" and not (tmp_path / "checkpoint-3" / MARK).exists()
    )


def test_a_checkpoint_is_marked_when_all_is_in_it(tmp_path, monkeypatch):
    """Also what other callbacks write, as the card does."""
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from octavo import demo, load, load_tokenizer
    from octavo.training import finetune
    from octavo.training.card import Origin
    from octavo.training.data import tokenize
    from octavo.training.prompts import Prompts
    from octavo.training.recipe import Recipe

    seen = []

    def marked(folder):
        seen.append(digest(folder))
        mark(folder)

    monkeypatch.setattr(finetune, "mark", marked)
    records = [{"text": f"La luna número {n} brilla sobre el mar."} for n in range(8)]
    tokenizer = load_tokenizer(demo.MODEL)
    examples = tokenize(records, tokenizer, 32).examples
    recipe = Recipe(max_steps=2, evaluations=2, batch_size=2, max_length=32)
    moved = finetune.move_into

    def whole(partial, output):
        # What makes a run a finished one takes all that is told of it along.
        assert {"adapter_model.safetensors", "training.json", "loss.png", "README.md"} <= {
            path.name for path in partial.iterdir()
        }
        moved(partial, output)

    monkeypatch.setattr(finetune, "move_into", whole)
    origin = Origin(str(demo.MODEL), ["text.txt"], Prompts.of(records, tokenizer))
    finetune.finetune_model(
        load(demo.MODEL, device="cpu"), tokenizer, examples, [], recipe, tmp_path / "out", origin=origin
    )
    assert (tmp_path / "out" / "training.json").exists() and (tmp_path / "out" / "loss.png").exists()
    for step, before in zip((1, 2), seen, strict=True):
        after = digest(tmp_path / "out" / f"checkpoint-{step}")
        assert "README.md" in before and {**after, MARK: ""} == {**before, MARK: ""}


def test_an_adapter_is_the_same_bytes_in_each_process(tmp_path):
    """Python's sets have another order in each; what is resumed after a power failure is compared byte for byte."""
    pytest.importorskip("peft")
    import subprocess
    import sys

    code = """
import sys, octavo
from octavo import demo
from octavo.training.adapters import add_adapters
from octavo.training.recipe import Recipe
add_adapters(octavo.load(demo.MODEL, device="cpu"), Recipe()).save_pretrained(sys.argv[1])
"""
    found = []
    for seed in ("1", "2"):
        out = tmp_path / seed
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run(
            [sys.executable, "-c", code, str(out)], check=True, env=environment, capture_output=True
        )
        found.append(json.loads((out / "adapter_config.json").read_text())["target_modules"])
    assert found[0] == found[1] == sorted(found[0]) and len(found[0]) > 3
