"""TRL's SFTTrainer trains an Octavo model as it would any other, guarded by GradientGuard."""

import pytest
import torch

import octavo
from octavo.training import GradientGuard

from .models import frozen_bytes, llama_tied, quantized
from .models.tokenizers import byte_tokenizer

peft = pytest.importorskip("peft")
trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
def test_sft_trainer(tmp_path):
    torch.manual_seed(0)
    model = octavo.prepare_for_training(quantized(llama_tied))
    before = frozen_bytes(model)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)
    data = datasets.Dataset.from_list([{"prompt": f"{n}+{n}=", "completion": str(2 * n)} for n in range(32)])
    trainer = trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(
            str(tmp_path),
            max_steps=8,
            per_device_train_batch_size=8,
            learning_rate=1e-2,
            optim="adamw_bnb_8bit",
            logging_steps=1,
            report_to=[],
            use_cpu=True,
            bf16=False,
            save_strategy="no",
        ),
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[GradientGuard()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.3
    after = frozen_bytes(trainer.model)
    assert set(after.values()) == set(before.values()) and len(after) == len(before)
