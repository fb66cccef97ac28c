"""One run from its slot to its result: prepared, driven, ended where it must be, reported from the journal.

    preparing   files fetched, setup commands run             -> a failure blocks the run
    running     the runner's bytes go through its driver      -> TestStarted, TestFinished on the bus as they are read
    stopping    a limit, cancel or stop: the kill ladder over the whole tree
    reporting   result.json and xunit.xml, from what the journal holds; then SuiteFinished

Source: protocols/suites.md, "A run", "States", "Limits and security".
"""

import logging
import math
import os
import shutil
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from agent.core.bus import Bus
from agent.core.errors import ActionError, AgentError
from agent.core.events import (
    Counts,
    RunChanged,
    RunState,
    State,
    SuiteFinished,
    TestFinished,
    Warned,
)
from agent.core.process import Child, ChildFailedToStart, Exit, Limits, Pipe, Spec, Step, environ, open_child
from agent.core.processtree import TreeSurvived
from agent.core.store import Store
from agent.core.supervise import Health
from agent.suites.capture import Capture
from agent.suites.prepare import Machine, command, fetch, folder_below, shown
from agent.suites.report import write_report
from agent.suites.runners import registry
from agent.suites.runners.driver import CannotLaunch, Driver, DriverEvent, Only, title
from agent.suites.runs import Run

log = logging.getLogger(__name__)

TEARDOWN_S = 600.0  # for the teardown of a run that was interrupted
COVERAGE_S = 120.0  # for the last look of the coverage and its report, before the run ends without
REPORT_AGAIN_S = 5.0  # a report that cannot be written (disk full) is tried again that often
T = TypeVar("T")


