"""`octavo.load`: any model in one call, ready to use in 8 bits.

    what `src` holds                              how it is loaded
    a model quantized by Octavo                   as it is, bit for bit
    a plain model (safetensors, .bin)             quantized while loading, in the source's own precision
    a published 8-bit checkpoint                  its bytes as they are, its adapters (if any) as a PEFT adapter
    a GGUF file, FP8, MXFP4, int8                 de-quantized and quantized, tensor by tensor

Example:
    >>> import octavo
    >>> model = octavo.load("model")                 # or "mrm8488/bertin-gpt-j-6B-ES-8bit"
    >>> tokenizer = octavo.load_tokenizer("model")
"""

from pathlib import Path
from typing import Any

import torch

from .config import OctavoConfig
from .wording import few, one_line

# Files of which a tokenizer has at least one.
VOCABULARIES = ("tokenizer.json", "vocab.*", "*.model", "*.tiktoken", "tekken.json", "tokenizer_config.json")


def load(
    src: str | Path,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    *,
    config: OctavoConfig | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
) -> Any:
    """Load a model in 8 bits.

    Args:
        src: a folder, a file (.safetensors, .bin, .gguf) or a Hugging Face id.
        dtype: type to compute in. Default: the model's own, or on a CPU or an old GPU without fast bfloat16 or float16
            the type that it computes well in (`compute_dtype`).
        device: where to put it. Default: "cuda" if there is one, else "cpu".
        config: how to quantize a source that is not quantized yet. Default: `OctavoConfig()`. An error for one that is.
        adapter: a PEFT adapter folder to put on top.
        revision: branch, tag or commit of a hub id.

    Returns:
        The transformers model, in evaluation mode. On a CPU, one whose heads share keys decodes with
        `octavo.integrations.attention`; `model.set_attn_implementation("sdpa")` takes that back (transformers' continuous
        batching, `generate_batch`, asks for it).

    Raises:
        octavo.checkpoint.CheckpointError: if nothing is found at `src`, or its files are missing, damaged or dangerous.
        ValueError: on an unknown type or device.
    """
    from .checkpoint import open_source

    device = device_named(device)
    with open_source(src, revision=revision) as source:
        if config is not None and source.eight_bit:
            raise ValueError(f"{src} is quantized already: `config` cannot change how; leave it out")
        model = _model_of(source, config, dtype_named(dtype) or compute_dtype(source.dtype, device), device)
        from .integrations.attention import use_grouped_attention

        use_grouped_attention(model)
        if source.adapters:
            from .integrations.peft import add_published_adapters

            add_published_adapters(model, source.adapters)
        source.check_unchanged()
    if adapter is not None:
        from .integrations.peft import add_adapter

        add_adapter(model, adapter)
    return model.eval()


def _model_of(source: Any, config: OctavoConfig | None, dtype: torch.dtype, device: torch.device) -> Any:
    from .checkpoint.build import build_model
    from .checkpoint.errors import out_of_memory
    from .checkpoint.skeleton import check_tables

    try:
        if not source.native:
            return build_model(source, config or OctavoConfig(), dtype, {"": str(device)})
        options = {} if source.eight_bit else {"quantization_config": config or OctavoConfig()}
        return from_pretrained(source, dtype, device, **options)
    except (RuntimeError, MemoryError) as error:
        if out_of_memory(error):
            check_tables(source.model_config())
        raise


def load_tokenizer(src: str | Path, *, revision: str | None = None) -> Any:
    """The tokenizer that belongs to `src`.

    Raises:
        ValueError: if there is none, saying which files are needed.
    """
    from transformers import AutoTokenizer

    from .checkpoint import open_source

    with open_source(src, revision=revision) as source:
        options = source.pretrained_options
        # Where there are no files at all, transformers makes an empty tokenizer and says nothing.
        if not options and not any(list(source.folder.glob(name)) for name in VOCABULARIES):
            raise ValueError(
                f"{src} holds no tokenizer: put the model's tokenizer.json and tokenizer_config.json beside its weights"
            )
        try:
            return AutoTokenizer.from_pretrained(str(source.folder), **options)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{src}: transformers cannot read its tokenizer: {one_line(error)}") from error


def compute_dtype(own: torch.dtype, device: torch.device) -> torch.dtype:
    """The type to compute in on `device` for a model whose own type is `own`.

    bfloat16 becomes float16 on GPUs without it (before compute capability 8.0); float16 becomes float32 on a CPU, where few
    operations outside our kernels are fast or even there in float16.
    """
    if device.type == "cuda" and own == torch.bfloat16 and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    if device.type == "cpu" and own == torch.float16:
        return torch.float32
    return own


def dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """The type asked for, by name or as it is; None for "auto". Raises ValueError for one that nothing computes in."""
    if dtype is None or dtype == "auto":
        return None
    from .ops.schema import DTYPES_BY_NAME

    found = DTYPES_BY_NAME.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if found not in DTYPES_BY_NAME.values():
        raise ValueError(f"dtype: expected one of {', '.join(DTYPES_BY_NAME)}, found {dtype}")
    return found


def device_named(device: torch.device | str | None) -> torch.device:
    """The device asked for; of None a GPU if there is one, else the CPU. Raises ValueError for a GPU that is not there."""
    found = torch.device(device if device is not None else "cuda" if torch.cuda.is_available() else "cpu")
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {found}: this torch finds no GPU; leave it out to use the CPU")
    return found


def from_pretrained(source: Any, dtype: torch.dtype, device: torch.device, **options: Any) -> Any:
    """A source that transformers reads as it is, by `from_pretrained` of its class, whole or not at all.

    Args:
        options: further ones of transformers' `from_pretrained`.

    Raises:
        octavo.checkpoint.CheckpointError: if transformers cannot load it, or the files lack parameters of the model, of which
            transformers would make random numbers.
    """
    from .checkpoint.errors import CheckpointError, library_errors, out_of_memory
    from .checkpoint.skeleton import model_class_of

    # The class alone would read config.json as its own configuration: EXAONE's, whose class is Llama's, as Llama's.
    config = source.model_config()
    model_class = model_class_of(config)
    try:
        model, found = model_class.from_pretrained(
            str(source.folder),
            config=config,
            dtype=dtype,
            device_map={"": str(device)},
            output_loading_info=True,
            **source.pretrained_options,
            **options,
        )
    except library_errors() as error:
        if isinstance(error, CheckpointError) or out_of_memory(error):
            raise
        raise CheckpointError(f"{source.folder}: transformers cannot load it: {one_line(error)}") from error
    if found["missing_keys"]:
        names = sorted(found["missing_keys"])
        raise CheckpointError(
            f"{source.folder}: {len(names)} parameters of {model_class.__name__} are in none of its files: {few(names)}; "
            "download it again, or load it by transformers' own from_pretrained, which makes them anew"
        )
    return model
