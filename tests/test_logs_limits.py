"""Rates count what they drop; a regex that gives up too often pauses for a while."""

from agent.logs.limits import Pauses, Rates, Suppressed
from agent.logs.messages import Rate
from agent.logs.regex import Regex
from agent.logs.scanner import LIMIT, Scanner, Worker


def test_a_burst_goes_through_and_then_a_trickle() -> None:
    rates = Rates([Rate(burst=3, per_s=2)], now=0)
    assert [rates.take(0, offset, 0) for offset in range(5)] == [0, 0, 0, None, None]
    assert rates.take(0, 5, 0.4) is None
    assert rates.take(0, 6, 0.5) == 3  # the match says how many were dropped before it
    assert rates.take(0, 7, 0.6) is None
    assert [rates.take(0, 8, 100) for _ in range(4)] == [1, 0, 0, None]


def test_no_limit_and_other_rules_are_their_own() -> None:
    rates = Rates([Rate(burst=1, per_s=1), Rate(burst=1, per_s=0)], now=0)
    assert [rates.take(0, 1, 0), rates.take(0, 2, 0)] == [0, None]
    assert [rates.take(1, n, 0) for n in range(1000)] == [0] * 1000


def test_what_was_dropped_is_told_every_ten_seconds_by_rule() -> None:
    rates = Rates([Rate(burst=1, per_s=0.01)] * 2, now=0)
    assert rates.due() is None
    for offset in range(100, 105):
        rates.take(1, offset, 1)
    rates.take(0, 7, 2)
    rates.take(0, 8, 2)
    assert rates.due() == 11
    assert rates.tell(10.9) == []
    assert rates.tell(11) == [Suppressed(0, 1, 8, 8), Suppressed(1, 4, 101, 104)]
    assert (rates.tell(30), rates.due()) == ([], None)


def test_more_may_be_dropped_at_once() -> None:
    rates = Rates([Rate(burst=1, per_s=1)], now=0)
    assert [rates.take(0, offset, 0) for offset in (1, 2)] == [0, None]
    rates.drop(0, 1000, 99)
    assert rates.take(0, 100, 5) == 1001
    assert rates.tell(10) == [Suppressed(0, 1001, 2, 99)]


def test_a_hundred_limit_errors_a_minute_pause_the_rule_on_that_file() -> None:
    pauses = Pauses(bytearray(3))
    assert [pauses.failed(1, 0.5 * n) for n in range(100)] == [False] * 99 + [True]
    assert (bytes(pauses.mask), pauses.due()) == (b"\0\1\0", 109.5)
    assert pauses.resume(109) == []
    assert pauses.resume(109.5) == [1]
    assert (bytes(pauses.mask), pauses.due()) == (b"\0\0\0", None)


def test_errors_that_are_far_between_pause_nothing() -> None:
    pauses = Pauses(bytearray(1))
    assert not any(pauses.failed(0, 0.7 * n) for n in range(1000))


def test_the_other_rules_go_on() -> None:
    worker, pauses = Worker(Scanner([Regex("(a+)+$"), Regex("a")], [[], []])), Pauses(bytearray(2))
    block = (b"a" * 3000 + b"!\n") * 120
    for match in worker.scan(block):
        if match.flags & LIMIT:
            pauses.failed(match.rule, 0)
    assert [match.rule for match in worker.scan(block, suspended=pauses.mask)] == [1] * 120
