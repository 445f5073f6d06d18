"""A fine-tuning run: the model in 8 bits, adapters on top, transformers' Trainer around it.

Everything lands in the output folder:

    adapter_config.json, adapter_model.safetensors   a standard PEFT adapter, with the tokenizer
    octavo_prompts.json                              what prompts it was trained on (`prompts`)
    checkpoint-N/                                    where `--resume` goes on
    loss.png, training.json, runs/                   curve, table, TensorBoard logs

Example:
    >>> from octavo.training.finetune import finetune_model
    >>> examples = [{"input_ids": ids[:64].tolist(), "labels": ids[:64].tolist()}] * 4
    >>> tuned = octavo.load("model-8bit", dtype="float32")
    >>> outcome = finetune_model(tuned, tokenizer, examples, examples, Recipe(max_steps=1), "tuned")
    >>> outcome.after["eval_loss"] > 0
    True
"""

import math
import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import ProgressCallback, TrainerState
from transformers.trainer_utils import SaveStrategy

from ..checkpoint.writing.durable import write_json
from ..checkpoint.writing.in_use import Lock
from .adapters import add_adapters
from .card import Origin, card_callback, write_card
from .curves import write_curve
from .data import Example, check_length, collate
from .folder import (
    ADAPTER,
    check_space,
    keep_options,
    mark,
    move_into,
    newest_checkpoint,
    told_of_a_full_disk,
)
from .prepare import GradientGuard, LossGuard, prepare_for_training
from .recipe import Recipe
from .sharding import held_bytes, keep_accelerate_from_sharding, shard_frozen, sharding_asked
from .trainer import OctavoTrainer, Progress, StopOnInterrupt

OPTIMIZERS = {"adamw_8bit": "adamw_bnb_8bit", "adamw": "adamw_torch"}


@dataclass
class Outcome:
    """What came of a run.

    Attributes:
        model: PEFT's model, trained.
        before, after: "eval_loss", "eval_perplexity", "eval_tokens" on the validation set; empty without one.
        history: the Trainer's log, one dict per entry.
        steps: steps taken in all.
        interrupted: Ctrl-C stopped it; `--resume` goes on.
        trainable, total: numbers of parameters.
        held_bytes: bytes of frozen 8-bit weights in this process: all, or its share under FSDP.
    """

    model: Any
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    history: list[dict[str, float]] = field(default_factory=list)
    steps: int = 0
    interrupted: bool = False
    trainable: int = 0
    total: int = 0
    held_bytes: int = 0


