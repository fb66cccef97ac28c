"""Ticks on a grid, one line, caps, backoff, and what a reload changes."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.monitors.schedule import FIRST_WITHIN_S, MAX_BACKOFF_S, Schedule, Skipped
from agent.monitors.settings import Monitor
from tests.monitor_transcripts import monitor

START = 1_795_294_381.0


def arranged(*monitors: Monitor, most: int = 8, groups: dict[str, int] | None = None, now: float = START) -> Schedule:
    schedule = Schedule("lab-07", most=most, groups=groups or {})
    assert schedule.arrange({each.id: each for each in monitors}, now) == []
    return schedule


def begun(schedule: Schedule) -> list[str]:
    names = []
    while begin := schedule.begin():
        names.append(begin[0])
    return names


@given(st.integers(1, 7 * 86_400), st.floats(1e9, 2e9))
def test_the_first_run_comes_soon_and_the_grid_follows(interval: int, now: float) -> None:
    schedule = arranged(monitor(interval=float(interval)), now=now)
    first = schedule.next_at()
    assert now <= first <= now + min(interval, FIRST_WITHIN_S)
    schedule.tick(first)
    assert begun(schedule) == ["web"]
    second = schedule.next_at()
    assert first < second <= first + interval
    schedule.end("web", has_result=True, now=first)
    schedule.tick(second)
    assert schedule.next_at() - second == pytest.approx(interval, abs=1e-3)


def test_the_grid_is_the_same_after_a_restart_and_another_for_each_monitor() -> None:
    def grid(name: str, machine: str = "lab-07") -> float:
        schedule = Schedule(machine, most=1, groups={})
        schedule.arrange({name: monitor(id=name, interval=600.0)}, START)
        schedule.tick(START + 40)
        return schedule.next_at()

    assert grid("web") == grid("web")
    assert len({grid("web"), grid("db"), grid("web", "lab-08")}) == 3


def test_missed_ticks_become_one_run() -> None:
    schedule = arranged(monitor(interval=10.0))
    schedule.tick(START + 3600)
    assert begun(schedule) == ["web"]


def test_a_tick_during_the_run_is_skipped_and_told_with_its_end() -> None:
    schedule = arranged(monitor(interval=10.0))
    schedule.tick(START + 10)
    assert begun(schedule) == ["web"]
    for n in range(2, 5):
        schedule.tick(START + 10 * n)
    assert schedule.describe("web")["skipped"] == {"overlap": 3}
    assert schedule.end("web", has_result=True, now=START + 45) == [Skipped("web", "overlap", 3)]
    schedule.tick(START + 60)
    assert begun(schedule) == ["web"]


def test_runs_without_a_result_are_given_a_rest() -> None:
    schedule = arranged(monitor(interval=1.0))
    now, rests = START + 1, []
    for _ in range(12):
        schedule.tick(now)
        assert begun(schedule) == ["web"]
        schedule.end("web", has_result=False, now=now)
        until = schedule.describe("web")["backoff_until"]
        assert isinstance(until, float)
        rests.append(until - now)
        schedule.tick(until - 0.5)
        assert begun(schedule) == []
        now = until + 1
    assert rests == [2.0**n for n in range(1, 10)] + [MAX_BACKOFF_S] * 3
    for _ in range(1100):  # eleven days
        schedule.run_now("web")
        assert begun(schedule) == ["web"]
        schedule.end("web", has_result=False, now=now)
    schedule.tick(now + 10)
    now += MAX_BACKOFF_S
    schedule.tick(now)
    begin = schedule.begin()
    assert begin is not None
    assert begin[1] == [Skipped("web", "backoff", 1)]
    schedule.end("web", has_result=True, now=now)
    assert schedule.describe("web")["backoff_until"] is None


def test_slots_are_given_in_turn_and_a_full_group_is_passed_by() -> None:
    names: list[dict[str, Any]] = [{"id": "a1", "group": "a"}, {"id": "a2", "group": "a"}, {"id": "b"}, {"id": "c"}]
    schedule = arranged(*(monitor(**name) for name in names), most=2, groups={"a": 1})
    for name in names:
        assert schedule.run_now(name["id"])
    assert begun(schedule) == ["a1", "b"]
    schedule.end("b", has_result=True, now=START)
    assert begun(schedule) == ["c"]
    schedule.end("a1", has_result=True, now=START)
    assert begun(schedule) == ["a2"]


def test_run_now_leaves_the_grid_alone_and_starts_nothing_twice() -> None:
    schedule = arranged(monitor(interval=600.0))
    tick = schedule.next_at()
    assert schedule.run_now("web")
    assert not schedule.run_now("web")
    assert begun(schedule) == ["web"]
    assert not schedule.run_now("web")
    assert schedule.next_at() == tick
    with pytest.raises(KeyError):
        schedule.run_now("none")


def test_a_reload_leaves_the_same_ones_alone() -> None:
    same, changed, gone = monitor(id="same"), monitor(id="changed"), monitor(id="gone")
    schedule = arranged(same, changed, gone)
    before = {name: schedule.describe(name)["next"] for name in ("same", "changed")}
    schedule.run_now("gone")
    other, slower = monitor(id="changed", timeout=3.0), monitor(id="new")
    assert schedule.arrange({"same": same, "changed": other, "new": slower}, START + 1) == ["gone"]
    assert begun(schedule) == []
    assert {name: schedule.describe(name)["next"] for name in ("same", "changed")} == before
    assert schedule.monitor("changed") == other
    assert "gone" not in schedule


def test_a_clock_that_is_set_back_does_not_stop_the_ticks() -> None:
    schedule = arranged(monitor(interval=60.0))
    schedule.tick(START + 60)
    begun(schedule)
    schedule.end("web", has_result=False, now=START + 60)
    schedule.tick(START - 86_400)
    assert schedule.next_at() <= START - 86_400 + 60
    until = schedule.describe("web")["backoff_until"]
    assert isinstance(until, float)
    assert until <= START - 86_400 + MAX_BACKOFF_S
