"""What llama.cpp calls a model's parts, and in which order it keeps their rows.

    transformers' model_type         llama.cpp's architecture
    llama, mistral, mixtral          llama: rows of queries and keys reordered, rotary pairs side by side
    qwen2, qwen3, qwen3_moe          qwen2, qwen3, qwen3moe
    gemma                            gemma: norms hold 1 + weight
    gpt2                             gpt2
    gpt_neox                         gptneox: queries, keys and values of all heads, not head by head
    phi                              phi2
    gptj                             phi2: see `GptJ`

Everything that is done to a weight is a choice of rows, so that it can be done while rows are read.

Example:
    >>> from octavo.export.architectures import architecture_of
    >>> architecture_of(source.model_config()).arch.name
    'PHI2'
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType, TensorNameMap

from .parameters import Parameters

SUFFIXES = (".weight", ".bias")
TANH_GELUS = ("gelu_new", "gelu_pytorch_tanh", "gelu_fast", "gelu")


@dataclass
class Target:
    """A tensor of the file.

    Attributes:
        name: as llama.cpp knows it.
        parameter: the model's parameter it comes from; "" for a constant.
        shape: [n], [rows, columns] or [experts, rows, columns].
        order: for each row (of each matrix) the parameter's row that it is; None: as they are.
        shift: added to every value.
        constant: the values, float32, where they come from no parameter.
    """

    name: str
    parameter: str
    shape: tuple[int, ...]
    order: torch.Tensor | None = None
    shift: float = 0.0
    constant: np.ndarray | None = None


class Architecture:
    """How one of llama.cpp's architectures describes and lays out a transformers model.

    Attributes:
        arch: llama.cpp's architecture.
        activations: what `config.hidden_act` may be.
        rms: whether norms are RMS norms.
        ties: whether the output may be the embedding. Else a tied model's embedding is written twice.
    """

    arch: MODEL_ARCH
    activations: tuple[str, ...] = ("silu",)
    rms = True
    ties = True

    def check(self, config: Any) -> None:
        """Raise ValueError, naming the setting, if llama.cpp would compute something else than the model does."""
        activation = getattr(config, "hidden_act", None) or getattr(config, "activation_function", None)
        _require(activation in self.activations, "activation", activation, " or ".join(self.activations))
        window = getattr(config, "sliding_window", None)
        if window and window < config.max_position_embeddings:
            warnings.warn(
                f"the model attends to the last {window} tokens, llama.cpp to all: they agree on texts up to that length",
                stacklevel=4,
            )

    def describe(self, writer: GGUFWriter, config: Any) -> None:
        """Write the keys that llama.cpp builds the model from."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        writer.add_block_count(config.num_hidden_layers)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_feed_forward_length(self.feed_forward(config))
        writer.add_head_count(heads)
        writer.add_head_count_kv(kv_heads)
        if self.rms:
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        else:
            epsilon = getattr(config, "layer_norm_epsilon", None) or config.layer_norm_eps
            writer.add_layer_norm_eps(epsilon)
        if getattr(config, "head_dim", None):
            writer.add_key_length(config.head_dim)
            writer.add_value_length(config.head_dim)
        if (dimensions := self.rotary_dimensions(config)) is not None:
            writer.add_rope_dimension_count(dimensions)
            _describe_rope(writer, config)
        writer.add_vocab_size(config.vocab_size)

    def feed_forward(self, config: Any) -> int:
        return config.intermediate_size

    def rotary_dimensions(self, config: Any) -> int | None:
        """Entries of a head that are rotated; None where positions are learned."""
        parameters = getattr(config, "rope_parameters", None) or {}
        return int(head_size(config) * parameters.get("partial_rotary_factor", 1.0))

    def order(self, name: str, config: Any) -> torch.Tensor | None:
        """Rows of the parameter `name` in the file's order."""
        return None

    def shift(self, name: str) -> float:
        return 0.0

    def constants(self, config: Any) -> dict[str, np.ndarray]:
        """Tensors that llama.cpp needs and the model does not have: name → float32."""
        factors = _rope_factors(config) if self.rotary_dimensions(config) is not None else None
        return {} if factors is None else {"rope_freqs.weight": factors}

    def targets(self, parameters: Parameters, config: Any, names: TensorNameMap) -> list[Target]:
        """The file's tensors.

        Raises:
            ValueError: if llama.cpp has no place for a parameter.
        """
        found = [target for name in parameters.names for target in self._of(name, parameters, config, names)]
        embedding, output = (
            next((t for t in found if t.name == f"{n}.weight"), None) for n in ("token_embd", "output")
        )
        if output is None and not self.ties and embedding is not None:
            found.append(Target("output.weight", embedding.parameter, embedding.shape))
        for name, value in self.constants(config).items():
            found.append(Target(name, "", value.shape, constant=value))
        return found

    def _of(self, name: str, parameters: Parameters, config: Any, names: TensorNameMap) -> Iterable[Target]:
        shape = parameters.shape(name)
        if name.endswith("experts.gate_up_proj"):
            half = shape[1] // 2
            layer = name.removeprefix("model.layers.").split(".")[0]
            for part, first in (("gate", 0), ("up", half)):
                order = torch.arange(first, first + half)
                key = f"blk.{layer}.ffn_{part}_exps.weight"
                yield Target(key, name, (shape[0], half, shape[2]), order)
            return
        known = names.get_name(name, try_suffixes=SUFFIXES)
        if known is None:
            raise ValueError(
                f"{name}: llama.cpp's architecture {self.arch.name.lower()!r} has no place for this parameter, so this "
                f"{type(config).__name__} cannot be exported"
            )
        key = known if known.endswith(SUFFIXES) else f"{known}.weight"
        yield Target(key, name, shape, self.order(name, config), self.shift(name))


