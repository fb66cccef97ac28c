"""The orchestrator: what 500 monitors cost, how exact their starts are, what a measured step has too much."""

import os
import re
import shutil
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import trio

from agent.core.events import MonitorStep
from agent.monitors import schedule
from tests.bench.test_bench_dist import ready, settings
from tests.monitors_house import ID, house, monitor, program

pytestmark = pytest.mark.bench
Figure = Callable[[str, str, str], None]

# It does nothing, and takes no time for that: what is measured is ours.
NOTHING = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>
static char said[100000];
static void take(char *to, int size) {
    for (int n = 0, got; n < size; n += got) if ((got = read(0, to + n, size - n)) <= 0) exit(1);
}
static void say(const char *text) {
    char head[8];
    snprintf(head, sizeof head, "%05d ", (int)strlen(text));
    if (write(1, head, 6) != 6 || write(1, text, strlen(text)) < 0) exit(1);
}
static void hear(void) {
    char head[7] = {0};
    take(head, 6);
    int size = atoi(head);
    take(said, size);
    said[size] = 0;
}
int main(void) {
    say("Started 1.1"); hear(); say("Ready"); hear(); say("Configured");
    for (hear(); strncmp(said, "Exit", 4); hear()) say("Step OK");
    return 0;
}
"""


@pytest.fixture
def nothing(tmp_path: Path) -> tuple[str, ...]:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler")
    source = tmp_path / "nothing.c"
    source.write_text(NOTHING)
    subprocess.run(["cc", "-O2", "-o", tmp_path / "nothing", source], check=True)
    return (str(tmp_path / "nothing"),)


async def test_five_hundred_monitors(figure: Figure, nothing: tuple[str, ...], tmp_path: Path) -> None:
    """In an agent of its own: what it costs to start a process depends on how large the one is that does it."""
    seconds, many = 60.0, 500
    one = '[[monitors.monitor]]\nid = "{id}-{n}"\ncommand = ["{nothing}"]\nsteps = ["A", "B", "C"]\ninterval = 60\n'
    each = "".join(one.format(id=ID, n=n, nothing=nothing[0]) for n in range(many))
    config = settings(tmp_path, f"[monitors]\nmax_concurrent = 64\n{each}")
    with ready(Path(sys.executable).with_name("agent"), config) as (pid, _):
        await trio.sleep(33)  # the first runs come within 30 s, as after every start
        clock = (
            ~pid << 3
        ) | 2  # a process's own processor time, also of threads that have ended: clock_getcpuclockid(3)
        cpu, began = time.clock_gettime(clock), time.time()
        await trio.sleep(seconds)
        cpu, ended = time.clock_gettime(clock) - cpu, time.time()
        status = await trio.Path(f"/proc/{pid}/status").read_text()
    (rss,) = re.findall(r"VmRSS:\s+(\d+) kB", status)
    with closing(sqlite3.connect(tmp_path / "state/store.db")) as db:
        rows = db.execute(
            "SELECT data FROM journal WHERE kind = 'MonitorStep' AND at BETWEEN ? AND ?", (began, ended)
        ).fetchall()
    steps = [step for (data,) in rows if (step := msgspec.json.decode(data, type=MonitorStep)).state == "ok"]
    runs = len({step.run for step in steps})
    assert runs > many * (seconds - 10) / 60
    late = sorted(_late_s(step.started_at or 0.0, step.monitor) for step in steps if step.step == "A")
    times = sorted(step.ms or 0.0 for step in steps)
    took = ended - began
    figure(
        f"500 monitors at 60 s, 3 steps ({runs} runs in {took:.0f} s)", f"{100 * cpu / took:.1f} % of a core", "< 5 %"
    )
    figure("the same, CPU of a run beside the monitor's", f"{1000 * cpu / runs:.1f} ms", "")
    figure("the same, first step after its tick, p50 / p99", f"{_ms(late, 0.5)} / {_ms(late, 0.99)}", "< 50 ms p99")
    figure("the same, RSS", f"{int(rss) / 1024:.0f} MiB", "< 60 MiB")
    figure(
        "a step that does nothing, p50 / p99",
        f"{times[len(times) // 2]:.2f} / {times[-len(times) // 100]:.2f} ms",
        "< 1 ms p99",
    )


def _late_s(started: float, name: str) -> float:
    """How long after a tick of its grid."""
    offset = 60 * schedule._share(f"idle-{os.getpid()}", name)
    return (started - offset) % 60


def _ms(values: list[float], q: float) -> str:
    return f"{1000 * values[min(len(values) - 1, int(len(values) * q))]:.0f} ms"


async def test_a_death_before_started(figure: Figure, tmp_path: Path) -> None:
    delays = []
    async with house(tmp_path, monitor(("/bin/false",))) as here:
        for _ in range(20):
            began = time.monotonic()
            await here.run_once()
            delays.append(time.monotonic() - began)
    figure(
        "a monitor that dies before Started, order to report, worst of 20", f"{1000 * max(delays):.0f} ms", "< 100 ms"
    )


async def test_the_library_adds_little(figure: Figure, tmp_path: Path) -> None:
    body = "shake()\nwhile hear().startswith('Run'): say('Step OK')"
    async with house(tmp_path, monitor(program(tmp_path, body), steps=("A",) * 500)) as here:
        steps = await here.run_once()
    times = sorted(step.ms or 0.0 for step in steps)
    what = f"a step in Python {sys.version_info.major}.{sys.version_info.minor} that does nothing, p50 / p99"
    figure(what, f"{times[250]:.2f} / {times[495]:.2f} ms", "< 1 ms p99")
