"""One run of a monitor on trio: its process, its pipes, the clock, and the way out.

One task waits for all of it at a time: what the monitor wrote, its end, room in its stdin, the next thing that is due.
A run takes some milliseconds of ours, and each turn of the loop is a part of them.

Source: protocols/monitors.md, "State machine of a run" (the ladder), "Limits and security".
"""

import json
import logging
import math
import os
import re
import select
import signal
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Literal
from urllib.parse import quote

import msgspec
import trio

from agent.core.cgroup import Leaves
from agent.core.payload import UNREADABLE
from agent.core.process import Child, Exit, Limits, Spec, open_child
from agent.core.processtree import TreeSurvived
from agent.monitors.folders import private_folder
from agent.monitors.framing import MAX_LINE, Lines, Reader, frame
from agent.monitors.messages import Dialect
from agent.monitors.session import Act, Leave, Poll, Say, Session, StepEnded, Told
from agent.monitors.settings import Monitor

if TYPE_CHECKING:
    import httpx

log = logging.getLogger(__name__)

TERM_S = 5.0
DRAIN_S = 0.5  # a pipe that a grandchild holds ends with it
# Results of steps that follow each other at once are told together: one commit of the store, not one each.
HOLD_S = 0.01
POLL_S, MAX_WEBHOOK = 5.0, 65_536  # how often a webhook's service is asked, and what is taken of its answer
PASSED = ("PATH", "LANG", "TZ")

EndedBy = Literal["self", "exit", "eof", "term", "kill"]


class Ended(msgspec.Struct, frozen=True, kw_only=True):
    """How the process ended, and after what. `again` is the spelling to start it once more with."""

    by: EndedBy
    exit: Exit
    survivors: tuple[int, ...] = ()
    again: Dialect | None = None


async def execute(
    session: Session,
    env: dict[str, str],
    mark: str,
    base: Path,
    tell: Callable[[StepEnded | Told], None],
    discard: Callable[[Path], None],
    stopping: trio.CancelScope,
    *,
    longest: int = MAX_LINE,
    leaves: Leaves | None = None,
) -> Ended:
    """Start the monitor in a folder of its own, lead it to its end; `stopping.cancel()` leads it out early.

    Every planned step is told once, also when cancelled: then the whole tree is killed. The folder is given to
    `discard` at the end. `longest` bytes of a line are read. Raises ChildFailedToStart, and has told nothing then.
    """
    monitor = session.monitor
    note, folder = await private_folder(mark, base, monitor.user)
    private = {name: str(folder) for name in ("TMPDIR", "TMP", "TEMP")}
    inherited = {name: os.environ[name] for name in PASSED if name in os.environ}
    limits = Limits(nofile=monitor.limits.nofile, address_space=monitor.limits.as_, cpu=monitor.limits.cpu, core=0)
    spec = Spec(
        argv=monitor.command,
        cwd=folder,
        env=inherited | private | env,
        mark=mark,
        stdin=True,
        user=monitor.user,
        limits=limits,
        makes_cwd=True,
    )
    run = None
    survived: tuple[int, ...] = ()
    try:
        async with open_child(spec, leaves=leaves) as child:
            run = _Run(session, child, tell, longest)
            await run.lead(stopping)
    except TreeSurvived as err:
        survived = err.pids
    finally:
        if run is not None:
            run.over()
        discard(note)
    assert run is not None
    return Ended(by=run.ended_by, exit=run.exit, survivors=survived, again=session.again)


