"""Which file a line of AVA's TAP speaks of.

With several files AVA puts `dir › file › ` before a title: the file's path below the common folder of all, without
`__tests__`, `.spec`, `.test`, `test-` and the extension. With one file it puts nothing.

Source: protocols/suites.md, "AVA, driver tap" row 8.
"""

import posixpath
import re
from collections.abc import Sequence
from typing import Final

SEPARATOR: Final = " › "

_GLOB = re.compile(r"[*?\[\]{}()!]")
_LINES = re.compile(r":[0-9,-]+$")


def literal(pattern: str) -> str | None:
    """The file that an entry of `files` names, without `:4,7-9`; null for a glob, and for what may be a folder."""
    path = _LINES.sub("", pattern)
    if _GLOB.search(path) or not posixpath.splitext(path)[1]:
        return None
    return posixpath.normpath(path)


class Files:
    """The files of a run, as far as the suite document names them one by one. `single` is the only one."""

    def __init__(self, patterns: Sequence[str]) -> None:
        literals = list(dict.fromkeys(map(literal, patterns)))
        self._files = [file for file in literals if file is not None]
        self.single = literals[0] if len(literals) == 1 else None
        # Which prefix means which file; null where it means two.
        self._prefixes: dict[str, str | None] = {}
        self._is_flat = True  # no prefix goes on where another ends
        is_mixed = len({file.startswith("/") for file in self._files}) > 1
        if None in literals or len(literals) < 2 or is_mixed:
            return  # the common folder of all files is not known
        base = len(posixpath.commonpath([posixpath.dirname(file) for file in self._files]))
        for file in self._files:
            prefix = _prefix(file[base:].lstrip("/"))
            self._prefixes[prefix] = None if prefix in self._prefixes else file
        self._is_flat = not any(SEPARATOR in prefix for prefix in self._prefixes)

    def split(self, title: str) -> tuple[str | None, str]:
        """The file and the test's own title. What is ambiguous or unknown stays whole, with file null."""
        if not self._prefixes:
            return self.single, title
        if self._is_flat:
            prefix, _, name = title.partition(SEPARATOR)
            file = self._prefixes.get(prefix) if name else None
            return (file, name) if file else (None, title)
        found: list[tuple[str | None, str]] = []
        at = title.find(SEPARATOR)
        while at >= 0:
            if (prefix := title[:at]) in self._prefixes:
                found.append((self._prefixes[prefix], title[at + len(SEPARATOR) :]))
            at = title.find(SEPARATOR, at + 1)
        if len(found) == 1 and found[0][0] is not None:
            return found[0]
        return None, title

    def known(self, path: str) -> str:
        """A path as AVA tells it, relative to the folder of package.json, as the suite document names it."""
        for file in self._files:
            if path == file or path.endswith(f"/{file}"):
                return file
        return path


def _prefix(path: str) -> str:
    *folders, name = path.split("/")
    for cut, by in ((".spec.", "."), (".test.", "."), ("test-", "")):
        name = name.replace(cut, by, 1)
    return SEPARATOR.join([*(part for part in folders if part != "__tests__"), posixpath.splitext(name)[0]])
