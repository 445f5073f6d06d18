"""prepare_for_training, and runs that would train nothing stopping before their first step."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import octavo
from octavo.training import GradientGuard, check_gradients, prepare_for_training

from .models import gptj, llama_tied, quantized

peft = pytest.importorskip("peft")

IDS = torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(5))
LORA = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
DATA = [{"input_ids": row, "labels": row} for row in IDS]


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        folder, max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **options
    )
    return Trainer(model, arguments, train_dataset=DATA, callbacks=[GradientGuard()])


def test_it_freezes_checkpoints_and_switches_the_cache_off():
    model = prepare_for_training(quantized(gptj))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.is_gradient_checkpointing and model.config.use_cache is False
    function = model.transformer._gradient_checkpointing_func
    assert function.keywords["use_reentrant"] is False
    assert model.get_input_embeddings()(IDS).requires_grad


def test_norms_in_float32_by_choice():
    model = quantized(llama_tied).to(torch.bfloat16)
    prepare_for_training(model, float32_norms=True)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16
    model = peft.get_peft_model(model, LORA).train()
    with torch.autocast("cpu", torch.bfloat16):
        model(input_ids=IDS, labels=IDS).loss.backward()
    check_gradients(model)


def test_a_plain_model_is_refused():
    with pytest.raises(
        ValueError, match="expected a model with 8-bit weights, found none in GPTJForCausalLM"
    ):
        prepare_for_training(gptj())


def test_the_trainer_trains_and_the_frozen_bytes_stay(tmp_path):
    model = peft.get_peft_model(prepare_for_training(quantized(llama_tied)), LORA)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    stored = {n: p.qdata.clone() for n, p in model.named_parameters() if isinstance(p, octavo.OctavoTensor)}
    trainer(model, tmp_path).train()
    after = dict(model.named_parameters())
    assert any(not torch.equal(after[name], value) for name, value in before.items())
    assert all(torch.equal(after[name].qdata, value) for name, value in stored.items())


def test_no_adapter_stops_at_once(tmp_path):
    model = prepare_for_training(quantized(llama_tied)).train()
    with pytest.raises(RuntimeError, match=r"no parameter requires a gradient.*get_peft_model"):
        model(input_ids=IDS, labels=IDS)


def test_inactive_adapters_stop_before_step_one(tmp_path):
    model = peft.get_peft_model(prepare_for_training(quantized(llama_tied)), LORA)
    for module in model.modules():
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module._active_adapter = []
    run = trainer(model, tmp_path)
    with pytest.raises(RuntimeError, match=r"no gradient flows.*28 trainable.*not active"):
        run.train()
    assert run.state.global_step == 0


@pytest.mark.filterwarnings("ignore")
def test_reentrant_checkpointing_that_loses_the_gradient_is_named(tmp_path):
    model = prepare_for_training(quantized(llama_tied), gradient_checkpointing=False)
    model.disable_input_require_grads()
    model = peft.get_peft_model(model, LORA)
    base = model.get_base_model()
    base.gradient_checkpointing_enable({"use_reentrant": True})
    base.disable_input_require_grads()
    with pytest.raises(RuntimeError, match="reentrant gradient checkpointing"):
        base.train()(input_ids=IDS, labels=IDS)


def test_check_gradients_after_a_backward_pass():
    model = peft.get_peft_model(prepare_for_training(quantized(llama_tied)), LORA).train()
    with pytest.raises(RuntimeError, match="no gradient flows"):
        check_gradients(model)
    model(input_ids=IDS, labels=IDS).loss.backward()
    check_gradients(model)


def test_two_gpus_in_one_process_never_become_data_parallel(tmp_path, monkeypatch):
    model = peft.get_peft_model(prepare_for_training(quantized(llama_tied)), LORA)
    arguments = TrainingArguments(tmp_path, max_steps=1, report_to=[], use_cpu=True, save_strategy="no")
    assert arguments.n_gpu == 0
    # Two GPUs, as far as the Trainer knows.
    arguments._n_gpu = 2
    with pytest.raises(RuntimeError, match=r"2 GPUs.*accelerate launch --num_processes 2"):
        GradientGuard().on_train_begin(arguments, None, None, model=model)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    with pytest.warns(UserWarning, match="DataParallel, which cannot copy 8-bit weights"):
        prepare_for_training(quantized(llama_tied))
