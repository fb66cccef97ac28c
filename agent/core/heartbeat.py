"""The watchdog's food, from real progress: while a role, the store or the loop is overdue, there is none.

Every third of the supervisor's limit (every 10 s where nobody watches) it looks whether a role has a unit of work that
should be done by now, whether the store's writer is behind, and how late the loop itself wakes up. What is overdue is
named in STATUS= and in the log, a role with the stacks of its tasks; the supervisor's SIGABRT makes faulthandler print
those of the threads. An idle agent is never killed, a hung one always. The same looks end the trial of a new release,
and find a disk that does not answer: there is an alert of it, and no restart.

Source: protocols/packaging.md 4, "Heartbeat"; 8, "TRIAL".
"""

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NoReturn

import trio

from agent.core import notify
from agent.core.errors import shown
from agent.core.events import Alert, AlertCleared
from agent.core.release import Pending, write
from agent.core.store import Store
from agent.core.supervise import Supervisor

log = logging.getLogger(__name__)

LOOK_S = 10.0  # between two looks where no watchdog asks for more
BEHIND_S = 5.0  # the store's writer
LATE_S = 5.0  # the loop
WELL_S = 60.0  # protocols/packaging.md 8, "TRIAL": so long all roles are healthy
LOOK_TRIAL_S = 1.0
HUNG = "disk.hung"
SHOWN = 8  # paths in one alert

Publish = Callable[[Alert | AlertCleared], None]


def overdue(supervisor: Supervisor, store: Store, late_s: float) -> dict[str, float]:
    """What should have got on by now, with the seconds it is late; "store" and "loop" beside the roles' names.

    While the disk is full, only the loop counts: who waits for a commit does not hang, and what waits in memory for
    room would be lost with the process. The full disk is told by an alert.
    """
    found: dict[str, float] = {}
    if not store.full:
        found = supervisor.overdue()
        if (behind_s := store.behind_s(trio.current_time())) > BEHIND_S:
            found["store"] = behind_s
    if late_s > LATE_S:
        found["loop"] = late_s
    return found


async def beat(supervisor: Supervisor, store: Store, publish: Publish) -> NoReturn:
    """Feed the watchdog for as long as nothing is overdue, until cancelled. A disk that hangs is told of."""
    watchdog_s = notify.watchdog_s()
    every_s = watchdog_s / 3 if watchdog_s else LOOK_S
    named: set[str] = set()  # what is overdue was named already
    hung: set[str] = set()  # as the alert says
    due = trio.current_time()
    while True:
        late = overdue(supervisor, store, trio.current_time() - due)
        for name in late.keys() - named:
            stacks = "".join(supervisor.stacks(name))
            log.error("overdue name=%s late_s=%.1f%s", name, late[name], f" stacks:\n{stacks}" if stacks else "")
        if late:
            notify.status("overdue: " + ", ".join(f"{name} by {by:.0f} s" for name, by in sorted(late.items())))
        elif named:
            log.warning("no longer overdue names=%s", ",".join(sorted(named)))
            notify.status("well again")
        if watchdog_s and not late:
            notify.alive()
        named = set(late)
        if (paths := supervisor.hung()).keys() != hung:
            hung = set(paths)
            publish(_hung(paths, time.time()) if paths else AlertCleared(code=HUNG))
        due = trio.current_time() + every_s
        await trio.sleep_until(due)


def _hung(paths: Mapping[str, float], now: float) -> Alert:
    named = [shown(path) for path in sorted(paths)[:SHOWN]]
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return Alert(
        code=HUNG,
        text=f"the disk does not answer for {', '.join(named)}{more}",
        remedy="See what is mounted there (mount, dmesg). What is watched there goes on when it answers.",
        since=now - max(paths.values()),
    )


async def confirm(supervisor: Supervisor, store: Store, pending: Pending) -> None:
    """Say that the trial of this release went well, after WELL_S with all roles healthy; returns then."""
    since = trio.current_time()
    while trio.current_time() - since < WELL_S:
        await trio.sleep(LOOK_TRIAL_S)
        failing = [name for name, status in supervisor.status.items() if status.state == "backoff"]
        if failing or overdue(supervisor, store, 0):
            since = trio.current_time()
    while True:
        try:
            await trio.to_thread.run_sync(write, Path(pending.confirm), pending.id.encode() + b"\n", 0o600)
        except OSError as err:
            log.error("release cannot be confirmed version=%s error=%s", pending.version, err)  # noqa: TRY400 - as said
            await trio.sleep(WELL_S)
        else:
            log.info("release confirmed version=%s after_s=%g", pending.version, WELL_S)
            return
