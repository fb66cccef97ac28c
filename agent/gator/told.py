"""What happened to every job of a tree, once each, as JSON lines: what `--events-fd` writes.

    {"event": "plan", "jobs": [["nightly", "build"], ...]}
    {"event": "start", "path": ["nightly"], "ident": "build", "started": 1684696100.5}
    {"event": "output", "path": ["nightly"], "ident": "build", "text": "..."}
    {"event": "end", "path": ["nightly"], "ident": "build", "result": "SUCCESS", "code": 0, ...}

A tier that is not ours tells only which jobs failed, one that was lost nothing: what is left of them is told with its
end, and what nobody told of at all when the tree has ended.

Source: protocols/suites.md, "pytest, TAP, command" (gator).
"""

import os
from collections.abc import Iterator
from typing import Any

import msgspec

from agent.gator import spec as specs
from agent.gator.spec import Group, Ident, Node

_encode = msgspec.json.Encoder().encode


class Told:
    """For the tree `root`, into the descriptor `fd`."""

    def __init__(self, root: Node, fd: int) -> None:
        self._root, self._fd = root, fd
        self._ended: set[Ident] = set()
        self._is_open = True
        self._write({"event": "plan", "jobs": list(_leaves(root, ()))})

    def tell(self, event: dict[str, Any]) -> None:
        """A job's `start` or `end`; or a tier's `tier_end`, which tells of all below it that nobody told of yet."""
        at: Ident = (*event["path"], event["ident"])
        match event["event"]:
            case "tier_end":
                failed = {tuple(path) for path in event.pop("failed")}
                result = event["result"]
                for leaf in _leaves(self._root, ()):
                    if leaf[: len(at)] == at and leaf not in self._ended:
                        passed = result == "SUCCESS" or (result == "FAILURE" and failed and leaf not in failed)
                        told = {"result": "SUCCESS", "code": 0} if passed and not event["why"] else {}
                        self._end({**event, **told, "event": "end", "path": leaf[:-1], "ident": leaf[-1]}, leaf)
            case "end":
                self._end(event, at)
            case _:
                self._write(event)

    def close(self, now: float) -> None:
        """The tree has ended."""
        for leaf in _leaves(self._root, ()):
            self._end(
                {
                    "event": "end",
                    "path": leaf[:-1],
                    "ident": leaf[-1],
                    "result": "FAILURE",
                    "code": 254,
                    "pruned": False,
                    "why": "nothing was told of it",
                    "started": None,
                    "ended": now,
                    "folder": "",
                },
                leaf,
            )

    def _end(self, event: dict[str, Any], leaf: Ident) -> None:
        if leaf not in self._ended:
            self._ended.add(leaf)
            self._write(event)

    def _write(self, event: dict[str, Any]) -> None:
        if not self._is_open:
            return
        data = memoryview(_encode(event) + b"\n")
        try:
            while data:
                data = data[os.write(self._fd, data) :]
        except OSError:  # whoever read it has gone
            self._is_open = False


def _leaves(node: Node, above: Ident) -> Iterator[Ident]:
    """The idents from the root to each job, arrays expanded."""
    at = (*above, node.ident)
    if not isinstance(node, Group):
        yield at
        return
    for child in specs.children(node):
        job = msgspec.structs.replace(node.jobs[child.place], ident=child.ident)
        yield from _leaves(job, at)
