"""Which parameters of a model are quantized (`octavo.quantize_model` does it), and making them plain again.

Everything that holds a large matrix is quantized, whatever its module's class is called: linear layers, embeddings, the head,
`Conv1D`, fused experts. What stays in float, and why, is in `kept_in_float`; `KEEP_IN_FLOAT` names parameters. No module is
replaced.

Example:
    >>> import torch, octavo
    >>> model = torch.nn.Sequential(torch.nn.Embedding(100, 64), torch.nn.LayerNorm(64))
    >>> plan = plan_model(model, octavo.OctavoConfig())
    >>> list(plan.entries), plan.other["1.weight"]
    (['0.weight'], 'a vector')
"""

import fnmatch
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from .config import OctavoConfig, matches
from .tensor import OctavoTensor

# Below this a matrix is noise beside the others, and its codebook (1 KiB) would weigh as much as the weights.
SMALLEST_MATRIX = 4096
SHORTEST_ROW = 16
# From here on, leaving a stack of small matrices in float is not done without a word.
LARGE_STACK = 16 * SMALLEST_MATRIX
LARGEST_FLOAT_SHARE = 0.01

_POSITIONS = "a table of positions, which is added"
_ROUTER = "a router: rounded scores choose other experts (docs/MODELS.md has the figures), and it is a thousandth of the weights"
_HEADS = "projections in three dimensions: stacks of matrices too small for a codebook each"
_STREAMS = "mixes residual streams: the published model keeps it in float32"

# Parameters with the shape of a matrix that stay in float: type of model (`model_type` of a configuration in it; "*": any) →
# {pattern: why}. A pattern is compared with the end of a parameter's name, by whole components; `*` also crosses dots. This is
# the place for what a family of models must have in float; what one user wants in float is `OctavoConfig(skip=[...])`.
KEEP_IN_FLOAT: dict[str, dict[str, str]] = {
    "*": {
        "A_log": "state-space decay: its exponential is taken, and an error in it compounds over the sequence",
        "*bias": "a bias, which is added; those of a stack of experts have a matrix's shape",
        "scale": "scales of channels, no product",
        "pos_embed": _POSITIONS,
        "rel_pos_[hw]": _POSITIONS,
        "router.*weight": _ROUTER,
        "mlp.gate.weight": _ROUTER,
        "feed_forward.gate.weight": _ROUTER,
        "mixer.gate.weight": _ROUTER,
        "mlp.gate.router_mlp.*weight": _ROUTER,
    },
    "deepseek_v4": {"attn_hc.fn": _STREAMS, "ffn_hc.fn": _STREAMS, "hc_head.hc_fn": _STREAMS},
    "funnel": {"attention.r_kernel": _HEADS},
    "hy_v4": {"fn": _STREAMS, "hc_fn": _STREAMS},
    "perceiver": {"latents": "the first hidden state itself, no product", "position_embeddings": _POSITIONS},
    "reformer": {"position_embeddings.weights.*": _POSITIONS},
    "xlnet": {"rel_attn.[qkvor]": _HEADS},
}

CONVOLUTIONS = (nn.modules.conv._ConvNd,)


class CoverageError(ValueError):
    """Too much of a model would stay in float without having been skipped on purpose."""


