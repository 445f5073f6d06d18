"""transformers' Trainer with the loss in chunks, and perplexity counted token by token.

Everything else (the loop, schedules, checkpoints, distribution) is the Trainer's own.

Example:
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import TrainingArguments
    >>> adapted = get_peft_model(octavo.load("model-8bit"), LoraConfig(target_modules="all-linear"))
    >>> examples = [{"input_ids": ids[:64].tolist(), "labels": ids[:64].tolist()}]
    >>> arguments = TrainingArguments("out", report_to=[], disable_tqdm=True)
    >>> trainer = OctavoTrainer(model=adapted, args=arguments, eval_dataset=examples)
    >>> trainer.evaluate()["eval_perplexity"] > 1
    {'eval_loss': ..., 'eval_perplexity': ..., 'eval_tokens': 63, 'epoch': 0}
    True
"""

import math
import signal
import threading
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import ProgressCallback

from ..integrations.distributed import ignore_frozen
from .loss import IGNORED, language_model_loss
from .sharding import data_parallel, is_sharded


class OctavoTrainer(Trainer):
    """A Trainer whose logits never exist all at once, and which evaluates to a perplexity."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # The loss below is divided by the number of tokens of the whole accumulated batch.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._loss_shifts_labels = True

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.args.fp16 and self.accelerator.device.type == "cpu":
            # accelerate computes in float16 and scales the loss on accelerators only.
            self.accelerator.native_amp = True
            self.accelerator.scaler = torch.amp.GradScaler("cpu")

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        total, tokens = language_model_loss(model, inputs, self.accelerator.unwrap_model(model))
        count = tokens if num_items_in_batch is None else num_items_in_batch
        # DDP averages the gradients of the processes, while `count` is the number of tokens in all of them.
        processes = self.accelerator.num_processes if num_items_in_batch is not None else 1
        loss = total * processes / count
        return (loss, {}) if return_outputs else loss

    def _wrap_model(self, model, training=True, dataloader=None):
        if not training or not is_sharded(model):
            # DDP would broadcast the frozen weights, as floats.
            return super()._wrap_model(ignore_frozen(model), training, dataloader)
        # accelerate wraps no model that holds shards. It prepares autocast; DDP is for the adapters.
        self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        return data_parallel(model)

    def _move_model_to_device(self, model, device):
        # FSDP2 has put the shards where they belong.
        if not is_sharded(model):
            super()._move_model_to_device(model, device)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval") -> dict[str, float]:
        """Loss per token and perplexity over a data set, every token counted once whatever the batch size.

        Returns:
            {"eval_loss", "eval_perplexity", "eval_tokens"}, which also goes to the log.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        bare: Any = self.model
        model = self._wrap_model(bare, training=False)
        model.eval()
        total = torch.zeros(2, dtype=torch.float64, device=self.args.device)
        for batch in self._shares_of(dataset):
            with torch.no_grad():
                loss, tokens = language_model_loss(
                    model, self._prepare_inputs(batch), self.accelerator.unwrap_model(model)
                )
            total += torch.stack((loss.double(), tokens.double()))
        loss, tokens = self.accelerator.reduce(total, "sum").tolist()
        mean = loss / max(tokens, 1)
        metrics = {
            f"{metric_key_prefix}_loss": mean,
            f"{metric_key_prefix}_perplexity": math.exp(min(mean, 700)),
            f"{metric_key_prefix}_tokens": int(tokens),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def _shares_of(self, dataset) -> DataLoader:
        """This process's share of a data set. All processes get as many batches: FSDP gathers weights in each."""
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        examples = [dataset[index] for index in range(rank, len(dataset), processes)]
        if len(examples) < math.ceil(len(dataset) / processes):
            first = dataset[0]
            examples.append({**first, "labels": [IGNORED] * len(first["input_ids"])})
        shares: Any = examples
        return DataLoader(shares, self.args.per_device_eval_batch_size, collate_fn=self.data_collator)


class Progress(ProgressCallback):
    """The Trainer's progress bar, with the newest losses beside it in place of a line for each."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if self.training_bar is not None and logs:
            shown = {name: logs[name] for name in ("loss", "eval_loss", "eval_perplexity") if name in logs}
            self._shown = {**getattr(self, "_shown", {}), **shown}
            self.training_bar.set_postfix({name: f"{value:.3f}" for name, value in self._shown.items()})


class StopOnInterrupt(TrainerCallback):
    """Ctrl-C while this context is open: finish the step, save a checkpoint, stop. A second Ctrl-C stops at
    once.

    Attributes:
        interrupted: whether the run was stopped.
    """

    def __init__(self, accelerator: Any):
        self.accelerator = accelerator
        self.asked = self.interrupted = False
        self._previous: Any = None

    def _handle(self, number, frame):
        self.asked = True
        signal.signal(signal.SIGINT, self._previous)

    def __enter__(self) -> "StopOnInterrupt":
        # Python gives signals to the main thread only.
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *exception: Any) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def on_step_end(self, args, state, control, **kwargs):
        asked = self.asked
        if self.accelerator.num_processes > 1:
            # All processes must stop at the same step, whichever was told to.
            flag = torch.tensor(float(asked), device=self.accelerator.device)
            asked = bool(self.accelerator.reduce(flag, "sum") > 0)
        if asked:
            self.interrupted = True
            control.should_save = control.should_training_stop = True