def training_type(asked: str, device: torch.device) -> torch.dtype:
    """The type to compute in: `asked`, or for "auto" bfloat16 where a GPU has it, else float16; float32 on a CPU."""
    if asked != "auto":
        return {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}[asked]
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def training_device() -> torch.device:
    """This process's own GPU, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))


def arguments_of(
    recipe: Recipe, output: str | Path, steps: int, dtype: torch.dtype, validate: bool
) -> TrainingArguments:
    """The Trainer's arguments for a recipe.

    Args:
        steps: optimizer steps in all: decides how often is logged, evaluated and saved.
        validate: whether there is a validation set.
    """
    every = max(1, math.ceil(steps / max(recipe.evaluations, 1)))
    arguments = TrainingArguments(
        output_dir=str(output),
        num_train_epochs=recipe.epochs,
        max_steps=recipe.max_steps or -1,
        per_device_train_batch_size=recipe.batch_size,
        per_device_eval_batch_size=recipe.batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation,
        learning_rate=recipe.learning_rate,
        lr_scheduler_type=recipe.schedule,
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        max_grad_norm=recipe.max_grad_norm,
        optim=OPTIMIZERS[recipe.optimizer],
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        seed=recipe.seed,
        data_seed=recipe.seed,
        logging_steps=max(1, steps // 100),
        logging_first_step=True,
        # A loss that is no number must be seen (`prepare.LossGuard`), not replaced by 0.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if validate and recipe.evaluations else "no",
        eval_steps=every,
        save_strategy=SaveStrategy.STEPS,
        save_steps=every,
        save_total_limit=2,
        report_to=["tensorboard"] if _has("tensorboard") else [],
        remove_unused_columns=False,
        # Every adapter takes part in every step.
        ddp_find_unused_parameters=False,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    if arguments.n_gpu > 1:
        # Several GPUs in one process: use the first, never nn.DataParallel. `accelerate launch` uses them all.
        arguments._n_gpu = 1
    return arguments


def _has(package: str) -> bool:
    from importlib.util import find_spec

    return find_spec(package) is not None


def steps_of(recipe: Recipe, examples: int, processes: int = 1) -> int:
    """Optimizer steps that a recipe takes over a number of examples."""
    if recipe.max_steps:
        return recipe.max_steps
    batches = math.ceil(examples / (recipe.batch_size * processes))
    return max(1, math.ceil(math.ceil(batches / recipe.gradient_accumulation) * recipe.epochs))


def finetune_model(
    model: Any,
    tokenizer: Any,
    train: list[Example],
    held_out: list[Example],
    recipe: Recipe,
    output: str | Path,
    *,
    origin: Origin | None = None,
    resume: bool = False,
    callbacks: list[Any] | None = None,
) -> Outcome:
    """Train adapters on a quantized model and save them.

    Args:
        model: a transformers model with 8-bit weights.
        tokenizer: saved with the adapter; its padding token fills batches. May be None.
        train, held_out: examples (`octavo.training.data.tokenize`); `held_out` may be empty.
        output: the folder to write.
        origin: where the model and the examples come from; kept with the adapter, for whoever uses it.
        resume: continue from the newest complete checkpoint in `output`.

    Raises:
        ValueError: if there is nothing to train on, or `resume` meets other options than the run was started
        with, or another process trains into `output`. FileNotFoundError: if `resume` finds no checkpoint.
    """
    if not train:
        raise ValueError("nothing to train on: every example is empty, or its prompt fills --max-length")
    check_length(model.config, max(len(example["input_ids"]) for example in (*train, *held_out)))
    output = Path(output)
    checkpoint = newest_checkpoint(output) if resume else None
    output.mkdir(parents=True, exist_ok=True)
    # Other runs are kept out until this one returns; of its own processes the first does that.
    held = Lock(output) if int(os.environ.get("RANK", 0)) == 0 else None
    keep_options(recipe, train, held_out, output, checkpoint is not None)
    if origin is not None:
        # Before the first step: a checkpoint of a run that was killed is asked in the same way.
        origin.prompts.save(output)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    steps = steps_of(recipe, len(train), processes)
    state = TrainerState.load_from_json(str(checkpoint / "trainer_state.json")) if checkpoint else None
    finished = state is not None and state.global_step >= steps
    if finished and (output / ADAPTER).exists():
        raise ValueError(
            f"--resume: the run in {output} is finished ({steps} steps); to train further start a new run with another --output"
        )
    set_seed(recipe.seed)
    # Whether a step computes in 16 bits was settled when the model was loaded.
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    prepare_for_training(model, gradient_checkpointing=recipe.gradient_checkpointing)
    model = add_adapters(model, recipe)
    if origin is not None:
        model.peft_config["default"].base_model_name_or_path = origin.absolute_base
    outcome = Outcome(model)
    outcome.trainable = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    outcome.total = sum(parameter.numel() for parameter in model.parameters())
    # float32 adapters, once in a checkpoint and once at the end; the optimizer's state, where it is smallest, is half of that.
    check_space(output, 10 * outcome.trainable)
    shard = sharding_asked()
    if shard:
        keep_accelerate_from_sharding()
    arguments = arguments_of(recipe, output, steps, dtype, bool(held_out))
    arguments.eval_on_start = bool(held_out) and checkpoint is None
    if shard:
        shard_frozen(model, arguments.device)
    pad = next((token for token in _padding(tokenizer) if token is not None), 0)
    trainer = OctavoTrainer(
        model=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held_out or None,
        data_collator=partial(collate, pad=pad),
        processing_class=tokenizer,
        callbacks=[
            GradientGuard(),
            LossGuard(),
            *([card_callback(origin, recipe)] if origin is not None else []),
            *(callbacks or []),
            # Behind whatever else writes into a checkpoint.
            _Marks(),
        ],
    )
    if not arguments.disable_tqdm:
        trainer.remove_callback(ProgressCallback)
        trainer.add_callback(Progress)
    stop = StopOnInterrupt(trainer.accelerator)
    trainer.add_callback(stop)
    with stop, told_of_a_full_disk(output):
        if state is not None and finished and not shard:
            # It was killed between its last checkpoint and saving the adapter; the Trainer would take one more step.
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state = state
        else:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if held_out and not stop.interrupted and not _evaluated_at(trainer.state):
            trainer.evaluate()
        outcome.model, outcome.steps = trainer.model, trainer.state.global_step
        outcome.interrupted, outcome.history = stop.interrupted, trainer.state.log_history
        _save(trainer, output, origin, recipe, outcome)
    evaluations = [entry for entry in outcome.history if "eval_loss" in entry]
    if evaluations:
        outcome.before, outcome.after = evaluations[0], evaluations[-1]
    outcome.held_bytes = held_bytes(model)
    if held is not None:
        held.close()
    return outcome


class _Marks(TrainerCallback):
    """Marks each checkpoint that the Trainer has saved, before it saves the next one and removes one before it."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            mark(Path(args.output_dir) / f"checkpoint-{state.global_step}")


def _save(trainer: Any, output: Path, origin: Origin | None, recipe: Recipe, outcome: Outcome) -> None:
    """Write the adapter and what is told of the run (log, curve, card) aside, and move them in place whole, the adapter last."""
    partial = output / "adapter.partial"
    try:
        trainer.save_model(str(partial))
        if trainer.args.should_save:
            if origin is not None:
                write_card(partial, origin, recipe, outcome.history, output)
                write_json(partial / "training.json", outcome.history, indent=1)
                title = f"{origin.base} on {', '.join(origin.data)}"
                write_curve(outcome.history, partial / "loss.png", title=title)
            move_into(partial, output)
    finally:
        if trainer.args.should_save:
            shutil.rmtree(partial, ignore_errors=True)


def _padding(tokenizer: Any) -> tuple[int | None, int | None]:
    """Tokens to fill batches with, best first. They are masked: any that the model knows will do."""
    return getattr(tokenizer, "pad_token_id", None), getattr(tokenizer, "eos_token_id", None)


def _evaluated_at(state: Any) -> bool:
    """Whether the log holds an evaluation of the last step."""
    return any("eval_loss" in entry and entry["step"] == state.global_step for entry in state.log_history)
