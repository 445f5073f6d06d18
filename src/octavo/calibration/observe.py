"""What goes into each matrix of a model while it runs: sums of x xᵀ over tokens.

Products are observed where they happen, by function, as `octavo.tensor.products` catches them: any module that says
`F.linear(x, self.weight)`, or multiplies by a transposed weight as `Conv1D` does, is seen, whatever its class.
Matrices that are given the same tensor (queries, keys and values) share one sum.

Example:
    >>> import torch
    >>> from octavo.calibration.observe import Observer
    >>> layer = torch.nn.Linear(64, 32)
    >>> with torch.no_grad(), Observer({id(layer.weight): ("weight", False)}) as seen:
    ...     _ = layer(torch.randn(10, 64))
    >>> seen.gram("weight").shape, seen.tokens("weight")
    (torch.Size([64, 64]), 10)
"""

import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

# x W for a weight that holds inputs as rows: the place of x among the arguments, that of W follows.
TRANSPOSED_PRODUCTS = {
    torch.addmm: 1,
    torch.mm: 0,
    torch.matmul: 0,
    torch.Tensor.matmul: 0,
    torch.Tensor.__matmul__: 0,
    torch.Tensor.addmm: 1,
    torch.Tensor.mm: 0,
}


class Enough(Exception):
    """Raised inside the model's forward pass once the last matrix of interest has been used."""


class Observer(TorchFunctionMode):
    """Sums up the inputs of matrices while it is active. Gradients must be off (`torch.no_grad`, not `inference_mode`).

    Args:
        weights: id of a parameter → its name, and whether it holds inputs as rows.
        wanted: names to sum up. Default: all; each matrix of interest costs 4 K² bytes for rows of K inputs.
        stop_after: raise `Enough` when this matrix has been used.
        sizes_only: only note which matrices are used, in which order, and which share their inputs.
    """

    def __init__(
        self,
        weights: dict[int, tuple[str, bool]],
        wanted: set[str] | None = None,
        stop_after: str | None = None,
        sizes_only: bool = False,
    ):
        super().__init__()
        self.weights = weights
        self.wanted = {name for name, _ in weights.values()} if wanted is None else wanted
        self.stop_after = stop_after
        self.sizes_only = sizes_only
        # Name → the first name that was given the same inputs; in order of use.
        self.shared: dict[str, str] = {}
        self.columns: dict[str, int] = {}
        # Names that are embeddings as well: heads tied to them.
        self.embeddings: set[str] = set()
        self._grams: dict[str, torch.Tensor] = {}
        self._tokens: dict[str, int] = {}
        # id of an input → that input, the version of its data, and the name under which it was summed up.
        self._inputs: dict[int, tuple[Callable[[], Any], int, str]] = {}

    def gram(self, name: str) -> torch.Tensor:
        """Sum of x xᵀ over the inputs of the matrix `name`: float32 [K, K]."""
        return self._grams[self.shared[name]]

    def tokens(self, name: str) -> int:
        """How many inputs that sum holds."""
        return self._tokens[self.shared[name]]

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is F.embedding and len(args) > 1 and id(args[1]) in self.weights:
            self.embeddings.add(self.weights[id(args[1])][0])
        x, weight = _product(func, args, kwargs)
        if weight is not None and id(weight) in self.weights:
            name, transposed = self.weights[id(weight)]
            if name in self.wanted and transposed == (func is not F.linear):
                self._note(name, x)
                if name == self.stop_after:
                    raise Enough
        return result

    def _note(self, name: str, x: torch.Tensor) -> None:
        found = self._inputs.get(id(x))
        same = found is not None and found[0]() is x and found[1] == x._version
        owner = self.shared.setdefault(name, found[2] if same and found else name)
        self.columns.setdefault(name, x.shape[-1])
        if same and found and found[2] == owner:
            return
        self._inputs[id(x)] = (weakref.ref(x), x._version, owner)
        if self.sizes_only:
            return
        rows = x.detach().reshape(-1, x.shape[-1]).to(torch.float32)
        if owner not in self._grams:
            self._grams[owner] = rows.new_zeros(rows.shape[1], rows.shape[1])
        self._grams[owner].addmm_(rows.T, rows)
        self._tokens[owner] = self._tokens.get(owner, 0) + len(rows)


def _product(func: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """The input and the weight of a product, or None, None."""
    if func is F.linear:
        x = args[0] if args else kwargs.get("input")
        return x, args[1] if len(args) > 1 else kwargs.get("weight")
    place = TRANSPOSED_PRODUCTS.get(func)
    if place is None or len(args) < place + 2:
        return None, None
    return args[place], args[place + 1]
