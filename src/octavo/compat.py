"""The names that the published model cards import, so that their own code runs with one line changed.

The card of `mrm8488/bertin-gpt-j-6B-ES-8bit` downloads a file `Utils.py` and says

    from Utils import GPTJBlock, GPTJForCausalLM
    transformers.models.gptj.modeling_gptj.GPTJBlock = GPTJBlock
    ckpt = "mrm8488/bertin-gpt-j-6B-ES-8bit"
    model = GPTJForCausalLM.from_pretrained(ckpt, pad_token_id=tokenizer.eos_token_id, low_cpu_mem_usage=True)

With `from octavo.compat import GPTJBlock, GPTJForCausalLM` the rest stays as it is. `GPTJBlock` is transformers' own, since
nothing has to be replaced; `GPTJForCausalLM` is transformers' own as well, and also reads checkpoints in 8 bits.

Example:
    >>> from octavo.compat import GPTJForCausalLM
    >>> model = GPTJForCausalLM.from_pretrained("published", output_attentions=True)     # or "hivemind/gpt-j-6B-8bit"
"""

import copy
import inspect
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.models.gptj import modeling_gptj
from transformers.models.gptj.modeling_gptj import GPTJBlock

__all__ = ["GPTJBlock", "GPTJForCausalLM"]

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "token")
# What transformers takes and drops today.
IGNORED = (
    "low_cpu_mem_usage",
    "from_tf",
    "from_flax",
    "mirror",
    "_fast_init",
    "offload_state_dict",
    "weights_only",
)
# What is said of loading; everything else is a change of the configuration, as transformers has it.
LOADING = (
    *(
        "max_memory",
        "offload_folder",
        "offload_buffers",
        "output_loading_info",
        "trust_remote_code",
        "use_kernels",
    ),
    *("attn_implementation", "experts_implementation", "kernel_config", "generation_config", "tqdm_class"),
)
# What speaks of files or placements that a checkpoint in 8-bit blocks does not have → why.
NOT_HONOURED = {
    "quantization_config": "its 8-bit numbers are kept as they are; `octavo quantize --codebook fitted` fits new ones",
    "variant": "it has one set of weights",
    "key_mapping": "its names are mapped as those of a GPT-J",
    "ignore_mismatched_sizes": "weights of other sizes would be initialized at random",
    "adapter_kwargs": "adapters inside it are loaded with it; put others on with octavo.load(..., adapter=...)",
    "proxies": "set HTTPS_PROXY, which huggingface_hub reads",
    **dict.fromkeys(
        ("distributed_config", "tp_plan", "tp_size", "device_mesh"),
        "8-bit weights are not split over devices by tensor parallelism",
    ),
}


class GPTJForCausalLM(modeling_gptj.GPTJForCausalLM):
    """transformers' GPT-J, whose `from_pretrained` also reads the published 8-bit checkpoints."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load a model as transformers' own `from_pretrained` does, in 8 bits.

        Args:
            pretrained_model_name_or_path: a Hugging Face id or a folder: a published 8-bit checkpoint, one in Octavo's
                format, or a plain one, which is quantized while it is loaded.
            kwargs: what transformers takes: changes of the configuration (`pad_token_id=...`), `config`, `dtype` or
                `torch_dtype`, `device_map`, `revision`, `subfolder`, `cache_dir`, `token`, `local_files_only`,
                `output_loading_info`, ... Without a type, the checkpoint's own, in which the device computes well
                (`octavo.loading.compute_dtype`).

        Returns:
            transformers' GPTJForCausalLM; with `output_loading_info`, it and a dictionary.

        Raises:
            TypeError: on an option that neither transformers nor the model knows, or that cannot be honoured, saying why.
            octavo.checkpoint.CheckpointError: if nothing is found there, or its files are damaged.
        """
        own = modeling_gptj.GPTJForCausalLM
        if pretrained_model_name_or_path is None or kwargs.get("gguf_file"):
            return own.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        if kwargs.get("state_dict") is not None:
            raise TypeError(
                "state_dict: this class loads weights from files; give it None in the place of a name, or leave it out"
            )
        from .checkpoint import open_source
        from .config import OctavoConfig
        from .loading import compute_dtype

        found = {name: kwargs[name] for name in HUB_OPTIONS if kwargs.get(name)}
        revision, subfolder = kwargs.get("revision"), kwargs.get("subfolder") or ""
        with open_source(
            pretrained_model_name_or_path, revision=revision, subfolder=subfolder, **found
        ) as source:
            asked = kwargs.pop("dtype", None) or kwargs.pop("torch_dtype", None)
            kwargs.pop("torch_dtype", None)
            device_map = kwargs.pop("device_map", None)
            dtype = asked or compute_dtype(source.dtype, _first_device(device_map))
            if source.native:
                if not source.eight_bit:
                    kwargs.setdefault("quantization_config", OctavoConfig())
                options = {"dtype": dtype, "device_map": device_map, **kwargs}
                return own.from_pretrained(pretrained_model_name_or_path, *args, **options)
            return _load(source, pretrained_model_name_or_path, args, dtype, device_map, kwargs)


def _load(source: Any, name: Any, args: Any, dtype: Any, device_map: Any, kwargs: dict[str, Any]) -> Any:
    """A checkpoint that transformers does not read itself: its tensors through our reader, all else through transformers."""
    from .checkpoint.build import build_model
    from .config import OctavoConfig
    from .integrations.peft import add_published_adapters

    for option, why in NOT_HONOURED.items():
        if kwargs.pop(option, None):
            raise TypeError(f"from_pretrained: {option} cannot be honoured for this checkpoint: {why}")
    if kwargs.pop("use_safetensors", None) and not all(
        path.suffix == ".safetensors" for path in source.files
    ):
        raise TypeError(
            f"from_pretrained: use_safetensors: {source.folder} holds {source.files[0].name} instead"
        )
    named = set(inspect.signature(modeling_gptj.GPTJForCausalLM.from_pretrained).parameters)
    others = ("revision", "subfolder", "adapter_name", *(named - {"config", "kwargs"}))
    for option in (*HUB_OPTIONS, *IGNORED, *others):
        kwargs.pop(option, None)
    config, loading = kwargs.pop("config", None), {key: kwargs.pop(key) for key in LOADING if key in kwargs}
    if isinstance(config, PreTrainedConfig):
        config = copy.deepcopy(config)
        changes, left = {}, kwargs
    else:
        changes = dict(kwargs)
        place = str(source.folder) if config is None else config
        config, left = modeling_gptj.GPTJConfig.from_pretrained(place, return_unused_kwargs=True, **kwargs)
    result = build_model(
        source,
        OctavoConfig(),
        source.dtype if dtype == "auto" else dtype,
        device_map if device_map is not None else {"": "cpu"},
        model_config=config,
        changes=changes,
        arguments=args,
        **loading,
        **left,
    )
    model = result[0] if isinstance(result, tuple) else result
    model.name_or_path = model.config.name_or_path = str(name)
    if source.adapters:
        add_published_adapters(model, source.adapters)
    return result


def _first_device(device_map: Any) -> torch.device:
    """The device that a `device_map` begins with: where the type to compute in is decided."""
    if isinstance(device_map, dict):
        device_map = next(iter(device_map.values()), None)
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device("cpu" if device_map in (None, "disk") else device_map)
