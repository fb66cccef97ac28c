"""Where records come from: a `journalctl` that follows the journal, and /dev/kmsg.

    read the last records -> follow from the checkpoint -> it ends, or cannot be read: an Alert, again after 1 to 30 s

Source: protocols/logs.md 5, "Journal and kernel".
"""

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NoReturn

import trio

from agent.core.bus import Bus
from agent.core.errors import AgentError, PeerBrokeProtocol, PeerUnreachable, unwrap
from agent.core.events import Alert, AlertCleared
from agent.core.process import Child, Exit, Spec, drain, environ, open_child
from agent.logs.journal import Entry, JournalReader, kernel_record
from agent.logs.matched import shown
from agent.logs.records import Reached, Record, Records
from agent.logs.tail import RETRY_MAX_S, RETRY_S
from agent.logs.watches import JOURNAL, KERNEL

log = logging.getLogger(__name__)

KMSG = "/dev/kmsg"
BOOT_ID = "/proc/sys/kernel/random/boot_id"
RECORD_MAX = 1 << 14  # bytes; the kernel's own limit is 8 KiB
RING = 1 << 16  # records of the kernel that are read at once: all it has, mostly
BATCH = 256  # of these that are matched together
LAST = 500  # entries that are read again at the start, for what stands before the next match
LAST_S = 60.0  # s that reading them may take
GOOD_S = 10.0  # a journalctl that has run for so long can read the journal
REMEDY = {
    JOURNAL: "Install systemd's journalctl, or take the watch out; the group systemd-journal may read all of it.",
    KERNEL: "Run the agent as root, or with CAP_SYSLOG; or take the watch out.",
}


async def follow(records: Records, name: str, bus: Bus, clock: Callable[[], float] = time.time) -> NoReturn:
    """Have the records of `records.path` matched, JOURNAL or KERNEL, until cancelled. `name` is that of the watch.

    What fails is begun again, with an Alert "logs.watch.NAME" meanwhile.
    """
    once = _journal if records.path == JOURNAL else _kernel
    outage = _Outage(records, f"logs.watch.{name}", bus, clock)
    try:
        while True:
            try:
                await once(records, outage)
            except* (AgentError, OSError) as group:
                await outage.wait(unwrap(group))
    finally:
        outage.end()  # nobody is to look at what is watched no longer


class _Outage:
    """The time in which a log cannot be read: told once, and once that it is over."""

    def __init__(self, records: Records, code: str, bus: Bus, clock: Callable[[], float]) -> None:
        self._records, self._code, self._bus, self._clock = records, code, bus, clock
        self._wait_s = 0.0

    async def wait(self, why: BaseException) -> None:
        """It failed."""
        self._records.state = "ERROR"
        if not self._wait_s:
            what = why.what if isinstance(why, AgentError) else str(why)
            text = f"{self._records.path} cannot be followed: {what}"
            log.error("%s", text)
            self._records.tell("unreadable", what)
            self._bus.publish(Alert(code=self._code, text=text, remedy=REMEDY[self._records.path], since=self._clock()))
        self._wait_s = min(RETRY_MAX_S, 2 * self._wait_s) if self._wait_s else RETRY_S
        await trio.sleep(self._wait_s)

    def over(self) -> None:
        """It works."""
        if self._wait_s:
            self.end()
            self._records.state = "IDLE"
            self._records.tell("recovered")
            log.info("followed again path=%s", self._records.path)

    def end(self) -> None:
        """Take the Alert back."""
        if self._wait_s:
            self._wait_s = 0.0
            self._bus.publish(AlertCleared(code=self._code))


# ---- the journal -----------------------------------------------------------------------------------------------------


async def _journal(records: Records, outage: _Outage) -> NoReturn:
    """Run journalctl to its end. Raises PeerUnreachable, PeerBrokeProtocol, ChildFailedToStart."""
    if not records.is_begun:
        await _look_at_the_last(records)
    reached = records.reached
    behind = [f"--after-cursor={reached.cursor}"] if reached and reached.cursor else []
    async with _journalctl(["--follow", "--no-tail", *behind]) as (child, said), trio.open_nursery() as nursery:

        async def call_it_good() -> None:
            await trio.sleep(GOOD_S)
            outage.over()

        nursery.start_soon(call_it_good)
        await _feed(child, records, outage)
        exit_ = await child.finish()
        nursery.cancel_scope.cancel()
    raise _ended(exit_, said)


async def _feed(child: Child, records: Records, outage: _Outage) -> None:
    reader = JournalReader()
    while chunk := await child.streams["stdout"].receive_some():
        await records.room()
        if entries := reader.feed(chunk):
            outage.over()
            await records.take(list(map(_of_entry, entries)))
        if reader.broken:
            raise reader.broken


