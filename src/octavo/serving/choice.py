"""Which engine serves a model, and why.

Example:
    >>> from octavo.checkpoint.reading.locate import locate
    >>> choose("transformers", locate("model-8bit"), None)
    Choice(engine='transformers', why='asked for with --engine')
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

from ..checkpoint.reading.locate import Location
from ..json_files import read_object

VLLM, TRANSFORMERS = "vllm", "transformers"
# What transformers' server needs, beside what Octavo brings.
NEEDED = ("fastapi", "uvicorn", "openai", "pydantic")


@dataclass(frozen=True)
class Choice:
    """An engine, "vllm" or "transformers", and a clause that says why."""

    engine: str
    why: str


def check_installed(engine: str) -> None:
    """Before anything slow is imported.

    Raises:
        ImportError: if the engine that is asked for is not installed, or with "auto" none is.
    """
    has_vllm = importlib.util.find_spec("vllm") is not None
    if engine == VLLM and not has_vllm:
        raise ImportError("--engine vllm: vLLM is not installed; see https://docs.vllm.ai for your machine")
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing and (engine == TRANSFORMERS or not has_vllm):
        raise ImportError(f"transformers' server needs {', '.join(missing)}: pip install 'octavo[serve]'")


def choose(engine: str, found: Location, adapter: Path | None) -> Choice:
    """vLLM if it is installed and serves the model, transformers' server otherwise; or what is asked for.

    Args:
        engine: "auto", "vllm" or "transformers".
        found: where the model is.
        adapter: a folder.

    Raises:
        ValueError: if vLLM is asked for and cannot serve the model.
    """
    if engine == TRANSFORMERS:
        return Choice(TRANSFORMERS, "asked for with --engine")
    if importlib.util.find_spec("vllm") is None:
        return Choice(TRANSFORMERS, "vLLM is not installed")
    able, why = _served_by_vllm(found, adapter)
    if able:
        return Choice(VLLM, why)
    if engine == VLLM:
        raise ValueError(f"--engine vllm: {why}; --engine transformers serves it")
    return Choice(TRANSFORMERS, why)


def _served_by_vllm(found: Location, adapter: Path | None) -> tuple[bool, str]:
    if found.format != "safetensors":
        return (
            False,
            f"vLLM reads Octavo folders, and this is a {found.format} file; `octavo quantize` makes one of it",
        )
    try:
        config = read_object(found.folder / "config.json")
    except (OSError, ValueError):
        return False, "vLLM needs a config.json"
    if (config.get("quantization_config") or {}).get("quant_method") != "octavo":
        return (False, "the model is not in 8 bits yet; `octavo quantize` makes a folder for vLLM")
    from .vllm_engine import serves

    return serves((config.get("architectures") or [""])[0], adapter)
