"""What keeps the service's start short, and what it leaves small; signals that come too early.

`load_later` lets a module wait for its first use. What stands below us imports OpenSSL, IDNA tables and more for what
most agents never do: 5 MiB. What does `from module import name` loads it at once, as ever. importlib.util.LazyLoader is
of no use: before Python 3.12 even a plain `import` of what is there already asks it for its `__spec__`, and that loads.

Source: protocols/packaging.md 3 and 12.
"""

import gc
import importlib
import logging
import signal
import sys
from _blake2 import blake2b
from collections.abc import Callable, Mapping
from types import ModuleType

log = logging.getLogger(__name__)

M_ARENA_MAX = -8  # malloc.h
MADV_DONTNEED = 4  # sys/mman.h
LED_BY = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


def prepare() -> None:
    """The service begins, trio is not imported yet: what it does not need does not get in.

    The signals that lead it wait until it listens to them (`heed`): a reload that comes sooner would be its end.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, LED_BY)
    gc.disable()  # until the roles are up (`settle`): a fifth of the start
    load_later("ssl", "idna", "hmac", "secrets", "yaml")
    load_later("hashlib", blake2b=blake2b)  # all else it takes from OpenSSL
    load_later("ast", NodeVisitor=object)  # the base of a class of inspect's, which looks into sources
    load_later("importlib.metadata", version=_version)
    if mallopt := _of_glibc("mallopt"):
        mallopt(M_ARENA_MAX, 1)  # else each thread has its own, and what they free is not one's


def heed() -> None:
    """Whoever is led by signals listens to them: those that waited come now. Before the first child, and thread."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, LED_BY)


def load_later(*names: str, **ready: object) -> None:
    """Let these modules wait for their first use. One that is loaded already stays.

    The names `ready` are there without it.
    """
    for name in names:
        sys.modules.setdefault(name, _standing_in_for(name, ready))


def _standing_in_for(name: str, ready: Mapping[str, object]) -> ModuleType:
    """Becomes the module at the first name that is asked of it and not `ready` (PEP 562)."""
    module = ModuleType(name)
    module.__dict__.update(ready)

    def load(attribute: str) -> object:
        if attribute.startswith("__"):  # the import system looks at what it finds
            raise AttributeError(attribute)
        if sys.modules.get(name) is module:
            del sys.modules[name]
        found = importlib.import_module(name)
        module.__dict__.pop("__getattr__", None)  # another thread may have been here
        module.__dict__.update(found.__dict__)
        return getattr(module, attribute)

    module.__dict__["__getattr__"] = load
    return module


def _version(distribution: str) -> str:
    """What trio-websocket asks of importlib.metadata, which imports email and zipfile: of trio, and no more."""
    version: str = importlib.import_module(distribution).__version__
    return version


def settle() -> None:
    """The start is over: what it made stays, and is not looked at for garbage again; what it read goes back."""
    gc.collect()
    gc.freeze()
    gc.enable()
    if malloc_trim := _of_glibc("malloc_trim"):
        malloc_trim(0)
    _let_code_go()


def _let_code_go() -> None:
    """Program and libraries leave our memory; what is still used comes back from the page cache, and that alone.

    Only what was never written is: where a page is our own copy, as of what the dynamic linker filled in, it stays.
    """
    import ctypes

    madvise = ctypes.CDLL(None).madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    is_code, start, end = False, b"", b""
    try:
        with open("/proc/self/smaps", "rb") as maps:
            for line in maps:
                first, *words = line.split(None, 5)
                if not first.endswith(b":"):
                    start, _, end = first.partition(b"-")
                    is_code = words[0] in (b"r-xp", b"r--p") and words[-1].startswith(b"/")
                elif is_code and first == b"Anonymous:" and words[0] == b"0":
                    madvise(int(start, 16), int(end, 16) - int(start, 16), MADV_DONTNEED)
    except OSError as err:
        log.debug("code stays in memory error=%s", err)  # a kernel without these figures


def _of_glibc(function: str) -> Callable[..., int] | None:
    """A function that other C libraries do not have."""
    import ctypes

    return getattr(ctypes.CDLL(None), function, None)
