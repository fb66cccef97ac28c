"""Counts and percentiles of a monitor's steps."""

import math

import msgspec

from agent.monitors.history import KEPT, RESERVED, History, percentile


def test_percentiles_are_nearest_ranks() -> None:
    assert percentile([], 0.5) is None
    assert [percentile([4.0, 1.0, 3.0, 2.0], q) for q in (0.0, 0.5, 0.95, 1.0)] == [1.0, 2.0, 4.0, 4.0]


def test_a_step_has_its_counts_its_last_end_and_its_last_times() -> None:
    history = History(runs=3)
    for n in range(KEPT + 10):
        history.add("Ping", "ok", 100.0 + n, float(n))
    history.add("Ping", "timeout", 500.0, None)
    [step] = history.describe().values()
    assert step["states"] == {"ok": KEPT + 10, "timeout": 1}
    assert (step["last"], step["at"], step["ms"]) == ("timeout", 500.0, KEPT + 9.0)
    assert len(history.steps["Ping"].ms) == KEPT
    assert history.seconds("Ping", 1.0) == (KEPT + 9) / 1000
    assert math.isnan(history.seconds("none", 0.5))
    assert msgspec.json.decode(msgspec.json.encode(history), type=History) == history


def test_a_number_is_given_once_whoever_dies() -> None:
    history = History()
    assert [history.number() for _ in range(3)] == [(1, True), (2, False), (3, False)]
    kept = msgspec.json.decode(msgspec.json.encode(History(runs=1, reserved=history.reserved)), type=History)
    kept.resume()
    assert kept.number() == (RESERVED + 2, True)
    history.settle()
    history.resume()
    assert history.number() == (4, True)
