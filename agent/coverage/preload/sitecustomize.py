"""Loaded by each Python that the agent covers, old ones too: every Python from 2.7 on must be able to read this.

It stands before the machine's own sitecustomize, which is loaded too. Source: drill sheet, "Probe sources".
"""

import os
import sys


def load_shadowed():
    # type: () -> None
    """Import the sitecustomize that would have been found without us; it takes our place in sys.modules."""
    ours = os.path.dirname(os.path.abspath(__file__))
    path = list(sys.path)
    sys.path[:] = [folder for folder in path if os.path.abspath(folder or os.curdir) != ours]
    shortened = list(sys.path)
    this = sys.modules.pop("sitecustomize", None)
    try:
        import sitecustomize  # type: ignore[import-not-found]  # noqa: F401
    except ImportError:
        if getattr(sys.exc_info()[1], "name", "sitecustomize") != "sitecustomize":
            raise  # as Python's site does: it is there, and what it needs is not
        if this is not None:
            sys.modules["sitecustomize"] = this
    finally:
        if sys.path == shortened:
            sys.path[:] = path
        elif ours not in sys.path:
            sys.path.append(ours)  # it has a path of its own


try:  # noqa: SIM105  # contextlib takes a while to load, and is another in old ones
    import emissary_coverage  # type: ignore[import-not-found]  # noqa: F401
except Exception:  # noqa: BLE001  # an old Python, or a strange one: the product runs on without
    pass
load_shadowed()
