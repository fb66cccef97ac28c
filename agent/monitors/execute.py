"""One run of a monitor on trio: its process, its pipes, the clock, and the way out.

Source: protocols/monitors.md, "State machine of a run" (the ladder), "Limits and security".
"""

import logging
import math
import os
import secrets
import shutil
import signal
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Literal
from urllib.parse import quote

import msgspec
import trio

from agent.core.cgroup import Leaves
from agent.core.errors import unwrap
from agent.core.process import Child, Exit, Limits, Spec, open_child
from agent.core.processtree import TreeSurvived
from agent.monitors.framing import MAX_LINE, Lines, Reader, frame
from agent.monitors.messages import Dialect
from agent.monitors.session import Act, Leave, Poll, Say, Session, StepEnded, Told
from agent.monitors.settings import Monitor

log = logging.getLogger(__name__)

TERM_S = 5.0
DRAIN_S = 0.5  # a pipe that a grandchild holds ends with it
POLL_S = 5.0  # of a webhook
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
    stopping: trio.Event,
    *,
    longest: int = MAX_LINE,
    leaves: Leaves | None = None,
) -> Ended:
    """Start the monitor in a folder of its own (`private_folder`), lead it to its end; `stopping` ends it early.

    Every planned step is told once, also when cancelled: then the whole tree is killed. `longest` bytes of a line are
    read. Raises ChildFailedToStart, and has told nothing then.
    """
    monitor = session.monitor
    note, folder = private_folder(mark, base, monitor.user)
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
    )
    run = None
    survived: tuple[int, ...] = ()
    try:
        async with open_child(spec, leaves=leaves) as child:
            run = _Run(session, child, tell, longest)
            await run.lead(stopping)
    except* TreeSurvived as group:
        err = unwrap(group)
        assert isinstance(err, TreeSurvived)
        survived = err.pids
    finally:
        if run is not None:
            run.over()
        try:
            os.rmdir(note)  # most leave nothing in it, and need no thread
        except OSError:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(remove, note)
    assert run is not None
    return Ended(by=run.ended_by, exit=run.exit, survivors=survived, again=session.again)


