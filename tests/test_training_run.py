"""Whole runs: the numbers, resuming, Ctrl-C, kill -9, what lands in the folder. Tiny models, 8-bit AdamW."""

import io
import os
import signal
import subprocess
import sys
import textwrap
import time
from dataclasses import replace

import pytest
import torch
from transformers import TrainerCallback

import octavo
from octavo.training.data import tokenize
from octavo.training.finetune import finetune_model
from octavo.training.folder import newest_checkpoint, refuse_to_overwrite
from octavo.training.recipe import Recipe

from .models import frozen_bytes, llama_tied, quantized
from .models.tokenizers import byte_tokenizer

peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

TEXT = "the cat sat on the mat and the dog sat on the log. " * 40
SMALL = Recipe(
    max_steps=6,
    batch_size=2,
    max_length=32,
    lora_r=4,
    lora_dropout=0.1,
    learning_rate=5e-3,
    evaluations=3,
    seed=3,
)


def model_and_data():
    model = quantized(llama_tied)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    records = [{"text": TEXT, "packed": True}]
    examples = [e for e in tokenize(records, tokenizer, 32).examples if max(e["input_ids"]) < 256]
    return model, tokenizer, examples[:-4], examples[-4:]


def run(folder, recipe=SMALL, resume=False, callbacks=None):
    model, tokenizer, train, held_out = model_and_data()
    return finetune_model(
        model, tokenizer, train, held_out, recipe, folder, resume=resume, callbacks=callbacks
    )


def training_losses(outcome):
    return {entry["step"]: entry["loss"] for entry in outcome.history if "loss" in entry}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run(folder)


