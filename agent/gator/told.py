"""What happened to every job of a tree, once each, as JSON lines: what `--events-fd` writes.

    {"event": "plan", "jobs": [["nightly", "build"], ...]}
    {"event": "start", "path": ["nightly"], "ident": "build", "started": 1684696100.5}
    {"event": "output", "path": ["nightly"], "ident": "build", "text": "..."}
    {"event": "end", "path": ["nightly"], "ident": "build", "result": "SUCCESS", "code": 0, ...}
    {"event": "dropped", "count": 3}

Nothing waits for who reads them: what is not read in time waits here, up to a bound for each kind, and what is beyond
it is dropped, and counted where it would have been.

A tier that is not ours tells only which jobs failed, at most 1000 of them, one that was lost nothing: what is left of
them is told with its end, and what nobody told of at all when the tree has ended. Who did not name as many jobs as it
says have failed proves of no other that it passed.

Source: protocols/suites.md, "pytest, TAP, command" (gator).
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

import msgspec

from agent.core.outflow import LAST_S, MIB, Outflow
from agent.gator import spec as specs
from agent.gator.messages import Number, Result
from agent.gator.spec import Group, Ident, Node

ROOM: Final = {"output": 8 * MIB, "start": 16 * MIB, "end": 64 * MIB}  # bytes that wait, when one of these comes


class _Start(msgspec.Struct, frozen=True, tag_field="event", tag="start"):
    path: list[str]
    ident: str
    started: float | None


class _Output(msgspec.Struct, frozen=True, tag_field="event", tag="output"):
    path: list[str]
    ident: str
    text: str


class _End(msgspec.Struct, frozen=True, tag_field="event", tag="end"):
    path: list[str]
    ident: str
    result: Result
    code: int
    pruned: bool
    why: str | None
    started: float | None
    ended: float | None
    folder: str
    metrics: dict[str, Number]


class _TierEnd(_End, frozen=True, tag="tier_end"):
    failed: list[list[str]]
    failed_jobs: int


_encode = msgspec.json.Encoder().encode


def fault(event: dict[str, Any], child: Ident) -> str | None:
    """Why this is nothing that `child`, by the idents from the root down, can tell of itself or of what is below it."""
    try:
        given = msgspec.convert(event, _Start | _Output | _End | _TierEnd)
    except msgspec.ValidationError as err:
        return str(err)
    at = (*given.path, given.ident)
    return None if at[: len(child)] == child else f"{'/'.join(at)} is not below {'/'.join(child)}"


class Told:
    """For the tree `root`, into the descriptor `fd`, by `keep_writing`."""

    def __init__(self, root: Node, fd: int) -> None:
        self._root = root
        self._ended: set[Ident] = set()
        self._out = Outflow(fd, "--events-fd", lambda count: _line({"event": "dropped", "count": count}))
        self._out.put(_line({"event": "plan", "jobs": list(_leaves(root, ()))}), math.inf)

    async def keep_writing(self) -> None:
        """Write what is told, until it is closed; returns when all is written, or is not read any more."""
        with suppress(OSError):  # whoever read it has gone
            await self._out.keep_writing()

    def tell(self, event: dict[str, Any]) -> None:
        """A job's `start` or `end`; or a tier's `tier_end`, which tells of all below it that nobody told of yet."""
        at: Ident = (*event["path"], event["ident"])
        match event["event"]:
            case "tier_end":
                leaves = [leaf for leaf in _leaves(self._root, ()) if leaf[: len(at)] == at]
                failed = {tuple(path) for path in event.pop("failed")}.intersection(leaves)
                is_whole = len(failed) >= max(1, event.pop("failed_jobs"))
                if event["result"] == "FAILURE" and not is_whole and not event["why"]:
                    event = {**event, "why": f"its tier failed, and named {len(failed)} of the jobs that did"}
                for leaf in leaves:
                    passed = event["result"] == "SUCCESS" or (event["result"] == "FAILURE" and leaf not in failed)
                    told = {"result": "SUCCESS", "code": 0} if passed and not event["why"] else {}
                    self._end({**event, **told, "event": "end", "path": leaf[:-1], "ident": leaf[-1]}, leaf)
            case "end":
                self._end(event, at)
            case _:
                self._put(event)

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
        self._out.close(LAST_S)

    def _end(self, event: dict[str, Any], leaf: Ident) -> None:
        if leaf not in self._ended:
            self._ended.add(leaf)
            self._put(event)

    def _put(self, event: dict[str, Any]) -> None:
        self._out.put(_line(event), ROOM[event["event"]])


def _line(event: dict[str, Any]) -> bytes:
    return _encode(event) + b"\n"


def _leaves(node: Node, above: Ident) -> Iterator[Ident]:
    """The idents from the root to each job, arrays expanded."""
    at = (*above, node.ident)
    if not isinstance(node, Group):
        yield at
        return
    for child in specs.children(node):
        job = msgspec.structs.replace(node.jobs[child.place], ident=child.ident)
        yield from _leaves(job, at)
