"""What keeps the service's start short, and what it leaves small.

`load_later` lets a module wait for its first use. What stands below us imports OpenSSL, IDNA tables and more for what
most agents never do: 5 MiB. What does `from module import name` loads it at once, as ever. importlib.util.LazyLoader is
of no use: before Python 3.12 even a plain `import` of what is there already asks it for its `__spec__`, and that loads.

Source: protocols/packaging.md 3 and 12.
"""

import ctypes
import gc
import importlib
import sys
from types import ModuleType


def load_later(*names: str) -> None:
    """Let these top-level modules wait for their first use. One that is loaded already stays."""
    for name in names:
        sys.modules.setdefault(name, _standing_in_for(name))


def _standing_in_for(name: str) -> ModuleType:
    """Becomes the module at the first name that is asked of it (PEP 562)."""
    module = ModuleType(name)

    def load(attribute: str) -> object:
        if attribute.startswith("__"):  # the import system looks at what it finds
            raise AttributeError(attribute)
        if sys.modules.get(name) is module:
            del sys.modules[name]
        found = importlib.import_module(name)
        del module.__dict__["__getattr__"]
        module.__dict__.update(found.__dict__)
        return getattr(module, attribute)

    module.__dict__["__getattr__"] = load
    return module


def settle() -> None:
    """The start is over: what it made stays, and is not looked at for garbage again; what it read goes back."""
    gc.collect()
    gc.freeze()
    gc.enable()
    if malloc_trim := getattr(ctypes.CDLL(None), "malloc_trim", None):  # glibc's
        malloc_trim(0)
