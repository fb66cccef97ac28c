"""The two roles of this folder on trio: the file monitor and the entitlement status.

run_files answers watch_file, unwatch_file and look_file. What a client watches is taken up again after a restart,
unless it was `passing`. A running suite's `watch.files` are watched while it runs, and their events carry the run.

run_entitlement answers entitlement. It asks the D-Bus services at the start, when they tell of a change, when they or
the bus come back, and 2 s after the last change of a certificate.

Source: protocols/emissary.md, "Control server" (actions), "Entitlement and file monitor"; protocols/suites.md, "The
suite document" (`watch`).
"""

import logging
import math
import os.path
import re
import stat
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import msgspec
import trio

from agent.core.bus import Bus
from agent.core.errors import ActionError, unwrap
from agent.core.events import (
    Alert,
    AlertCleared,
    EntitlementChanged,
    FileChanged,
    FileGap,
    RunReceived,
    RunStarted,
    SuiteFinished,
)
from agent.core.metrics import Metrics
from agent.core.payload import read
from agent.core.store import Store
from agent.core.supervise import Health
from agent.core.underway import order_of, underway
from agent.files import disk, services
from agent.files.entitlement import NOTHING, Status, from_certificates, is_news
from agent.files.follow import Follower
from agent.files.looks import Look, Watch, described
from agent.files.messages import (
    MAX_PATH,
    PATH_DESCRIBED,
    PATH_PATTERN,
    AskEntitlement,
    EntitlementNow,
    LookFile,
    UnwatchFile,
    Was,
    Watched,
    WatchFile,
)
from agent.files.settings import EntitlementSettings, FilesSettings

log = logging.getLogger(__name__)

MAX_WATCHES = 256  # of clients
MAX_OF_RUN = 64
START_S = 5.0  # s that the start waits until what is there is known; a hanging mount must not stop the agent
LOOK_S = 10.0
KEPT = "files.watches"
ALERT = "files.watches"

HISTORY = "entitlement.history"
MAX_HISTORY = 64
CERTIFICATES = ("entitlement", "product", "consumer")  # the directories below /etc/pki
TOUCHED_S = 2.0  # s without another change of a certificate
REFRESH_S = 10.0  # s between two askings that clients want
FIRST_RETRY_S, LAST_RETRY_S, GOOD_AFTER_S = 1.0, 60.0, 60.0


class _Kept(msgspec.Struct, frozen=True, kw_only=True):
    """The clients' watches on disk, and the number of the last one."""

    last: int = 0
    watches: dict[str, WatchFile] = {}