class Llama(Architecture):
    arch = MODEL_ARCH.LLAMA

    def order(self, name: str, config: Any) -> torch.Tensor | None:
        # transformers rotates entry i of a head with entry i + size/2; llama.cpp, here, with its neighbour.
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if f".{part}." in name:
                size = head_size(config)
                return torch.arange(heads * size).view(heads, 2, size // 2).transpose(1, 2).reshape(-1)
        return None


class Mixtral(Llama):
    def describe(self, writer: GGUFWriter, config: Any) -> None:
        super().describe(writer, config)
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)


class Qwen2(Architecture):
    arch = MODEL_ARCH.QWEN2

    def check(self, config: Any) -> None:
        super().check(config)
        if self.arch == MODEL_ARCH.QWEN2:
            size = config.hidden_size // config.num_attention_heads
            _require(head_size(config) == size, "head_dim", head_size(config), str(size))


class Qwen3(Qwen2):
    arch = MODEL_ARCH.QWEN3


class Qwen3Moe(Qwen2):
    arch = MODEL_ARCH.QWEN3MOE

    def check(self, config: Any) -> None:
        super().check(config)
        _require(config.norm_topk_prob, "norm_topk_prob", config.norm_topk_prob, "true")

    def describe(self, writer: GGUFWriter, config: Any) -> None:
        super().describe(writer, config)
        writer.add_expert_count(config.num_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)


class Gemma(Architecture):
    arch = MODEL_ARCH.GEMMA
    activations = ("gelu_pytorch_tanh", "gelu")

    def shift(self, name: str) -> float:
        # transformers multiplies by 1 + weight.
        return 1.0 if name.endswith("norm.weight") else 0.0


class Gpt2(Architecture):
    arch = MODEL_ARCH.GPT2
    activations = TANH_GELUS
    rms = False

    def check(self, config: Any) -> None:
        super().check(config)
        plain = config.scale_attn_weights and not config.scale_attn_by_inverse_layer_idx
        _require(plain, "scale of attention", "another", "1 / sqrt(head size)")

    def feed_forward(self, config: Any) -> int:
        return config.n_inner or 4 * config.hidden_size

    def rotary_dimensions(self, config: Any) -> int | None:
        return None


class GptNeoX(Architecture):
    arch = MODEL_ARCH.GPTNEOX
    activations = TANH_GELUS
    rms = False
    ties = False

    def describe(self, writer: GGUFWriter, config: Any) -> None:
        super().describe(writer, config)
        writer.add_parallel_residual(config.use_parallel_residual)

    def order(self, name: str, config: Any) -> torch.Tensor | None:
        if ".query_key_value." not in name:
            return None
        heads, size = config.num_attention_heads, head_size(config)
        return torch.arange(3 * heads * size).view(heads, 3, size).transpose(0, 1).reshape(-1)


