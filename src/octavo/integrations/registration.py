"""Registers Octavo with transformers when, and only when, transformers' quantizers are imported.

`import octavo` must stay light (transformers takes seconds to import), and yet
`AutoModelForCausalLM.from_pretrained(octavo_folder)` must find us afterwards, whichever was imported first. So: if
transformers is there already, register at once; else wait for the import of the module that holds its table of quantizers. The
table is filled through transformers' own registration functions; nothing of it is changed.

Programs that never import Octavo find its files too (`lm_eval`, `trl`, anybody's script): torch calls `register_when_needed` when
it is imported, through the entry point that PyTorch offers to extensions (group `torch.backends` in pyproject.toml).

Example:
    >>> import octavo  # calls register_when_needed()
    >>> import transformers.quantizers.auto as auto
    >>> "octavo" in auto.AUTO_QUANTIZER_MAPPING
    True
"""

import importlib
import importlib.abc
import importlib.util
import sys

AWAITED = "transformers.quantizers.auto"
# Loading a model imports it, after AWAITED.
LATER = "transformers.modeling_utils"


def register_when_needed() -> None:
    """Register now if transformers' quantizers are loaded, else when they are. Calling it twice is harmless."""
    module = sys.modules.get(AWAITED)
    if module is None:
        _await(AWAITED)
    elif getattr(module.__spec__, "_initializing", False):
        # AWAITED imports torch, and torch calls us (the entry point in pyproject.toml) before AWAITED is ready.
        _await(LATER)
    else:
        _register()


def _await(name: str) -> None:
    if not any(isinstance(finder, _Awaiter) and finder.awaited == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _Awaiter(name))


def _register() -> None:
    # It registers itself at its end. If it is what imports AWAITED just now, it has yet to get there.
    importlib.import_module(f"{__package__}.transformers")


class _Awaiter(importlib.abc.MetaPathFinder):
    """Finds the awaited module as usual, and registers after it has run."""

    def __init__(self, awaited: str):
        self.awaited = awaited

    def find_spec(self, fullname, path, target=None):
        if fullname != self.awaited:
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
