"""The log monitor at work: from an append to the event on the bus, and what 200 idle logs cost. Goals: logs.md 9.3."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trio
from trio.abc import Instrument

from agent.core.events import LogMatched
from agent.logs.settings import LogWatch
from tests.test_logs_role import house

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]

RATE, LINES, LIMIT_S = 200, 2000, 120.0
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
began = time.monotonic()
with open(sys.argv[1], "ab", buffering=0) as log:
    for n in range({LINES}):
        time.sleep(max(0, began + n / {RATE} - time.monotonic()))
        log.write(b"Jan  5 10:00:01 host12 clock[17]: tick %d\\n" % time.monotonic_ns())
"""
IDLE, SETTLE_S, IDLE_S = 200, 15.0, 30.0


async def test_from_an_append_to_the_bus(tmp_path: Path, figure: Figure) -> None:
    late_ms: list[float] = []
    async with house(tmp_path, RULES) as one, trio.open_nursery() as nursery:
        one.write()
        await one.start()
        gc.freeze()  # as the service does
        with one.bus.subscribe(LogMatched) as events, trio.fail_after(LIMIT_S):
            nursery.start_soon(partial(trio.run_process, [sys.executable, "-c", WRITER, str(one.log)]))
            for _ in range(LINES):
                event = await anext(events)
                late_ms.append((time.monotonic_ns() - int(event.captures["at"] or 0)) / 1e6)
    gc.unfreeze()
    p50, p99 = (statistics.quantiles(late_ms, n=100)[q - 1] for q in (50, 99))
    figure(
        f"an append -> its event on the bus, {RATE} lines/s", f"p50 {p50:.2f} ms, p99 {p99:.2f} ms", "< 0.3 ms, < 2 ms"
    )


class Turns(Instrument):
    """Counts how often the loop slept and woke."""

    count = 0

    def after_io_wait(self, timeout: float) -> None:  # type: ignore[explicit-override]  # typing's needs 3.12
        self.count += timeout > 0


async def test_two_hundred_idle_logs(tmp_path: Path, figure: Figure) -> None:
    async with house(tmp_path, RULES) as one:
        for n in range(IDLE):
            one.write(n, name=f"{n}.log")
        await one.start(LogWatch(name="all", glob=str(tmp_path / "logs/*.log")))
        await trio.sleep(SETTLE_S)  # what was found is committed, and the start's threads have ended
        turns, used = Turns(), time.process_time()
        trio.lowlevel.add_instrument(turns)
        await trio.sleep(IDLE_S)
        used = time.process_time() - used
        trio.lowlevel.remove_instrument(turns)
    figure(
        f"{IDLE} idle logs",
        f"{used / IDLE_S:.2%} CPU, {turns.count / IDLE_S:.1f} wake-ups a second",
        "< 0.2 % CPU, one slow poll",
    )
