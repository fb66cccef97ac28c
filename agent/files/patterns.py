"""Which paths a watch means: a file, a directory with what is in it, or a glob. Pure.

A pattern is walked name by name, as a directory tree is: `start()` is "/", `step()` goes into a name. What it returns
are the places in the pattern that may have been reached; from them follow what is reported and where to look further.

    *  ?  [a-z]     within a name, as in a shell, dot files too
    **              any number of directories, none too

Source: protocols/emissary.md, "Entitlement and file monitor"; issue 4, item 5.
"""

import fnmatch
import re

Places = frozenset[int]
NOWHERE: Places = frozenset()

_WILD = re.compile(r"[*?\[]")
_ANY_DEPTH = None


class Pattern:
    """A watch's path. A directory that matches means its entries too; with `recursive` all that is below it."""

    def __init__(self, path: str, *, recursive: bool = False) -> None:
        names = [name for name in path.split("/") if name]
        self._parts = tuple(
            _ANY_DEPTH if name == "**" else re.compile(fnmatch.translate(name)) if _WILD.search(name) else name
            for name in names
        )
        self._end, self._recursive = len(names), recursive

    def start(self) -> Places:
        """The places of the root directory."""
        return self._closed({0})

    def step(self, places: Places, name: str) -> Places:
        """The places of an entry of a directory with these places; NOWHERE: it is of no interest."""
        reached = set()
        for place in places:
            if place > self._end:
                if self._recursive:
                    reached.add(place)
            elif place == self._end:
                reached.add(place + 1)
            else:
                match self._parts[place]:
                    case None:
                        reached.add(place)
                    case str(literal):
                        if literal == name:
                            reached.add(place + 1)
                    case wild:
                        if wild.match(name):
                            reached.add(place + 1)
        return self._closed(reached) if reached else NOWHERE

    def walk(self, path: str) -> Places:
        """The places of an absolute path."""
        places = self.start()
        for name in path.split("/"):
            if name:
                places = self.step(places, name)
        return places

    def is_reported(self, places: Places) -> bool:
        """Is what has these places a thing that is watched, and not only on the way to one?"""
        return any(place >= self._end for place in places)

    def reports_all(self, places: Places) -> bool:
        """Is every entry of a directory with these places reported?"""
        return any(place == self._end or (place > self._end and self._recursive) for place in places)

    def may_report(self, places: Places) -> bool:
        """Can an entry of a directory with these places be reported?"""
        return any(place == self._end - 1 for place in places) or self.reports_all(places)

    def names(self, places: Places) -> frozenset[str] | None:
        """The only names that matter in a directory with these places; None: any name may."""
        literal = set()
        for place in places:
            part = self._parts[place] if place < self._end else None
            if not isinstance(part, str):
                if place > self._end and not self._recursive:
                    continue
                return None
            literal.add(part)
        return frozenset(literal)

    def _closed(self, places: set[int]) -> Places:
        """`**` may stand for no directory."""
        for place in range(self._end):
            if place in places and self._parts[place] is _ANY_DEPTH:
                places.add(place + 1)
        return frozenset(places)
