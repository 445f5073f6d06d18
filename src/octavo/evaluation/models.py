"""The models that are measured, each as it is: a quantized one in 8 bits, a plain one plain.

`octavo.load` quantizes a plain model while it loads, which is what a user wants and what a measurement must not do.

    what `src` holds                                  how it is measured
    Octavo's format, a published 8-bit checkpoint     by `octavo.load`
    a plain model (safetensors, .bin)                 by transformers, in its own type
    a GGUF file                                       de-quantized to float by transformers, not quantized again

Example:
    >>> model = load_as_it_is("model")
    >>> round(stored_bits("model-8bit"), 2)
    8.3
"""

from pathlib import Path
from typing import Any

import torch

from ..config import OctavoConfig


def load_as_it_is(
    src: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    config: OctavoConfig | None = None,
    adapter: str | Path | None = None,
) -> Any:
    """Load a model to be measured.

    Args:
        src: anything `octavo.load` takes.
        dtype: type to compute in. Default: as `octavo.load` chooses: the model's own; float32 in target of float16 on a CPU.
        device: Default: "cuda" if there is one, else "cpu".
        config: quantize a plain model in this way while it loads.
        adapter: a PEFT adapter to put on top.

    Returns:
        The transformers model, in evaluation mode.

    Raises:
        octavo.checkpoint.CheckpointError: as `octavo.load`.
        ValueError: on an unknown type or device.
    """
    from ..checkpoint import open_source
    from ..checkpoint.build import build_model
    from ..loading import compute_dtype, device_named, dtype_named, from_pretrained, load

    with open_source(src) as source:
        if config is None and not source.eight_bit:
            target = device_named(device)
            asked = dtype_named(dtype) or compute_dtype(source.dtype, target)
            if source.kind == "packed":
                return build_model(source, None, asked, {"": str(target)}).eval()
            model = from_pretrained(source, asked, target)
            if adapter is not None:
                from ..integrations.peft import add_adapter

                add_adapter(model, adapter)
            return model.eval()
    return load(src, dtype, device, config=config, adapter=adapter)


def stored_bits(src: str | Path) -> float:
    """Stored bits per weight: of the matrices in 8 bits, scales and codebooks included; of a plain model, of all its matrices."""
    from ..checkpoint.inspection import report

    found = report(src)
    if found.quantized:
        return found.bits_per_weight
    matrices = [item for item in found.items if len(item.shape) > 1]
    return 8 * sum(item.nbytes for item in matrices) / max(sum(item.weights for item in matrices), 1)
