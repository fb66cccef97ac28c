"""The suites role on trio: takes runs, decides, gives slots, and after a restart takes up what was left unfinished.

Answers the actions run_suite, cancel, stop, drain, undrain, runs and shut_down. Every state of a run is in the journal
before it is told. What happens between slot and result is execute.py.

Source: protocols/suites.md, "A run"; protocols/emissary.md, "Control server", "Run states on the agent".
"""

import logging
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args

import msgspec
import trio

from agent.core.bus import Bus
from agent.core.errors import ActionError, AgentError, DocumentError
from agent.core.events import (
    Reloaded,
    RunChanged,
    RunReceived,
    RunRefused,
    RunStarted,
    SlotsChanged,
    SuiteFinished,
    TestFinished,
    TestsSelected,
    TestStarted,
    Warned,
    decode,
)
from agent.core.process import ChildFailedToStart, Spec, drain, environ, open_child
from agent.core.processtree import TreeSurvived, sweep
from agent.core.store import Store
from agent.core.supervise import Health
from agent.suites import document, requirements
from agent.suites.execute import Execution
from agent.suites.messages import Runner, Suite
from agent.suites.prepare import Machine, below, suite_of
from agent.suites.runners import registry
from agent.suites.runners.driver import MESSAGE_MAX, Cases, Only, clip
from agent.suites.runs import Run
from agent.suites.settings import SuitesSettings

log = logging.getLogger(__name__)

RUN_ID = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}\Z")
ROOM_LOOK_S = 30.0  # how often the free disk space is looked at
FULL_DISK_GRACE_S = 60.0  # settings.md, "Ends": on a full disk running ones get 60 s to end
PROBED = {"node": ("node", "--version"), "python3": ("python3", "--version"), "git": ("git", "--version")}
DRAINING = "suites.draining"  # in the store, while it is so
# What `run_suite` answers for a refusal: codes of protocols/emissary.md, "The envelope".
ERROR_CODES = {"busy": "busy", "space": "busy", "draining": "draining"}


