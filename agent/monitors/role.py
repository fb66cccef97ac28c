"""The monitors role on trio: ticks to runs, runs to events; `monitors` and `run_monitor` are answered here.

A changed setting takes effect at the monitor's next tick, a removed monitor is led out, the others notice nothing.

Source: protocols/monitors.md; protocols/emissary.md, "Control server" (`monitors`, `run_monitor`).
"""

import logging
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import trio

from agent.core.bus import Bus, Subscription
from agent.core.cgroup import Leaves
from agent.core.errors import ActionError, AgentError
from agent.core.events import MonitorLog, MonitorOrphan, MonitorRun, MonitorSkipped, MonitorStep, Reloaded
from agent.core.metrics import Metrics
from agent.core.process import Exit
from agent.core.processtree import TreeSurvived, sweep
from agent.core.store import Store
from agent.core.supervise import Health
from agent.monitors import secrets
from agent.monitors.execute import Ended, execute
from agent.monitors.folders import Litter, remove
from agent.monitors.framing import MAX_BODY, MAX_LINE
from agent.monitors.history import QUANTILES, History
from agent.monitors.messages import Dialect
from agent.monitors.schedule import Schedule, Skipped
from agent.monitors.secrets import Redactor, SecretUnresolved
from agent.monitors.session import Cause, Session, StepEnded, Told, config_text, refused
from agent.monitors.settings import Monitor, MonitorsSettings

log = logging.getLogger(__name__)

KILLED = Ended(by="kill", exit=Exit(None, "SIGKILL", "SIGKILL", None))
LOOK_S = 30.0  # the wall clock may be set while we sleep
MARK = "monitor-"
# Where a package puts our own monitors; in a checkout they are beside this file.
SHARE = "/usr/share/emissary/monitors/"