async def _look_at_the_last(records: Records) -> None:
    """Remember the last entries that were matched; at the first start of all, those there are, and begin behind them.

    Raises PeerUnreachable, PeerBrokeProtocol, ChildFailedToStart.
    """
    reached, reader, last = records.reached, JournalReader(), list[Entry]()
    if not (reached and not reached.cursor):  # else it was empty when it was looked at first
        at = [f"--cursor={reached.cursor}"] if reached else []
        with trio.move_on_after(LAST_S) as scope:
            async with _journalctl(["--reverse", f"--lines={LAST}", *at]) as (child, said):
                await drain(child.streams["stdout"], lambda data: last.extend(reader.feed(data)))
                exit_ = await child.finish()
            if exit_.code != 0:
                raise _ended(exit_, said)
        if scope.cancelled_caught:
            raise PeerUnreachable(f"journalctl did not end within {LAST_S:.0f} s", remedy="It is started again.")
        if reader.broken:
            raise reader.broken
    records.remember(map(_of_entry, reversed(last)), is_whole=len(last) < LAST)
    newest = last[0] if last else Entry("", b"", {})
    if reached and reached.cursor and reached.cursor != newest.cursor:
        records.lose(reached.offset + 1, None, "the journal has no longer what was read last")
    records.begin(reached or Reached(generation=1, cursor=newest.cursor, offset=newest.sequence))


def _ended(exit_: Exit, said: Sequence[str]) -> PeerUnreachable:
    how = exit_.signal or f"exit code {exit_.code}"
    return PeerUnreachable(f"journalctl ended by {how}{': ' if said else ''}{''.join(said)}", remedy="It starts again.")


def _of_entry(entry: Entry) -> Record:
    return Record(entry.cursor, entry.sequence, entry.message, entry.fields)


@asynccontextmanager
async def _journalctl(options: Sequence[str]) -> AsyncIterator[tuple[Child, list[str]]]:
    """Run it; beside it the last line that it wrote to standard error, if any."""
    said: list[str] = []

    def hear(data: bytes) -> None:
        for line in shown(data[-1000:]).splitlines():
            log.warning("journalctl: %s", line)
            said[:] = [line]

    argv = ("journalctl", "--output=export", *options)
    mark = f"logs-{os.urandom(4).hex()}"  # of its own: two watches may have one each
    spec = Spec(argv=argv, cwd=Path("/"), env=environ(os.environ), mark=mark)
    async with open_child(spec) as child, trio.open_nursery() as nursery:
        nursery.start_soon(drain, child.streams["stderr"], hear)
        yield child, said
        nursery.cancel_scope.cancel()


# ---- the kernel ------------------------------------------------------------------------------------------------------


async def _kernel(records: Records, outage: _Outage) -> NoReturn:
    """Read /dev/kmsg, which gives all that the kernel has, and then what comes. Raises OSError, PeerUnreachable."""
    boot = _boot_id()
    fd = os.open(KMSG, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY)
    try:
        new = _what_is_new(_read(fd, boot), records, boot)
        while True:
            outage.over()
            for start in range(0, len(new), BATCH):
                await records.room()
                _tell_gaps(new[start : start + BATCH], records)
                await records.take(new[start : start + BATCH])
                await trio.lowlevel.checkpoint()
            await trio.lowlevel.wait_readable(fd)
            new = _read(fd, boot)
    finally:
        os.close(fd)


def _boot_id() -> str:
    return Path(BOOT_ID).read_text().strip()


def _what_is_new(there: list[Record], records: Records, boot: str) -> list[Record]:
    """Of the records that are there now, those to match. At the first start none is; after a boot all are."""
    known = records.reached
    if known is None:
        done, last = len(there), there[-1].offset if there else -1
        reached = Reached(generation=1, cursor=f"{boot}:{last}", offset=last)
    elif known.cursor.startswith(f"{boot}:"):
        done, reached = sum(record.offset <= known.offset for record in there), known
    else:
        done, reached = 0, Reached(generation=known.generation + 1, cursor=f"{boot}:-1", offset=-1)
    if not records.is_begun:
        records.remember(there[:done], is_whole=bool(there) and there[0].offset == 0)
    records.begin(reached)
    return there[done:]


def _tell_gaps(new: Sequence[Record], records: Records) -> None:
    assert records.reached
    expected = records.reached.offset + 1
    for record in new:
        if record.offset > expected:
            records.lose(expected, record.offset, "overwritten before they were read")
        expected = record.offset + 1


def _read(fd: int, boot: str) -> list[Record]:
    """The records that can be read at once, at most RING."""
    found: list[Record] = []
    while len(found) < RING:
        try:
            data = os.read(fd, RECORD_MAX)
        except BlockingIOError:
            break
        except BrokenPipeError:  # some were overwritten; their numbers are missing in the next
            continue
        if not data:
            raise PeerUnreachable(f"{KMSG} is at its end", remedy="It is opened again.")
        try:
            record = kernel_record(data)
        except PeerBrokeProtocol as err:
            log.warning("%s", err)
            continue
        found.append(Record(f"{boot}:{record.sequence}", record.sequence, record.message, record.fields))
    return found
