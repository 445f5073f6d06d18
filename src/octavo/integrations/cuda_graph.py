"""Decoding by a CUDA graph: one step of a model is recorded, and replayed for each token.

A step of a model of some billion parameters is a thousand small kernels, and Python takes longer to start them than a fast GPU
to run them. A graph starts them all at once. Recording takes as long as a few steps; nothing is compiled. (transformers compiles
a step that has a static cache, which takes a minute, and fuses kernels besides.) transformers' `generate` asks the model's
`get_compiled_call` for what runs a step; here it gets a graph.

What a graph replays is what the GPU was told, not what Python did: addresses, and numbers that Python knew, stay as they were. So

- keys and values lie in a static cache of plain layers, whose position is a tensor; sliding windows keep theirs in Python,
- a step with other tensors (a new cache, another batch) is recorded anew,
- the first step that is replayed is computed eagerly as well, and must give the same logits, or the graph is thrown away,
- a model that looks at its numbers in Python cannot be recorded: it goes on eagerly, and `Graphs.eager` says why.

Example:
    >>> with decoding_by_graph(model) as graphs:                              # doctest: +SKIP
    ...     ids = model.generate(ids, cache_implementation="static")
    >>> graphs.replayed, graphs.eager                                        # doctest: +SKIP
    (125, '')
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch.utils import _pytree as pytree

from ..tensor import OctavoTensor
from ..wording import one_line

# Of a step that is computed twice, in 16 bits: relative to the largest logit. The kernels are the same; a sum may be
# shared out in another order.
TOLERANCE = 2e-2

# What a step gives, and how to do it again.
Recorded = tuple[Any, Callable[[], None]]


def why_not(model: Any) -> str:
    """Why a model cannot decode by a graph; "" if it can be tried."""
    from transformers.cache_utils import StaticCache, StaticLayer

    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "its layers lie on several devices"
    if not getattr(model, "_can_compile_fullgraph", False):
        return f"transformers has no static cache for {type(model).__name__}"
    layers = StaticCache(config=model.config.get_text_config(decoder=True), max_cache_len=8).layers
    if any(isinstance(parameter, OctavoTensor) and parameter.dim() == 3 for parameter in model.parameters()):
        return "Python reads which experts are asked"
    if not all(type(layer) is StaticLayer for layer in layers):
        return "not all of its layers keep all keys and values (sliding windows, states)"
    return ""


def record_cuda(step: Callable[[], Any]) -> Recorded:
    """Record what `step` starts on the current GPU.

    Raises:
        RuntimeError: of CUDA, if it does what cannot be recorded: reads a number back, copies from the host.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            outputs = step()
    finally:
        # Where recording fails, torch leaves its own stream in charge, which does not wait for what runs in this one.
        torch.cuda.set_stream(stream)
    return outputs, graph.replay


