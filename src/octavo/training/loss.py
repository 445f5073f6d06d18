"""Cross-entropy of a language model in chunks of tokens, so that its logits never decide the peak of memory.

2048 tokens times GPT-J's vocabulary of 50400 are 394 MiB of float32 logits, and their softmax and gradient as
much again. Here the head runs on a few hundred tokens at a time, and each chunk's gradient is computed at
once, in the forward pass: nothing is computed twice, and no more than `CHUNK_BYTES` of logits exist at any
time. Tokens without a label (a prompt, padding) never reach the head.

Example:
    >>> import torch
    >>> head, hidden, labels = torch.nn.Linear(8, 32), torch.randn(1, 5, 8), torch.randint(0, 32, (1, 5))
    >>> total, tokens = summed_cross_entropy(hidden, labels, head)
    >>> total.shape, int(tokens)
    (torch.Size([]), 4)
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

CHUNK_BYTES = 64 * 2**20
IGNORED = -100

# What families of models do to the logits after the head, by the first words of `model_type`: the option, and the same
# operations as in transformers' code. One name means different things: Granite divides by `logits_scaling`, HyperCLOVA X
# multiplies. A model that has one of the options and is of no family here keeps its own loss.
AFTER_THE_HEAD: dict[str, tuple[str, Callable[[torch.Tensor, float], torch.Tensor]]] = {
    "cohere": ("logit_scale", torch.mul),
    "falcon_h1": ("lm_head_multiplier", torch.mul),
    "gemma": ("final_logit_softcapping", lambda logits, cap: torch.tanh(logits / cap) * cap),
    "granite": ("logits_scaling", torch.div),
    "hyperclovax": ("logits_scaling", torch.mul),
    "nanochat": ("final_logit_softcapping", lambda logits, cap: torch.tanh(logits / cap) * cap),
    "vaultgemma": ("final_logit_softcapping", lambda logits, cap: torch.tanh(logits / cap) * cap),
}
CHANGES_LOGITS = {option for option, _ in AFTER_THE_HEAD.values()}


def rows_per_chunk(vocabulary: int) -> int:
    """How many tokens' float32 logits fit CHUNK_BYTES; at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocabulary))


class _SummedCrossEntropy(torch.autograd.Function):
    """Σ cross-entropy over rows; gradients of the hidden states and of the head's parameters, chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, labels, head, rows, *parameters):
        differentiate = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        grads = [torch.zeros_like(parameter) for parameter in parameters]
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            with torch.set_grad_enabled(differentiate):
                chunk = hidden[part].detach().requires_grad_(differentiate)
                # [rows, vocabulary]
                loss = F.cross_entropy(head(chunk).float(), labels[part], reduction="sum")
            total += loss.detach()
            if differentiate:
                found = torch.autograd.grad(loss, [chunk, *parameters])
                if grad_hidden is not None:
                    grad_hidden[part] = found[0]
                for grad, more in zip(grads, found[1:], strict=True):
                    grad += more
        ctx.save_for_backward(*([] if grad_hidden is None else [grad_hidden]), *grads)
        ctx.has_hidden = grad_hidden is not None
        return total

    @staticmethod
    def backward(ctx, grad_total):
        # Saved for a sum of losses, not a mean: in float16 a mean's gradients would vanish.
        scaled = [grad * grad_total for grad in ctx.saved_tensors]
        grad_hidden = scaled.pop(0) if ctx.has_hidden else None
        return grad_hidden, None, None, None, *scaled


def summed_cross_entropy(
    hidden: torch.Tensor,
    labels: torch.Tensor,
    head: Callable[[torch.Tensor], torch.Tensor],
    parameters: list[nn.Parameter] | None = None,
    *,
    select: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Next-token cross-entropy, summed over the tokens that have a label.

    Args:
        hidden: the last hidden states, float [batch, length, dim].
        labels: token ids [batch, length]; position t is predicted from t - 1; -100 is not counted.
        head: hidden states [rows, dim] → logits [rows, vocabulary].
        parameters: trainable parameters of the head. Default: those of `head`, if it is a module.
        select: leave tokens without a label out of the product with the head. Without data (shapes alone) it
            cannot be known which they are.

    Returns:
        The sum in float32 (differentiable in `hidden` and `parameters`), and the number of tokens counted.
    """
    if parameters is None:
        parameters = list(head.parameters()) if isinstance(head, nn.Module) else []
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1)
    flat = hidden.reshape(-1, hidden.shape[-1])
    tokens = (targets != IGNORED).sum()
    if select:
        counted = (targets != IGNORED).nonzero().squeeze(-1)
        flat, targets = flat[counted], targets[counted]
    vocabulary: Any = getattr(head, "out_features", None) or getattr(head, "vocabulary", 50_000)
    total = _SummedCrossEntropy.apply(flat, targets, head, rows_per_chunk(vocabulary), *parameters)
    return total, tokens


