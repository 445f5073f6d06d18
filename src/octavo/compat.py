"""The names that the published model cards import, so that their own code runs with one line changed.

The card of `mrm8488/bertin-gpt-j-6B-ES-8bit` downloads a file `Utils.py` and says

    from Utils import GPTJBlock, GPTJForCausalLM
    transformers.models.gptj.modeling_gptj.GPTJBlock = GPTJBlock
    model = GPTJForCausalLM.from_pretrained("mrm8488/bertin-gpt-j-6B-ES-8bit", low_cpu_mem_usage=True)

With `from octavo.compat import GPTJBlock, GPTJForCausalLM` the rest stays as it is. `GPTJBlock` is transformers' own, since
nothing has to be replaced; `GPTJForCausalLM` is transformers' own as well, loading through `octavo.load`.

Example:
    >>> from octavo.compat import GPTJForCausalLM
    >>> model = GPTJForCausalLM.from_pretrained("hivemind/gpt-j-6B-8bit")  # doctest: +SKIP
"""

from typing import Any

from transformers.models.gptj import modeling_gptj
from transformers.models.gptj.modeling_gptj import GPTJBlock

__all__ = ["GPTJBlock", "GPTJForCausalLM"]


class GPTJForCausalLM(modeling_gptj.GPTJForCausalLM):
    """transformers' GPT-J, whose `from_pretrained` also reads the published 8-bit checkpoints."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Load with `octavo.load`.

        Args:
            pretrained_model_name_or_path: a Hugging Face id or a folder.
            kwargs: `dtype` or `torch_dtype`, `revision` and `device_map` (a device) are understood;
                `low_cpu_mem_usage` is always on.

        Raises:
            TypeError: on any other option, naming it.
        """
        from .loading import load

        kwargs.pop("low_cpu_mem_usage", None)
        dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
        device = kwargs.pop("device_map", None)
        revision = kwargs.pop("revision", None)
        if args or kwargs:
            raise TypeError(
                f"from_pretrained: options {sorted(kwargs) or args} are not understood here; use "
                "transformers.GPTJForCausalLM for a model that is not a published 8-bit checkpoint"
            )
        if isinstance(device, dict):
            device = next(iter(device.values()))
        # The card puts the model on a device afterwards; until then it is where torch puts tensors by default.
        return load(
            pretrained_model_name_or_path,
            dtype=dtype,
            device=None if device == "auto" else device or "cpu",
            revision=revision,
        )
