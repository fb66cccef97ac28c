"""The log monitor at work: from an append to the event on the bus, and what 200 idle logs cost. Goals: logs.md 9.3.

Beside the first stand what trio and inotify take by themselves, and rsyslog: in the same run and at the same rates,
since all of them take the longer the longer ago the last line was: the caches are another's by then.
"""

import gc
import os
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from inotify_simple import INotify, flags
from trio.abc import Instrument

from agent.core.events import LogMatched
from agent.core.inotify import open_inotify
from agent.logs.settings import LogWatch
from tests.test_logs_role import house

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]

RATES, WRITE_S, LIMIT_S = (2000, 200, 20), 10, 120.0  # lines/s, s of each, s for each
RULES = r"""
version = 1
[[rule]]
id = "tick"
regex = 'tick (?<at>\d+)'
rate = { burst = 1000000, per_s = 0 }
"""
# Each line ends in the time at which it was written.
WRITER = f"""
import sys, time
began, rate = time.monotonic(), int(sys.argv[2])
with open(sys.argv[1], "ab", buffering=0) as log:
    for n in range(rate * {WRITE_S}):
        time.sleep(max(0, began + n / rate - time.monotonic()))
        log.write(b"Jan  5 10:00:01 host12 clock[17]: tick %d\\n" % time.monotonic_ns())
"""
RSYSLOG = """
global(workDirectory="{folder}")
module(load="imfile")
template(name="text" type="string" string="%msg%\\n")
ruleset(name="told") {{
  if re_match($msg, "tick [0-9]+") then {{ action(type="ompipe" pipe="{pipe}" template="text") }}
}}
input(type="imfile" file="{log}" tag="log" ruleset="told")
"""
IDLE, SETTLE_S, IDLE_S = 200, 15.0, 30.0


async def ours(folder: Path, rate: int) -> list[float]:
    """ms from an append to its event on the bus."""
    late_ms, lines = list[float](), rate * WRITE_S
    async with house(folder, RULES) as one, trio.open_nursery() as nursery:
        one.write()
        await one.start()
        gc.freeze()  # as the service does
        with one.bus.subscribe(LogMatched) as events:
            nursery.start_soon(write, one.log, rate)
            while len(late_ms) < lines:
                late_ms.append(late((await anext(events)).captures["at"] or ""))
    gc.unfreeze()
    return late_ms


async def alone(folder: Path, rate: int) -> list[float]:
    """ms from an append to a task that is sent the line, by nothing but trio and inotify."""
    late_ms, lines, log = list[float](), rate * WRITE_S, folder / "alone.log"
    log.touch()
    send, receive = trio.open_memory_channel[bytes](lines)

    async def hear(notify: INotify) -> None:
        with log.open("rb", buffering=0) as file:
            while True:
                await trio.lowlevel.wait_readable(notify.fileno())
                os.read(notify.fileno(), 1 << 16)
                send.send_nowait(file.read())

    with open_inotify() as notify:
        assert notify
        notify.add_watch(folder, flags.MODIFY)  # type: ignore[no-untyped-call]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(hear, notify)
            nursery.start_soon(write, log, rate)
            while len(late_ms) < lines:
                late_ms += [late(line) for line in (await receive.receive()).splitlines()]
            nursery.cancel_scope.cancel()
    return late_ms


async def rsyslog(folder: Path, rate: int) -> list[float] | None:
    """ms from an append to who reads the pipe that rsyslog writes a matching line to."""
    if not (program := shutil.which("rsyslogd", path="/usr/sbin:/usr/bin")):
        return None
    log, pipe, conf = folder / "rsyslog.log", folder / "rsyslog.pipe", folder / "rsyslog.conf"
    log.touch()
    os.mkfifo(pipe)
    conf.write_text(RSYSLOG.format(folder=folder, log=log, pipe=pipe))

    def read(end: int) -> list[float]:
        late_ms: list[float] = []
        while len(late_ms) < rate * WRITE_S:
            late_ms += [late(line) for line in os.read(end, 1 << 16).splitlines()]
        return late_ms

    end = os.open(pipe, os.O_RDWR)
    try:
        async with trio.open_nursery() as nursery:
            command = [program, "-n", "-f", str(conf), "-i", str(folder / "rsyslog.pid")]
            nursery.start_soon(partial(trio.run_process, command, capture_stderr=True))
            await trio.sleep(2)  # it says nowhere that it follows the file
            nursery.start_soon(write, log, rate)
            late_ms = await trio.to_thread.run_sync(read, end, abandon_on_cancel=True)
            nursery.cancel_scope.cancel()
    finally:
        os.close(end)
    return late_ms


async def write(log: Path, rate: int) -> None:
    await trio.run_process([sys.executable, "-c", WRITER, str(log), str(rate)])


def late(line: str | bytes) -> float:
    """ms since the time that it ends with."""
    return (time.monotonic_ns() - int(line.split()[-1])) / 1e6


@pytest.mark.parametrize("rate", RATES)
async def test_from_an_append_to_the_bus(tmp_path: Path, rate: int, figure: Figure) -> None:
    for what, measure, goal in (
        (f"an append -> its event on the bus, {rate} lines/s", ours, "< 0.3 ms, < 2 ms"),
        ("the same, trio and inotify alone", alone, "-"),
        ("the same, rsyslog to a pipe", rsyslog, "-"),
    ):
        with trio.fail_after(LIMIT_S):
            late_ms = await measure(tmp_path, rate)
        if late_ms is None:
            figure(what, "not installed: packaging/deps peers", goal)
            continue
        p50, p99 = (statistics.quantiles(late_ms, n=100)[q - 1] for q in (50, 99))
        figure(what, f"p50 {p50:.2f} ms, p99 {p99:.2f} ms", goal)


class Turns(Instrument):
    """Counts how often the loop slept and woke."""

    count = 0

    def after_io_wait(self, timeout: float) -> None:  # type: ignore[explicit-override]  # typing's needs 3.12
        self.count += timeout > 0


def resident() -> int:
    """Bytes of this process in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def test_two_hundred_idle_logs(tmp_path: Path, figure: Figure) -> None:
    async with house(tmp_path, RULES) as one:
        for n in range(IDLE):
            one.write(n, name=f"{n}.log")
        before = resident()
        await one.start(LogWatch(name="all", glob=str(tmp_path / "logs/*.log")))
        await trio.sleep(SETTLE_S)  # what was found is committed, and the start's threads have ended
        turns, used = Turns(), time.process_time()
        trio.lowlevel.add_instrument(turns)
        await trio.sleep(IDLE_S)
        used = time.process_time() - used
        trio.lowlevel.remove_instrument(turns)
        grown = (resident() - before) / 2**20
    figure(
        f"{IDLE} idle logs",
        f"{used / IDLE_S:.2%} CPU, {turns.count / IDLE_S:.1f} wake-ups a second, {grown:.0f} MiB",
        "< 0.2 % CPU, one slow poll",
    )
