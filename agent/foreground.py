"""Monitors in the foreground: `agent monitors run [--once] [--all] FILE`, one JSON line for each step's result.

Source: protocols/monitors.md, "Results"; ARCHITECTURE.md, "The commands".
"""

import signal
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import trio

from agent.core.bus import Bus
from agent.core.events import AnyEvent, MonitorLog, MonitorOrphan, MonitorRun, MonitorSkipped, MonitorStep
from agent.core.metrics import Metrics
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


class Printer:
    """Takes every event in place of a journal: shows the lines, and sees whether all is well and all have run."""

    def __init__(self, settings: MonitorsSettings, show: Callable[[str], object], *, all_lines: bool) -> None:
        self.waiting = {monitor.id for monitor in settings.monitor}
        self.all_ok, self.all_ran = True, trio.Event()
        self._show, self._all_lines = show, all_lines

    def append(self, event: AnyEvent, at: float) -> None:
        """Show it, if it is a line."""
        kind = _KINDS.get(type(event))
        if kind == "step" or (kind and self._all_lines):
            self._show(line(kind, event))
        match event:
            case MonitorStep(state=state):
                self.all_ok = self.all_ok and state == "ok"
            case MonitorRun(monitor=monitor):
                self.waiting.discard(monitor)
                if not self.waiting:
                    self.all_ran.set()


async def run(
    settings: MonitorsSettings, machine: str, show: Callable[[str], object], *, once: bool, all_lines: bool
) -> bool:
    """Show the results until SIGINT or SIGTERM; with `once` until each monitor had one run. Were all steps ok?"""
    printer = Printer(settings, show, all_lines=all_lines)
    with (
        tempfile.TemporaryDirectory(prefix="emissary-monitors-") as folder,
        trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM) as signals,
    ):
        store = open_store(Path(folder), reserve=4096)
        try:
            async with trio.open_nursery() as nursery:

                async def until_signal() -> None:
                    await anext(aiter(signals))
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
    return printer.all_ok and not printer.waiting


def line(kind: str, event: AnyEvent) -> str:
    """One line of the sheet: `kind` first, times in ISO 8601 with milliseconds."""
    fields: dict[str, Any] = msgspec.to_builtins(event)
    for name in ("started_at", "ended_at"):
        if fields.get(name) is not None:
            fields[name] = datetime.fromtimestamp(fields[name], UTC).isoformat(timespec="milliseconds")[:-6] + "Z"
    fields.pop("metadata_raw", None)  # in the journal only: the sheet's line has no such key
    return msgspec.json.encode({"kind": kind} | fields).decode()