class StopAt(TrainerCallback):
    """Ctrl-C in the middle of a step, or a kill in the middle of saving a checkpoint."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            os.kill(os.getpid(), signal.SIGINT)


def test_it_learns_and_reports(whole):
    outcome = whole[1]
    assert outcome.steps == 6 and not outcome.interrupted
    assert outcome.after["eval_perplexity"] < outcome.before["eval_perplexity"] * 0.95
    assert outcome.before["step"] == 0 and outcome.after["step"] == 6
    assert outcome.after["eval_tokens"] == 4 * 31
    assert 0 < outcome.trainable < outcome.total * 0.2
    assert sorted(training_losses(outcome)) == [1, 2, 3, 4, 5, 6]


def test_the_folder_is_a_standard_adapter(whole):
    folder, outcome = whole
    model, _, _, held_out = model_and_data()
    model = peft.PeftModel.from_pretrained(model, folder).eval()
    nll = 0.0
    for example in held_out:
        ids = torch.tensor([example["input_ids"]])
        with torch.no_grad():
            nll += model(input_ids=ids, labels=ids).loss.item() * 31
    assert nll / (4 * 31) == pytest.approx(outcome.after["eval_loss"], rel=1e-5)


def test_the_frozen_bytes_are_those_of_before(whole):
    assert set(frozen_bytes(whole[1].model).values()) == set(frozen_bytes(quantized(llama_tied)).values())


def test_the_evaluation_counts_tokens_whatever_the_batch(tmp_path):
    model, _, _, held_out = model_and_data()
    held_out[1] = {name: values[:7] for name, values in held_out[1].items()}
    found = []
    for batch in (1, 3):
        model, tokenizer, train, _ = model_and_data()
        recipe = replace(SMALL, batch_size=batch, max_steps=1, learning_rate=1e-12)
        found.append(finetune_model(model, tokenizer, train, held_out, recipe, tmp_path / str(batch)).before)
    assert found[0]["eval_tokens"] == found[1]["eval_tokens"] == 3 * 31 + 6
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_accumulated_batches_are_one_large_batch(tmp_path):
    large = replace(SMALL, batch_size=4, max_steps=2, lora_dropout=0.0, evaluations=0)
    small = replace(large, batch_size=1, gradient_accumulation=4)
    first, second = run(tmp_path / "a", large), run(tmp_path / "b", small)
    for step in (1, 2):
        assert training_losses(first)[step] == pytest.approx(training_losses(second)[step], rel=1e-4)


def test_ctrl_c_saves_and_resuming_gives_the_losses_of_an_uninterrupted_run(whole, tmp_path):
    stopped = run(tmp_path, callbacks=[StopAt(3)])
    assert stopped.interrupted and stopped.steps == 3
    assert newest_checkpoint(tmp_path).name == "checkpoint-3"
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    resumed = run(tmp_path, resume=True)
    assert resumed.steps == 6 and not resumed.interrupted
    expected = training_losses(whole[1])
    assert training_losses(resumed) == expected
    assert resumed.after["eval_loss"] == pytest.approx(whole[1].after["eval_loss"], rel=1e-6)


def test_a_finished_run_is_not_resumed_but_completed(tmp_path):
    recipe = replace(SMALL, max_steps=2, schedule="constant", warmup=0.0)
    outcome = run(tmp_path, recipe)
    with pytest.raises(ValueError, match=r"is finished \(2 steps\)"):
        run(tmp_path, recipe, resume=True)
    # Killed after its last checkpoint, before the adapter was saved.
    saved = tmp_path / "adapter_model.safetensors"
    before = saved.read_bytes()
    saved.unlink()
    again = run(tmp_path, recipe, resume=True)
    assert again.steps == 2 and saved.read_bytes() == before
    assert again.after["eval_loss"] == outcome.after["eval_loss"]


def test_a_run_that_diverges_stops_and_says_so(tmp_path):
    with pytest.raises(
        ValueError, match=r"loss is nan at step \d+: the run has diverged.*Lower --learning-rate"
    ):
        run(tmp_path, replace(SMALL, learning_rate=1e25, warmup=0.0, schedule="constant"))
    assert not (tmp_path / "adapter_model.safetensors").exists()


def test_more_tokens_than_the_model_has_positions(tmp_path):
    model, tokenizer, train, held_out = model_and_data()
    model.config.max_position_embeddings = 16
    with pytest.raises(ValueError, match=r"--max-length: this model reads at most 16 tokens .* has 32"):
        finetune_model(model, tokenizer, train, held_out, SMALL, tmp_path)


@pytest.mark.parametrize("below", [True, False])
def test_an_output_that_cannot_be_made(below, tmp_path):
    file = tmp_path / "a file"
    file.write_text("x")
    with pytest.raises(ValueError, match=r"--output .*a file is no folder"):
        refuse_to_overwrite(file / "run" if below else file)


@pytest.mark.slow
def test_an_incomplete_checkpoint_is_passed_over(tmp_path):
    run(tmp_path, callbacks=[StopAt(2)])
    broken = tmp_path / "checkpoint-9"
    broken.mkdir()
    (broken / "adapter_model.safetensors").write_bytes(b"half of i")
    (broken / "trainer_state.json").write_text('{"global_st')
    assert newest_checkpoint(tmp_path).name == "checkpoint-2"
    assert run(tmp_path, resume=True).steps == 6


def test_resuming_with_other_options_or_without_a_checkpoint_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no complete checkpoint-N"):
        run(tmp_path, resume=True)
    run(tmp_path, callbacks=[StopAt(2)])
    with pytest.raises(ValueError, match=r"--learning-rate was 0\.005, is 0\.1"):
        run(tmp_path, replace(SMALL, learning_rate=0.1), resume=True)
    model, tokenizer, train, held_out = model_and_data()
    with pytest.raises(ValueError, match=r"found others: --validation gives other examples$"):
        finetune_model(model, tokenizer, train, held_out[1:], SMALL, tmp_path, resume=True)
    with pytest.raises(ValueError, match=r"holds a run already: --resume goes on with it"):
        refuse_to_overwrite(tmp_path)
    refuse_to_overwrite(tmp_path / "new")


@pytest.mark.slow
def test_kill_minus_nine_in_mid_run_and_resume(whole, tmp_path):
    script = textwrap.dedent(
        f"""
        from tests.test_training_run import run
        from transformers import TrainerCallback
        import time
        class Slow(TrainerCallback):
            def on_step_end(self, args, state, control, **kwargs):
                time.sleep(0.5)
        run({str(tmp_path)!r}, callbacks=[Slow()])
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    deadline = time.time() + 240
    while not (tmp_path / "checkpoint-4" / "trainer_state.json").exists():
        assert process.poll() is None and time.time() < deadline
        time.sleep(0.02)
    process.kill()
    process.wait()
    resumed = run(tmp_path, resume=True)
    assert resumed.steps == 6
    assert training_losses(resumed) == training_losses(whole[1])


