"""Backtracking from a match: 64 MiB by reverse scan, and by the index. Goals: protocols/logs.md 9.5."""

import statistics
import time
from collections.abc import Callable

import pytest

from agent.core import toml
from agent.logs import rules
from agent.logs.context import Anchor, Anchors, Around, Ask, Place, look_back

pytestmark = pytest.mark.bench

RULE = r"""
version = 1
[[rule]]
id = "r"
regex = 'fail (?<block>blk_\d+)'
[rule.context]
until = 'begin (?<block>blk_\d+)'
same = ["block"]
lines = "same"
"""
Figure = Callable[[str, str, str], None]


def test_back_over_64_mib_and_by_index(figure: Figure) -> None:
    (rule,) = rules.from_documents([("rule", toml.parse(RULE))]).rules
    line = b"2026-01-05 08:00:00,123 INFO dfs.DataNode: begin blk_1234 of another thing, src: /10.250.19.102:54106\n"
    log = b"begin blk_4711\n" + line * ((64 << 20) // len(line) - 10)
    place, captures = Place(1, len(log)), {"block": b"blk_4711"}

    def run(index: Anchors | None) -> tuple[Around, float]:
        started = time.process_time()
        search = look_back(rule, place, captures, [index])
        try:
            wish = next(search)
            while True:
                wish = search.send(log[wish.start : wish.start + wish.size] if isinstance(wish, Ask) else None)
        except StopIteration as end:
            return end.value, time.process_time() - started

    search_s = []
    for _ in range(5):
        around, seconds = run(None)
        assert around.found
        search_s.append(seconds)
    figure("context: anchor and lines 64 MiB behind a match", f"{statistics.median(search_s) * 1e3:.0f} ms", "< 50 ms")

    index = Anchors(["block"], Place(1, 0))
    near = Anchor(Place(1, len(log) - len(line)), b"begin blk_4711", {"block": b"blk_4711"})
    for n in range(4000):
        index.add(Anchor(Place(1, n), b"begin", {"block": b"blk_%d" % n}))
    index.add(near)
    index_s = [run(index)[1] for _ in range(201)]
    figure("context: by index", f"{statistics.median(index_s) * 1e6:.0f} us", "< 20 us")
