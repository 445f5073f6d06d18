"""Registers Octavo with transformers when, and only when, transformers' quantizers and models are imported.

`import octavo` must stay light (transformers takes seconds to import), and yet
`AutoModelForCausalLM.from_pretrained(octavo_folder)` must find us afterwards, whichever was imported first. So: if
transformers is there already, register at once; else wait for the import of the modules that hold its tables: of quantizers,
and of attention functions, one of which a pickled model from `octavo.load` asks for by name. The tables are filled through
transformers' own registration functions; nothing of them is changed.

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

# Module that is waited for → our module that registers itself at its end.
AWAITED = {"transformers.quantizers.auto": "transformers", "transformers.modeling_utils": "attention"}


def register_when_needed() -> None:
    """Register with those of transformers' modules that are loaded, and with the others when they are. Calling it twice is
    harmless."""
    for name, ours in AWAITED.items():
        if name not in sys.modules:
            _await(_Awaiter(name, ours))
        elif _is_loading(name):
            # It imports torch, and torch calls us (the entry point in pyproject.toml) before it is ready.
            _await(_NextLookUp(name, ours))
        else:
            _register(ours)


def _is_loading(name: str) -> bool:
    # Not there any more: its import failed, and may be tried again.
    return name not in sys.modules or getattr(sys.modules[name].__spec__, "_initializing", False)


def _await(finder: "_Awaiter") -> None:
    if not any(type(f) is type(finder) and vars(f) == vars(finder) for f in sys.meta_path):
        sys.meta_path.insert(0, finder)


def _register(ours: str) -> None:
    # It registers itself at its end. If it is what imports the awaited module just now, it has yet to get there.
    importlib.import_module(f"{__package__}.{ours}")


class _Awaiter(importlib.abc.MetaPathFinder):
    """Finds the awaited module as usual, and registers after it has run."""

    def __init__(self, awaited: str, ours: str):
        self.awaited = awaited
        self.ours = ours

    def find_spec(self, fullname, path, target=None):
        if fullname != self.awaited:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _AfterLoading(spec.loader, self.ours)
        return spec


class _NextLookUp(_Awaiter):
    """Finds nothing; registers when a further module of transformers (or code that came with a model, `transformers_modules`) is
    looked for after the awaited one is ready. No model is unpickled or loaded before that."""

    def find_spec(self, fullname, path, target=None):
        if fullname.startswith("transformers") and not _is_loading(self.awaited):
            sys.meta_path.remove(self)
            _register(self.ours)


class _AfterLoading(importlib.abc.Loader):
    """Wraps the module's own loader; only adds the registration after it."""

    def __init__(self, loader, ours: str):
        self.loader = loader
        self.ours = ours

    def create_module(self, spec):
        return self.loader.create_module(spec)

    def exec_module(self, module):
        self.loader.exec_module(module)
        _register(self.ours)

    def __getattr__(self, name):
        return getattr(self.loader, name)
