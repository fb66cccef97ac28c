"""Monitors in the foreground: `agent monitors run [--once] [--all] FILE`, one JSON line for each step's result.

No monitor waits for who reads the lines: they wait here, up to a bound. Where some had to be dropped stands
`{"kind": "dropped", "count": 3}`.

Source: protocols/monitors.md, "Results"; ARCHITECTURE.md, "The commands".
"""

import math
import signal
import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import trio

from agent.core.bus import Bus
from agent.core.events import AnyEvent, MonitorLog, MonitorOrphan, MonitorRun, MonitorSkipped, MonitorStep
from agent.core.metrics import Metrics
from agent.core.outflow import LAST_S, MIB, Outflow
from agent.core.process import adopt
from agent.core.store import open_store
from agent.core.supervise import Health
from agent.monitors import role
from agent.monitors.settings import MonitorsSettings

_KINDS: dict[type[AnyEvent], str] = {
    MonitorStep: "step",
    MonitorRun: "run",
    MonitorLog: "log",
    MonitorSkipped: "skip",
    MonitorOrphan: "orphan",
}
ROOM = {"log": 8 * MIB}  # bytes that wait, when a line of that kind comes
MOST = 64 * MIB  # the same of the others: a day of a hundred monitors


class Printer:
    """Takes every event in place of a journal: shows the lines, and sees whether all is well and all have run."""

    def __init__(self, settings: MonitorsSettings, out: Outflow, *, all_lines: bool) -> None:
        self.waiting = {monitor.id for monitor in settings.monitor}
        self.all_ok, self.all_ran = True, trio.Event()
        self._out, self._all_lines = out, all_lines

    def append(self, event: AnyEvent, at: float) -> None:
        """Show it, if it is a line."""
        kind = _KINDS.get(type(event))
        if kind == "step" or (kind and self._all_lines):
            self._out.put(line(kind, event), ROOM.get(kind, MOST))
        match event:
            case MonitorStep(state=state):
                self.all_ok = self.all_ok and state == "ok"
            case MonitorRun(monitor=monitor):
                self.waiting.discard(monitor)
                if not self.waiting:
                    self.all_ran.set()


async def run(settings: MonitorsSettings, machine: str, fd: int, *, once: bool, all_lines: bool) -> bool:
    """Write the results until SIGINT or SIGTERM; with `once` until each monitor had one run. Were all steps ok?

    Returns when all is read. Raises OSError when `fd` cannot be written to.
    """
    out = Outflow(fd, "standard output", lambda count: _encoded({"kind": "dropped", "count": count}))
    printer = Printer(settings, out, all_lines=all_lines)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(out.keep_writing)
        is_stopped = await _run(settings, machine, printer, once=once)
        out.close(LAST_S if is_stopped else math.inf)
    return printer.all_ok and not printer.waiting


async def _run(settings: MonitorsSettings, machine: str, printer: Printer, *, once: bool) -> bool:
    """Until the end; was that a signal?"""
    is_stopped = False
    with (
        tempfile.TemporaryDirectory(prefix="emissary-monitors-") as folder,
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
    ):
        store = open_store(Path(folder), reserve=4096)
        try:
            async with trio.open_nursery() as nursery:

                async def until_signal() -> None:
                    nonlocal is_stopped
                    await anext(aiter(signals))
                    is_stopped = True
                    nursery.cancel_scope.cancel()

                async def serve(task_status: trio.TaskStatus[None]) -> None:
                    await role.run(
                        Bus(printer), store, lambda: settings, machine, Health("monitors"), metrics=Metrics(),
                        once=once, task_status=task_status,
                    )  # fmt: skip

                nursery.start_soon(until_signal)
                await nursery.start(store.run)
                await nursery.start(adopt)
                await nursery.start(serve)
                if not once:
                    await trio.sleep_forever()
                await printer.all_ran.wait()
                nursery.cancel_scope.cancel()
        finally:
            store.close()
    return is_stopped


def line(kind: str, event: AnyEvent) -> bytes:
    """One line of the sheet: `kind` first, times in ISO 8601 with milliseconds."""
    fields: dict[str, Any] = msgspec.to_builtins(event)
    for name in ("started_at", "ended_at"):
        if fields.get(name) is not None:
            fields[name] = datetime.fromtimestamp(fields[name], UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
    fields.pop("metadata_raw", None)  # in the journal only: the sheet's line has no such key
    return _encoded({"kind": kind} | fields)


def _encoded(fields: dict[str, Any]) -> bytes:
    return msgspec.json.encode(fields) + b"\n"