class _Run:
    def __init__(self, session: Session, child: Child, tell: Callable[[StepEnded | Told], None], longest: int) -> None:
        self._session, self._child, self._tell = session, child, tell
        self._reader, self._errors = Reader(longest), Lines(longest)
        out, err = child.streams["stdout"], child.streams["stderr"]
        self._takes = {out.fileno(): (out, self._take_output), err.fileno(): (err, self._take_errors)}
        self._unsent = bytearray()
        self._held: list[StepEnded | Told] = []
        self._tell_at = self._rung_at = self._drained_at = math.inf
        self._rungs: list[tuple[EndedBy, float]] = []  # of the ladder, below the one it stands on; and their times
        self._ready = select.epoll()  # bytes, room for bytes, its end
        self._wait = trio.CancelScope()  # for one of these, or for something to be due
        self._nursery: trio.Nursery | None = None
        self._is_ended = self._is_at_bottom = self._waits_for_room = False
        self.ended_by: EndedBy = "self"
        self.exit = Exit(None, "SIGKILL", "SIGKILL", None)

    async def lead(self, stopping: trio.CancelScope) -> None:
        """From the first byte to the death of the whole tree. Raises TreeSurvived."""
        with self._ready:
            for fd in (*self._takes, self._child.fileno()):
                self._ready.register(fd, select.EPOLLIN)
            self._take()  # a fast one has begun to speak while its start was told
            if self._session.monitor.webhook_url:
                try:
                    async with trio.open_nursery() as self._nursery:
                        await self._lead(stopping)
                        self._nursery.cancel_scope.cancel()
                finally:
                    self._nursery = None
            else:
                await self._lead(stopping)
            await self._child.kill()
            self._look()
            self._drained_at = trio.current_time() + DRAIN_S
            await self._attend()
            self._take()  # nobody writes any more: what is left, if the time ran out before we looked

    def over(self) -> None:
        """Nothing more will come."""
        now, session = trio.current_time(), self._session
        self._act(session.feed(self._reader.eof(), now))
        self._act(session.errors(self._errors.end(), now))
        if not self._is_ended:  # cancelled: nothing else leaves it so while a step runs
            self._act(session.stop(now))
        self._act(session.exited(self.exit.code, self.exit.signal, now))
        self._tell_held()

    async def _lead(self, stopping: trio.CancelScope) -> None:
        with stopping:
            await self._attend()
        if stopping.cancelled_caught:
            self._act(self._session.stop(trio.current_time()))
            await self._attend()

    async def _attend(self) -> None:
        """Until it has ended, and its pipes too or they had their time; or until it is only to be killed."""
        while not self._is_over():
            with trio.CancelScope(deadline=self._due()) as self._wait:
                while not self._is_over():
                    await trio.lowlevel.wait_readable(self._ready.fileno())
                    self._take()
            if self._wait.cancelled_caught:
                self._pass_time(trio.current_time())

    def _is_over(self) -> bool:
        if self._is_ended:
            return not self._takes or self._drained_at <= trio.current_time()
        return self._is_at_bottom

    def _due(self) -> float:
        if self._is_ended:
            return min(self._tell_at, self._drained_at)
        times = (self._session.due(), self._reader.due(), self._tell_at, self._rung_at)
        return min(due for due in times if due is not None)

    def _take(self) -> None:
        """What has happened. Of each pipe one read: who floods waits for the others' turns."""
        for fd, _ in self._ready.poll(0):
            if fd == self._child.fileno():
                self._look()
            elif fd not in self._takes:
                self._push()
            else:
                pipe, take = self._takes[fd]
                data, now = pipe.read(), trio.current_time()
                if data:
                    take(data, now)
                elif data is not None:
                    self._ready.unregister(fd)
                    del self._takes[fd]
                    pipe.close()
                    self._look()  # it may have ended just behind its pipes

    def _look(self) -> None:
        exit_ = None if self._is_ended else self._child.look()
        if exit_ is not None:
            self._ready.unregister(self._child.fileno())  # else it would be ready for as long as its pipes are open
            self.exit, self._is_ended = exit_, True
            self._drained_at = trio.current_time() + DRAIN_S

    def _pass_time(self, now: float) -> None:
        if not self._is_ended:
            self._act(self._session.feed(self._reader.tick(now), now))
            self._act(self._session.tick(now))
            if now >= self._rung_at:
                self._step_down(now)
        if now >= self._tell_at:
            self._tell_held()

    def _act(self, acts: list[Act]) -> None:
        for act in acts:
            match act:
                case Say(text):
                    if act.begins_step:
                        self._session.ordered(trio.current_time())
                    self._send(text)
                case StepEnded() | Told():
                    self._held.append(act)
                    self._tell_at = min(self._tell_at, trio.current_time() + HOLD_S)
                case Leave():
                    self._lead_out(act, trio.current_time())
                case Poll() if self._nursery is not None:
                    self._nursery.start_soon(self._poll, act)
        self._wait.deadline = self._due()

    def _tell_held(self) -> None:
        held, self._held, self._tell_at = self._held, [], math.inf
        for act in held:
            self._tell(act)

    def _take_output(self, data: bytes, now: float) -> None:
        self._act(self._session.feed(self._reader.feed(data, now), now))

    def _take_errors(self, data: bytes, now: float) -> None:
        self._session.keep_stderr(data)
        self._act(self._session.errors(self._errors.feed(data), now))

    def _send(self, text: str) -> None:
        self._unsent += frame(text)
        self._push()

    def _push(self) -> None:
        """Write what the pipe has room for; `_take` goes on when there is more."""
        assert self._child.stdin is not None
        stdin = self._child.stdin.fileno()
        try:
            del self._unsent[: os.write(stdin, self._unsent)]
        except BlockingIOError:
            pass
        except OSError:  # it has closed its end, or we ours: its exit, or a timeout, says the rest
            self._unsent.clear()
        if bool(self._unsent) != self._waits_for_room:
            self._waits_for_room = not self._waits_for_room
            self._ready.register(stdin, select.EPOLLOUT) if self._waits_for_room else self._ready.unregister(stdin)

    def _lead_out(self, leave: Leave, now: float) -> None:
        """Onto the ladder, until it has ended."""
        self._rungs = [("eof", self._session.monitor.eof_grace or 0.0), ("term", TERM_S), ("kill", math.inf)]
        self._rung_at = now + leave.grace_s
        if leave.word is not None:
            self.ended_by = "exit"
            self._send(leave.word)

    def _step_down(self, now: float) -> None:
        assert self._child.stdin is not None
        self.ended_by, wait_s = self._rungs.pop(0)
        self._rung_at = now + wait_s
        match self.ended_by:
            case "eof":
                self._unsent.clear()
                self._child.stdin.close()
                self._waits_for_room = False  # who is closed is not waited for
            case "term":
                self._child.send(signal.SIGTERM)
            case _:
                self._is_at_bottom = True

    async def _poll(self, poll: Poll) -> None:
        """Ask the webhook service until it answers with JSON. The step's end does not wait for it."""
        import httpx  # at first use: it takes a tenth of a second and MiBs, and few monitors wait for webhooks

        session = self._session
        monitor: Monitor = session.monitor
        uid = quote(poll.uid, safe="")
        url = monitor.webhook_url.replace("{monitor}", quote(monitor.id, safe="")).replace("{uid}", uid)
        async with httpx.AsyncClient(timeout=None, headers={"Accept-Encoding": "identity"}) as client:
            while session.waits_for is poll:
                body, why = None, f"nothing within {POLL_S:g} s"
                with trio.move_on_after(POLL_S):
                    try:
                        body = await _answer(client, url)
                    except (httpx.HTTPError, httpx.InvalidURL, ValueError, *UNREADABLE) as err:
                        why = str(err) or type(err).__name__
                if session.waits_for is not poll:
                    return
                if body is not None:
                    self._act(session.webhook(body))
                    return
                log.info("webhook not called yet monitor=%s answer=%s", monitor.id, why)
                await trio.sleep(POLL_S)


async def _answer(client: "httpx.AsyncClient", url: str) -> str:
    """What the webhook service gives, which is JSON, in ASCII only: a real library counts characters.

    Raises ValueError and DecodeError for anything else.
    """
    async with client.stream("GET", url) as response:
        if response.status_code != 200:
            raise ValueError(f"status {response.status_code}")
        body, size = b"", 0
        async for part in response.aiter_raw():  # to its end, or that of our patience: a generator wants no other
            size += len(part)
            body += part if size <= MAX_WEBHOOK else b""
        if size > MAX_WEBHOOK:
            raise ValueError(f"more than {MAX_WEBHOOK} bytes")
    msgspec.json.decode(body)
    text = re.sub(r"[^\x00-\x7f]", lambda found: json.dumps(found[0])[1:-1], body.decode())
    if len(text) > MAX_WEBHOOK:
        raise ValueError(f"more than {MAX_WEBHOOK} bytes in ASCII")
    return text
