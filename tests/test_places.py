"""OUT may be a link, a mount point, in a folder that cannot be written, in the source or around it: nothing is ever lost."""

import contextlib
import errno
import os
import subprocess
from pathlib import Path

import pytest

import octavo
from octavo.checkpoint import CheckpointError, convert
from octavo.checkpoint.writing.output_directory import OutputDirectory

from .models.checkpoints import digest, save


@pytest.fixture
def plain(tmp_path):
    save("llama", tmp_path / "plain")
    convert(tmp_path / "plain", tmp_path / "expected")
    return tmp_path / "plain"


def whole(folder, tmp_path):
    return digest(folder) == digest(tmp_path / "expected")


@pytest.mark.parametrize("target", ["empty", "full", "dangling", "deep and dangling", "a chain"])
def test_a_link_stays_and_its_target_is_written(target, plain, tmp_path):
    disk = tmp_path / "disk" / "models"
    if target in ("empty", "full", "a chain"):
        disk.mkdir(parents=True)
    if target == "full":
        (disk / "old.txt").write_text("precious")
    if target == "dangling":
        disk.parent.mkdir()
    link = tmp_path / "out"
    if target == "a chain":
        (tmp_path / "middle").symlink_to(disk)
        link.symlink_to("middle")
    else:
        link.symlink_to(disk)
    if target == "full":
        with pytest.raises(CheckpointError, match="out is not empty"):
            convert(plain, link)
        assert (disk / "old.txt").read_text() == "precious"
    result = convert(plain, link, overwrite=target == "full")
    assert link.is_symlink() and disk.is_dir() and not disk.is_symlink()
    assert whole(disk, tmp_path) and whole(result.out, tmp_path)
    assert [path.name for path in disk.parent.iterdir()] == ["models"]
    assert octavo.load(link).config.model_type == "llama"


def test_a_link_to_a_file_to_the_source_and_to_itself(plain, tmp_path):
    (tmp_path / "file").write_text("precious")
    for name, target, message in (
        ("a", tmp_path / "file", "is a file"),
        ("b", plain, "holds the source itself"),
        ("c", tmp_path / "c", "circle|not empty|lead"),
    ):
        (tmp_path / name).symlink_to(target)
        with pytest.raises(CheckpointError, match=message):
            convert(plain, tmp_path / name, overwrite=True)
    before = digest(plain)
    for out in (plain, tmp_path, plain / "sub" / ".."):
        with pytest.raises(CheckpointError, match="holds the source itself"):
            convert(plain, out, overwrite=True)
    assert digest(plain) == before and (tmp_path / "file").read_text() == "precious"


def test_a_link_within_the_path_to_out(plain, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    convert(plain, tmp_path / "link" / "a" / "out")
    assert whole(tmp_path / "disk" / "a" / "out", tmp_path)


def pretend_mounted(monkeypatch, folder):
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == folder)

    def rename(self, target):
        # As the system refuses it for a mount point.
        if folder in (self, Path(target)):
            raise OSError(errno.EBUSY, "Device or resource busy")
        os.rename(self, target)

    monkeypatch.setattr(Path, "rename", rename)


@pytest.mark.parametrize("full", [False, True])
def test_a_mount_point_is_filled_in_place(full, plain, tmp_path, monkeypatch):
    out = tmp_path / "volume"
    (out / "lost+found").mkdir(parents=True)
    if full:
        (out / "config.json").write_text("{}")
        (out / "old").mkdir()
        (out / "old" / "file").touch()
    pretend_mounted(monkeypatch, out)
    if full:
        with pytest.raises(CheckpointError, match="not empty"):
            convert(plain, out)
    convert(plain, out, overwrite=full)
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*(p.name for p in (tmp_path / "expected").iterdir()), "lost+found"]
    )
    (out / "lost+found").rmdir()
    assert whole(out, tmp_path)
    assert not (tmp_path / "volume.partial").exists()


@pytest.mark.parametrize("steps", range(1, 9))
def test_an_exchange_that_is_cut_short_is_finished_by_the_next_run(steps, plain, tmp_path, monkeypatch):
    """The process ends after some of the renames; what was finished is complete after the next start, whatever it is for."""
    out = tmp_path / "volume"
    out.mkdir()
    for name in ("config.json", "a", "b"):
        (out / name).write_text("old")
    with monkeypatch.context() as patched:
        pretend_mounted(patched, out)
        refuse, left = Path.rename, [steps]

        def rename(self, target):
            if left[0] == 0:
                raise KeyboardInterrupt
            left[0] -= 1
            refuse(self, target)

        patched.setattr(Path, "rename", rename)
        with contextlib.suppress(KeyboardInterrupt):
            convert(plain, out, overwrite=True)
    pretend_mounted(monkeypatch, out)
    convert(plain, out, overwrite=True)
    assert whole(out, tmp_path)


def test_a_real_mount_point(plain, tmp_path):
    out = tmp_path / "volume"
    out.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", str(out)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this user may not mount")
    try:
        convert(plain, out)
        assert whole(out, tmp_path)
    finally:
        subprocess.run(["umount", str(out)], check=True)


def pretend_read_only(monkeypatch, folder):
    access = os.access
    monkeypatch.setattr(
        os, "access", lambda path, mode: Path(path) != folder.absolute() and access(path, mode)
    )


def test_a_folder_without_write_permission_around_out(plain, tmp_path, monkeypatch):
    """OUT is there and may be written, the folder around it may not: a home that an administrator gave."""
    around = tmp_path / "around"
    (around / "out").mkdir(parents=True)
    pretend_read_only(monkeypatch, around)
    convert(plain, around / "out")
    assert whole(around / "out", tmp_path)
    with pytest.raises(CheckpointError, match=r"may not write to .*around; give another folder"):
        convert(plain, around / "new")
    pretend_read_only(monkeypatch, around / "out")
    with pytest.raises(CheckpointError, match=r"may not write"):
        convert(plain, around / "out", overwrite=True)
    assert whole(around / "out", tmp_path)


def test_a_folder_of_the_users_that_is_called_replaced_is_left_alone(plain, tmp_path):
    (tmp_path / "out.replaced").mkdir()
    (tmp_path / "out.replaced" / "file").write_text("precious")
    (tmp_path / "out").mkdir()
    convert(plain, tmp_path / "out")
    assert (tmp_path / "out.replaced" / "file").read_text() == "precious"


def test_where_the_work_is_done():
    assert OutputDirectory(Path("out"), Path("out")).partial == Path("out.partial")
    assert OutputDirectory(Path("out"), Path("out"), inside=True).partial == Path("out/.octavo-partial")