class Phi(Architecture):
    arch = MODEL_ARCH.PHI2
    activations = TANH_GELUS
    rms = False
    ties = False


class GptJ(Phi):
    """GPT-J, as the Phi-2 that computes the same.

    llama.cpp has a name for GPT-J but cannot run it. Phi-2 has the same layers: one norm, attention and feed-forward side by
    side, part of each head rotated, an output with bias. What differs: Phi-2's attention output has a bias (written as zeros),
    and GPT-J rotates neighbours where Phi-2 rotates entries half the rotated part away (a matter of the rows' order).
    """

    def feed_forward(self, config: Any) -> int:
        return config.n_inner or 4 * config.hidden_size

    def rotary_dimensions(self, config: Any) -> int | None:
        return config.rotary_dim or head_size(config)

    def order(self, name: str, config: Any) -> torch.Tensor | None:
        if not name.endswith(("q_proj.weight", "k_proj.weight")):
            return None
        heads, size = config.num_attention_heads, head_size(config)
        rotated = config.rotary_dim or size
        head = torch.cat(
            [torch.arange(0, rotated, 2), torch.arange(1, rotated, 2), torch.arange(rotated, size)]
        )
        return (torch.arange(heads)[:, None] * size + head).reshape(-1)

    def constants(self, config: Any) -> dict[str, np.ndarray]:
        zeros = np.zeros(config.hidden_size, dtype=np.float32)
        return {f"blk.{layer}.attn_output.bias": zeros for layer in range(config.num_hidden_layers)}


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Llama(),
    "mistral": Llama(),
    "mixtral": Mixtral(),
    "qwen2": Qwen2(),
    "qwen3": Qwen3(),
    "qwen3_moe": Qwen3Moe(),
    "gemma": Gemma(),
    "gpt2": Gpt2(),
    "gpt_neox": GptNeoX(),
    "phi": Phi(),
    "gptj": GptJ(),
}


def architecture_of(config: Any) -> Architecture:
    """The architecture for a transformers configuration.

    Raises:
        ValueError: if there is none, naming those there are; if a setting of the model is beyond llama.cpp.
    """
    found = ARCHITECTURES.get(config.model_type)
    if found is None:
        raise ValueError(
            f"no export to GGUF for models of type {config.model_type!r}; there is one for {', '.join(ARCHITECTURES)}"
        )
    found.check(config)
    return found


def head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _require(holds: bool, setting: str, found: Any, expected: str) -> None:
    if not holds:
        raise ValueError(
            f"config.json: {setting}: llama.cpp computes with {expected}, this model has {found}"
        )


def _describe_rope(writer: GGUFWriter, config: Any) -> None:
    """The rotary base and, for contexts that were stretched, how.

    Raises:
        ValueError: on a way of stretching that has no counterpart.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    kind = rope.get("rope_type", "default")
    if kind in ("default", "llama3"):
        return
    if kind not in ("linear", "yarn"):
        raise ValueError(f"config.json: rope_type {kind!r}: expected default, linear, yarn or llama3")
    writer.add_rope_scaling_type(RopeScalingType.LINEAR if kind == "linear" else RopeScalingType.YARN)
    writer.add_rope_scaling_factor(float(rope["factor"]))
    if kind == "yarn":
        # Their attention factors are defined in different ways: only the one both take by default is the same.
        for key in ("attention_factor", "mscale", "mscale_all_dim"):
            _require(rope.get(key) is None, f"rope_parameters.{key}", rope.get(key), "its default")
        original = rope.get("original_max_position_embeddings") or config.max_position_embeddings
        writer.add_rope_scaling_orig_ctx_len(original)
        writer.add_rope_scaling_yarn_beta_fast(float(rope.get("beta_fast") or 32))
        writer.add_rope_scaling_yarn_beta_slow(float(rope.get("beta_slow") or 1))


def _rope_factors(config: Any) -> np.ndarray | None:
    """What llama.cpp divides each rotary frequency by: float32 [head size / 2], for Llama 3's stretching, else None."""
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") != "llama3":
        return None
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    stretched, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    size = head_size(config)
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    return (plain / stretched).numpy().astype(np.float32)
