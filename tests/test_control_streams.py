"""Event streams without a network: who gets what, how it is cut, what a full queue costs."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.control.messages import Filter, Policy, Subscribe
from agent.control.streams import (
    MAX_BYTES,
    MAX_EVENT,
    MAX_EVENTS,
    QUEUE_BYTES,
    QUEUE_EVENTS,
    Feed,
    Subscription,
    Topic,
    message,
    replayed,
    topic_of,
)
from agent.core.events import Recorded


def event(seq: int, kind: str = "Logged", run: str | None = None, test: str | None = None, **data: Any) -> Recorded:
    return Recorded(seq=seq, at=1.5, kind=kind, run=run, test=test, data=msgspec.Raw(msgspec.json.encode(data)))


def subscribed(feed: Feed, topic: Topic, number: int = 1, policy: Policy = "drop_oldest") -> Subscription:
    subscription = Subscription(number, topic, policy, lambda: None)
    feed.attach(subscription)
    return subscription


def taken(subscription: Subscription) -> list[list[dict[str, Any]]]:
    """The events of each message that waits."""
    messages = []
    while (text := subscription.take()) is not None:
        told = msgspec.json.decode(text)["payload"]
        assert told["sub"] == subscription.number
        messages.append(told["events"])
    return messages


def numbers(events: list[dict[str, Any]]) -> list[Any]:
    """Each event's number, or a gap's two."""
    return [(e["data"]["from"], e["data"]["to"]) if e["kind"] == "Gap" else e["seq"] for e in events]


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        (Subscribe(), [1, 2, 3, 4, 5, 6, 7]),
        (Subscribe(kinds=("Test*",)), [2, 3]),
        (Subscribe(kinds=("Alert", "FileChange?")), [1, 4, 6]),
        (Subscribe(filter=Filter(run="r-9")), [2, 3]),
        (Subscribe(filter=Filter(test="r-9:b")), [3]),
        (Subscribe(kinds=("Test*",), filter=Filter(run="r-8")), []),
        (Subscribe(filter=Filter(path="/etc/rhsm")), [4]),
        (Subscribe(filter=Filter(path="/etc/rhsm/rhsm.conf")), [4]),
        (Subscribe(filter=Filter(path="/etc/rhs")), []),
        (Subscribe(filter=Filter(path="/etc/old")), [6]),
        (Subscribe(filter=Filter(path="/var/log/b")), [7]),
    ],
)
def test_a_topic_wants_kinds_runs_tests_and_paths(asked: Subscribe, wanted: list[int]) -> None:
    moved: dict[str, Any] = {"from": "/etc/old/a"}
    unread: dict[str, Any] = {"from": 7}
    events = [
        event(1, "Alert", code="x"),
        event(2, "TestStarted", "r-9", "r-9:a"),
        event(3, "TestFinished", "r-9", "r-9:b"),
        event(4, "FileChanged", path="/etc/rhsm/rhsm.conf"),
        event(5, "LogMatched", path=7),
        event(6, "FileChanged", path="/etc/new", **moved),
        event(7, "LogGap", path="/var/log/b", **unread),
    ]
    assert [e.seq for e in events if topic_of(asked).wants(e)] == wanted


def test_an_event_is_shown_as_the_journal_has_it() -> None:
    feed = Feed(0)
    subscription = subscribed(feed, Topic())
    feed.publish([event(1, "TestStarted", "r-9", "r-9:a", case="a"), event(2, code="x")])
    assert taken(subscription) == [
        [
            {"seq": 1, "at": 1.5, "kind": "TestStarted", "run": "r-9", "test": "r-9:a", "data": {"case": "a"}},
            {"seq": 2, "at": 1.5, "kind": "Logged", "data": {"code": "x"}},
        ]
    ]
    assert feed.seq == 2


@pytest.mark.parametrize(
    ("env", "shown"),
    [({"TOKEN": "x", "MODE": "fast"}, {"TOKEN": "***", "MODE": "***"}), ({}, {}), (None, None), (["TOKEN=x"], "***")],
)
def test_the_environment_of_a_suite_is_shown_by_its_names(env: Any, shown: Any) -> None:
    data: dict[str, Any] = {"run": "r-9", "suite": {"id": "login", "env": env}, "origin": "control"}
    received = Recorded(seq=1, at=1.5, kind="RunReceived", run="r-9", data=msgspec.Raw(msgspec.json.encode(data)))
    told = {"run": "r-9", "suite": {"id": "login", "env": shown}, "origin": "control"}
    feed = Feed(0)
    subscription = subscribed(feed, Topic())
    feed.publish([received])
    assert [e["data"] for e in taken(subscription)[0]] == [told]
    (piece,) = replayed(Topic(), [received], 0, 1)
    assert msgspec.json.decode(piece.text)["data"] == told


def test_who_wants_the_same_shares_the_pieces_and_who_detaches_gets_nothing_more() -> None:
    feed = Feed(0)
    first, second, other = (
        subscribed(feed, topic, n) for n, topic in enumerate((Topic(), Topic(), Topic(run="r-1")), 1)
    )
    assert len(feed) == 3
    feed.publish([event(1), event(2, run="r-1")])
    assert first._pieces[0] is second._pieces[0]
    assert numbers(taken(other)[0]) == [2]
    feed.detach(second)
    feed.detach(second)
    feed.publish([event(3)])
    assert [numbers(m) for m in taken(first)] == [[1, 2, 3]]
    assert [numbers(m) for m in taken(second)] == [[1, 2]]


def test_a_message_holds_500_events_and_256_kib_at_most() -> None:
    feed = Feed(0)
    subscription = subscribed(feed, Topic())
    feed.publish([event(n) for n in range(1, 1202)])
    assert [len(message) for message in taken(subscription)] == [MAX_EVENTS, MAX_EVENTS, 201]
    feed.publish([event(n, text="x" * 100_000) for n in range(1202, 1207)])
    messages = []
    while text := subscription.take():
        assert len(text) <= MAX_BYTES + 100
        messages.append(len(msgspec.json.decode(text)["payload"]["events"]))
    assert messages == [2, 2, 1]


def test_what_gathers_meanwhile_goes_in_one_message() -> None:
    feed = Feed(0)
    subscription = subscribed(feed, Topic())
    for n in range(1, 300):
        feed.publish([event(n)])
    assert [len(message) for message in taken(subscription)] == [299]


def test_an_event_that_fits_no_message_is_a_gap_of_its_number() -> None:
    feed = Feed(6)
    subscription = subscribed(feed, Topic())
    feed.publish([event(7, text="x" * MAX_EVENT), event(8)])
    assert [numbers(message) for message in taken(subscription)] == [[(7, 7), 8]]


def test_a_full_queue_drops_the_oldest_and_says_which() -> None:
    feed = Feed(0)
    subscription = subscribed(feed, Topic())
    for n in range(1, QUEUE_EVENTS + 4):
        feed.publish([event(n)])
    first, *rest = taken(subscription)
    assert numbers(first)[:2] == [(1, 3), 4]
    assert sum(map(len, rest)) + len(first) == QUEUE_EVENTS + 1
    assert subscription.dropped == 3
    assert taken(subscription) == []


def test_a_queue_holds_8_mib_at_most() -> None:
    feed = Feed(0)
    subscription = subscribed(feed, Topic())
    for n in range(1, 12):
        feed.publish([event(n, text="x" * 1_000_000)])
    told = [number for message in taken(subscription) for number in numbers(message)]
    assert told[0] == (1, 11 - QUEUE_BYTES // 1_000_040)
    assert told[1:] == list(range(told[0][1] + 1, 12))


def test_with_disconnect_an_overflow_ends_it() -> None:
    feed = Feed(0)
    woken: list[int] = []
    subscription = Subscription(1, Topic(), "disconnect", lambda: woken.append(1))
    feed.attach(subscription)
    feed.publish([event(n) for n in range(1, QUEUE_EVENTS + 1)])
    before = subscription.overflowed
    feed.publish([event(QUEUE_EVENTS + 1)])
    assert (before, subscription.overflowed) == (False, True)
    assert len(woken) == QUEUE_EVENTS // MAX_EVENTS + 1
    assert subscription.take() is None
    feed.publish([event(QUEUE_EVENTS + 2)])
    assert subscription.take() is None


@pytest.mark.parametrize(
    ("seqs", "after", "upto", "told"),
    [
        ([1, 2, 3], 0, 3, [1, 2, 3]),
        ([4, 5], 1, 5, [(2, 3), 4, 5]),
        ([2, 5], 1, 6, [2, (3, 4), 5, (6, 6)]),
        ([], 3, 9, [(4, 9)]),
        ([], 3, 3, []),
    ],
)
def test_numbers_that_the_journal_no_longer_has_are_gaps(
    seqs: list[int], after: int, upto: int, told: list[Any]
) -> None:
    pieces = replayed(Topic(), [event(seq) for seq in seqs], after, upto)
    events = [e for piece in pieces for e in msgspec.json.decode(message(1, [piece.text]))["payload"]["events"]]
    assert numbers(events) == told


def test_numbers_that_a_filter_skips_are_none() -> None:
    rows = [event(2), event(3, run="r-9"), event(6, run="r-9")]
    (piece,) = replayed(Topic(run="r-9"), rows, 1, 6)
    assert numbers(msgspec.json.decode(message(1, [piece.text]))["payload"]["events"]) == [3, (4, 5), 6]


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 2500), st.sampled_from([10, 2000, 300_000])), max_size=8))
def test_whatever_comes_and_whenever_it_is_taken_each_number_is_told_once(
    steps: list[tuple[bool, int, int]],
) -> None:
    feed, told = Feed(0), list[Any]()
    subscription = subscribed(feed, Topic())
    for takes, count, size in steps:
        count = min(count, 12_000_000 // size)
        feed.publish([event(feed.seq + n, t="x" * size) for n in range(1, count + 1)])
        if takes:
            told += [number for message in taken(subscription) for number in numbers(message)]
    told += [number for message in taken(subscription) for number in numbers(message)]
    expanded = [n for item in told for n in (range(item[0], item[1] + 1) if isinstance(item, tuple) else (item,))]
    assert expanded == list(range(1, feed.seq + 1))