@dataclass(frozen=True)
class Entry:
    """A parameter that is quantized.

    Attributes:
        name: its first name in the model.
        shape: its shape in the model.
        transposed: whether it holds inputs as rows, so that its transpose is stored.
        aliases: further names of the same, tied, parameter.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    aliases: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (self.name, *self.aliases)


@dataclass
class Plan:
    """What becomes of each parameter of a model.

    Attributes:
        entries: quantized parameters by first name.
        skipped: matrices left in float by the config's patterns, by name.
        left: other matrices left in float, with the reason.
        other: all the other parameters (norms, biases, convolutions, small tensors), with the reason.
    """

    entries: dict[str, Entry] = field(default_factory=dict)
    skipped: dict[str, int] = field(default_factory=dict)
    left: dict[str, tuple[int, str]] = field(default_factory=dict)
    other: dict[str, str] = field(default_factory=dict)

    @property
    def named(self) -> dict[str, Entry]:
        """Quantized parameters by every name, aliases included, under which they are known."""
        return {name: entry for entry in self.entries.values() for name in entry.names}

    @property
    def names(self) -> Set[str]:
        """Those names."""
        return self.named.keys()

    @property
    def coverage(self) -> float:
        """Share of the weights in matrices, but for those skipped on purpose, that is quantized."""
        done = sum(_count(entry.shape) for entry in self.entries.values())
        total = done + sum(count for count, _ in self.left.values())
        return done / total if total else 1.0

    def check(self) -> None:
        """Raise CoverageError, naming what is left, if more than 1 % of the matrices would silently stay in float."""
        if 1 - self.coverage <= LARGEST_FLOAT_SHARE:
            return
        worst = sorted(self.left.items(), key=lambda item: -item[1][0])
        listed = "\n".join(f"  {name}: {count:,} weights ({why})" for name, (count, why) in worst[:20])
        more = f"\n  ... and {len(worst) - 20} more" if len(worst) > 20 else ""
        raise CoverageError(
            f"{1 - self.coverage:.1%} of the model's matrices would stay in float, more than "
            f"{LARGEST_FLOAT_SHARE:.0%}:\n{listed}{more}\n"
            "If that is meant, name them: skip=[pattern, ...] (on the command line --skip PATTERN)"
        )


def _count(shape) -> int:
    return torch.Size(shape).numel()


def plan_model(model: nn.Module, config: OctavoConfig, *, within: str = "", strict: bool = True) -> Plan:
    """Decide for each parameter of a model whether it is quantized. Works on the meta device.

    Args:
        model: any module.
        config: `skip` is what counts here.
        within: what the names of a part of a model begin with in the whole, which patterns may mention ("model").
        strict: whether a pattern that matches nothing is an error. Not for a stored model, of which a part may be loaded.

    Raises:
        ValueError: if a pattern of `config.skip` matches no parameter.
    """

    def skipped(name: str) -> bool:
        return config.skips(f"{within}.{name}" if within else name)

    names: dict[int, list[str]] = {}
    owners: dict[int, tuple[nn.Module, torch.Tensor]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            names.setdefault(id(parameter), []).append(f"{prefix}.{leaf}" if prefix else leaf)
            # The first owner decides: a head tied to the embedding is the embedding.
            owners.setdefault(id(parameter), (module, parameter))
    if strict:
        _check_patterns(config, [name for group in names.values() for name in group])
    # Computed, not learned (sinusoidal positions): never in a checkpoint.
    unsaved = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    configs = (getattr(module, "config", None) for module in model.modules())
    families = {getattr(config, "model_type", None) or "" for config in configs}
    plan = Plan()
    for key, (name, *aliases) in names.items():
        module, parameter = owners[key]
        count = parameter.numel()
        kept = kept_in_float(module, name, parameter, families)
        if unsaved.issuperset((name, *aliases)):
            plan.other[name] = "computed, not learned: never in a checkpoint"
        elif (kept is None or kept.counts) and any(skipped(each) for each in (name, *aliases)):
            plan.skipped[name] = count
        elif kept is None:
            transposed = holds_transpose(module)
            plan.entries[name] = Entry(
                name, tuple(parameter.shape), transposed, tuple(dict.fromkeys(aliases))
            )
        elif kept.counts:
            plan.left[name] = (count, kept.why)
        else:
            plan.other[name] = kept.why
    return plan


def _check_patterns(config: OctavoConfig, names: list[str]) -> None:
    for pattern in config.skip:
        if not any(matches(pattern, name) for name in names):
            raise ValueError(
                f"skip pattern {pattern!r} matches no parameter. Patterns are compared with whole components of names"
                + (f" such as {names[0]!r}" if names else "")
                + "; `*` stands for anything"
            )


class Kept(NamedTuple):
    """Why a parameter stays in float. `counts`: it is a matrix all the same, and lowers the coverage."""

    why: str
    counts: bool = False


def kept_in_float(
    module: nn.Module, name: str, parameter: torch.Tensor, families: Iterable[str] = ()
) -> Kept | None:
    """Why a parameter stays in float; None if it is quantized.

    Args:
        module: the module that owns it.
        name: its name in the model.
        families: types of the model and of models inside it, which `KEEP_IN_FLOAT` may mention ("llama").
    """
    if not parameter.is_floating_point():
        return Kept("no float")
    shape = [size for size in parameter.shape if size != 1]
    if len(shape) < 2:
        return Kept("a vector")
    if isinstance(module, CONVOLUTIONS):
        return Kept("a convolution")
    for family in ("*", *families):
        for pattern, why in KEEP_IN_FLOAT.get(family, {}).items():
            if fnmatch.fnmatchcase(f".{name}", f"*.{pattern}"):
                return Kept(why)
    if len(parameter.shape) > 3:
        return Kept(
            f"a tensor of {len(parameter.shape)} dimensions, not a matrix or a stack of matrices", True
        )
    matrix = parameter.shape[-2:]
    if matrix.numel() < SMALLEST_MATRIX or min(matrix) < SHORTEST_ROW:
        if len(shape) == 3 and parameter.numel() >= LARGE_STACK:
            return Kept("a stack of small matrices, each of which would need a codebook", True)
        return Kept("a small matrix")
    return None


def holds_transpose(module: nn.Module) -> bool:
    """Whether a module's matrices hold inputs as rows: transformers' Conv1D, and experts that say so."""
    return type(module).__name__ == "Conv1D" or bool(getattr(module, "is_transposed", False))


def loaded_parameter(weight: OctavoTensor) -> nn.Parameter:
    """A parameter that transformers does not initialize anew."""
    parameter: Any = nn.Parameter(weight, requires_grad=False)
    parameter._is_hf_initialized = True
    return parameter


def set_parameter(model: nn.Module, entry: Entry, weight: OctavoTensor) -> None:
    """Put one quantized weight in place of a parameter, under all its names."""
    parameter = loaded_parameter(weight)
    for name in entry.names:
        path, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(path), leaf, parameter)


def dequantize_model(model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """Replace a model's quantized weights by plain ones in place; tied weights stay tied.

    Args:
        dtype: type of the plain weights. Default: each weight's compute dtype.
    """
    plain: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for leaf, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if isinstance(parameter, OctavoTensor):
                if id(parameter) not in plain:
                    plain[id(parameter)] = nn.Parameter(
                        parameter.dequantize(dtype).contiguous(), requires_grad=False
                    )
                setattr(module, leaf, plain[id(parameter)])
    if getattr(model, "quantization_method", None) == "octavo":
        # A transformers model that no longer says it is quantized is saved as a plain one, in its published layout.
        whole: Any = model
        whole.hf_quantizer.remove_quantization_config(whole)
        whole._weight_conversions = None
    return model
