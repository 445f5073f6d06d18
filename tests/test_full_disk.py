"""A disk that fills while fine-tuning: one line that says what is left and what to do, and nothing half-written in place."""

import subprocess

import pytest
import torch

from octavo import demo, load, load_tokenizer
from octavo.training.data import tokenize
from octavo.training.folder import ADAPTER, check_space, newest_checkpoint, told_of_a_full_disk

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")


def save_safetensors(path):
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1 << 21)}, path)


def save_pickle(path):
    # What the Trainer saves an optimizer with.
    torch.save({"a": torch.zeros(1 << 21)}, path)


def save_text(path):
    path.write_text("a" * 8_000_000)


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 3 MB: more than one adapter of rank 2, less than two checkpoints of it."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)], capture_output=True
    ).returncode:
        pytest.skip("this user may not mount")
    yield folder
    # A library may keep the file open that it could not write.
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("save", [save_safetensors, save_pickle, save_text])
def test_what_each_library_raises_is_told_in_one_way(save, small_disk):
    """safetensors raises its own error, torch a RuntimeError, Python an OSError."""
    with (
        pytest.raises(
            OSError, match=r"--output .*: the disk is full .*no checkpoint was complete yet: start again"
        ),
        told_of_a_full_disk(small_disk),
    ):
        save(small_disk / "file")


def test_other_errors_stay_what_they_are(tmp_path):
    with pytest.raises(RuntimeError, match="shapes"), told_of_a_full_disk(tmp_path):
        raise RuntimeError("shapes do not fit")


def test_too_little_space_is_told_before_the_first_step(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10**6})())
    with pytest.raises(OSError, match=r"its disk has 1\.0 MB free, .* takes 2\.0 MB; free some space"):
        check_space(tmp_path, 2 * 10**6)
    check_space(tmp_path, 10**6)


def test_a_disk_that_fills_during_a_run_and_going_on_once_there_is_space(small_disk):
    """Another program fills the disk after the first checkpoint. What is there stays whole, and --resume ends the run."""
    from transformers import TrainerCallback

    from octavo.training.finetune import finetune_model
    from octavo.training.recipe import Recipe

    tokenizer = load_tokenizer(demo.MODEL)
    examples = tokenize([{"text": "Y dijo Dios: Sea la luz."}] * 8, tokenizer, 32).examples
    recipe = Recipe(max_steps=4, batch_size=4, lora_r=2, evaluations=4)
    out, other = small_disk / "out", small_disk / "other"

    class AnotherProgram(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 1:
                with pytest.raises(OSError, match="No space"), other.open("wb") as file:
                    while True:
                        file.write(bytes(4096))

    def run(resume, *callbacks):
        model = load(demo.MODEL, dtype=torch.float32, device="cpu")
        return finetune_model(
            model, tokenizer, examples, [], recipe, out, resume=resume, callbacks=list(callbacks)
        )

    with pytest.raises(
        OSError, match=r"the disk is full \(0\.0 MB free\).*--resume goes on from checkpoint-1"
    ):
        run(False, AnotherProgram())
    assert newest_checkpoint(out).name == "checkpoint-1"
    assert not (out / ADAPTER).exists() and not (out / "adapter.partial").exists()
    other.unlink()
    assert run(True).steps == 4
    assert (out / ADAPTER).exists()