class Graphs:
    """Steps of a model, recorded and replayed.

    Args:
        step: of keyword arguments, as transformers' `generate` calls a model to decode.
        record: how a step is recorded.

    Attributes:
        eager: why steps run eagerly; "" while nothing stands against a graph.
        replayed: number of steps that were replayed.
        options: what `generate` takes, so that it asks for them.
    """

    def __init__(
        self, step: Callable[..., Any], record: Callable[[Callable[[], Any]], Recorded] = record_cuda
    ):
        self.step, self.record = step, record
        self.eager, self.replayed = "", 0
        self.options: dict[str, Any] = {}
        self.forget()

    def forget(self) -> None:
        """Let go of what was recorded, and of its memory."""
        self._key: Any = None
        self._tensors: list[torch.Tensor] = []
        self._outputs: Any = None
        self._replay: Callable[[], None] | None = None
        self._first = 0

    def __call__(self, **inputs: Any) -> Any:
        cache = inputs.get("past_key_values")
        if self.eager or cache is None:
            return self.step(**inputs)
        tensors, rest = _split(inputs)
        key = (rest, [(t.shape, t.dtype, t.device) for t in tensors], _addresses(cache))
        if key != self._key:
            # Once eagerly: kernels are chosen and checked, libraries make room.
            self.forget()
            self._key = key
            return self.step(**inputs)
        if self._replay is None:
            outputs = self.step(**inputs)
            self._record(inputs, tensors)
            return outputs
        for static, tensor in zip(self._tensors, tensors, strict=True):
            static.copy_(tensor)
        self._replay()
        self.replayed += 1
        return self._checked(inputs, cache) if self.replayed == self._first else self._copied(cache)

    def _record(self, inputs: dict[str, Any], tensors: list[torch.Tensor]) -> None:
        self._tensors = [tensor.clone() for tensor in tensors]
        static = _put_back(inputs, self._tensors)
        try:
            self._outputs, self._replay = self.record(lambda: self.step(**static))
            self._first = self.replayed + 1
        except RuntimeError as error:
            # Of CUDA: not while a graph is recorded. Nothing has run.
            self.eager = one_line(error)
            self.forget()

    def _copied(self, cache: Any) -> Any:
        """What the graph has given: the next replay writes over it."""
        return type(self._outputs)(
            **{
                name: value if value is cache else pytree.tree_map_only(torch.Tensor, torch.clone, value)
                for name, value in self._outputs.items()
            }
        )

    def _checked(self, inputs: dict[str, Any], cache: Any) -> Any:
        """The first replay, beside the same step done eagerly: its position must have moved on since it was recorded."""
        for layer in cache.layers:
            layer.cumulative_length.sub_(1)
        right = self.step(**inputs)
        error = (self._outputs.logits.float() - right.logits.float()).abs().max()
        if not error <= TOLERANCE * right.logits.float().abs().max():
            self.eager = f"a replayed step was off by {error:.1e}"
            self.forget()
        return right


def _split(inputs: dict[str, Any]) -> tuple[list[torch.Tensor], Any]:
    """The tensors among the arguments of a step, and all else (of the cache: which one it is)."""
    leaves, structure = pytree.tree_flatten({**inputs, "past_key_values": None})
    rest = [None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)], (structure, rest)


def _put_back(inputs: dict[str, Any], tensors: list[torch.Tensor]) -> dict[str, Any]:
    """The arguments of a step with other tensors in the places of theirs."""
    leaves, structure = pytree.tree_flatten({**inputs, "past_key_values": None})
    others = iter(tensors)
    leaves = [next(others) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    return {**pytree.tree_unflatten(leaves, structure), "past_key_values": inputs["past_key_values"]}


def _addresses(cache: Any) -> list[int]:
    """Where a static cache lies: what puts other tensors there (beam search does) must not go unseen."""
    return [
        tensor.data_ptr()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values, layer.cumulative_length)
    ]


@contextmanager
def decoding_by_graph(
    model: Any, record: Callable[[Callable[[], Any]], Recorded] = record_cuda, wanted: bool = True
) -> Iterator[Graphs]:
    """Within this, transformers' `generate` decodes `model` by a graph where it would compile it: with a static cache.

    Args:
        model: a transformers model. Off a GPU, and where `why_not` has a reason, it decodes as usual.
        record: how a step is recorded.
        wanted: False: it decodes as usual.

    Yields:
        The graphs; `generate` takes their `options`.
    """
    graphs = Graphs(model.__call__, record)
    on_gpu = model.device.type == "cuda"
    possible = wanted and (on_gpu or record is not record_cuda)
    graphs.eager = why_not(model) if possible else ""
    if not possible or graphs.eager:
        yield graphs
        return
    graphs.options = {"cache_implementation": "static"}
    model.get_compiled_call = lambda compile_config: graphs
    try:
        with torch.cuda.device(model.device) if on_gpu else nullcontext():
            yield graphs
    finally:
        del model.get_compiled_call
        graphs.forget()