async def run(
    bus: Bus,
    store: Store,
    settings: Callable[[], SuitesSettings],
    machine: Callable[[], Machine],
    health: Health,
    *,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Answer the suite actions and execute runs, until cancelled.

    `settings` and `machine` give what holds now: a reload must not end a run.
    """
    async with trio.open_nursery() as nursery:
        suites = _Suites(bus, store, settings, machine, health, nursery)
        await suites.probe()
        await suites.recover()
        actions = {
            "run_suite": suites.run_suite,
            "cancel": suites.cancel,
            "stop": suites.stop,
            "drain": suites.drain,
            "undrain": suites.undrain,
            "runs": suites.runs,
            "shut_down": suites.shut_down,
            "warn_run": suites.warn_run,
        }
        with ExitStack() as answering:
            for action, handler in actions.items():
                answering.enter_context(bus.answer(action, handler))
            suites.tell_slots()
            nursery.start_soon(suites.watch_disk)
            nursery.start_soon(suites.follow_reloads)
            nursery.start_soon(suites.watch_room)
            task_status.started()
            await trio.sleep_forever()


class _Begun(NamedTuple):
    """A test without an end: for which attempt it was selected, and its start where it had one.

    `is_told`: an earlier recovery has told that it was interrupted.
    """

    attempt: int
    started: TestStarted | None = None
    is_told: bool = False


class _Left(NamedTuple):
    """Tests without an end, by file and name. `is_complete`: nothing but these can be left.

    `attempt` is the last that any test had: a failed one may have been at its second.
    """

    tests: dict[tuple[str | None, str], _Begun]
    is_complete: bool
    attempt: int


class _Suites:
    def __init__(
        self,
        bus: Bus,
        store: Store,
        settings: Callable[[], SuitesSettings],
        machine: Callable[[], Machine],
        health: Health,
        nursery: trio.Nursery,
    ) -> None:
        self._bus, self._store, self._settings, self._machine, self._health = bus, store, settings, machine, health
        self._nursery = nursery
        self._active: dict[str, Execution] = {}
        self._ordering: set[str] = set()
        self._draining = False
        self._told_free = 0
        self._programs: dict[str, str] = {}

    # ---- actions ---------------------------------------------------------------------------------------------------

    async def run_suite(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Take a run: `{suite}` or `{path}`, `run?`, `reservation?`, `deadline?`, `origin?` -> `{run}`.

        On disk when it returns; the decision is RunStarted or RunRefused. A run id that is known starts nothing. For
        whoever waits for no event (every origin but the Seneschal) a refusal is an error answer too.
        """
        tree, base = await self._document(payload)
        run = payload.get("run") or _new_run_id(tree)
        if not isinstance(run, str) or not RUN_ID.match(run):
            raise ActionError("bad_payload", f"run: {run!r} is not 1 to 128 of A-Z a-z 0-9 . _ - without a leading dot")
        deadline = payload.get("deadline")
        if deadline is not None and not (isinstance(deadline, int | float) and math.isfinite(deadline)):
            raise ActionError("bad_payload", f"deadline: {deadline!r} is not a time in epoch seconds")
        reservation = payload.get("reservation")
        if not isinstance(reservation, str | None):  # it would be in the journal, and be read at each start
            raise ActionError("bad_payload", f"reservation: {reservation!r} is not the id of an offer")
        if run in self._ordering or run in self._active:
            return {"run": run}
        received = RunReceived(
            run=run,
            suite=tree,
            origin=str(payload.get("origin", "control")),
            base=str(base) if base else None,
            reservation=reservation,
            deadline=deadline,
        )
        self._ordering.add(run)  # before the journal is asked: the same order may come from two sides at once
        try:
            if await self._store.read(run=run, limit=1):
                return {"run": run}
            self._store.keep(run)
            self._bus.publish(received)
            refused = self._decide(received)
            await self._store.commit()
        finally:
            self._ordering.discard(run)
        if refused is not None and received.origin != "seneschal":
            code, _, text = refused.partition(": ")
            raise ActionError(ERROR_CODES.get(code, "bad_payload"), text or code)
        return {"run": run}

    async def cancel(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{run, reason?}` -> {}; the run ends `aborted`."""
        execution = self._active.get(str(payload.get("run")))
        if execution is None:
            raise ActionError("no_such_run", f"{payload.get('run')} is not running here")
        reason = clip(str(payload.get("reason") or "no reason given"), MESSAGE_MAX)  # each test left will tell it
        execution.stop(f"cancel: {reason}")
        return {}

    async def warn_run(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{run, code, text}` -> {}; the run's result has that warning."""
        execution = self._active.get(str(payload.get("run")))
        if execution is None:
            raise ActionError("no_such_run", f"{payload.get('run')} is not running here")
        execution.tell(Warned(str(payload["code"]), str(payload["text"])))
        return {}

    async def stop(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> {}; every run is aborted, the service stays."""
        for execution in self._active.values():
            execution.stop("stop")
        return {}

    async def drain(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> {}; no new run is accepted until `undrain`, over restarts too; running ones finish."""
        self._drain(True)
        self._store.put(DRAINING, True)
        return {}

    async def undrain(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> {}; new runs are accepted again."""
        self._drain(False)
        self._store.forget(DRAINING)
        return {}

    def _drain(self, is_draining: bool) -> None:
        self._draining = is_draining
        self.tell_slots()

    async def runs(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> `{slots, free, draining, runs, runners}`: what runs now, and what could."""
        now, epoch = trio.current_time(), time.time()
        return {
            "slots": self._settings().slots,
            "free": self._free_slots(),
            "draining": self._draining,
            "runs": [execution.run.describe(now, epoch) for execution in self._active.values()],
            "runners": self._programs,
        }

    async def shut_down(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> {} when no run is left: resumable ones stay resumable, others are aborted (settings.md, "Ends")."""
        self._drain(True)
        for execution in list(self._active.values()):
            if execution.run.suite.resumable:
                execution.scope.cancel()
            else:
                execution.stop("shutdown")
        for execution in list(self._active.values()):
            await execution.over.wait()
        return {}

    # ---- deciding --------------------------------------------------------------------------------------------------

    async def _document(self, payload: dict[str, Any]) -> tuple[dict[str, Any], Path | None]:
        suite, path = payload.get("suite"), payload.get("path")
        if suite is not None and path is not None:
            raise ActionError("bad_payload", "key path: suite stands beside it; give a document, or the path of one")
        if isinstance(suite, dict):
            return suite, None
        if not isinstance(path, str):
            raise ActionError("bad_payload", "key suite is missing: a suite document, or path: the folder of one")
        try:
            look = partial(_suite_below, Path(path), self._settings().roots)
            read, base = await trio.to_thread.run_sync(look, abandon_on_cancel=True)
        except AgentError as err:
            raise ActionError("bad_payload", str(err)) from err
        return msgspec.to_builtins(read), base

    def _decide(self, received: RunReceived) -> str | None:
        """Start the run, or say why it is refused."""
        suite, reason = self._check(received)
        if suite is None or reason is not None:
            log.warning("run refused run=%s reason=%s", received.run, reason)
            self._bus.publish(
                RunRefused(
                    run=received.run, reason=reason or "", origin=received.origin, reservation=received.reservation
                )
            )
            self._store.release(received.run)
            return reason
        self._begin(suite, received, attempt=1)
        return None

    def _check(self, received: RunReceived) -> tuple[Suite | None, str | None]:
        try:
            suite = document.from_tree(received.suite)
        except DocumentError as err:
            return None, f"bad_suite: {err}"
        if suite.source is None and received.base is None:
            return None, "bad_suite: suite: source: is missing. It came over a link: add dir, archive or git."
        if self._draining:
            return suite, "draining"
        if self._store.full:
            return suite, "space: the disk is full"
        if len(self._active) >= self._settings().slots:
            return suite, "busy: every slot is taken"
        if received.deadline is not None and received.deadline <= time.time():
            return suite, "deadline: it has passed already"
        return suite, requirements.unmet(
            suite.requires,
            suite.runner,
            labels=self._machine().labels,
            runners=self._programs,
            free=self._free_disk(),
        )

    def _free_disk(self) -> int:
        space = os.statvfs(self._store.folder)
        return space.f_bavail * space.f_frsize

    def _free_slots(self) -> int:
        # Without room none is offered: each order that is refused would take room for what says so.
        if self._draining or self._store.full or self._free_disk() < requirements.FREE_DISK:
            return 0
        return max(0, self._settings().slots - len(self._active))

    async def watch_room(self) -> None:
        """Slots are offered no more, or again, as the disk fills and empties below what a run needs."""
        while True:
            await trio.sleep(ROOM_LOOK_S)
            if self._free_slots() != self._told_free:
                self.tell_slots()

    def tell_slots(self) -> None:
        """Tell how many slots are free now."""
        self._told_free = self._free_slots()
        self._bus.publish(SlotsChanged(free=self._told_free, total=self._settings().slots, draining=self._draining))

    def _begin(
        self,
        suite: Suite,
        received: RunReceived,
        attempt: int,
        only: tuple[Only, ...] = (),
        began: float | None = None,
    ) -> None:
        """Give it a slot and tell that it is accepted."""
        taken = {execution.run.slot for execution in self._active.values()}
        execution = self._execution(suite, received, attempt, slot=min(set(range(len(taken) + 1)) - taken), began=began)
        run = execution.run
        self._active[run.run] = execution
        polarion = suite.report.polarion
        self._bus.publish(
            RunStarted(
                run=run.run,
                suite=suite.id,
                title=suite.title or suite.id,
                runner=suite.runner,
                driver=suite.driver,
                source=_source(suite, received.base),
                origin=run.origin,
                slot=run.slot,
                reservation=run.reservation,
                polarion=polarion.cases if polarion else {},
                to_mimir=suite.report.mimir,
                to_polarize=suite.report.polarize,
                attempt=attempt,
            )
        )
        self.tell_slots()
        self._nursery.start_soon(self._execute, execution, only)

    def _execution(
        self, suite: Suite, received: RunReceived, attempt: int, *, slot: int, began: float | None
    ) -> Execution:
        now = trio.current_time()
        run = Run(
            received.run,
            suite,
            origin=received.origin,
            now=now,
            slot=slot,
            reservation=received.reservation,
            deadline=None if received.deadline is None else now + received.deadline - time.time(),
            timeout_factor=self._machine().timeout_factor,
            attempt=attempt,
        )
        return Execution(
            run,
            Path(received.base) if received.base else None,
            self._store.folder / "runs" / run.run,
            bus=self._bus,
            store=self._store,
            machine=self._machine(),
            health=self._health,
            began=began,
        )

    async def _execute(self, execution: Execution, only: tuple[Only, ...]) -> None:
        try:
            await execution.execute(self._settings().roots, only)
        finally:
            del self._active[execution.run.run]
            self.tell_slots()
        await self._prune_folders()

    async def _prune_folders(self) -> None:
        """Keep the newest folders of runs, and those of which something is still owed.

        Newest is what the journal says, for the date may have been set; before these, what it does not know any more.
        """
        spared = await self._store.owed_runs() | set(await self._store.kept())
        folders = await trio.to_thread.run_sync(_oldest_first, self._store.folder / "runs")
        at = {folder: await self._store.newest(folder.name) for folder in folders}
        for folder in sorted(folders, key=at.__getitem__)[: -self._settings().keep_runs]:
            if folder.name not in spared:
                await trio.to_thread.run_sync(shutil.rmtree, folder, True)

    # ---- starting and failing --------------------------------------------------------------------------------------

    async def probe(self) -> None:
        """Find out which programs that runners need are here, and their versions."""

        async def ask(name: str, argv: tuple[str, ...]) -> None:
            said = bytearray()
            spec = Spec(argv=argv, cwd=Path("/"), env=environ(os.environ), mark=f"probe-{name}-{os.getpid()}")
            try:
                with trio.move_on_after(10):
                    async with open_child(spec) as child, trio.open_nursery() as nursery:
                        for pipe in child.streams.values():
                            nursery.start_soon(drain, pipe, said.extend)
                        await child.finish()
            except* ChildFailedToStart:
                log.info("absent program=%s", name)
            if version := re.search(rb"\d+(\.\d+)+", said):
                self._programs[name] = version[0].decode()

        async with trio.open_nursery() as nursery:
            for name, argv in PROBED.items():
                nursery.start_soon(ask, name, argv)

    async def recover(self) -> None:
        """Runs that an earlier process left: end their processes, then resume them or report them as interrupted.

        Was it drained, it still is.
        """
        self._draining = bool(await self._store.get(DRAINING, bool))
        for run in await self._store.kept():
            try:
                await sweep(run)
            except TreeSurvived as err:
                log.error("left over run=%s error=%s", run, err)  # noqa: TRY400 - the run is reported all the same
            rows = await self._store.read(run=run, kinds=_RECOVERED)
            began = next((row.at for row in rows if row.kind == "RunStarted"), None)
            events = [decode(row.kind, row.data) for row in rows]
            received = next((event for event in events if isinstance(event, RunReceived)), None)
            over = any(isinstance(event, SuiteFinished | RunRefused) for event in events)
            if over or received is None:
                self._store.release(run)
                continue
            starts = [event for event in events if isinstance(event, RunStarted)]
            if not starts:
                self._decide(received)
                continue
            suite = _suite_of(received, starts[-1])
            changes = [event for event in events if isinstance(event, RunChanged)]
            reporting = next((event for event in changes if event.state == "reporting"), None)
            left, last = await self._left_over(run), starts[-1].attempt
            only = registry.remaining(suite, list(left.tests), is_complete=left.is_complete)
            if suite.resumable and reporting is None and only is not None:
                for (file, name), test in left.tests.items():
                    if test.started:  # it begins again, as another attempt
                        self._bus.publish(_interrupted(suite, run, file, name, test))
                self._begin(suite, received, max(left.attempt, last) + 1, only, began)
            else:
                await self._report_interrupted(suite, received, last, began, reporting, left)

    async def _report_interrupted(
        self,
        suite: Suite,
        received: RunReceived,
        attempt: int,
        began: float | None,
        reporting: RunChanged | None,
        left: _Left,
    ) -> None:
        """The service or the machine went down in mid-run: what had finished stands, the rest is aborted; tear down."""
        execution = self._execution(suite, received, attempt, slot=0, began=began)
        run = execution.run
        run.state = "running"
        if reporting is not None:  # all was told already, and why it ended
            if reporting.reason is not None:
                run.stop(reporting.reason)
        else:
            run.stop("interrupted")
            for (file, name), test in left.tests.items():
                if not test.is_told:
                    execution.tell(_interrupted(suite, run.run, file, name, test))
            if not (left.tests or left.is_complete):
                execution.tell(execution.rest("aborted", "interrupted"))
            await execution.tear_down(self._settings().roots)  # before a slot is offered
        await execution.report()

    async def _left_over(self, run: str) -> _Left:
        """Which tests of an interrupted run were selected or had started, and have not ended."""
        left: dict[tuple[str | None, str], _Begun] = {}
        is_complete, attempt = False, 1
        async for event in self._records(run):
            attempt = max(attempt, event.attempt)
            match event:
                case TestsSelected():
                    is_complete = True
                    left |= dict.fromkeys(event.tests, _Begun(event.attempt))
                case TestStarted():
                    left[event.file, event.name] = _Begun(event.attempt, event)
                case TestFinished(kind="test", message="aborted: interrupted"):
                    left[event.file, event.name] = _Begun(event.attempt, is_told=True)
                case TestFinished() if event.kind == "test":
                    left.pop((event.file, event.name), None)
                case TestFinished() if event.kind == "rest":
                    is_complete = True
        return _Left(left, is_complete, attempt)

    async def _records(self, run: str) -> AsyncIterator[TestsSelected | TestStarted | TestFinished]:
        since = 0
        while rows := await self._store.read(since, run=run, kinds=("TestsSelected", "TestStarted", "TestFinished")):
            for row in rows:
                event = decode(row.kind, row.data)
                assert isinstance(event, TestsSelected | TestStarted | TestFinished)
                yield event
            since = rows[-1].seq

    async def follow_reloads(self) -> None:
        """Another number of slots is told at once."""
        with self._bus.subscribe(Reloaded) as reloads:
            async for _ in reloads:
                self.tell_slots()

    async def watch_disk(self) -> None:
        """On a full disk running ones get a minute to end, then they are aborted. Source: settings.md, "Ends"."""
        while True:
            await self._store.wait_full()
            self.tell_slots()
            with trio.move_on_after(FULL_DISK_GRACE_S) as grace:
                await self._store.wait_room()
            if grace.cancelled_caught:
                for execution in self._active.values():
                    execution.stop("space: the disk is full")
                await self._store.wait_room()
            self.tell_slots()


_RECOVERED = ("RunReceived", "RunRefused", "RunStarted", "RunChanged", "SuiteFinished")


def _suite_below(path: Path, roots: tuple[str, ...]) -> tuple[Suite, Path]:
    """What `suite_of` says of a path below the roots. For a thread: a mount may hang."""
    return suite_of(below(path, roots))


def _suite_of(received: RunReceived, started: RunStarted) -> Suite:
    """The suite of an accepted run; where only a newer version knew all of its document, what is needed for its report.

    Source: protocols/packaging.md 8 (a release that is gone back from).
    """
    try:
        return document.from_tree(received.suite)
    except DocumentError as err:
        log.warning("cannot be resumed run=%s error=%s", received.run, err)
        runner: Runner = next((known for known in get_args(Runner) if known == started.runner), "command")
        return Suite(id=started.suite, title=started.title, runner=runner)


def _oldest_first(folder: Path) -> list[Path]:
    """What is in it, by the time of its last change."""
    found: list[tuple[float, Path]] = []
    for path in folder.iterdir():
        with suppress(FileNotFoundError):  # the end of another run removes it just now
            found.append((path.stat().st_mtime, path))
    return [path for _, path in sorted(found)]


def _interrupted(suite: Suite, run: str, file: str | None, name: str, test: _Begun) -> TestFinished:
    """The record of a test that was to run or ran when the service or the machine went down."""
    case = test.started.case if test.started else Cases(test.attempt).case(file, name)
    return TestFinished(
        run=run, suite=suite.id, case=case, name=name, file=file, state="aborted", ended=time.time(),
        attempt=test.attempt, started=test.started.started if test.started else None, message="aborted: interrupted",
    )  # fmt: skip


def _source(suite: Suite, base: str | None) -> str:
    source = suite.source
    if source is None:
        return base or ""
    return source.dir or source.archive or f"{source.git}@{source.ref or 'HEAD'}"


def _new_run_id(tree: dict[str, Any]) -> str:
    """An id of ours for a run that whoever ordered it gave none."""
    suite = re.sub(r"[^A-Za-z0-9_-]", "_", str(tree.get("id", "suite")))[:64]
    return f"{suite}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}-{secrets.token_hex(3)}"
