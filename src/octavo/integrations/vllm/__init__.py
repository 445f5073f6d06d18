"""vLLM's plugin: `vllm serve DIR` serves an Octavo folder, its weights in 8 bits.

vLLM calls `register` in each of its processes (entry point `vllm.general_plugins` in pyproject.toml). Its own classes of models
are used. What happens to a checkpoint:

    files: P_qdata, P_absmax, P_code  → (`weights`)  one `OctavoTensor` P in vLLM's stream of weights
      → vLLM's own renaming, fusing and splitting among ranks
      → (`layers`, `experts`)  a layer that was given the quantization configuration keeps the parts, shard by shard
      → any other module copies the weight into its float parameter, which de-quantizes it

Example:
    >>> from octavo.integrations.vllm import register  # vLLM does this
    >>> register()                                      # doctest: +SKIP
"""


def register() -> None:
    """Make quant_method "octavo" known to vLLM. Calling it again is harmless."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .config import NAME, VllmOctavoConfig

    register_quantization_config(NAME)(VllmOctavoConfig)