class _Head:
    """The head's own forward, callable while `forward` is replaced, and what the model does to its logits."""

    def __init__(self, forward: Callable, vocabulary: int, after: Callable[[torch.Tensor], torch.Tensor]):
        self.forward = forward
        self.vocabulary = vocabulary
        self.after = after

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.after(self.forward(hidden))


@contextmanager
def loss_in_place_of_logits(
    head: nn.Module,
    labels: torch.Tensor,
    vocabulary: int,
    *,
    after: Callable[[torch.Tensor], torch.Tensor] = lambda logits: logits,
    select: bool = True,
) -> Iterator[dict[str, Any]]:
    """While active, `head(hidden)` gives the summed loss of `labels` in place of logits.

    The model still runs through its own `forward`, and the head through its own `__call__`, so that DDP's and
    FSDP's hooks see what they expect. What the model does to the loss that it takes for logits is of no account.

    Args:
        after: what the model does to its logits after the head (`after_the_head`).

    Yields:
        A dict that holds `loss` and `tokens` once the head has run.
    """
    result: dict[str, Any] = {}
    own = _Head(head.forward, vocabulary, after)

    def forward(hidden):
        parameters = list(head.parameters())
        result["loss"], result["tokens"] = summed_cross_entropy(
            hidden, labels, own, parameters, select=select
        )
        return result["loss"]

    # accelerate may have put a forward of its own onto the instance.
    set_before = head.__dict__.get("forward")
    head.forward = forward
    try:
        yield result
    finally:
        del head.forward
        if set_before is not None:
            head.forward = set_before


def _text_config(model: Any) -> Any:
    return model.config.get_text_config() if hasattr(model.config, "get_text_config") else model.config


def after_the_head(config: Any) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """What a model does to its logits after the head; None if it does something that is not known here.

    Args:
        config: the configuration of its language model.
    """
    options = {name for name in CHANGES_LOGITS if getattr(config, name, None) not in (None, 1, 1.0)}
    if not options:
        return lambda logits: logits
    kind = str(config.model_type)
    for family, (option, change) in AFTER_THE_HEAD.items():
        if kind.startswith(family) and options == {option}:
            value = getattr(config, option)
            return lambda logits: change(logits, value)
    return None


def takes_chunked_loss(model: Any) -> bool:
    """Whether it is known what a model does to the logits that its head gives, so that its loss can be computed in chunks."""
    config = _text_config(model)
    with_router = getattr(config, "output_router_logits", False)
    return (
        after_the_head(config) is not None and not with_router and model.get_output_embeddings() is not None
    )


def language_model_loss(
    model: Any, inputs: dict[str, torch.Tensor], bare: Any = None, *, select: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """A causal language model's summed loss and number of counted tokens, in chunks where the model allows
    it.

    Args:
        model: the model to call, perhaps wrapped by DDP.
        inputs: its inputs, with `labels` [batch, length].
        bare: the same model unwrapped. Default: `model`.
        select: as in `summed_cross_entropy`.
    """
    bare = model if bare is None else bare
    inputs = dict(inputs)
    labels = inputs.pop("labels")
    if takes_chunked_loss(bare):
        head = bare.get_output_embeddings()
        config = _text_config(bare)
        after = after_the_head(config)
        assert after is not None
        with loss_in_place_of_logits(head, labels, config.vocab_size, after=after, select=select) as result:
            model(**inputs, use_cache=False)
        return result["loss"], result["tokens"]
    logits = model(**inputs, use_cache=False).logits.float()
    targets = F.pad(labels, (0, 1), value=IGNORED)[..., 1:].reshape(-1)
    total = F.cross_entropy(logits.view(-1, logits.shape[-1]), targets, ignore_index=IGNORED, reduction="sum")
    return total, (targets != IGNORED).sum()