class Execution:
    """A run that has a slot. `scope` gives it up without a report: for a resumable run, when the service ends.

    `began` is the epoch time of its first start, if that was before a restart.
    """

    def __init__(
        self,
        run: Run,
        base: Path | None,
        folder: Path,
        *,
        bus: Bus,
        store: Store,
        machine: Machine,
        health: Health,
        began: float | None = None,
    ) -> None:
        self.run, self.scope, self.over = run, trio.CancelScope(), trio.Event()
        self._base, self._folder = base, folder
        self._bus, self._store, self._machine, self._health = bus, store, machine, health
        self._changed = trio.Event()  # something happened that may move the next check
        self._warnings: list[Warned] = []
        self._exit: Exit | None = None
        self._cover: dict[str, str] | None = None  # what covered runners get; None: nobody was asked, or could say
        self._began = began

    def stop(self, reason: str) -> None:
        """End the run, in its own task. The first reason counts."""
        self.run.stop(reason)
        self._changed.set()

    async def execute(self, roots: tuple[str, ...], only: tuple[Only, ...] = ()) -> None:
        """Lead the run through its states to `done`. `only` narrows it to what is resumed."""
        try:
            with self.scope:
                self._advance("preparing")
                try:
                    (self._folder / "scratch").mkdir(parents=True, exist_ok=True)
                    await self._prepare_and_drive(roots, only)
                except* (AgentError, OSError) as group:
                    for err in each(group):
                        self._blocked(str(err))
                await self.report()
        finally:
            self.over.set()

    async def _prepare_and_drive(self, roots: tuple[str, ...], only: tuple[Only, ...]) -> None:
        env = self._env()
        async with self._captured("setup.log") as setup:
            project = await self._unless_ended(partial(self._fetch, roots, setup))
            if project is None:
                return
            try:
                if await self._unless_ended(partial(self._set_up, project, env, setup)) is None:
                    return
                if await self._unless_ended(partial(self._open_coverage, project)) is None:
                    return
                try:
                    await self._drive(project, env, only)
                finally:
                    await self._close_coverage()
            finally:
                await self._tear_down(project, env, setup)

    async def _unless_ended(self, prepare: Callable[[], Awaitable[T]]) -> T | None:
        """A step of preparing, unless the run is ended meanwhile: then None, and a record says why."""
        done: list[T] = []
        async with trio.open_nursery() as nursery:

            async def until_ended() -> None:
                await self._until_ended()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_ended)
            done.append(await prepare())
            nursery.cancel_scope.cancel()
        if done:
            return done[0]
        reason = self.run.stop_reason or ""
        if reason.startswith("limits.setup"):
            self._blocked(reason)
        else:
            self.tell(self.rest("aborted", reason))
        return None

    async def _fetch(self, roots: tuple[str, ...], setup: Capture) -> Path:
        suite, mark = self.run.suite, self.run.run
        ca_file = self._machine.ca_file
        root = await fetch(suite.source, self._base, self._folder, roots, mark=mark, log=setup, ca_file=ca_file)
        look = partial(folder_below, root / suite.cwd, (str(root),), "cwd")
        return await trio.to_thread.run_sync(look, abandon_on_cancel=True)

    async def _set_up(self, project: Path, env: dict[str, str], setup: Capture) -> Path:
        for argv in self.run.suite.setup:
            await command(argv, project, env, mark=self.run.run, log=setup, limits=_child_limits(self.run))
        return project

    def _env(self) -> dict[str, str]:
        return environ(os.environ, keep=self.run.suite.env_pass) | self.run.suite.env

    async def tear_down(self, roots: tuple[str, ...]) -> None:
        """The suite's teardown, for a run that an earlier process left unfinished; none where it had no files yet."""
        suite = self.run.suite
        is_here = suite.source is None or suite.source.dir is not None or (self._folder / "source").exists()
        if not suite.teardown or not is_here:
            return
        log.info("tearing down run=%s", self.run.run)
        try:
            with trio.fail_after(TEARDOWN_S):  # no run begins before
                self._folder.mkdir(parents=True, exist_ok=True)
                async with self._captured("teardown.log") as said:  # what the run itself wrote stays in setup.log
                    await self._tear_down(await self._fetch(roots, said), self._env(), said)
        except* (AgentError, OSError, trio.TooSlowError) as group:
            self._warnings += [Warned("teardown", str(err) or "took too long") for err in each(group)]

    async def _tear_down(self, project: Path, env: dict[str, str], setup: Capture) -> None:
        for argv in self.run.suite.teardown:
            try:
                with trio.fail_after(self.run.limits.setup or math.inf):
                    await command(argv, project, env, mark=self.run.run, log=setup)
            except* trio.TooSlowError:
                self._warnings.append(Warned("teardown", f"{shown(argv)}: took too long"))
            except* (AgentError, OSError) as group:
                self._warnings += [Warned("teardown", str(err)) for err in each(group)]

    async def _open_coverage(self, project: Path) -> Path:
        """Runners are covered where the suite or a session of the Drill admin asks for it; never does it stop a run.

        Source: protocols/suites.md, "The suite document" (`coverage`).
        """
        kept, wants_report = self._folder / "scratch/coverage.json", self.run.suite.coverage
        asked = {"run": self.run.run, "dir": str(project), "report": wants_report, "kept": str(kept)}
        try:
            self._cover = (await self._bus.ask("coverage_open", asked))["env"]
        except ActionError as err:  # the role is in backoff, or cannot read the product
            if wants_report:
                self._warnings.append(Warned("coverage.unavailable", f"not measured: {err.what}"))
        return project

    async def _close_coverage(self) -> None:
        if self._cover is None:
            return
        with trio.move_on_after(COVERAGE_S, shield=True) as limit:
            try:
                ended = {"run": self.run.run, "artifacts": str(self._folder), "resumes": self.scope.cancel_called}
                said = await self._bus.ask("coverage_close", ended)
                self._warnings += [Warned("coverage", text) for text in said.get("warnings", ())]
                if self.run.suite.coverage and not said:  # it knows nothing of the run any more
                    text = "no report: the coverage of the agent was started anew during the run"
                    self._warnings.append(Warned("coverage.lost", text))
            except ActionError as err:
                self._warnings.append(Warned("coverage.lost", f"no report: {err.what}"))
        if limit.cancelled_caught:
            self._warnings.append(Warned("coverage.lost", f"no report: not written within {COVERAGE_S:g} s"))

    async def _drive(self, project: Path, env: dict[str, str], only: tuple[Only, ...]) -> None:
        """Launch the runner; again for failed tests, as often as the document says."""
        run, suite = self.run, self.run.suite
        self._advance("running")
        attempt = run.attempt
        async with self._captured("stdout.log") as stdout, self._captured("stderr.log") as stderr:
            logs = {"stdout": stdout, "stderr": stderr}
            while True:
                failed = await self._attempt(project, env, only, attempt, logs)
                if not failed or attempt > suite.retries or run.stop_reason is not None:
                    break
                only, attempt = failed, attempt + 1
            for capture in logs.values():
                if capture.cut:
                    self._warnings.append(Warned("output_cut", f"{capture.path.name}: {capture.cut} bytes cut"))

    async def _attempt(
        self,
        project: Path,
        env: dict[str, str],
        only: tuple[Only, ...],
        attempt: int,
        logs: dict[str, Capture],
    ) -> tuple[Only, ...]:
        """One start of the runner to its end; the tests to run again: which failed, or were not run for that reason."""
        run, suite = self.run, self.run.suite
        scratch, self._exit = self._folder / "scratch", None
        # In a thread: patterns are looked for in trees of any size, on disks that may hang.
        prepare = partial(registry.prepare, suite, project, scratch, run.run, attempt, only)
        prepared = await self._unless_ended(partial(trio.to_thread.run_sync, prepare, abandon_on_cancel=True))
        if prepared is None:
            return ()
        launch, driver = prepared
        for name, content in launch.files.items():
            (scratch / name).write_bytes(content)
        own = {name: value for name, value in env.items() if name not in launch.unset_env}
        spec = Spec(
            argv=launch.argv,
            cwd=project,
            env=joined(own | launch.set_env, self._cover or {}),
            mark=run.run,
            pipes=launch.pipes,
            limits=_child_limits(run),
        )
        failed: list[Only] = []

        def feed(stream: str, data: bytes) -> None:
            if stream in logs:
                self._capture(logs[stream], data)
            for event in driver.feed(stream, data, time.time()):
                if isinstance(event, TestFinished) and event.kind == "test" and event.state == "failed":
                    failed.append(Only(event.file, event.name))
                self.tell(event)

        async def read(stream: str, pipe: Pipe) -> None:
            with suppress(trio.ClosedResourceError):
                while data := await pipe.receive_some():
                    feed(stream, data)
                    await self._store.room()  # a runner faster than the disk waits for it, as it would for a terminal

        try:
            async with open_child(spec, leaves=self._machine.leaves) as child, trio.open_nursery() as nursery:
                feed("stdout", b"")  # it has started, which a silent one does not say itself
                for name, pipe in child.streams.items():
                    nursery.start_soon(read, name, pipe)
                self._exit = await self._until_exit(driver, child)
        except* ChildFailedToStart as group:
            for err in each(group):
                raise CannotLaunch(str(err), remedy="Nothing was run.") from err
        except* TreeSurvived as group:
            for err in each(group):
                self._warnings.append(Warned("tree_survived", str(err)))
        ended = self._exit or Exit(None, None, "SIGKILL", None)
        unrun = []
        for event in driver.finish(ended.code, ended.signal, run.stop_reason, time.time()):
            self.tell(event)
            if isinstance(event, TestFinished) and event.state == "skipped":  # at the end: it stopped at a failure
                unrun.append(event)
        if ended.oom:
            self._warnings.append(Warned("oom", "the kernel ended a process of the run for want of memory"))
        if not failed:
            return ()
        if all(event.kind == "test" for event in unrun):
            return (*failed, *(Only(event.file, event.name) for event in unrun))
        if suite.retries:  # some are not known by name: what failed could pass, and the run without them
            self._warnings.append(Warned("retries", "nothing was run again: the runner stopped before all had begun"))
        return ()

    async def _until_exit(self, driver: Driver, child: Child) -> Exit:
        """Wait for the runner's exit, or end it when a limit or somebody says so."""
        async with trio.open_nursery() as nursery:

            async def until_ended() -> None:
                await self._until_ended()
                nursery.cancel_scope.cancel()

            nursery.start_soon(until_ended)
            await child.wait()
            nursery.cancel_scope.cancel()
        if self.run.stop_reason is None:
            return await child.finish()
        self._advance("stopping", self.run.stop_reason)
        stops = driver.stop(self.run.stop_reason)
        return await child.stop([Step(stop.signal, stop.wait_s, "child" if stop.alone else "group") for stop in stops])

    async def _until_ended(self) -> None:
        """Returns when the run must be ended: somebody said so, or a limit has passed."""
        run = self.run
        while run.stop_reason is None:
            if reason := run.overdue(trio.current_time()):
                self.stop(reason)
                return
            self._changed = trio.Event()
            with trio.move_on_at(run.next_check() or math.inf):
                await self._changed.wait()

    def tell(self, event: DriverEvent) -> None:
        """Publish what the driver said, or keep its warning for the result."""
        if isinstance(event, Warned):
            self._warnings.append(event)
            return
        self._bus.publish(event)
        self.run.feed(event, trio.current_time())
        if self.run.limits.test:
            self._changed.set()

    @asynccontextmanager
    async def _captured(self, name: str) -> AsyncIterator[Capture]:
        """A capture that a thread puts in order and onto the disk: it may be 64 MiB, and the heartbeat must go on."""
        if self.run.attempt > 1:  # what the attempts before a restart wrote stays: "stdout.2.log"
            name = f"{name.removesuffix('.log')}.{self.run.attempt}.log"
        capture = Capture(self._folder / name, self.run.limits.output)
        try:
            yield capture
        finally:
            with trio.CancelScope(shield=True):
                try:
                    await trio.to_thread.run_sync(capture.close)
                except OSError as err:
                    self._warnings.append(Warned("output_lost", f"{name}: {err.strerror}"))

    def _capture(self, capture: Capture, data: bytes) -> None:
        try:
            capture.write(data)
        except OSError as err:
            warned = Warned("output_lost", f"{capture.path.name}: {err.strerror}")
            if warned not in self._warnings:
                self._warnings.append(warned)

    def _blocked(self, why: str) -> None:
        """The run could not be judged: a crash of the runner, before it began."""
        log.warning("run blocked run=%s reason=%s", self.run.run, why)
        name = title(why)
        self.tell(
            TestFinished(
                run=self.run.run, suite=self.run.suite.id, case=name, name=name, file=None, kind="crash",
                state="blocked", ended=time.time(), message=name, attempt=self.run.attempt,
            ),
        )  # fmt: skip

    def rest(self, state: State, reason: str) -> TestFinished:
        return TestFinished(
            run=self.run.run, suite=self.run.suite.id, case="(not reported)", name="(not reported)", file=None,
            kind="rest", state=state, ended=time.time(), message=f"{state}: {reason}", attempt=self.run.attempt,
        )  # fmt: skip

    def _advance(self, state: RunState, reason: str | None = None) -> None:
        self.run.advance(state, trio.current_time())
        self._bus.publish(RunChanged(run=self.run.run, state=state, reason=reason))
        self._changed.set()

    # ---- reporting -------------------------------------------------------------------------------------------------

    async def report(self) -> None:
        """Write result and xUnit from the journal, then tell that the run is over."""
        run = self.run
        self._advance("reporting", run.stop_reason)
        await self._store.commit()
        ended = self._exit
        report = run.suite.report
        if report.polarize and self._machine.project == "" and not (report.polarion and report.polarion.project):
            text = "not submitted: neither report.polarion.project nor polarize.project is set"
            self._warnings.append(Warned("polarize.project", text))
        now = time.time()
        lasted_s = trio.current_time() - run.began  # the date may have been set meanwhile
        finished = SuiteFinished(
            run=run.run,
            suite=run.suite.id,
            runner=run.suite.runner,
            driver=run.suite.driver,
            verdict="blocked",
            result="FAILURE",
            code=ended.code if ended else None,
            signal=ended.signal if ended else None,
            reason=run.stop_reason,
            started=now - lasted_s if self._began is None else self._began,
            ended=now,
            counts=Counts(),
            warnings=tuple(self._warnings),
        )
        write = partial(write_report, self._store, run.suite, finished, self._folder, self._machine.ident)
        self._bus.publish(await self._written(write))
        self._advance("done")
        self._store.release(run.run)
        await self._store.commit()
        for fetched_or_made in ("scratch", "source"):  # fifty copies of a suite's files would fill the disk
            await trio.to_thread.run_sync(shutil.rmtree, self._folder / fetched_or_made, True)

    async def _written(self, write: Callable[[], SuiteFinished]) -> SuiteFinished:
        """The result, once it is on the disk: a full one is waited for."""
        while True:
            try:
                with self._health.busy(limit=120):
                    return await trio.to_thread.run_sync(write)
            except (OSError, sqlite3.OperationalError) as err:
                log.error("cannot write the report run=%s error=%s", self.run.run, err)  # noqa: TRY400 - each time
            await trio.sleep(REPORT_AGAIN_S)


def joined(env: dict[str, str], cover: dict[str, str]) -> dict[str, str]:
    """A runner's environment with what coverage adds to it. What the runner has of its own stays.

    The folder of PYTHONPATH comes first: its sitecustomize loads the one that it stands before.
    """
    merged = cover | env
    for name, ours in cover.items():
        if name in env and name == "NODE_OPTIONS":
            merged[name] = f"{env[name]} {ours}"
        if name in env and name == "PYTHONPATH":
            merged[name] = f"{ours}{os.pathsep}{env[name]}"
    return merged


def each(group: BaseExceptionGroup[BaseException]) -> Iterator[BaseException]:
    """The single errors of a group, however nested."""
    for err in group.exceptions:
        if isinstance(err, BaseExceptionGroup):
            yield from each(err)
        else:
            yield err


def _child_limits(run: Run) -> Limits:
    return Limits(memory=run.limits.memory or None, processes=run.limits.processes or None)
