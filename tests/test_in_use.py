"""One process at a time writes a file, a folder, a run: the second one is told, and harms nothing."""

import errno
import os

import pytest

from octavo import demo
from octavo.checkpoint import CheckpointError, convert
from octavo.checkpoint.writing.in_use import InUseError, Lock
from octavo.export import export_gguf

fcntl = pytest.importorskip("fcntl")


def test_a_lock_keeps_others_out_until_it_is_closed(tmp_path):
    for place in (tmp_path, tmp_path / "file"):
        held = Lock(place)
        with pytest.raises(InUseError, match="another process is writing it"):
            Lock(place)
        held.close()
        with Lock(place):
            pass
        Lock(place).close()


def test_a_lock_of_a_file_that_got_another_name_meanwhile_is_of_the_new_one(tmp_path, monkeypatch):
    """Else two would write the new file, each with a lock."""
    path, real = tmp_path / "file", fcntl.flock
    renamed = []

    def renames_once(handle, how):
        if not renamed:
            renamed.append(path.rename(tmp_path / "final"))
        real(handle, how)

    monkeypatch.setattr(fcntl, "flock", renames_once)
    with Lock(path), pytest.raises(InUseError):
        Lock(path)
    assert renamed and path.exists()


def test_a_file_system_without_locks_is_written_all_the_same(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    with Lock(tmp_path / "file"):
        pass


def test_an_export_beside_another_one(tmp_path):
    """Both wrote into one unfinished file, and the later one went on in what had its final name."""
    out = tmp_path / "out.gguf"
    other = tmp_path / "out.gguf.partial"
    with Lock(other):
        other.write_text("the other's")
        with pytest.raises(InUseError):
            export_gguf(demo.MODEL, out, "q8_0")
        assert other.read_text() == "the other's"
    assert export_gguf(demo.MODEL, out, "q8_0").nbytes == out.stat().st_size
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_predictions_beside_others(tmp_path):
    from octavo.evaluation.evaluate import evaluate

    out, text = tmp_path / "logits", tmp_path / "text.txt"
    text.write_text("La luna brilla sobre el mar, y nadie la mira dos veces. " * 10)
    other = tmp_path / "logits.partial"
    with Lock(other):
        other.write_text("the other's")
        with pytest.raises(InUseError):
            evaluate(demo.MODEL, [str(text)], save_logits=out)
        assert other.read_text() == "the other's" and not out.exists()
    evaluate(demo.MODEL, [str(text)], save_logits=out)
    assert out.exists() and not other.exists()


def test_a_run_beside_another_one(tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes")
    from octavo import load, load_tokenizer
    from octavo.training.data import tokenize
    from octavo.training.finetune import finetune_model
    from octavo.training.recipe import Recipe

    tokenizer = load_tokenizer(demo.MODEL)
    examples = tokenize([{"text": "La luna brilla."}] * 4, tokenizer, 32).examples
    recipe = Recipe(max_steps=1, batch_size=2, max_length=32)
    with Lock(tmp_path), pytest.raises(InUseError):
        finetune_model(load(demo.MODEL, device="cpu"), tokenizer, examples, [], recipe, tmp_path)
    assert list(tmp_path.iterdir()) == []
    finetune_model(load(demo.MODEL, device="cpu"), tokenizer, examples, [], recipe, tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_a_folder_that_came_meanwhile_is_not_replaced(tmp_path):
    """Two conversions began when it was not there; the second ends when the first one's result is."""
    out = tmp_path / "out"

    def appears(done, total, name):
        out.mkdir(exist_ok=True)
        (out / "precious").write_text("mine")

    with pytest.raises(CheckpointError, match="out is not empty"):
        convert(demo.MODEL, out, progress=appears)
    assert [path.name for path in out.iterdir()] == ["precious"]
    # What was done is kept, and published when that is said.
    result = convert(demo.MODEL, out, overwrite=True)
    assert result.resumed and not (out / "precious").exists() and (out / "config.json").exists()
    assert os.listdir(tmp_path) == ["out"]
