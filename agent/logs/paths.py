"""Paths as people and clients write them: what a glob finds, where it begins, what clients may have. All of it blocks.

Source: protocols/logs.md 2.2 and 7; protocols/suites.md, "The suite document" (`watch`).
"""

import glob
import os
import stat
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, TypeGuard

from agent.logs.identity import rotated_from
from agent.logs.watches import JOURNAL, KERNEL, Watch

COMPRESSED = (".gz", ".xz", ".bz2", ".zst", ".lz4", ".Z")
MAX_PATH = 4096  # characters
MAX_OF_RUN = 64  # paths
RELIST_S = 10.0  # a link to nothing may have become one to a file, and clocks of servers err
COARSE_S = 2.0


def is_path(path: object) -> TypeGuard[str]:
    """May a file be called so?"""
    return isinstance(path, str) and 0 < len(path) <= MAX_PATH and "\0" not in path


def matching(pattern: str) -> list[str]:
    """The files of a glob, compressed ones left out."""
    found = sorted(glob.glob(pattern, recursive=True))
    return [path for path in found if not path.endswith(COMPRESSED) and os.path.isfile(path)]


def rotated(pattern: str, since: float) -> list[str]:
    """What a glob would have found, of whose rotations, which it does not find, some were written since."""
    folder, name = os.path.split(pattern)
    found = set()
    for one in glob.glob(folder, recursive=True) if glob.has_magic(folder) else [folder]:
        with suppress(OSError), os.scandir(one) as entries:
            for entry in entries:
                if entry.name.endswith(COMPRESSED) or fnmatch(entry.name, name) or not entry.is_file():
                    continue
                if entry.stat(follow_symlinks=False).st_mtime >= since:
                    found |= {os.path.join(one, of) for of in rotated_from(entry.name) if fnmatch(of, name)}
    return sorted(found)


class Globs:
    """What globs find, asked for each second: a directory that says that it has not changed is not read again.

    It is believed for RELIST_S, and only when its last change is older than clocks are coarse: of another that came in
    the same tick it would say nothing.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[int, float, list[str]]] = {}  # change of the directory, when it was read, files
        self.asked: str | None = None  # what is being looked for

    def find(self, patterns: Iterable[str]) -> dict[str, list[str]]:
        """The files of each."""
        now, steady, before = time.time(), time.monotonic(), self._known
        self._known = {}
        for pattern in patterns:
            self.asked = pattern
            folder, name = os.path.split(pattern)
            changed = -1 if glob.has_magic(folder) or name == "**" else _changed(folder)
            known = before.get(pattern)
            if known is None or known[0] != changed or changed < 0 or steady >= known[1] + RELIST_S:
                if changed > (now - COARSE_S) * 1e9:
                    changed = -1
                known = (changed, steady, matching(pattern))
            self._known[pattern] = known
        self.asked = None
        return {pattern: files for pattern, (_, _, files) in self._known.items()}


def _changed(folder: str) -> int:
    """When a name in the directory changed last, in ns of its file system's clock; -1: not known."""
    try:
        return os.stat(folder).st_mtime_ns
    except OSError:
        return -1


def joined(base: str, path: str) -> str:
    """The path, seen from a folder."""
    return os.path.normpath(os.path.join(base, path))


def fixed(pattern: str) -> str:
    """The directory that a glob begins with."""
    parts = pattern.split("/")
    plain = next((i for i, part in enumerate(parts) if glob.has_magic(part)), len(parts) - 1)
    return "/".join(parts[:plain]) or "/"


def size(path: str) -> int:
    """Where its next line will be written."""
    try:
        return os.stat(path).st_size
    except OSError:  # not there yet, or what its Tail will tell
        return 0


def outside(path: str, roots: Sequence[str]) -> str | None:
    """Why clients may not have it; None: they may."""
    real = Path(os.path.realpath(path))
    if any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        return None
    return f"is not below {', '.join(roots) or 'any of logs.roots, which is empty'}"


def unfit(path: str) -> str | None:
    """Why it cannot be followed; None: it is a regular file, or not there."""
    try:
        return None if stat.S_ISREG(os.stat(path).st_mode) else "is not a regular file"
    except FileNotFoundError:
        return None
    except OSError as err:
        return err.strerror


def refused(path: str, roots: Sequence[str]) -> str | None:
    """Why a client's watch does not follow it, if it does not."""
    return outside(path, roots) or unfit(path)


def of_run(run: str, suite: Mapping[str, Any], base: str | None) -> tuple[list[Watch], list[str]]:
    """What a suite asked for in its `watch`, `logs` of which is a list; and in sentences, what of that is not watched.

    Paths are seen from the folder of its document, `base`, or for one that came over a link, from its `source.dir`. To
    be asked for before its processes begin: what stands in the files now is not read.
    """
    source, wanted = suite.get("source"), suite["watch"]
    directory = source.get("dir") if isinstance(source, dict) else None
    folder = base or (joined("/", directory) if is_path(directory) else None)
    watches, refused = [], []
    named = list(wanted["logs"])
    if len(named) > MAX_OF_RUN:
        refused.append(f"{len(named) - MAX_OF_RUN} logs are not watched: a run has {MAX_OF_RUN} at most")
    for number, path in enumerate(named[:MAX_OF_RUN]):
        if not is_path(path):
            refused.append(f"{path!r:.200} is not watched: it is no path of 1 to {MAX_PATH} characters")
        elif path in (JOURNAL, KERNEL):
            refused.append(f"{path} is not watched for a run alone: name it in a [[logs.watch]] of the settings")
        elif folder is None and not path.startswith("/"):
            refused.append(
                f"{path} is not watched: the suite has no folder here yet that it could be in; name it from /"
            )
        else:
            is_glob = glob.has_magic(path)
            pattern = joined(glob.escape(folder or "/") if is_glob else folder or "/", path)
            watch = Watch(
                id=f"{run}/{number}",
                pattern=pattern,
                is_glob=is_glob,
                sets=wanted.get("rules", ()),
                start="start",
                sizes={path: size(path) for path in (matching(pattern) if is_glob else [pattern])},
                base=folder or "/",
                run=run,
            )
            watches.append(watch)
    return watches, refused
