"""The GPU kernels: one file and one record (`KERNEL`) each. A new kernel is a new file here, and nothing else.

Files are read when the first GPU operation runs; those written in Triton are left out where it is missing.

Example:
    >>> from octavo.ops.gpu import kernels
    >>> "panels" in kernels.named(), kernels.named()["panels"].operation
    (True, 'linear')
"""

import functools
import importlib
import pkgutil

from ..kernel import Kernel


def files() -> list[str]:
    """The name of every kernel, whether it can be imported here or not."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


@functools.cache
def named() -> dict[str, Kernel]:
    """name → record of every kernel that can be imported."""
    found = {}
    for name in files():
        try:
            found[name] = importlib.import_module(f"{__name__}.{name}").KERNEL
        except ModuleNotFoundError as missing:
            if missing.name is None or missing.name.partition(".")[0] != "triton":
                raise
    return found