class _Run:
    def __init__(self, session: Session, child: Child, tell: Callable[[StepEnded | Told], None], longest: int) -> None:
        self._session, self._child, self._tell = session, child, tell
        self._reader, self._errors = Reader(longest), Lines(longest)
        self._unsent = bytearray()
        self._clock = trio.CancelScope()  # of the wait for something to be due
        self._nursery: trio.Nursery | None = None
        self._is_done = False
        self.ended_by: EndedBy = "self"
        self.exit = Exit(None, "SIGKILL", "SIGKILL", None)

    async def lead(self, stopping: trio.Event) -> None:
        """From the first byte to the death of the whole tree."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(self._read, "stdout", self._take_output)
            nursery.start_soon(self._read, "stderr", self._take_errors)
            nursery.start_soon(self._stop_when, stopping)
            while not self._is_done:
                with trio.CancelScope(deadline=self._due()) as self._clock:
                    self.exit, self._is_done = await self._child.wait(), True
                if self._clock.cancelled_caught:
                    now = trio.current_time()
                    self._act(self._session.feed(self._reader.tick(now), now))
                    self._act(self._session.tick(now))
            await self._child.finish(drain_s=DRAIN_S)
            nursery.cancel_scope.cancel()

    def over(self) -> None:
        """Nothing more will come."""
        self._nursery = None
        now, session = trio.current_time(), self._session
        self._act(session.feed(self._reader.eof(), now))
        self._act(session.errors(self._errors.end(), now))
        if not self._is_done:  # cancelled: nothing else leaves it so while a step runs
            self._act(session.stop(now))
        self._act(session.exited(self.exit.code, self.exit.signal, now))

    def _act(self, acts: list[Act]) -> None:
        for act in acts:
            match act:
                case Say(text):
                    self._send(text)
                case StepEnded() | Told():
                    self._tell(act)
                case Leave() if self._nursery is not None:
                    self._nursery.start_soon(self._lead_out, act)
                case Poll(uid) if self._nursery is not None:
                    self._nursery.start_soon(self._poll, uid)
        self._clock.deadline = self._due()

    def _due(self) -> float:
        return min((due for due in (self._session.due(), self._reader.due()) if due is not None), default=math.inf)

    async def _read(self, name: str, take: Callable[[bytes], None]) -> None:
        pipe = self._child.streams[name]
        try:
            while data := await pipe.receive_some():
                take(data)
        except trio.ClosedResourceError:
            return

    def _take_output(self, data: bytes) -> None:
        now = trio.current_time()
        self._act(self._session.feed(self._reader.feed(data, now), now))

    def _take_errors(self, data: bytes) -> None:
        self._session.keep_stderr(data)
        self._act(self._session.errors(self._errors.feed(data), trio.current_time()))

    def _send(self, text: str) -> None:
        """Hand it to the pipe at once: a task that did would take as long as all the rest of a step."""
        is_new = not self._unsent
        self._unsent += frame(text)
        self._push()
        if is_new and self._unsent and self._nursery is not None:
            self._nursery.start_soon(self._write)

    def _push(self) -> None:
        assert self._child.stdin is not None
        try:
            del self._unsent[: os.write(self._child.stdin.fileno(), self._unsent)]
        except BlockingIOError:
            return
        except OSError:  # it has closed its end, or we ours: its exit, or a timeout, says the rest
            self._unsent.clear()

    async def _write(self) -> None:
        """What the pipe had no room for."""
        assert self._child.stdin is not None
        while self._unsent:
            with suppress(trio.ClosedResourceError):
                await trio.lowlevel.wait_writable(self._child.stdin.fileno())
            self._push()

    async def _stop_when(self, stopping: trio.Event) -> None:
        await stopping.wait()
        self._act(self._session.stop(trio.current_time()))

    async def _lead_out(self, leave: Leave) -> None:
        """The ladder. `lead` ends it when the process has ended."""
        child = self._child
        assert child.stdin is not None
        if leave.word is not None:
            self.ended_by = "exit"
            self._send(leave.word)
            await trio.sleep(leave.grace_s)
        self.ended_by = "eof"
        child.stdin.close()
        self._unsent.clear()
        await trio.sleep(self._session.monitor.eof_grace or 0.0)
        self.ended_by = "term"
        child.send(signal.SIGTERM)
        await trio.sleep(TERM_S)
        self.ended_by = "kill"
        await child.kill()

    async def _poll(self, uid: str) -> None:
        """Ask the webhook service until it answers with JSON. The step's end does not wait for it."""
        import httpx  # at first use: it takes a tenth of a second and MiBs, and few monitors wait for webhooks

        monitor: Monitor = self._session.monitor
        url = monitor.webhook_url.replace("{monitor}", quote(monitor.id, safe="")).replace("{uid}", quote(uid, safe=""))
        step = self._session.step
        async with httpx.AsyncClient(timeout=POLL_S, follow_redirects=False) as client:
            while self._session.state == "step" and self._session.step == step:
                try:
                    answer = await client.get(url)
                    if answer.status_code == 200 and len(answer.content) <= 65_536:
                        msgspec.json.decode(answer.content)
                        self._act(self._session.webhook(answer.content.decode()))
                        return
                    why = f"status {answer.status_code}"
                except (httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError) as err:
                    why = str(err) or type(err).__name__
                log.info("webhook not called yet monitor=%s uid=%s answer=%s", monitor.id, uid, why)
                await trio.sleep(POLL_S)


def private_folder(mark: str, base: Path, user: str | None) -> tuple[Path, Path]:
    """A folder for a run, and what stands for it below `base`, where what a killed agent left is found.

    Another user cannot get below `base`: his is in the system's temporary folder, and a link to it there.
    """
    if user is None or os.geteuid() != 0:
        folder = Path(tempfile.mkdtemp(prefix=f"{mark}-", dir=base))
        return folder, folder
    note = base / f"{mark}-{secrets.token_hex(8)}"
    folder = Path(tempfile.gettempdir(), note.name)
    note.symlink_to(folder)  # first: whatever ends us now, the folder will be found
    folder.mkdir(mode=0o700)
    with suppress(LookupError):  # open_child says that there is no such user
        shutil.chown(folder, user)
    return note, folder


def remove(note: Path) -> None:
    """Remove a run's folder, and what stands for it. rmtree follows no link that somebody has put in its place."""
    is_link = note.is_symlink()
    folder = note.readlink() if is_link else note
    for _ in range(3):  # a tree that outlived us may still write
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
    else:
        log.error("cannot remove a monitor's folder path=%s", folder)
    if is_link:
        note.unlink()
