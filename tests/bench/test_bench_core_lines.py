"""How fast a runner's pipe is cut into lines."""

import time
from collections.abc import Callable

import pytest

from agent.core.engine import native_engine
from agent.core.lines import Lines

pytestmark = pytest.mark.bench

PIPE = 65_536  # what one read of a full pipe returns


def test_short_lines(figure: Callable[[str, str, str], None]) -> None:
    wire = b"".join(b"ok %d - signs in as user %d\n" % (n, n) for n in range(1_000_000))
    lines, found, started = Lines(limit=1 << 20), 0, time.perf_counter()
    for at in range(0, len(wire), PIPE):
        found += len(lines.feed(wire[at : at + PIPE]))
    seconds = time.perf_counter() - started
    assert found == 1_000_000
    figure(
        f"lines cut from a runner's pipe ({native_engine()})", f"{found / seconds / 1e6:.1f} M lines/s", "> 2 M lines/s"
    )
