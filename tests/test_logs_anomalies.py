"""Novelty and rates: what is told, what is not, and how much is remembered."""

import random
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logs.anomalies import (
    LEAST,
    TRACKED,
    WARM_LINES,
    WARM_WINDOWS,
    WINDOW_S,
    Jump,
    KeptRates,
    Rates,
    Tokens,
    Warmth,
)

Counts = Callable[[random.Random, int], int]


def jumps(counts: Counts, windows: int = 200) -> list[tuple[int, str]]:
    """The windows in which a template jumped."""
    rng, rates, found = random.Random(1), Rates(0.0), list[tuple[int, str]]()
    for window in range(windows):
        for part in [counts(rng, window)]:
            found += [(window, jump.what) for jump in rates.see("log", [7] * part, 1)]
        found += [(window, jump.what) for jump in rates.tick((window + 1) * WINDOW_S)]
    return found


def about(rng: random.Random, mean: float) -> int:
    return sum(rng.random() < mean / 1000 for _ in range(1000))


@pytest.mark.parametrize("mean", [1, 5, 30, 300])
def test_a_steady_rate_does_not_jump(mean: int) -> None:
    assert jumps(lambda rng, window: about(rng, mean)) == []


def test_bursts_that_are_usual_do_not_jump() -> None:
    assert jumps(lambda rng, window: about(rng, 5) + (200 if rng.random() < 0.1 else 0)) == []


@pytest.mark.parametrize("mean", [1, 5, 30])
def test_a_rise_is_told_once(mean: int) -> None:
    assert jumps(lambda rng, window: about(rng, mean if window < 100 else mean * 25)) == [(100, "rose")]


def test_a_template_that_no_longer_comes_is_told_once() -> None:
    assert jumps(lambda rng, window: about(rng, 40) if window < 100 else 0) == [(100, "fell")]


def test_a_spike_is_told_again_when_all_was_usual_in_between() -> None:
    assert jumps(lambda rng, window: 500 if window in (60, 61, 160) else about(rng, 5)) == [(60, "rose"), (160, "rose")]


def test_nothing_is_told_before_a_template_is_known() -> None:
    assert jumps(lambda rng, window: 1000 if window == WARM_WINDOWS - 1 else 1, WARM_WINDOWS) == []


def test_windows_with_late_lines_do_not_count() -> None:
    rates = Rates(0.0)
    for window in range(WARM_WINDOWS + 1):
        rates.see("log", [1] * 50, 1)
        rates.tick((window + 1) * WINDOW_S)
    rates.late("log")
    assert rates.tick((WARM_WINDOWS + 2) * WINDOW_S) == []
    fell = rates.tick((WARM_WINDOWS + 3) * WINDOW_S)
    assert fell == [Jump("log", 1, "fell", 0, 50.0)]


def test_a_template_that_took_in_others_begins_anew() -> None:
    rates = Rates(0.0)
    for window in range(WARM_WINDOWS + 1):
        rates.see("log", [1], 1)
        rates.tick((window + 1) * WINDOW_S)
    rates.restart({1})
    assert rates.see("log", [1] * 1000, 1) == []


def test_sampled_lines_stand_for_those_left_out() -> None:
    rates = Rates(0.0)
    for window in range(WARM_WINDOWS + 1):
        rates.see("log", [1] * 100, 1)
        rates.tick((window + 1) * WINDOW_S)
    assert rates.see("log", [1] * 20, 5) == []
    assert rates.see("log", [1] * 180, 5) == [Jump("log", 1, "rose", 1000, 100.0)]


def test_rates_go_on_after_a_restart_but_for_what_was_written_meanwhile() -> None:
    first = Rates(0.0)
    for window in range(WARM_WINDOWS):
        first.see("log", [1] * 50 + [2], 1)
        first.see("other", [3] * 50, 1)
        first.tick((window + 1) * WINDOW_S)
    kept = msgspec.json.decode(msgspec.json.encode(first.kept()), type=KeptRates)
    assert [(kept.logs[one.log], one.template, one.mean) for one in kept.rates] == [
        *(("log", 1, 50.0), ("log", 2, 1.0), ("other", 3, 50.0)),
    ]
    second = Rates(0.0)
    second.resume(kept, lambda template: template != 3)
    assert second.see("log", [1] * 3000, 1) == []  # of an hour
    assert second.tick(WINDOW_S) == []
    assert second.see("log", [1] * 300 + [3] * 3000, 1) == [Jump("log", 1, "rose", 300, 50.0)]
    assert second.tick(2 * WINDOW_S) == []
    assert second.kept().rates[-1] == (0, 3, 3000.0, 0.0, 1, False)


def test_only_so_many_rates_are_remembered() -> None:
    rates = Rates(0.0)
    for window in range(WARM_WINDOWS + 1):
        rates.see("log", [0], 1)
        rates.tick((window + 1) * WINDOW_S)
    rates.see("log", range(1, TRACKED + 1), 1)
    assert rates.see("log", [0] * (LEAST + 1), 1) == []


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 500), st.floats(0, 200)), max_size=60))
def test_any_counts_are_taken(steps: list[tuple[int, int, float]]) -> None:
    rates, now = Rates(0.0), 0.0
    for template, count, wait in steps:
        now += wait
        for jump in [*rates.see("log", [template] * count, 1 + template), *rates.tick(now)]:
            assert jump.what in ("rose", "fell")
            assert (jump.lines > jump.mean) == (jump.what == "rose")


def test_a_log_is_warm_after_many_lines_of_few_templates() -> None:
    warmth, was_warm = Warmth(), []
    for lines, new in ((WARM_LINES - 1, 40), (1000, 0), (500, 400)):
        warmth.see(lines, new)
        was_warm.append(warmth.is_warm)
    assert was_warm == [False, True, False]


def test_tokens() -> None:
    tokens = Tokens(2, 10.0, 0.0)
    assert [tokens.take(0.0) for _ in range(4)] == [0, 0, None, None]
    assert tokens.take(10.0) == 2
    assert tokens.take(11.0) is None
