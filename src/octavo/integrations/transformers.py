"""The transformers plugin: quantizing while loading, saving, loading again, de-quantizing.

transformers calls the `HfQuantizer` below. A quantized parameter `P` is three tensors in a file (`P_qdata`, `P_absmax`,
`P_code`); while loading, they are put together into one `OctavoTensor` under the name `P`; no module is replaced.

Example:
    >>> import octavo
    >>> from transformers import AutoModelForCausalLM
    >>> model = AutoModelForCausalLM.from_pretrained("model", quantization_config=octavo.OctavoConfig())
    >>> model.save_pretrained("saved")
"""

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import ConversionOps, PrefixChange, WeightConverter, WeightRenaming
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..checkpoint.reading.octavo_source import put_together
from ..checkpoint.reading.open import require_plain
from ..config import OctavoConfig as PlainConfig
from ..model import Entry, Plan, dequantize_model, loaded_parameter, plan_model
from ..tensor import SUFFIXES, OctavoTensor, pack
from .completeness import is_missing
from .peft import keep_frozen_out_of_adapters


class OctavoConfig(PlainConfig, QuantizationConfigMixin):  # type: ignore[misc]  # quant_method: a str here, an enum there
    """`octavo.OctavoConfig` as transformers reads it from config.json."""


def register() -> None:
    """Enter Octavo into transformers' tables of quantizers; a second call does nothing."""
    if "octavo" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config("octavo")(OctavoConfig)
    if "octavo" not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer("octavo")(OctavoHfQuantizer)


def attach(model: Any, config: PlainConfig) -> None:
    """Mark a model quantized outside `from_pretrained`, so that `save_pretrained` and `dequantize` know it."""
    register()
    keep_frozen_out_of_adapters(model)
    _undo_only_renamings(model)
    model.hf_quantizer = OctavoHfQuantizer(config, pre_quantized=False)
    model.is_quantized = True
    model.quantization_method = "octavo"
    model.config.quantization_config = config


class Quantize(ConversionOps):
    """One float parameter → an OctavoTensor, while loading."""

    def __init__(self, hf_quantizer: "OctavoHfQuantizer"):
        self.hf_quantizer = hf_quantizer

    def convert(self, input_dict, full_layer_name=None, missing_keys=None, **kwargs):
        # The model's own conversions (a merge of experts) may give several parameters, all of which come here.
        out = {}
        for name, value in input_dict.items():
            value = value[0] if isinstance(value, list) else value
            name = full_layer_name if len(input_dict) == 1 else name
            out[name] = self.hf_quantizer.or_placeholder(self.hf_quantizer.quantized, name, value)
        return out


class Deserialize(ConversionOps):
    """`P_qdata`, `P_absmax`, `P_code` → the OctavoTensor `P`."""

    def __init__(self, hf_quantizer: "OctavoHfQuantizer"):
        self.hf_quantizer = hf_quantizer

    def __deepcopy__(self, memo):
        # transformers copies its converters for each parameter; the quantizer, with the plan of the whole model, is one.
        return Deserialize(self.hf_quantizer)

    def convert(self, input_dict, full_layer_name=None, **kwargs):
        parts = {
            pattern.rpartition("_")[2]: value[0] if isinstance(value, list) else value
            for pattern, value in input_dict.items()
        }
        quantizer = self.hf_quantizer
        return {full_layer_name: quantizer.or_placeholder(quantizer.assembled, full_layer_name, parts)}


