"""Which files below the roots are the product's. All of it blocks: for a thread.

Source: drill sheet, "Settings" (roots, include, exclude).
"""

import os
import re
from collections.abc import Collection, Iterator, Sequence
from functools import cache
from pathlib import Path


class Chosen:
    """The settings' `include` and `exclude`: `**` is any folders, `*` and `?` stay within a name."""

    def __init__(self, include: Sequence[str], exclude: Sequence[str]) -> None:
        self._include = [_pattern(text) for text in include]
        self._exclude = [_pattern(text) for text in exclude]

    def takes(self, path: str) -> bool:
        """Is it meant? `path` is relative to its root, with slashes."""
        if any(pattern.fullmatch(path) for pattern in self._exclude):
            return False
        return not self._include or any(pattern.fullmatch(path) for pattern in self._include)

    def enters(self, folder: str) -> bool:
        """May there be a file that is meant? False where all of a folder is excluded."""
        both = f"{folder}/\0", f"{folder}/\0/\0"  # a file in it, and one below: `test/*` is not all of `test`
        return not any(all(map(pattern.fullmatch, both)) for pattern in self._exclude)


@cache
def _pattern(text: str) -> re.Pattern[str]:
    """A pattern of files; one without a slash at its begin or in it is meant at any depth, as in a .gitignore."""
    if "/" not in text:
        text = f"**/{text}"
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", text.removeprefix("./").removeprefix("/"))
    wild = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(wild.get(part, re.escape(part)) for part in parts), re.DOTALL)


def files_below(root: Path, chosen: Chosen, suffixes: Collection[str]) -> Iterator[tuple[str, str]]:
    """The product's files with one of the suffixes (".js"): relative to the root, and absolute. In order of the names.

    Links to folders are not followed; what cannot be read, or has a name that is no UTF-8, is left out. `root` is real:
    no link is in it.
    """
    for folder, folders, files in os.walk(root):
        if "pyvenv.cfg" in files and folder != str(
            root
        ):  # a virtual environment: what the product uses, not what it is
            folders.clear()
            continue
        below = os.path.relpath(folder, root).removeprefix(".").removeprefix("/")
        inside = f"{below}/" if below else ""
        folders[:] = sorted(name for name in folders if name != ".git" and chosen.enters(inside + name))
        for name in sorted(files):
            if os.path.splitext(name)[1] in suffixes and _is_utf8(inside + name) and chosen.takes(inside + name):
                yield inside + name, f"{folder}/{name}"


def _is_utf8(name: str) -> bool:
    """Names that are not come with surrogates, which no announcement can hold."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)
