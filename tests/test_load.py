"""`octavo.load`: every kind of source in one call."""

import json

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

import octavo
from octavo.checkpoint import CheckpointError

from .models.published import publish, tiny_gptj

IDS = torch.arange(11)[None] * 7


def refusal() -> str:
    """Why transformers refuses the installed PEFT; empty if it does not."""
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        return str(error)
    return ""


needs_peft_for_transformers = pytest.mark.skipif(bool(refusal()), reason=f"transformers: {refusal()}")


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def quantized(model):
    return [weight for weight in model.parameters() if isinstance(weight, octavo.OctavoTensor)]


# 64: a row is one block of gcd 64; 160: blocks of 4096 straddle rows, gcd 32.
@pytest.mark.parametrize("width", [64, 160])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_published_checkpoint_gives_the_logits_of_the_dequantized_model(tmp_path, width, file):
    expected = publish(tiny_gptj(width), tmp_path, file=file)
    model = octavo.load(tmp_path, device="cpu")
    assert len(quantized(model)) == 14
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


def test_published_checkpoint_with_short_blocks_is_fitted_with_a_warning(tmp_path):
    expected = publish(tiny_gptj(80), tmp_path)
    with pytest.warns(UserWarning, match="quantized anew"):
        model = octavo.load(tmp_path, device="cpu")
    error = (logits(model) - logits(expected)).norm() / logits(expected).norm()
    assert 0 < error < 0.02


def test_published_adapters_work(tmp_path):
    expected = publish(tiny_gptj(64), tmp_path, adapters=True)
    model = octavo.load(tmp_path, device="cpu")
    torch.testing.assert_close(logits(model), logits(expected), rtol=0, atol=1e-5)


@needs_peft_for_transformers
def test_published_adapters_can_be_switched_off(tmp_path):
    publish(tiny_gptj(64), tmp_path, adapters=True)
    model = octavo.load(tmp_path, device="cpu")
    with_adapter = logits(model)
    assert model.active_adapters() == ["published"]
    model.disable_adapters()
    assert (logits(model) - with_adapter).abs().max() > 1e-2


def test_plain_model_is_quantized_while_loading_and_reloads_bit_for_bit(tmp_path):
    plain = tiny_gptj()
    plain.save_pretrained(tmp_path / "plain")
    model = octavo.load(tmp_path / "plain", device="cpu")
    assert len(quantized(model)) == 14
    error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < error < 0.02
    model.save_pretrained(tmp_path / "eight")
    assert torch.equal(logits(octavo.load(tmp_path / "eight", device="cpu")), logits(model))
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "eight")), logits(model))


def test_a_model_keeps_its_own_configuration_where_its_class_is_anothers(tmp_path, monkeypatch):
    """As EXAONE, whose class is Llama's: names in its files depend on which it is."""
    plain = tiny_gptj()
    other = type("OtherConfig", (type(plain.config),), {"model_type": "octavo_other"})
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "octavo_other", other)
    plain.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "octavo_other"}))
    model = octavo.load(tmp_path, device="cpu")
    assert type(model).__name__ == "GPTJForCausalLM" and type(model.config) is other
    model.save_pretrained(tmp_path / "eight")
    again = octavo.load(tmp_path / "eight", device="cpu")
    assert type(again.config) is other and torch.equal(logits(again), logits(model))


def test_bin_checkpoint(tmp_path):
    plain = tiny_gptj()
    torch.save(plain.state_dict(), tmp_path / "pytorch_model.bin")
    plain.config.save_pretrained(tmp_path)
    plain.save_pretrained(tmp_path / "safe")
    assert torch.equal(
        logits(octavo.load(tmp_path, device="cpu")), logits(octavo.load(tmp_path / "safe", device="cpu"))
    )


KINDS = {
    "lora": {"target_modules": "all-linear", "init_lora_weights": False},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "norms and biases": {"target_modules": ["q_proj"], "modules_to_save": ["ln_f", "ln_1"], "bias": "all"},
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)
def test_adapter_on_top(options, tmp_path):
    peft = pytest.importorskip("peft")
    plain = tiny_gptj()
    plain.save_pretrained(tmp_path / "plain")
    model = octavo.load(tmp_path / "plain", device="cpu")
    base = logits(model)
    adapted = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    expected = logits(adapted)
    adapted.save_pretrained(tmp_path / "adapter")
    loaded = octavo.load(tmp_path / "plain", device="cpu", adapter=tmp_path / "adapter")
    torch.testing.assert_close(logits(loaded), expected)
    assert (base - expected).abs().max() > 1e-2
    assert type(loaded) is type(plain)


@needs_peft_for_transformers
def test_an_adapter_on_top_can_be_switched_off(tmp_path):
    import peft

    tiny_gptj().save_pretrained(tmp_path / "plain")
    model = octavo.load(tmp_path / "plain", device="cpu")
    base = logits(model)
    options = KINDS["lora"]
    peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(
        tmp_path / "adapter"
    )
    loaded = octavo.load(tmp_path / "plain", device="cpu", adapter=tmp_path / "adapter")
    assert loaded.active_adapters() == ["default"] and not torch.equal(logits(loaded), base)
    loaded.disable_adapters()
    assert torch.equal(logits(loaded), base)


def test_what_is_no_adapter_is_named(tmp_path):
    pytest.importorskip("peft")
    tiny_gptj().save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match=r"expected a PEFT adapter folder, found no adapter_config.json"):
        octavo.load(tmp_path / "plain", device="cpu", adapter=tmp_path / "plain")
    with pytest.raises(ValueError, match=r"nowhere: no such folder"):
        octavo.load(tmp_path / "plain", device="cpu", adapter=tmp_path / "nowhere")


@pytest.mark.parametrize("dtype", ["float16", torch.bfloat16, "float32"])
def test_dtype_asked_for(tmp_path, dtype):
    tiny_gptj().save_pretrained(tmp_path)
    model = octavo.load(tmp_path, dtype=dtype, device="cpu")
    assert {weight.dtype for weight in quantized(model)} == {model.dtype}
    assert str(model.dtype).removeprefix("torch.") == str(dtype).removeprefix("torch.")
    assert {weight.absmax.dtype for weight in quantized(model)} == {torch.float16}


def test_half_precision_checkpoint_computes_in_float32_on_a_cpu(tmp_path):
    tiny_gptj().half().save_pretrained(tmp_path)
    assert octavo.load(tmp_path, device="cpu").dtype == torch.float32


def test_errors_say_what_to_do(tmp_path):
    plain = tiny_gptj()
    plain.save_pretrained(tmp_path / "plain")
    with pytest.raises(ValueError, match="float32, float16, bfloat16, found int4"):
        octavo.load(tmp_path / "plain", dtype="int4")
    octavo.load(tmp_path / "plain", device="cpu").save_pretrained(tmp_path / "eight")
    with pytest.raises(ValueError, match="quantized already"):
        octavo.load(tmp_path / "eight", config=octavo.OctavoConfig())
    with pytest.raises(CheckpointError):
        octavo.load(tmp_path / "nothing-here")
    with pytest.raises(ValueError, match="tokenizer"):
        octavo.load_tokenizer(tmp_path / "plain")
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="no GPU"):
            octavo.load(tmp_path / "plain", device="cuda")


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    """A failed connection is an error of the HTTP library, which is no OSError."""
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    library = next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")

    class ConnectError(library):
        pass

    def unreachable(*arguments, **options):
        raise ConnectError("name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_files", unreachable)
    with pytest.raises(CheckpointError, match=r"cannot be reached \(ConnectError\)"):
        octavo.load("nobody/nothing")