class OctavoHfQuantizer(HfQuantizer):
    """How transformers loads and saves Octavo models. `pre_quantized`: the checkpoint is Octavo's."""

    requires_calibration = False
    quantization_config: PlainConfig  # type: ignore[assignment]  # duck-typed by transformers

    def __init__(self, quantization_config: PlainConfig, **kwargs):
        super().__init__(quantization_config, **kwargs)  # type: ignore[arg-type]  # likewise
        self.plan = Plan()
        self.entries: dict[str, Entry] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self.plain_dtypes: dict[str, torch.dtype] = {}
        self.leaves: set[str] = set()
        self.shapes: dict[str, torch.Size] = {}
        self.files: list[str] = []
        self.dtype = torch.get_default_dtype()
        self._read_in_float32: set[str] = set()
        self._errors: list[str] = []

    def update_attn_implementation(self, config):
        """The place where transformers shows the configuration before it chooses a type.

        Under `dtype=None` the Auto classes forget the configuration's own, and transformers then takes that of the first
        floats in the file, which here are scales.
        """
        if self.pre_quantized and config.dtype is None:
            config.dtype = _stored_dtype(config)
        return config

    # Older transformers (5.16) have no such place, but this one beside it.
    update_ep_plan = update_attn_implementation

    def _process_model_before_weight_loading(
        self, model, dtype=None, device_map=None, checkpoint_files=None, **kwargs
    ):
        if isinstance(device_map, dict) and "disk" in device_map.values():
            raise ValueError(
                "device_map: 8-bit weights cannot be offloaded to disk; place those modules on 'cpu' instead (expected "
                "devices, found 'disk')"
            )
        prefix = getattr(model, "base_model_prefix", "")
        # Of a stored model the base may be loaded alone: its names lack the prefix, and patterns may name what it lacks.
        within = prefix if self.pre_quantized and not hasattr(model, prefix) else ""
        self.plan = plan_model(model, self.quantization_config, within=within, strict=not self.pre_quantized)
        self.files = checkpoint_files or []
        if not self.pre_quantized:
            require_plain(self.files)
            self.plan.check()
        names = self.entries = self.plan.named
        self.dtype = dtype or torch.get_default_dtype()
        self.dtypes = _compute_dtypes(model, dict.fromkeys(names, self.dtype), self.dtype)
        plain = {
            name: value.dtype
            for name, value in model.state_dict().items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and name not in names
        }
        self.plain_dtypes = _compute_dtypes(model, plain, self.dtype)
        self.leaves = {name.rpartition(".")[2] for name in names}
        self.shapes = {name: p.shape for name, p in model.named_parameters(remove_duplicate=False)}
        if not self.pre_quantized:
            # transformers casts to the asked type before the quantizing op, and rounding float32 to bfloat16 costs as much as 8
            # bits do. Its plan of what stays in float32 is the way to read these parameters unrounded.
            self._read_in_float32 = {f"^{re.escape(name)}$" for name in names}
            model._keep_in_fp32_modules_strict = (
                set(model._keep_in_fp32_modules_strict or ()) | self._read_in_float32
            )

    def _process_model_after_weight_loading(self, model, **kwargs):
        if self._errors:
            raise ValueError("\n".join(self._errors))
        if self._read_in_float32:
            model._keep_in_fp32_modules_strict -= self._read_in_float32
        self._cast_plain(model)
        _undo_only_renamings(model)
        for entry in self.plan.entries.values():
            self._check(model, entry)
        keep_frozen_out_of_adapters(model)
        return model

    def _check(self, model, entry: Entry) -> None:
        """Raise ValueError if a planned parameter is neither in 8 bits, nor stored in float, nor new."""
        parameters = {name: model.get_parameter(name) for name in entry.names}
        for name, parameter in parameters.items():
            if isinstance(parameter, OctavoTensor) and tuple(parameter.shape) != entry.shape:
                raise ValueError(
                    f"{name}: expected shape {entry.shape}, found {tuple(parameter.shape)} in the checkpoint"
                )
        plain = [name for name, parameter in parameters.items() if not isinstance(parameter, OctavoTensor)]
        # Tying may have put the plain parameter of an alias first; every name must lead to the one quantized weight.
        if plain and len(plain) < len(parameters):
            raise ValueError(f"{', '.join(plain)}: expected the 8-bit weights of {entry.name}, found others")
        loaded = all(getattr(parameters[name], "_is_hf_initialized", False) for name in plain)
        if loaded and (self.pre_quantized or not plain):
            return
        if loaded or is_missing(model, plain[0], self.files):
            expected = "8-bit weights" if self.pre_quantized else "weights to quantize"
            raise ValueError(
                f"{', '.join(plain)}: expected {expected}, found none in the checkpoint, which is incomplete"
            )

    def _cast_plain(self, model):
        # Older transformers (without `get_new_dtype`) leave what has another name in the file, a router say, in its stored type.
        for name, value in model.state_dict(keep_vars=True).items():
            if name in self.plain_dtypes and not isinstance(value, OctavoTensor):
                value.data = value.data.to(self.plain_dtypes[name])

    def param_needs_quantization(self, model, param_name: str, **kwargs) -> bool:
        # What is stored keeps its own form, and transformers compares its shape as it does a plain weight's.
        return not self.pre_quantized and param_name in self.dtypes

    def param_element_size(self, model, param_name: str, param) -> float:
        """Bytes a weight takes once it is loaded. By them transformers reserves memory on a GPU before it loads: it would
        else reserve what 16 bits take."""
        if param_name not in self.dtypes:
            return super().param_element_size(model, param_name, param)
        # One byte per weight, and a scale of 2 (float16) or 4 bytes for each block.
        scale = 2 if self.quantization_config.codebook == "fitted" else 4
        return 1 + scale / self.quantization_config.row_block

    def get_quantize_ops(self):
        return Quantize(self)

    @property
    def serialized_names(self) -> dict[str, list[str]]:  # type: ignore[override]  # the base has it as a constant
        return {leaf: [f"{leaf}_{suffix}" for suffix in SUFFIXES] for leaf in sorted(self.leaves)}

    def get_weight_conversions(self):
        if not self.pre_quantized:
            return []
        return [
            WeightConverter(names, leaf, [Deserialize(self)]) for leaf, names in self.serialized_names.items()
        ]

    def get_new_dtype(self, converter, param, dtype):
        # The stored parts keep their types whatever compute dtype is asked for.
        operations = getattr(converter, "operations", ())
        return None if any(isinstance(operation, Deserialize) for operation in operations) else dtype

    def _entry(self, name: str) -> Entry:
        # Not planned: a version of Octavo with fewer entries in `KEEP_IN_FLOAT` may have written it; what is stored counts.
        return self.entries.get(name) or Entry(name, tuple(self.shapes[name]), transposed=False)

    def or_placeholder(self, make: Callable[..., torch.Tensor], name: str, value) -> torch.Tensor:
        """`make(name, value)`, or, if it raises ValueError, zeros that take no memory; the error is raised after loading.

        transformers catches what a conversion raises, and in the end only says that "some issues" were encountered.
        """
        try:
            return make(name, value)
        except ValueError as error:
            self._errors.append(str(error))
            return torch.zeros(()).expand(self.shapes.get(name, torch.Size()))

    def quantized(self, name: str, value: torch.Tensor) -> torch.Tensor:
        """Quantize one loaded parameter; values that are no planned parameter pass through."""
        if name not in self.dtypes:
            return value
        weight = OctavoTensor.from_float(
            value,
            self.quantization_config,
            name=name,
            transposed=self._entry(name).transposed,
            dtype=self.dtypes[name],
        )
        return loaded_parameter(weight)

    def assembled(self, name: str, parts: dict[str, torch.Tensor]) -> torch.Tensor:
        """One parameter from its stored parts. Raises ValueError naming it if they do not fit the model."""
        if name not in self.shapes or name in self.plan.skipped:
            raise ValueError(
                f"{name} is stored in 8 bits, but this model keeps it in float: the checkpoint and config.json differ"
            )
        weight = OctavoTensor.from_packed(
            put_together(name, parts, self.quantization_config.row_block),
            self.dtypes.get(name, self.dtype),
            self._entry(name).transposed,
            self.quantization_config.codebook,
        )
        return loaded_parameter(weight)

    def get_state_dict_and_metadata(self, model):
        self._list_plain(model)
        state = {}
        for name, value in model.state_dict().items():
            state.update(pack(name, value) if isinstance(value, OctavoTensor) else {name: value})
        return _without_ties(state, model), {}

    def _list_plain(self, model) -> None:
        """Add to `skip` what has become float (a grown head, a new one): config.json promises no more than the files hold."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return  # an adapter is saved, without that file
        config = self.quantization_config
        plain = [
            entry.name
            for entry in plan_model(model, config, strict=False).entries.values()
            if not isinstance(model.get_parameter(entry.name), OctavoTensor)
        ]
        if plain:
            # A config of their own: the user's may serve other models.
            self.quantization_config = replace(config, skip=[*config.skip, *plain])
            model.config.quantization_config = self.quantization_config

    def _dequantize(self, model, dtype=None):
        if isinstance(dtype, str):
            dtype = getattr(torch, dtype.removeprefix("torch."))
        return dequantize_model(model, dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _stored_dtype(config: Any) -> torch.dtype | None:
    """The type in the config.json that a configuration was read from; None if there is none."""
    if not config.name_or_path:
        return None  # made in memory, as for a checkpoint whose tensors come through our own reader
    try:
        stored, _ = type(config).get_config_dict(
            config.name_or_path, revision=getattr(config, "_commit_hash", None)
        )
    except OSError:
        return None  # no longer there, or it never had one
    return type(config)(**stored).dtype


def _undo_only_renamings(model: Any) -> None:
    """Choose what transformers undoes when the model is saved: the renamings of its parameters, but no merge or split.

    Those would merge the 8-bit parts of several parameters, tables and all. Taking a weight apart into its parts is
    `get_state_dict_and_metadata`'s.
    """
    # Not at import: it imports what imports this module.
    from transformers.conversion_mapping import get_model_conversion_mapping

    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = [
            rule
            for rule in get_model_conversion_mapping(model, add_legacy=False)
            # A model that came from no checkpoint has no published prefix.
            if not isinstance(rule, PrefixChange)
        ]
    model._weight_conversions = [rule for rule in conversions if isinstance(rule, WeightRenaming)]


def _compute_dtypes(model, types: dict[str, torch.dtype], asked: torch.dtype) -> dict[str, torch.dtype]:
    """`types` by name, float32 where the model asks for it (`_keep_in_fp32_modules`) when it is loaded in type `asked`."""
    kept = [
        (re.compile(pattern.replace("*", ".*")), dtype)
        for pattern, dtype in model._get_dtype_plan(asked).items()
    ]
    return {
        name: next((other for pattern, other in kept if pattern.search(name)), dtype)
        for name, dtype in types.items()
    }


def _without_ties(state: dict[str, torch.Tensor], model: nn.Module) -> dict[str, torch.Tensor]:
    """Drop the parts of tied names but the first: safetensors holds a tensor once, transformers ties it again."""
    first: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if not isinstance(parameter, OctavoTensor):
            continue
        if first.setdefault(id(parameter), name) != name:
            for suffix in SUFFIXES:
                state.pop(f"{name}_{suffix}", None)
    return state


register()