async def run_files(
    bus: Bus,
    store: Store,
    settings: FilesSettings,
    health: Health,
    *,
    metrics: Metrics,
    clock: Callable[[], float] = time.time,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Publish FileChanged and FileGap for what is watched, until cancelled."""
    files = _Files(bus, store, settings, health, metrics, clock)
    actions = {"watch_file": files.watch_file, "unwatch_file": files.unwatch_file, "look_file": files.look_file}
    async with trio.open_nursery() as nursery:
        await nursery.start(files.follower.run)
        before = await files.recall()
        with ExitStack() as answering:
            for action, handler in actions.items():
                answering.enter_context(bus.answer(action, handler))
            nursery.start_soon(files.begin, before)
            await nursery.start(files.follow_runs)
            with trio.move_on_after(START_S):
                await files.begun.wait()
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                bus.publish(AlertCleared(code=ALERT))


class _Files:
    def __init__(
        self,
        bus: Bus,
        store: Store,
        settings: FilesSettings,
        health: Health,
        metrics: Metrics,
        clock: Callable[[], float],
    ) -> None:
        self._bus, self._store, self._settings, self._metrics, self._clock = bus, store, settings, metrics, clock
        self.follower = Follower(self._tell, health, allow=settings.content_allow, lack=self._lack)
        self.begun = trio.Event()
        self._kept = _Kept()
        self._looking = trio.CapacityLimiter(2)
        self._of_run: dict[str, list[str]] = {}
        self._told = 0
        metrics.gauge("files_known", lambda: self.follower.monitor.known)
        metrics.gauge("files_watched_directories", lambda: self.follower.monitor.directories)

    # ---- what settings and clients watch ---------------------------------------------------------------------------

    async def recall(self) -> dict[str, WatchFile]:
        """What clients watched before, by id."""
        await self._store.commit()
        self._kept = await self._store.get(KEPT, _Kept) or _Kept()
        return self._kept.watches

    async def begin(self, before: Mapping[str, WatchFile]) -> None:
        """Watch what the settings name, and what clients watched `before`. A disk may hang meanwhile."""
        for number, watch in enumerate(self._settings.watch):
            await self.follower.watch(
                Watch(id=f"settings-{number}", path=watch.path, recursive=watch.recursive, content=watch.content)
            )
        for id, asked in before.items():
            if id in self._kept.watches:  # it did not end meanwhile
                await self._follow(id, asked)
        self.begun.set()

    async def watch_file(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{path, recursive?, content?, passing?}` -> `{watch}`: each change from now on is told."""
        asked = read(payload, WatchFile)
        _check(asked.path)
        mine = [id for id in self.follower.monitor.watches if id.startswith("w-")]
        if len(mine) >= MAX_WATCHES:
            raise ActionError("too_big", f"{MAX_WATCHES} paths are watched already", remedy="Unwatch some.")
        id = f"w-{self._kept.last + 1}"
        watches = self._kept.watches if asked.passing else {**self._kept.watches, id: asked}
        self._keep(_Kept(last=self._kept.last + 1, watches=watches))
        try:
            await self._follow(id, asked)
        except BaseException:  # who asked has left: nobody knows of it
            self._forget(id)
            raise
        return msgspec.structs.asdict(Watched(watch=id))

    async def unwatch_file(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{watch}` -> {}"""
        id = read(payload, UnwatchFile).watch
        if id not in self._kept.watches and not (id.startswith("w-") and id in self.follower.monitor.watches):
            raise ActionError("not_found", f"watch {id} is not known here")
        self._forget(id)
        return {}

    async def look_file(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{path}` -> `{path, size, mtime, mode, owner, sha256, content, no_content}` as in FileChanged."""
        path = read(payload, LookFile).path
        _check(path)
        look = Look(path, None, 0, None, follow=True, digest=True, content=True)
        take = partial(disk.look, look, self._settings.content_allow)
        with trio.move_on_after(LOOK_S) as waiting:
            found = await trio.to_thread.run_sync(take, limiter=self._looking, abandon_on_cancel=True)
            if found.why:
                raise ActionError("bad_payload", f"{path}: {found.why}")
            if found.seen is None:
                raise ActionError("not_found", f"{path}: there is no such file")
            tree: dict[str, Any] = msgspec.to_builtins(described(path, "created", found))
            return {key: value for key, value in tree.items() if key not in ("what", "from", "run")}
        assert waiting.cancelled_caught
        raise ActionError("busy", f"{path}: the disk did not answer for {LOOK_S:.0f} s")

    async def _follow(self, id: str, asked: WatchFile) -> None:
        await self.follower.watch(Watch(id=id, path=asked.path, recursive=asked.recursive, content=asked.content))

    def _forget(self, id: str) -> None:
        self.follower.unwatch(id)
        self._keep(_Kept(last=self._kept.last, watches={k: v for k, v in self._kept.watches.items() if k != id}))

    def _keep(self, kept: _Kept) -> None:
        self._kept = kept
        self._store.put(KEPT, kept)

    # ---- what running suites watch ---------------------------------------------------------------------------------

    async def follow_runs(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Watch the files of each run while it runs."""
        with self._bus.subscribe(RunStarted, SuiteFinished) as events:
            task_status.started()
            for received in await underway(self._bus, self._store):
                await self._begin_run(received)
            async for event in events:
                match event:
                    case RunStarted(run=run):
                        await self._begin_run(await order_of(run, self._store))
                    case SuiteFinished(run=run) if run in self._of_run:
                        await self.follower.settle()  # what the last test wrote belongs to the run
                        for id in self._of_run.pop(run):
                            self.follower.unwatch(id)

    async def _begin_run(self, received: RunReceived | None) -> None:
        if received is None or received.run in self._of_run:
            return
        run = received.run
        paths = _watched(received)
        if not paths:
            return
        self._of_run[run] = []
        for number, path in enumerate(paths):
            if not _is_path(path):
                await self._tell(FileGap(path=path, why=f"is not watched: it is not {PATH_DESCRIBED}", run=run))
                continue
            if number >= MAX_OF_RUN:
                await self._tell(FileGap(path=path, why=f"is not watched: a run has {MAX_OF_RUN} paths", run=run))
                return
            id = f"run/{run}/{number}"  # a run may be called "w-1", too
            self._of_run[run].append(id)
            await self.follower.watch(Watch(id=id, path=path, run=run))

    # ---- telling ---------------------------------------------------------------------------------------------------

    async def _tell(self, event: FileChanged | FileGap) -> None:
        self._bus.publish(event)
        if isinstance(event, FileGap):
            log.warning("changes may be unseen path=%s why=%s", event.path, event.why)
            self._metrics.count("files_gaps_total")
        else:
            self._metrics.count("files_changes_total", what=event.what)
        self._told += 1
        if self._told % 64 == 0:
            await trio.lowlevel.checkpoint()  # a whole tree may go at once
        await self._store.room()

    def _lack(self, short: int) -> None:
        if not short:
            self._bus.publish(AlertCleared(code=ALERT))
            return
        self._bus.publish(
            Alert(
                code=ALERT,
                text=f"the kernel gives no inotify watches for {short} directories; they are looked at every 5 s",
                remedy="Raise fs.inotify.max_user_watches and fs.inotify.max_user_instances with sysctl,"
                " or watch less.",
                since=self._clock(),
            )
        )


def _is_path(path: str) -> bool:
    return len(path) <= MAX_PATH and re.search(PATH_PATTERN, path) is not None


def _check(path: str) -> None:
    if not _is_path(path):
        raise ActionError("bad_payload", f"key path: expected {PATH_DESCRIBED}, got {path[:200]!r}")


def _watched(received: RunReceived) -> list[str]:
    """`watch.files` of a suite document, which was checked before the run began.

    Relative ones are seen from the document's folder, or for one that came over a link, from its `source.dir`.
    """
    watch, source = received.suite.get("watch"), received.suite.get("source")
    paths = watch.get("files") if isinstance(watch, dict) else None
    if not isinstance(paths, list | tuple):
        return []
    directory = source.get("dir") if isinstance(source, dict) else None
    folder = received.base or (os.path.join("/", directory) if isinstance(directory, str) else "")
    return [os.path.normpath(os.path.join(folder, path)) for path in paths if isinstance(path, str)]


async def run_entitlement(
    bus: Bus,
    store: Store,
    settings: EntitlementSettings,
    health: Health,
    *,
    pki: Path = Path("/etc/pki"),
    clock: Callable[[], float] = time.time,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Publish EntitlementChanged at the start and at each change, until cancelled."""
    entitlement = _Entitlement(bus, store, settings, health, pki, clock)
    async with trio.open_nursery() as nursery:
        await entitlement.recall()
        await nursery.start(entitlement.follower.run)
        for folder in CERTIFICATES:
            await entitlement.follower.watch(Watch(id=folder, path=str(pki / folder)))
        await entitlement.is_registered()
        nursery.start_soon(entitlement.ask_when_touched)
        nursery.start_soon(entitlement.keep_asking)
        with bus.answer("entitlement", entitlement.answer):
            task_status.started()
            await trio.sleep_forever()


class _Entitlement:
    def __init__(
        self,
        bus: Bus,
        store: Store,
        settings: EntitlementSettings,
        health: Health,
        pki: Path,
        clock: Callable[[], float],
    ) -> None:
        self._bus, self._store, self._settings, self._clock = bus, store, settings, clock
        self._consumer = trio.Path(pki / "consumer")
        self.follower = Follower(self._touch, health)
        self._touched = trio.Event()
        self._asking = services.Asking()
        self._learned = trio.Event()
        self._refreshed = -math.inf
        self._now: Status | None = None
        self._since, self._registered = 0.0, False
        self._history: list[Was] = []

    async def recall(self) -> None:
        """Read the history."""
        await self._store.commit()
        self._history = await self._store.get(HISTORY, list[Was]) or []

    async def answer(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`AskEntitlement` -> `EntitlementNow`."""
        asked = read(payload, AskEntitlement)
        learned = self._learned
        refresh = asked.refresh and trio.current_time() - self._refreshed >= REFRESH_S
        if refresh:
            self._refreshed = trio.current_time()
            self._asking.wish()
        if refresh or self._now is None:
            with trio.move_on_after(2 * services.CALL_S):
                await learned.wait()
        now = EntitlementNow(
            **msgspec.structs.asdict(self._now or NOTHING),
            since=self._since or None,
            registered=self._registered,
            history=tuple(self._history) if asked.history else msgspec.UNSET,
        )
        answer: dict[str, Any] = msgspec.to_builtins(now)
        return answer

    async def keep_asking(self) -> NoReturn:
        """Have a conversation with the bus; where there is none, the certificates must do until there is."""
        backoff, told = FIRST_RETRY_S, ""
        while True:
            began, why = trio.current_time(), ""
            try:
                await services.converse(self._settings.bus or "SYSTEM", self._asking, self._learn, self.is_registered)
            except* services.BusAway as group:
                why = str(unwrap(group)) or type(unwrap(group)).__name__
            if why != told:
                level = logging.WARNING if self._settings.enabled is True else logging.INFO  # was it asked for?
                at = self._settings.bus or "the system bus"
                log.log(level, "no D-Bus at=%s error=%s: the certificates must do. Start dbus.", at, why)
                told = why
            await self._learn(None)
            if trio.current_time() - began >= GOOD_AFTER_S:
                backoff = FIRST_RETRY_S
            with trio.move_on_after(backoff):
                await self._asking.wait()
            backoff = min(2 * backoff, LAST_RETRY_S)

    async def ask_when_touched(self) -> NoReturn:
        """Ask again when the certificates have been quiet for 2 s."""
        while True:
            await self._touched.wait()
            while self._touched.is_set():
                self._touched = trio.Event()
                with trio.move_on_after(TOUCHED_S):
                    await self._touched.wait()
            await self.is_registered()
            self._asking.wish()

    async def _touch(self, event: FileChanged | FileGap) -> None:
        self._touched.set()

    async def is_registered(self) -> bool:
        """Look whether there is a consumer certificate; what `answer` says of it is what was found last."""
        try:
            self._registered = stat.S_ISREG((await (self._consumer / "cert.pem").stat()).st_mode)
        except (FileNotFoundError, NotADirectoryError):
            self._registered = False
        except OSError:  # closed to this user: there is nothing that says that it is not registered
            self._registered = True
        return self._registered

    async def _learn(self, status: Status | None) -> None:
        if status is None:
            has_consumer = await trio.to_thread.run_sync(os.path.isdir, self._consumer)
            status = from_certificates(has_consumer, await self.is_registered())
        self._now, before = status, self._now
        learned, self._learned = self._learned, trio.Event()
        learned.set()
        if not is_news(before, status):
            return
        self._since = self._clock()
        previous = self._history[-1] if self._history else None
        nothing_before = previous is None or previous.source == "none"
        if status.source == "none" and nothing_before and self._settings.enabled == "auto":
            return  # a machine without entitlements, which never had any
        event = EntitlementChanged(
            status=status.status,
            name=status.name,
            raw=status.raw,
            source=status.source,
            previous=None if previous is None else previous.status,
        )
        self._bus.publish(event)
        log.info("entitlement status=%d name=%s source=%s", status.status, status.name, status.source)
        was = Was(at=self._since, status=status.status, name=status.name, raw=status.raw, source=status.source)
        self._history = [*self._history, was][-MAX_HISTORY:]
        self._store.put(HISTORY, self._history)