async def run(
    bus: Bus,
    store: Store,
    settings: Callable[[], MonitorsSettings],
    machine: str,
    health: Health,
    *,
    metrics: Metrics,
    leaves: Leaves | None = None,
    once: bool = False,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Run the monitors of the settings at their times, until cancelled: then what runs is killed and told.

    `settings` gives what holds now: a reload must not end a run. `once`: each has one run, now, and no other.
    """
    litter = Litter()
    try:
        # Subscribed before the settings are read: a reload while we come up is not missed.
        with bus.subscribe(Reloaded) as reloads:
            async with trio.open_nursery() as nursery:
                monitors = _Monitors(bus, store, settings, machine, metrics, leaves, litter, nursery, once=once)
                cut_off = await monitors.clear_up()
                await monitors.arrange()
                for run in cut_off:
                    await monitors.tell_cut_off(run, "the agent was ended in its midst")
                await monitors.tell_promised()
                with bus.answer("monitors", monitors.describe), bus.answer("run_monitor", monitors.run_now):
                    nursery.start_soon(monitors.follow, reloads)
                    nursery.start_soon(litter.keep_clear)
                    task_status.started()
                    try:
                        await monitors.keep_time(health)
                    finally:
                        monitors.settle()
    finally:
        await litter.clear()


class _Monitors:
    def __init__(
        self,
        bus: Bus,
        store: Store,
        settings: Callable[[], MonitorsSettings],
        machine: str,
        metrics: Metrics,
        leaves: Leaves | None,
        litter: Litter,
        nursery: trio.Nursery,
        *,
        once: bool,
    ) -> None:
        self._bus, self._store, self._settings, self._metrics = bus, store, settings, metrics
        self._leaves, self._litter, self._nursery = leaves, litter, nursery
        self._base, self._once = store.folder / "monitors", once
        now = settings()
        self._schedule = Schedule(machine, most=now.max_concurrent, groups=now.groups)
        self._changed = trio.Event()
        self._stopping: dict[str, trio.CancelScope] = {}  # of monitors that run: leads it out
        self._runs: dict[str, str] = {}  # monitor to the run that waits or runs
        self._history: dict[str, History] = {}
        self._gone: dict[str, History] = {}  # of monitors that were removed: their numbers
        self._measured: set[tuple[str, str]] = set()  # monitor and step that /metrics has percentiles of
        self._spoken: dict[tuple[tuple[str, ...], int], Dialect] = {}  # command and its date to its spelling
        self._absent: set[str] = set()  # monitors of ours that are not installed, once they are told of

    async def clear_up(self) -> list[str]:
        """What runs of an agent that was killed have left: processes, then folders. The runs."""
        self._base.mkdir(mode=0o700, exist_ok=True)
        runs: dict[str, None] = {}  # one that was started twice has two folders
        for folder in sorted(self._base.iterdir()):
            mark = folder.name.rpartition("-")[0]
            runs[mark.removeprefix(MARK)] = None
            try:
                await sweep(mark)
            except TreeSurvived as err:
                self._bus.publish(MonitorOrphan(monitor="", run=mark, pids=err.pids))
            await trio.to_thread.run_sync(remove, folder)
        return list(runs)

    async def tell_promised(self) -> None:
        """Of a run that somebody was told the id of too, though it waited for a slot when the agent was killed."""
        for name, history in list(self._history.items()):
            if history.promised is not None:
                run, history.promised = _run_id(name, history.promised), None
                await self.tell_cut_off(run, "the agent was ended while the run waited for a slot")
                self._store.put(_key(name), history)

    async def tell_cut_off(self, run: str, why: str) -> None:
        """Every planned step has its line: those that the agent which was killed did not live to tell."""
        name = run.rpartition("-")[0]
        if name not in self._schedule:
            return
        monitor, began = self._schedule.monitor(name), trio.current_time()
        await self._store.commit()  # it may be the role alone that has begun anew
        told = [each.kind for each in await self._store.read(run=run, kinds=("MonitorStep", "MonitorRun"), limit=1001)]
        if "MonitorRun" not in told:
            self._refuse(monitor, run, "stopped", why, began, told=told.count("MonitorStep"))

    def settle(self) -> None:
        """The last word of each history, when no run will come any more."""
        for name in [name for name in self._runs if name not in self._stopping]:
            self._give_up(self._schedule.monitor(name), "the agent ended")
        for name, history in self._history.items():
            if history.reserved > history.runs or history.promised is not None:
                history.settle()
                self._store.put(_key(name), history)

    async def arrange(self) -> None:
        """Take the settings that hold now, and the histories that the store has of new monitors."""
        settings = self._settings()
        wanted = self._installed(settings.filled())
        kept = {name: await self._store.get(_key(name), History) for name in wanted if name not in self._history}
        for name in wanted:  # at once: one that is back may have been forgotten while the others were read
            if name not in self._history:
                left = self._gone.pop(name) if name in self._gone else kept.get(name)
                self._history[name] = left if left is not None else History()
                self._history[name].resume()
        self._schedule.limit(settings.max_concurrent, settings.groups)
        waiting = {name: self._schedule.monitor(name) for name in self._schedule.waiting}
        for name in self._schedule.arrange(wanted, time.time()):
            if name in self._stopping:
                self._stopping[name].cancel()
            else:
                if name in waiting and name in self._runs:
                    self._give_up(waiting[name], "the monitor was removed")
                self._forget(name)
        self._changed.set()

    def _installed(self, monitors: dict[str, Monitor]) -> dict[str, Monitor]:
        """Those that a hardware profile names are left out where the package is not installed, and told of once.

        Whoever names a monitor for one run is told by its result.
        """
        found: dict[str, Monitor] = {}
        for name, monitor in monitors.items():
            command = tuple(map(_own_program, monitor.command))
            absent = next((part for part in command if part.startswith(SHARE) and not Path(part).exists()), None)
            if absent is None or self._once:
                found[name] = msgspec.structs.replace(monitor, command=command)
            elif name not in self._absent:
                self._absent.add(name)
                log.warning(
                    "monitor left out monitor=%s file=%s: it is not installed. Install the package.", name, absent
                )
        return found

    def _forget(self, name: str) -> None:
        """Of a monitor that is gone its numbers stay: if it comes back, no run has the id of an earlier one."""
        self._runs.pop(name, None)
        runs = self._history.pop(name).runs
        self._gone[name] = History(runs, reserved=runs)
        self._measured = {pair for pair in self._measured if pair[0] != name}
        self._metrics.forget(monitor=name)
        self._store.put(_key(name), self._gone[name])

    def _give_up(self, monitor: Monitor, why: str) -> None:
        """The run that somebody was told the id of will not begin."""
        run = self._runs.pop(monitor.id)
        self._refuse(monitor, run, "stopped", f"{why} while the run waited for a slot", trio.current_time())

    async def follow(self, reloads: Subscription[Reloaded]) -> None:
        """Other settings are taken at once."""
        async for _ in reloads:
            await self.arrange()

    async def keep_time(self, health: Health) -> None:
        """Begin each run at its tick; with `once` all of them now."""
        for name in self._history if self._once else ():
            self._schedule.run_now(name)
        while True:
            with health.busy(limit=5):
                if not self._once:
                    self._schedule.tick(time.time())
                while begun := self._schedule.begin():
                    name, skipped = begun
                    self._tell_skipped(skipped)
                    self._stopping[name] = trio.CancelScope()
                    self._nursery.start_soon(self._run, self._schedule.monitor(name), self._number(name))
                    self._history[name].promised = None  # from here on its folder stands for it
                self._changed = trio.Event()
            wait_s = LOOK_S if self._once else max(0.0, self._schedule.next_at() - time.time())
            with trio.move_on_after(min(LOOK_S, wait_s)):
                await self._changed.wait()

    # ---- actions ---------------------------------------------------------------------------------------------------

    async def describe(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> `{monitors: [{id, state, run, next, failures, backoff_until, skipped, interval, steps}]}`."""
        return {
            "monitors": [
                {
                    "id": name,
                    "run": self._runs.get(name),
                    "interval": self._schedule.monitor(name).interval,
                    "steps": self._history[name].describe(),
                    **self._schedule.describe(name),
                }
                for name in self._history  # a monitor of new settings is there once its history is read
                if name in self._schedule
            ]
        }

    async def run_now(self, payload: dict[str, Any]) -> dict[str, Any]:
        """`{id}` -> `{run}`: the run that begins as soon as there is a slot, or is there already."""
        name = str(payload.get("id"))
        try:
            is_new = self._schedule.run_now(name)
        except KeyError:
            raise ActionError("not_found", f"there is no monitor {name!r}") from None
        run = self._number(name)
        if is_new:
            self._changed.set()
        if name in self._schedule.waiting:
            history = self._history[name]
            history.promised = history.runs
            self._store.put(_key(name), history)
            await self._store.commit()
        return {"run": run}

    # ---- one run ---------------------------------------------------------------------------------------------------

    def _number(self, name: str) -> str:
        """The id of the run that waits or runs; made when somebody asks for it first."""
        if name not in self._runs:
            history = self._history[name]
            number, is_new = history.number()
            self._runs[name] = _run_id(name, number)
            if is_new:
                self._store.put(_key(name), history)
        return self._runs[name]

    async def _run(self, monitor: Monitor, run: str) -> None:
        name, has_result = monitor.id, False
        try:
            has_result = await self._lead(monitor, run)
        finally:
            del self._stopping[name]
            self._runs.pop(name, None)
            self._tell_skipped(self._schedule.end(name, has_result=has_result, now=time.time()))
            if name in self._schedule:
                self._store.put(_key(name), self._history[name])
            else:
                self._forget(name)
            if self._schedule.waiting:
                self._changed.set()

    async def _lead(self, monitor: Monitor, run: str) -> bool:
        """The run from its secrets to its last event; did any step have a result?"""
        began = trio.current_time()
        folder = Path(self._settings().secrets_dir)
        try:
            read = partial(_secret, folder)
            config, hidden = secrets.resolve(monitor.config, read, os.environ)
            env, more = secrets.resolve(monitor.env, read, os.environ, "env")
        except SecretUnresolved as err:
            return self._refuse(monitor, run, "secret_unresolved", str(err), began)
        text = config_text(config)
        if len("Config ") + len(text) > MAX_BODY:
            return self._refuse(monitor, run, "start_failed", f"config: {len(text)} bytes do not fit a frame", began)
        redactor = Redactor(hidden | more)
        spoken, key = None, (monitor.command, 0)
        if monitor.dialect == "auto":
            key = (monitor.command, _date(monitor.command[0]))
            spoken = self._spoken.get(key)
        while True:
            stopping = self._stopping[monitor.id]
            session = Session(
                monitor,
                text,
                trio.current_time(),
                epoch=time.time() - trio.current_time(),
                redactor=redactor,
                spoken=spoken,
            )
            try:
                ended = await execute(
                    session,
                    env,
                    f"{MARK}{run}",
                    self._base,
                    partial(self._tell, monitor, run),
                    self._litter.add,
                    stopping,
                    longest=MAX_LINE + redactor.longest,
                    leaves=self._leaves,
                )
            except (AgentError, OSError) as err:
                if session.state != "over":
                    return self._refuse(monitor, run, "start_failed", str(err), began)
                log.warning("monitor given up monitor=%s error=%s", monitor.id, err)  # its steps have their lines
                self._over(monitor, run, session, KILLED, began)
                return session.has_result
            except BaseException:  # cancelled: its steps have their lines if it was started at all
                if session.state == "over":
                    self._over(monitor, run, session, KILLED, began)
                else:
                    self._refuse(monitor, run, "stopped", "it was being started", began)
                raise
            if ended.again is None:
                break
            spoken = self._spoken[key] = ended.again
            if stopping.cancel_called:
                return self._refuse(monitor, run, "stopped", "it was to be started once more", began)
            self._stopping[monitor.id] = trio.CancelScope()
        self._over(monitor, run, session, ended, began)
        return session.has_result

    def _refuse(self, monitor: Monitor, run: str, cause: Cause, why: str, began: float, *, told: int = 0) -> bool:
        log.warning("monitor not run monitor=%s cause=%s error=%s", monitor.id, cause, why)
        for line in refused(monitor, cause, why)[told:]:
            self._tell(monitor, run, line)
        self._publish_run(monitor, run, None, None, began)
        return False

    def _over(self, monitor: Monitor, run: str, session: Session, ended: Ended, began: float) -> None:
        if ended.survivors:
            self._bus.publish(MonitorOrphan(monitor=monitor.id, run=run, pids=ended.survivors))
        self._publish_run(monitor, run, session, ended, began)

    def _publish_run(
        self, monitor: Monitor, run: str, session: Session | None, ended: Ended | None, began: float
    ) -> None:
        exit_ = ended.exit if ended else Exit(None, None, "self", None)
        self._bus.publish(
            MonitorRun(
                monitor=monitor.id,
                run=run,
                ended_by=ended.by if ended else None,
                rc=exit_.code,
                signal=exit_.signal,
                dialect=session.dialect if session else None,
                stray_results=session.stray if session else 0,
                dropped_bytes=session.dropped if session else 0,
                duration_ms=round((trio.current_time() - began) * 1000),
            )
        )
        self._metrics.count("monitors_runs_total", monitor=monitor.id)

    def _tell(self, monitor: Monitor, run: str, act: StepEnded | Told) -> None:
        if isinstance(act, Told):
            self._bus.publish(
                MonitorLog(
                    monitor=monitor.id, run=run, step=act.step, source=act.source, level=act.level, text=act.text
                )
            )
            return
        self._bus.publish(
            MonitorStep(
                monitor=monitor.id,
                run=run,
                step=act.step,
                state=act.state,
                ms=act.ms,
                timed_by=act.timed_by,
                started_at=act.started_at,
                ended_at=act.ended_at,
                text=act.text,
                cause=act.cause,
                metadata=act.metadata,
                metadata_raw=act.metadata_raw,
                rc=act.rc,
                signal=act.signal,
                stderr_tail=act.stderr_tail,
            )
        )
        self._metrics.count("monitors_steps_total", monitor=monitor.id, step=act.step, state=act.state)
        history = self._history[monitor.id]
        history.add(act.step, act.state, act.ended_at or time.time(), act.ms)
        if act.ms is None or (monitor.id, act.step) in self._measured:
            return
        self._measured.add((monitor.id, act.step))
        for q in QUANTILES:
            read = partial(history.seconds, act.step, q)
            self._metrics.gauge("monitors_step_seconds", read, monitor=monitor.id, step=act.step, quantile=str(q))

    def _tell_skipped(self, skipped: list[Skipped]) -> None:
        for each in skipped:
            self._bus.publish(MonitorSkipped(monitor=each.monitor, reason=each.reason, count=each.count))
            self._metrics.count("monitors_skipped_total", each.count, monitor=each.monitor, reason=each.reason)


def _own_program(part: str) -> str:
    """A part of a command; a file of ours that is not installed, but is in the checkout, by its name there."""
    beside = Path(__file__).parent / part.removeprefix(SHARE)
    return str(beside) if part.startswith(SHARE) and not Path(part).exists() and beside.exists() else part


def _run_id(monitor: str, number: int) -> str:
    return f"{monitor}-{number:06d}"


def _key(monitor: str) -> str:
    """The checkpoint of a monitor's history."""
    return f"monitors.{monitor}"


def _date(program: str) -> int:
    """A program's change in nanoseconds; another program may speak otherwise. 0: it is looked up in the PATH."""
    try:
        return Path(program).stat().st_mtime_ns
    except OSError:
        return 0


def _secret(folder: Path, name: str) -> str:
    """A secret's text, less one final line end. Raises OSError, and ValueError for a file that others may read.

    A service without root has it among its credentials, where the unit put it (protocols/packaging.md 4).
    """
    given = Path(os.environ.get("CREDENTIALS_DIRECTORY", "/nonexistent"), f"secrets_{name}")
    with (given if given.exists() else folder / name).open("rb") as file:
        if os.fstat(file.fileno()).st_mode & 0o077:
            raise ValueError("others may read or write it; chmod 600")
        return file.read(2**20).decode().removesuffix("\n").removesuffix("\r")
