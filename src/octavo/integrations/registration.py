"""Registers Octavo with transformers when, and only when, transformers' quantizers are imported.

`import octavo` must stay light (transformers takes seconds to import), and yet
`AutoModelForCausalLM.from_pretrained(octavo_folder)` must find us afterwards, whichever was imported first. So: if
transformers is there already, register at once; else wait for the import of the module that holds its table of quantizers. The
table is filled through transformers' own registration functions; nothing of it is changed.

Example:
    >>> import octavo  # calls register_when_needed()
    >>> import transformers.quantizers.auto as auto
    >>> "octavo" in auto.AUTO_QUANTIZER_MAPPING
    True
"""

import importlib.abc
import importlib.util
import sys

AWAITED = "transformers.quantizers.auto"


def register_when_needed() -> None:
    """Register now if transformers' quantizers are loaded, else when they are. Calling it twice is harmless."""
    if AWAITED in sys.modules:
        _register()
    elif not any(isinstance(finder, _Awaiter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiter())


def _register() -> None:
    from .transformers import register

    register()


class _Awaiter(importlib.abc.MetaPathFinder):
    """Finds the awaited module as usual, and registers after it has run."""

    def find_spec(self, fullname, path, target=None):
        if fullname != AWAITED:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _AfterLoading(spec.loader)
        return spec


class _AfterLoading(importlib.abc.Loader):
    """Wraps the module's own loader; only adds the registration after it."""

    def __init__(self, loader):
        self.loader = loader

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        _register()

    def __getattr__(self, name):
        return getattr(self.loader, name)
