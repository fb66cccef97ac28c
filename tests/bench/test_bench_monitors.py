"""The orchestrator: what 500 monitors cost, how exact their starts are, what a measured step has too much."""

import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from agent.monitors import schedule
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
    seconds = 60.0
    many = [monitor(nothing, id=f"{ID}-{n}", steps=("A", "B", "C"), interval=60.0) for n in range(500)]
    async with house(tmp_path, *many, max_concurrent=64) as here:
        await trio.sleep(31)  # the first runs come within 30 s, as after every start
        here.events.clear()
        cpu, began = time.process_time(), time.time()
        await trio.sleep(seconds)
        cpu, took = time.process_time() - cpu, time.time() - began
        steps = [step for step in here.steps() if step.state == "ok"]
        runs = len(here.runs())
        late = sorted(_late_s(step.started_at or 0.0, step.monitor) for step in steps if step.step == "A")
        times = sorted(step.ms or 0.0 for step in steps)
    rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    figure(
        f"500 monitors at 60 s, 3 steps ({runs} runs in {took:.0f} s)", f"{100 * cpu / took:.1f} % of a core", "< 5 %"
    )
    figure("the same, CPU of a run beside the monitor's", f"{1000 * cpu / runs:.1f} ms", "")
    figure("the same, first step after its tick, p50 / p99", f"{_ms(late, 0.5)} / {_ms(late, 0.99)}", "< 50 ms p99")
    figure("the same, RSS", f"{rss:.0f} MiB", "< 60 MiB")
    figure(
        "a step that does nothing, p50 / p99",
        f"{times[len(times) // 2]:.2f} / {times[-len(times) // 100]:.2f} ms",
        "< 1 ms p99",
    )


def _late_s(started: float, name: str) -> float:
    """How long after a tick of its grid."""
    offset = 60 * schedule._share("lab-07", name)
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
