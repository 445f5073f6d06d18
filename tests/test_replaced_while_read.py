"""A checkpoint that another takes the place of while it is read: refused, never a mixture of both that nothing shows."""

import shutil

import pytest

import octavo
from octavo import loading
from octavo.checkpoint import CheckpointError, convert, open_source
from octavo.export import export_gguf

from .models.checkpoints import save

REFUSED = "was replaced while it was read"


@pytest.fixture
def two(tmp_path):
    """Two models of the same shapes, in several files each; and how the second takes the first one's place."""
    for name in ("first", "second"):
        save("llama", tmp_path / name, max_shard_size="40KB")
    (tmp_path / "kept").mkdir()

    def replace():
        (tmp_path / "first").rename(tmp_path / "kept" / "old")
        shutil.copytree(tmp_path / "second", tmp_path / "first")

    return tmp_path / "first", replace


def test_while_it_is_loaded(two, monkeypatch):
    folder, replace = two
    real = loading.from_pretrained

    def replaced(*arguments, **options):
        model = real(*arguments, **options)
        replace()
        return model

    monkeypatch.setattr(loading, "from_pretrained", replaced)
    with pytest.raises(CheckpointError, match=REFUSED):
        octavo.load(folder, device="cpu")
    monkeypatch.undo()
    octavo.load(folder, device="cpu")


def test_while_it_is_converted(two, tmp_path):
    folder, replace = two
    steps = []

    def progress(done, total, name):
        steps.append(name)
        if len(steps) == 5:
            replace()

    with open_source(folder) as source, pytest.raises(CheckpointError, match=REFUSED):
        convert(source, tmp_path / "out", progress=progress)
    assert len(steps) > 5 and not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


def test_what_lies_beside_it_may_come_and_go(two, tmp_path):
    folder, _ = two
    with open_source(folder) as source:
        convert(source, tmp_path / "out", progress=lambda *_: (folder / "notes.txt").write_text("mine"))
    assert (tmp_path / "out" / "config.json").exists()


def test_while_it_is_exported(tmp_path):
    from octavo import demo

    folder = tmp_path / "model"
    shutil.copytree(demo.MODEL, folder)

    def progress(done, total, name):
        if done and not (tmp_path / "old").exists():
            folder.rename(tmp_path / "old")
            shutil.copytree(demo.MODEL, folder)

    with pytest.raises(CheckpointError, match=REFUSED):
        export_gguf(folder, tmp_path / "out.gguf", "q8_0", progress=progress)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "old"]
