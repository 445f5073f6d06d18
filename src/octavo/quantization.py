"""`quantize_model`: the matrices of a model in memory, quantized in place.

Example:
    >>> import torch, octavo
    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.Linear(64, 100))
    >>> octavo.quantize_model(model, octavo.OctavoConfig())[1].weight
    OctavoTensor(shape=(100, 64), dtype=torch.float32, device=cpu, block_size=64, codebook='fitted')
"""

from collections.abc import Callable

from torch import nn

from .config import OctavoConfig
from .model import plan_model, set_parameter
from .tensor import OctavoTensor


def quantize_model(
    model: nn.Module, config: OctavoConfig | None = None, progress: Callable[[str, int], None] | None = None
) -> nn.Module:
    """Quantize a model's matrices in place.

    Args:
        model: any module; tied parameters stay tied.
        config: what is quantized and how. Default: `OctavoConfig()`.
        progress: called with each parameter's name and number of weights once it is done.

    Returns:
        The model itself, its compute dtypes unchanged; a transformers model can now be saved with `save_pretrained`.

    Raises:
        CoverageError: if more than 1 % of the matrices would stay in float without a `skip` pattern.
        ValueError: on NaN or infinity in a weight, naming it; on a skip pattern that matches nothing.
    """
    config = config or OctavoConfig()
    if any(isinstance(parameter, OctavoTensor) for parameter in model.parameters()):
        raise ValueError(
            "the model is quantized already; load it from its float weights to quantize it otherwise"
        )
    plan = plan_model(model, config)
    plan.check()
    for entry in plan.entries.values():
        weight = model.get_parameter(entry.name)
        packed = OctavoTensor.from_float(
            weight.detach(), config, name=entry.name, transposed=entry.transposed
        )
        set_parameter(model, entry, packed)
        if progress is not None:
            progress(entry.name, weight.numel())
    if hasattr(model, "save_pretrained"):
        # It takes seconds to import, and other models do without.
        from .integrations.transformers import attach

        attach(model, config)
    return model
