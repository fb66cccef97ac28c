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

import logging
import math
import os
import select
from collections.abc import Iterator
from typing import Any, Final

import msgspec
import trio

from agent.gator import spec as specs
from agent.gator.messages import Number, Result
from agent.gator.spec import Group, Ident, Node

log = logging.getLogger(__name__)

MIB: Final = 1024 * 1024
ROOM: Final = {"output": 8 * MIB, "start": 16 * MIB, "end": 64 * MIB}  # bytes that wait, when one of these comes
LAST_S: Final = 10.0  # that nothing is read, when all has ended, until the rest is given up


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
        self._root, self._fd = root, fd
        self._ended: set[Ident] = set()
        self._waiting = bytearray(_line({"event": "plan", "jobs": list(_leaves(root, ()))}))
        self._dropped = 0
        self._news = trio.Event()
        self._is_read, self._is_closed = True, False
        self._write_scope = trio.CancelScope()

    async def keep_writing(self) -> None:
        """Write what is told, until it is closed; returns when all is written, or is not read any more."""
        while self._waiting or not self._is_closed:
            if not self._waiting:
                self._news = trio.Event()
                await self._news.wait()
                continue
            # A thread, as the descriptor is the caller's, who would see O_NONBLOCK too; PIPE_BUF, to see it go on.
            part = bytes(self._waiting[: select.PIPE_BUF])
            with trio.CancelScope(deadline=self._deadline()) as self._write_scope:
                try:
                    written = await trio.to_thread.run_sync(os.write, self._fd, part, abandon_on_cancel=True)
                    del self._waiting[:written]
                except OSError:  # whoever read it has gone
                    self._is_read = False
                    return
            if self._write_scope.cancelled_caught:
                log.warning("--events-fd is not read: %d events dropped", self._waiting.count(b"\n"))
                return

    def _deadline(self) -> float:
        return trio.current_time() + LAST_S if self._is_closed else math.inf

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
        if self._dropped:
            self._tell_dropped()
        self._is_closed = True
        self._write_scope.deadline = self._deadline()
        self._news.set()

    def _end(self, event: dict[str, Any], leaf: Ident) -> None:
        if leaf not in self._ended:
            self._ended.add(leaf)
            self._put(event)

    def _put(self, event: dict[str, Any]) -> None:
        if not self._is_read:
            return
        line = _line(event)
        if len(self._waiting) + len(line) > ROOM[event["event"]]:
            if not self._dropped:
                log.warning("--events-fd is read too slowly: events are dropped")
            self._dropped += 1
            return
        if self._dropped:
            self._tell_dropped()
        self._waiting += line
        self._news.set()

    def _tell_dropped(self) -> None:
        self._waiting += _line({"event": "dropped", "count": self._dropped})
        self._dropped = 0


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