def test_bfloat16_trains_adapters_norms_and_biases_in_float32(tmp_path):
    model, tokenizer, train, held_out = model_and_data()
    recipe = replace(SMALL, train_norms=True, train_biases=True, max_steps=3)
    outcome = finetune_model(model.to(torch.bfloat16), tokenizer, train, held_out, recipe, tmp_path)
    trained = {p.dtype for p in outcome.model.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    assert any("norm" in n for n, p in outcome.model.named_parameters() if p.requires_grad)
    assert outcome.after["eval_loss"] < outcome.before["eval_loss"]
    from safetensors.torch import load_file

    assert any("norm" in name for name in load_file(tmp_path / "adapter_model.safetensors"))


class OverflowOnce(TrainerCallback):
    """An infinite gradient in the first step; keeps the trained values after each step."""

    def __init__(self):
        self.values = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._keep()
        self.trained[0].register_hook(
            lambda grad: torch.full_like(grad, float("inf")) if state.global_step == 0 else grad
        )

    def on_step_end(self, args, state, control, **kwargs):
        self._keep()

    def _keep(self):
        self.values.append([parameter.detach().clone() for parameter in self.trained])


def test_float16_scales_the_loss_and_skips_a_step_that_overflows(tmp_path):
    model, tokenizer, train, held_out = model_and_data()
    watch = OverflowOnce()
    # PyTorch multiplies losses by 65536 at first; a token's loss of 5.5 and its gradients fit all the same.
    recipe = replace(SMALL, max_steps=8, learning_rate=5e-3, optimizer="adamw", warmup=0.0)
    outcome = finetune_model(
        model.to(torch.float16), tokenizer, train, held_out, recipe, tmp_path, callbacks=[watch]
    )
    equal = [
        all(map(torch.equal, before, after))
        for before, after in zip(watch.values[:-1], watch.values[1:], strict=True)
    ]
    assert equal[0] and not equal[-1]
    assert outcome.after["eval_loss"] < outcome.before["eval_loss"] - 0.05
    scale = torch.load(newest_checkpoint(tmp_path) / "scaler.pt", weights_only=True)["scale"]
    assert scale <= 65536 / 2


def test_presets_and_options_that_make_no_sense():
    card = Recipe.of("model-card", learning_rate=None, lora_r=8)
    assert (card.lora_targets, card.lora_r, card.lora_alpha, card.schedule) == ("all", 8, 32, "linear")
    for options, message in (
        ({"batch_size": 0}, "--batch-size: expected a number above 0, found 0"),
        ({"learning_rate": float("inf")}, "--learning-rate: expected a number above 0, found inf"),
        ({"learning_rate": float("nan")}, "--learning-rate: expected a number above 0, found nan"),
        ({"weight_decay": float("nan")}, "--weight-decay: expected a number of at least 0, found nan"),
        ({"evaluations": -1}, "--evaluations: expected a number of at least 0, found -1"),
        ({"seed": -1}, "--seed: expected a number of at least 0, found -1"),
        ({"schedule": "up"}, "--schedule: expected one of cosine, linear, constant, found 'up'"),
        ({"preset": "x"}, "--preset: expected one of model-card"),
        ({"lora_parameters": "experts.w"}, "--lora-dropout: expected 0 with --lora-parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            Recipe.of(**options)


def test_adapters_everywhere_and_on_names_that_do_not_exist():
    from octavo.training.adapters import add_adapters

    from .models import gptj

    model = add_adapters(octavo.prepare_for_training(quantized(gptj)), Recipe.of("model-card"))
    adapted = {
        name.rpartition(".")[2]
        for name, m in model.named_modules()
        if isinstance(m, peft.tuners.lora.LoraLayer)
    }
    assert adapted == {"wte", "lm_head", "q_proj", "k_proj", "v_proj", "out_proj", "fc_in", "fc_out"}
    with pytest.raises(ValueError, match=r"--lora-targets query: no layer.*fc_in"):
        add_adapters(quantized(gptj), Recipe(lora_targets="query"))


def test_curve_and_table_are_written(whole, tmp_path):
    pytest.importorskip("matplotlib")
    from rich.console import Console

    from octavo.training.curves import print_table, write_curve

    _, outcome = whole
    assert write_curve(outcome.history, tmp_path / "loss.png", "a title")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    console = Console(record=True, width=100, file=io.StringIO())
    print_table(outcome.history, console)
    assert f"{outcome.after['eval_perplexity']:.2f}" in console.export_text()
