"""How fast generic TAP is read, and what a long stream costs."""

import resource
import time
from collections.abc import Callable

import pytest

from agent.suites.runners.tap import TapDriver

pytestmark = pytest.mark.bench

Figure = Callable[[str, str, str], None]
PIPE = 65_536  # what one read of a full pipe returns
GOAL = "> 300 k lines/s"


def read(wire: bytes, lines: int) -> tuple[float, int]:
    """Lines a second, and how many events came."""
    driver, events, started = TapDriver("r1", "s1"), 0, time.perf_counter()
    for at in range(0, len(wire), PIPE):
        events += len(driver.feed("stdout", wire[at : at + PIPE], 5.0))
    return lines / (time.perf_counter() - started), events


def test_results_without_blocks(figure: Figure) -> None:
    wire = b"".join(b"ok %d - signs in as user %d\n" % (n, n) for n in range(300_000))
    speed, events = read(wire, 300_000)
    assert events == 300_000
    figure("TAP: a result a line, each with a title of its own", f"{speed / 1e3:.0f} k lines/s", GOAL)


def test_results_as_node_writes_them(figure: Figure) -> None:
    text = b"# Subtest: signs in as user %d\nok %d - signs in as user %d\n  ---\n  duration_ms: 1.5\n  ...\n"
    wire = b"".join(text % (n, n, n) for n in range(50_000))
    speed, events = read(wire, 250_000)
    assert events == 50_001  # the first was told before its block had come
    figure("TAP: results as Node writes them", f"{speed / 1e3:.0f} k lines/s", GOAL)


def test_failures_as_tape_writes_them(figure: Figure) -> None:
    block = b"  ---\n    operator: equal\n    expected: 2\n    actual: 1\n    stack: |-\n      x\n      at a\n  ...\n"
    wire = b"".join(b"not ok %d user %d\n%b" % (n, n, block) for n in range(20_000))
    speed, events = read(wire, 180_000)
    assert events == 20_000
    figure("TAP: failures as tape writes them", f"{speed / 1e3:.0f} k lines/s", "-")


def test_a_long_stream_leaves_the_memory_as_it_was(figure: Figure) -> None:
    results = b"".join(
        b"ok %d - signs in as user %d\nnot ok\n  ---\n  message: no\n  ...\n" % (n, n) for n in range(100)
    )
    block = results + b"what a program says of itself, at length\n" * 24_000
    driver, size = TapDriver("r1", "s1"), 0
    driver.feed("stdout", block, 5.0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    while size < 1_000_000_000:
        driver.feed("stdout", block, 5.0)
        size += len(block)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    figure("TAP: memory grown by a stream of 1 GB", f"{grown:.1f} MiB", "flat")
