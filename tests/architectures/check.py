"""What is checked of one architecture, on a small random model, against the plain model.

    the plain model                 saved, loaded again; what it cannot do is not asked of the 8-bit one
    quantized while loading, live, streamed by `convert`, saved and loaded again:   the same bytes
    logits                          those of the plain model that holds the de-quantized weights
    generation, adapters            likewise: the same tokens, the same gradients
    coverage                        of the architecture in its own default size

Example:
    >>> from tests.architectures.check import check
    >>> check("llama", "causal", "/tmp/scratch")["works"]  # doctest: +SKIP
    True
"""

import time
from pathlib import Path
from typing import Any

import torch

import octavo

from .shrink import CannotShrink, default_configs, small_config

LARGEST = 50_000_000
IDS = torch.arange(10, 22)[None]
LOGITS = 1e-4
GRADIENTS = 1e-3
TASKS = ("causal", "seq2seq", "masked")


class PlainFailsError(Exception):
    """The plain model cannot do it either: nothing to compare with."""


def architectures(task: str) -> list[str]:
    """Every model type that the installed transformers maps to a task."""
    from transformers.models.auto import modeling_auto

    names = {
        "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
        "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    }[task]
    return list(names)


def auto_class(task: str) -> Any:
    import transformers

    return {
        "causal": transformers.AutoModelForCausalLM,
        "seq2seq": transformers.AutoModelForSeq2SeqLM,
        "masked": transformers.AutoModelForMaskedLM,
    }[task]


def plain_model(kind: str, task: str) -> Any:
    """A small random model in float32 whose every parameter matters, in evaluation mode.

    Raises:
        PlainFailsError: if transformers cannot build it.
    """
    try:
        config = small_config(kind, task)
        auto = auto_class(task)
        with torch.device("meta"):
            count = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
        if count > LARGEST:
            raise CannotShrink(f"{count / 1e6:.0f} million weights are left")
        torch.manual_seed(0)
        model = auto.from_config(config).float().eval()
    except Exception as error:
        raise PlainFailsError(f"cannot be built small: {_line(error)}") from error
    computed = set(model._keys_to_ignore_on_save or ())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # What is initialized to zeros would hide mistakes.
            if parameter.is_floating_point() and name not in computed:
                parameter += 0.02 * torch.randn_like(parameter)
    return model


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return _logits(model)


def _logits(model: Any) -> torch.Tensor:
    options = {"decoder_input_ids": IDS[:, :6]} if model.config.is_encoder_decoder else {}
    if not model.config.is_encoder_decoder and model.can_generate():
        options["use_cache"] = False
    torch.manual_seed(0)
    out = model(input_ids=IDS, **options)
    found = out.logits if getattr(out, "logits", None) is not None else out[0]
    return found.float()


def check(kind: str, task: str, folder: str | Path) -> dict[str, Any]:
    """Check one architecture; returns its row of the table.

    `works` is whether the 8-bit model did all that the plain model can; `plain` is what the plain model cannot, if that is all.

    Raises:
        AssertionError: if the 8-bit model differs.
        PlainFailsError: if the plain model does not run.
    """
    started, folder = time.monotonic(), Path(folder)
    built = plain_model(kind, task)
    row: dict[str, Any] = {"architecture": kind, "task": task, "class": type(built).__name__}
    expected, plain, exact = _plain_logits(built, folder)
    row.update(full_size(kind, task))
    octavo.reset_fallbacks()
    loaded = octavo.load(folder / "plain", dtype="float32", device="cpu")
    found = logits(loaded)
    row["weights"] = sum(parameter.numel() for parameter in loaded.parameters())
    row["error"] = _relative(found, expected)
    row["quantized"] = sum(isinstance(weight, octavo.OctavoTensor) for weight in loaded.parameters())
    assert row["quantized"], "nothing is quantized"
    row.update(_check_storage(loaded, found, plain, folder, exact))
    row["fallbacks"] = octavo.fallbacks()
    row["seconds"] = round(time.monotonic() - started, 1)
    return row


def _plain_logits(model: Any, folder: Path) -> tuple[torch.Tensor, Any, bool]:
    """Logits of the plain model as it comes back from a file, that model, and whether they are those of before, bit for bit.

    They are not where a sum's order depends on how memory happens to be aligned.
    """
    try:
        first = logits(model)
        if not first.isfinite().all():
            raise PlainFailsError("the plain model gives NaN or infinity")
        model.save_pretrained(folder / "plain")
        again = type(model).from_pretrained(folder / "plain", dtype=torch.float32).eval()
        found = logits(again)
        if not _relative(found, first) < LOGITS:
            raise PlainFailsError("the plain model is another one when it is loaded again")
        return found, again, torch.equal(found, first)
    except PlainFailsError:
        raise
    except Exception as error:
        raise PlainFailsError(f"the plain model fails: {_line(error)}") from error


def _check_storage(loaded: Any, found: torch.Tensor, plain: Any, folder: Path, exact: bool) -> dict[str, str]:
    """Every way to the 8-bit model gives the same bytes; it computes what the de-quantized model does."""
    loaded.save_pretrained(folder / "saved")
    saved = octavo.load(folder / "saved", dtype="float32", device="cpu")
    result = octavo.checkpoint.convert(folder / "plain", folder / "streamed")
    assert result.unexpected == [], f"convert: no place for {result.unexpected}"
    streamed = octavo.load(folder / "streamed", dtype="float32", device="cpu")
    live = octavo.quantize_model(plain)
    same_bytes(live, loaded, "quantized while loading")
    same_bytes(live, saved, "saved and loaded again")
    same_bytes(live, streamed, "streamed")
    for model, how in ((saved, "saving and loading"), (streamed, "streaming")):
        again = logits(model)
        same = torch.equal(again, found) if exact else _relative(again, found) < LOGITS
        assert same, f"logits differ after {how}"
    twin = octavo.dequantize_model(live)
    error = _relative(found, logits(twin))
    assert error < LOGITS, f"logits differ from the de-quantized model's by {error:.1e}"
    generation = _check_generation(streamed, twin)
    adapters = _check_adapters(saved, twin)
    return {"generation": generation, "adapters": adapters}


def same_bytes(expected: Any, found: Any, how: str) -> None:
    """Two models hold the same parameters and the same 8-bit parts."""
    others = dict(found.named_parameters(remove_duplicate=False))
    for name, weight in expected.named_parameters(remove_duplicate=False):
        other = others.pop(name)
        assert type(other) is type(weight), f"{how}: {name} is a {type(other).__name__}"
        pairs = [(weight, other)]
        if isinstance(weight, octavo.OctavoTensor):
            pairs = [(getattr(weight, part), getattr(other, part)) for part in ("qdata", "absmax", "code")]
        assert all(torch.equal(one, two) for one, two in pairs), f"{how}: {name} differs"
    assert not others, f"{how}: {list(others)} besides"


def _check_generation(model: Any, twin: Any) -> str:
    """Greedy tokens, with a cache. Returns "yes", or what the plain model cannot."""
    if not twin.can_generate():
        return "no generation"
    options: dict[str, Any] = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": 1}
    if twin.config.is_encoder_decoder:
        options["decoder_start_token_id"] = 3
    try:
        expected = twin.generate(IDS, **options)
    except Exception as error:
        return f"plain: {_line(error)}"
    assert torch.equal(model.generate(IDS, **options), expected), "other tokens are generated"
    return "yes"


def _check_adapters(model: Any, twin: Any) -> str:
    """LoRA on every linear layer. Returns "yes", or what the plain model cannot."""
    try:
        expected = _adapter_gradients(twin)
    except Exception as error:
        return f"plain: {_line(error)}"
    found = _adapter_gradients(model)
    assert found.keys() == expected.keys(), (
        f"other adapters get gradients: {sorted(found.keys() ^ expected.keys())[:4]}"
    )
    assert any(grad.abs().max() > 0 for grad in found.values()), "no gradient flows"
    one, two = (torch.cat([grads[name].flatten() for name in sorted(found)]) for grads in (found, expected))
    error = _relative(one, two)
    assert error < GRADIENTS, f"gradients of adapters differ by {error:.1e}"
    return "yes"


def _adapter_gradients(model: Any) -> dict[str, torch.Tensor]:
    import peft

    torch.manual_seed(1)
    # State-space layers take the weights of these apart themselves; PEFT refuses them, or they would be left out silently.
    mamba = any("Mamba" in type(module).__name__ for module in model.modules())
    exclude = r".*\.(out_proj|conv1d|dt_proj)" if mamba else None
    options = peft.LoraConfig(
        r=2, target_modules="all-linear", exclude_modules=exclude, init_lora_weights=False
    )
    adapted = peft.get_peft_model(model, options).eval()
    out = _logits(adapted.base_model.model)
    torch.manual_seed(2)
    (out * torch.randn_like(out)).sum().backward()
    grads = {name: p.grad for name, p in adapted.named_parameters() if p.requires_grad and p.grad is not None}
    if not grads:
        raise ValueError("no adapter gets a gradient")
    return grads


def full_size(kind: str, task: str) -> dict[str, Any]:
    """Coverage of the architecture in its own default size, without weights; {} if that cannot be built."""
    from octavo.model import plan_model

    model = _without_weights(kind, task)
    if model is None:
        return {}
    plan = plan_model(model, octavo.OctavoConfig())
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    total = sum(sizes.values())
    done = sum(sizes[name] for name in plan.entries)
    reasons: dict[str, int] = {}
    for name, why in {**plan.other, **{name: why for name, (_, why) in plan.left.items()}}.items():
        reasons[why] = reasons.get(why, 0) + sizes[name]
    return {
        "default_weights": total,
        "coverage": plan.coverage,
        "in_8_bits": done / total,
        "in_float": {why: count / total for why, count in sorted(reasons.items(), key=lambda item: -item[1])},
    }


def _without_weights(kind: str, task: str) -> Any:
    """A model of the architecture's default size on the meta device; None if transformers cannot build one."""
    from transformers import initialization

    configs = default_configs(kind, task)
    while True:
        try:
            config = next(configs)
            with torch.device("meta"), initialization.no_init_weights():
                model = auto_class(task).from_config(config)
        except StopIteration:
            return None
        except Exception:
            continue
        model.tie_weights()
        return model


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-300))


def _line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:160] if text else ''}".rstrip(": ")
