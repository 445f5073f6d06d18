"""Every method of the installed PEFT trains on an 8-bit model as on the plain one: the same loss, the same gradients.

The methods are PEFT's own list, so that a new one is tried the day it is installed. Options are given only where a method has no
default that fits a model of 64 channels; what differs is in `EXCEPTIONS`, with the
reason.
"""

import pytest
import torch

from .conftest import relative_error
from .models import llama_tied, move_adapters, plain_twin, quantized

peft = pytest.importorskip("peft")
mapping = pytest.importorskip("peft.mapping")

# So many that all kinds of kernels have their turn: the one for a few tokens made no views, which hid a fault.
IDS = torch.randint(0, 256, (2, 64), generator=torch.Generator().manual_seed(5))
FLOAT32 = 1e-5
LAYERS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
PROMPT = {"num_virtual_tokens": 4}
OPTIONS = {
    "ADALORA": {**LAYERS, "init_r": 6, "target_r": 4, "total_step": 10},
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "C3A": {**LAYERS, "block_size": 32},
    "CARTRIDGE": {**PROMPT, "num_frozen_tokens": 1},
    "CPT": {
        "cpt_token_ids": [1, 2, 3, 4],
        "cpt_mask": [1, 1, 1, 1],
        "cpt_tokens_type_mask": [1, 2, 2, 4],
    },
    "LN_TUNING": {},
    "MULTITASK_PROMPT_TUNING": {**PROMPT, "num_tasks": 2},
    "POLY": {**LAYERS, "r": 4, "n_tasks": 2},
    "PREFIX_TUNING": {**PROMPT, "prefix_projection": True},
    "PROMPT_TUNING": PROMPT,
    "P_TUNING": {**PROMPT, "encoder_hidden_size": 32},
    "ROAD": {**LAYERS, "group_size": 32},
    "SHADOW": {},
    "SHIRA": {**LAYERS, "r": 4},
    "TRAINABLE_TOKENS": {"target_modules": ["embed_tokens"], "token_indices": [1, 5, 7]},
    "VBLORA": {**LAYERS, "vector_length": 32, "num_vectors": 8},
    "WAVEFT": {**LAYERS, "n_frequency": 100},
}
# What the forward pass is told beside the tokens.
INPUTS = {
    "POLY": {"task_ids": torch.tensor([0, 1])},
    "MULTITASK_PROMPT_TUNING": {"task_ids": torch.tensor([0, 1])},
}
# Methods whose numbers are not those of the plain model: how far from them they may be, and why.
EXCEPTIONS = {
    "SHIRA": (
        0.01,
        "adds to a copy of the weight in each pass, and the copy, in 8 bits, is rounded once more",
    ),
}


@pytest.fixture(scope="module")
def experts(tmp_path_factory):
    """Two saved LoRA adapters, which X-LoRA mixes."""
    folders = {}
    for name in ("0", "1"):  # as X-LoRA numbers them
        folders[name] = str(tmp_path_factory.mktemp("expert"))
        model = peft.get_peft_model(llama_tied(), peft.LoraConfig(r=4, task_type="CAUSAL_LM", **LAYERS))
        move_adapters(model)
        model.save_pretrained(folders[name])
    return folders


def trained(model, method: str, experts: dict[str, str]):
    """The loss, and gradients by name of each parameter that is to be trained."""
    config_class = mapping.PEFT_TYPE_TO_CONFIG_MAPPING[method]
    options = OPTIONS.get(method, LAYERS)
    if method == "XLORA":
        model.config.use_cache = False
        options = {"hidden_size": 64, "adapters": experts, "use_trainable_adapters": True}
    torch.manual_seed(1)
    config = config_class(task_type="CAUSAL_LM", **options)
    model = peft.get_peft_model(model, config)
    move_adapters(model)
    model.train()
    torch.manual_seed(2)
    loss = model(input_ids=IDS, labels=IDS, **INPUTS.get(method, {})).loss
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", sorted(kind.value for kind in mapping.PEFT_TYPE_TO_CONFIG_MAPPING))
def test_method_trains_as_on_the_plain_model(method, experts):
    tolerance, _ = EXCEPTIONS.get(method, (FLOAT32, ""))
    model = quantized(llama_tied)
    twin = plain_twin(model)
    loss, found = trained(model, method, experts)
    expected_loss, expected = trained(twin, method, experts)
    assert found.keys() == expected.keys() and found
    torch.testing.assert_close(loss, expected_loss, rtol=tolerance, atol=0)
    for name, gradient in expected.items():
        assert (found[name] is None) == (gradient is None), name
        if gradient is not None:
            assert relative_error(found[name], gradient) < tolerance, name
    assert any(gradient is not None and gradient.any() for gradient in found.values())
