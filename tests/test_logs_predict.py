"""Forecasts over time as transcripts, and any stream of lines against a plain model of the same rules."""

import re

import msgspec
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from agent.core.learned import LogEvidence, LogForecast
from agent.logs.chains import Chain, Chains, FailureClass, Seen
from agent.logs.predict import MOST_OPEN, Forecaster, Open, Tally

HORIZON_S, GAP_S = 60.0, 50.0
STEP, OTHER, END = 11, 12, 20


def chains() -> Chains:
    """One step makes the failure certain, one makes it less probable than not; nothing else is known."""
    chain = Chain({END: 1}, {OTHER: (0, 1), STEP: (1, 1)}, GAP_S, [(2.0, 30.0), (1.0, 20.0)])
    chain.counts = {level: [1000, 400] for level in range(16)} | {16 + level: [1000, 1000] for level in range(16)}
    suffixes: dict[tuple[int, ...], list[int]] = {(STEP,): [1000, 1000], (OTHER,): [1000, 400]}
    return Chains([FailureClass("disk", [chain], HORIZON_S, 0.5, suffixes)])


def play(forecaster: Forecaster, transcript: str) -> None:
    """`12 step a` at 12 s a line for the key a comes in; `=> open a` is what is told of it."""
    told: list[str] = []
    for row in filter(None, map(str.strip, transcript.splitlines())):
        if row.startswith("=>"):
            assert told, f"nothing was told: {row}"
            assert told.pop(0) == row[3:]
            continue
        assert not told, f"{told} before {row}"
        at, what, *key = row.split()
        told = [f"{event.state} {event.key}" for event in said(forecaster, float(at), what, *key)]
    assert not told, told


def said(forecaster: Forecaster, at: float, what: str, key: str = "") -> list[LogForecast]:
    if what == "due":
        return forecaster.due(at)
    template = {"step": STEP, "half": OTHER, "fails": END, "burns": 99, "misread": END, "unknown": 77}[what]
    failure = {"fails": "disk", "misread": "failure", "burns": "other", "unknown": "disk"}.get(what)
    return forecaster.see(
        Seen(at, "a.log", template, f"line {key} text".encode(), failure), "a.log", round(at * 10_000)
    )


@pytest.mark.parametrize(
    ("transcript", "tally"),
    [
        (
            """
            0 step a
            => open a
            10 step a
            12 fails a
            => hit a
            """,
            (1, 0, 0),
        ),
        (
            """
            0 step a
            => open a
            5 step b
            => open b
            60 due
            61 due
            => expired a
            70 fails b
            => expired b
            """,
            (0, 2, 1),
        ),
        (
            """
            0 half a
            10 fails a
            """,
            (0, 0, 1),
        ),
        (  # after one that expired, the probability must fall before another opens
            """
            0 step a
            => open a
            40 step a
            61 step a
            => expired a
            62 half a
            63 step a
            => open a
            """,
            (0, 1, 0),
        ),
        (  # or nothing come for longer than the chain pauses
            """
            0 step a
            => open a
            45 step a
            61 step a
            => expired a
            112 step a
            => open a
            """,
            (0, 1, 0),
        ),
        (  # a burst of lines of one failure is one failure
            """
            0 fails a
            1 fails a
            9 fails a
            20 fails a
            """,
            (0, 0, 2),
        ),
        (  # lines of a failure that was forecast, and go on
            """
            0 step a
            => open a
            5 fails a
            => hit a
            6 fails a
            """,
            (1, 0, 0),
        ),
        (  # a class that nothing is known of; a failure's line that was never seen
            """
            0 step a
            => open a
            5 burns a
            6 unknown a
            => hit a
            """,
            (1, 0, 1),
        ),
        (  # the line of a failure that others take for another class, or for none
            """
            0 step a
            => open a
            5 misread a
            => hit a
            """,
            (1, 0, 0),
        ),
        (  # a clock that goes back
            """
            100 step a
            => open a
            50 step b
            => open b
            111 due
            => expired b
            160 fails a
            => hit a
            """,
            (1, 1, 0),
        ),
    ],
)
def test_forecasts_over_time(transcript: str, tally: tuple[int, int, int]) -> None:
    forecaster = Forecaster(chains())
    play(forecaster, transcript)
    total = forecaster.total
    assert (total.hits, total.expired, total.misses) == tally


def test_a_forecast_says_what_it_is_based_on() -> None:
    forecaster = Forecaster(chains())
    forecaster.sampled = True
    assert said(forecaster, 1.0, "half", "vol-3") == []
    (event,) = said(forecaster, 2.0, "step", "vol-3")
    assert re.fullmatch(r"lf-[0-9a-f]{16}", event.id)
    assert 0.9 < event.probability <= 1
    evidence = (
        LogEvidence("a.log", 10_000, "line vol-3 text", OTHER),
        LogEvidence("a.log", 20_000, "line vol-3 text", STEP),
    )
    expected = LogForecast(
        path="a.log",
        id=event.id,
        state="open",
        class_="disk",
        probability=event.probability,
        horizon_s=HORIZON_S,
        expected_s=(1.0, 20.0),
        key="vol-3",
        evidence=evidence,
        sampled=True,
    )
    assert event == expected
    (hit,) = said(forecaster, 9.0, "fails", "vol-3")
    failure = LogEvidence("a.log", 90_000, "line vol-3 text", END)
    assert hit == msgspec.structs.replace(expected, state="hit", evidence=(*evidence, failure))


def test_a_forecast_is_of_one_test_from_its_beginning_to_its_end() -> None:
    forecaster = Forecaster(chains())
    events = [
        *forecaster.see(Seen(0.0, "a.log", STEP, b"line a text"), "a.log", 0, scope=("r", "r:t")),
        *forecaster.see(Seen(1.0, "a.log", STEP, b"line b text"), "a.log", 9, scope=("r", None)),
        *forecaster.see(Seen(2.0, "a.log", END, b"line a text", "disk"), "a.log", 20, scope=("s", "s:u")),
        *forecaster.due(100.0),
    ]
    assert [(event.state, event.run, event.test) for event in events] == [
        *(("open", "r", "r:t"), ("open", "r", None), ("hit", "r", "r:t"), ("expired", "r", None)),
    ]


def test_the_same_lines_give_the_same_ids() -> None:
    first, second = (said(Forecaster(chains()), 1.0, "step", "a")[0] for _ in range(2))
    assert first == second
    assert said(Forecaster(chains()), 1.0, "step", "b")[0].id != first.id


def test_evidence_is_bounded_and_can_be_read() -> None:
    forecaster = Forecaster(chains())
    for at in range(20):
        forecaster.see(Seen(float(at), "a.log", OTHER, b"line a \xff" + b"x" * 9000 + b"\r\n"), "a.log", at)
    (event,) = said(forecaster, 20.0, "step", "a")
    assert len(event.evidence) == 8
    assert event.evidence[0].text.startswith("line a \\xffxx")
    assert len(event.evidence[0].text) < 600


def test_forecasts_that_find_no_room_are_counted_and_told() -> None:
    forecaster = Forecaster(chains())
    for n in range(MOST_OPEN):
        assert said(forecaster, 0.001 * n, "step", f"u{n}")[0].suppressed == 0
    for at in (10.0, 11.0):  # one chain of each is one forecast
        assert said(forecaster, at, "step", "x") == said(forecaster, at, "step", "y") == []
    assert (forecaster.open, forecaster.suppressed) == (MOST_OPEN, 2)
    assert [event.state for event in said(forecaster, 12.0, "fails", "u7")] == ["hit"]
    (late,) = said(forecaster, 13.0, "step", "y")  # when there is room again
    assert (late.state, late.key, late.suppressed) == ("open", "y", 2)
    said(forecaster, 14.0, "fails", "u8")
    (next,) = said(forecaster, 15.0, "step", "z")
    assert (next.suppressed, forecaster.suppressed) == (0, 2)


def test_forecasts_that_came_true_are_not_remembered_until_their_time_is_over() -> None:
    forecaster = Forecaster(chains(), learning=False)
    assert [event.state for event in said(forecaster, 0, "step", "long")] == ["open"]
    for n in range(1, 3 * MOST_OPEN):
        at = n / MOST_OPEN  # all within the horizon of the first
        assert [event.state for event in said(forecaster, at, "step", "a")] == ["open"]
        assert [event.state for event in said(forecaster, at, "fails", "a")] == ["hit"]
        assert len(forecaster._ends) <= 2 * MOST_OPEN
    assert [f"{event.state} {event.key}" for event in said(forecaster, HORIZON_S + 1, "due")] == ["expired long"]


def test_what_is_hardly_known_is_not_said() -> None:
    """Two rows of two that failed are no reason for an alarm, a hundred are."""
    for rows, opens in ((2, False), (100, True)):
        known = chains()
        known.classes[0].suffixes[STEP,] = [rows, rows]
        known.weights = (1.8, 0.0, 0.0, 0.0)  # 86 %
        assert bool(said(Forecaster(known, threshold=0.8), 0.0, "step", "a")) == opens


@pytest.mark.parametrize("learning", [True, False])
def test_a_forecast_corrects_what_is_known_unless_frozen(learning: bool) -> None:
    forecaster = Forecaster(chains(), learning=learning)
    play(forecaster, "0 step a\n=> open a\n61 due\n=> expired a")
    assert (forecaster.chains.encode() == chains().encode()) is not learning


def test_what_comes_true_and_what_does_not_are_learned() -> None:
    forecaster = Forecaster(chains())
    play(forecaster, "0 step a\n=> open a\n10 fails a\n=> hit a\n20 step b\n=> open b\n81 due\n=> expired b")
    assert forecaster.chains.classes[0].suffixes[STEP,] == [1002, 1001]


def test_lines_before_only_leave_their_tracks() -> None:
    forecaster = Forecaster(chains())
    forecaster.warm(Seen(0.0, "a.log", OTHER, b"line a text"))
    forecaster.warm(Seen(1.0, "a.log", END, b"line b text", "disk"))
    forecaster.warm(Seen(1.0, "a.log", 99, b"line b text", "other"))
    assert vars_of(forecaster.total) == (0, 0, 0)
    (event,) = said(forecaster, 2.0, "step", "a")
    assert [line.template for line in event.evidence] == [STEP]


def vars_of(tally: Tally) -> tuple[int, int, int]:
    return tally.hits, tally.expired, tally.misses


def test_a_template_that_joined_another_is_still_a_step() -> None:
    forecaster = Forecaster(chains())
    assert forecaster.wanted == {STEP, OTHER}
    forecaster.joined(STEP, 500)
    forecaster.joined(500, 501)
    forecaster.joined(7, 502)  # of no chain
    forecaster.joined(OTHER, STEP)  # one step has become another: its lines are that one's
    assert forecaster.wanted == {STEP, OTHER, 500, 501}
    (event,) = forecaster.see(Seen(0.0, "a.log", 501, b"line a text"), "a.log", 0)
    assert event.key == "a"


def test_a_line_as_failures_were_is_one_until_others_join_it() -> None:
    known = chains()
    known.classes[0].chains[0].sure = [END]
    forecaster = Forecaster(known)
    assert forecaster.wanted == {STEP, OTHER, END}
    for told in (["hit"], []):
        assert [event.state for event in said(forecaster, 0.0, "step", "a")] == ["open"]
        unnamed = Seen(1.0, "a.log", END, b"line a text")
        assert [event.state for event in forecaster.see(unnamed, "a.log", 0)] == told
        forecaster.joined(END, 500)
    assert vars_of(forecaster.total) == (1, 0, 0)


def restarted(before: Forecaster, known: Chains, now: float) -> Forecaster:
    """Another process, that has what the one before had put on the disk."""
    kept = msgspec.json.encode(list(before.waiting))
    forecaster = Forecaster(known)
    forecaster.resume(msgspec.json.decode(kept, type=list[Open]), before.total, now)
    return forecaster


def test_open_forecasts_live_on_in_the_next_process() -> None:
    first = Forecaster(chains())
    play(first, "0 step a\n=> open a\n5 step b\n=> open b\n7 step c\n=> open c\n8 fails c\n=> hit c\n9 burns x")
    second = restarted(first, chains(), 30.0)
    assert second.open == 2
    play(second, "31 step a\n50 fails a\n=> hit a\n65 due\n66 due\n=> expired b")
    assert vars_of(second.total) == (2, 1, 1)
    assert second.chains.encode() != chains().encode()  # both taught it something


def test_forecasts_outlive_the_model_that_knew_their_class() -> None:
    first = Forecaster(chains())
    play(first, "0 step a\n=> open a\n5 step b\n=> open b")
    other = chains()
    other.classes[0].name = "fan"
    for known in (Chains(), other):
        second = restarted(first, known, 30.0)
        play(second, "40 unknown a\n=> hit a\n66 due\n=> expired b")
        assert vars_of(second.total) == (1, 1, 0)
        assert second.chains.weights == known.weights


def test_no_forecast_waits_longer_because_the_clock_was_put_back() -> None:
    first = Forecaster(chains())
    play(first, "1000000 step a\n=> open a")
    play(restarted(first, chains(), 30.0), "89 due\n91 due\n=> expired a")


def stamped(at: float, second: int | None, *, template: int = STEP, log: str = "a.log") -> Seen:
    """A line for the key a that was read at a time, and written in a second of this minute."""
    head = "" if second is None else f"2026-01-05T08:00:{second:02} "
    return Seen(at, log, template, f"{head}line a text".encode(), "disk" if template == END else None)


@pytest.mark.parametrize(
    ("step", "failure", "is_late", "told", "tally"),
    [
        # Its time went by while nobody read: then what the lines say themselves decides.
        (stamped(0.0, 10), stamped(203.0, 50, template=END), False, ["hit"], (1, 0, 0)),
        (stamped(0.0, 10), stamped(203.0, 9, template=END), False, ["expired"], (0, 1, 1)),
        (stamped(0.0, 10), stamped(203.0, None, template=END), False, ["expired"], (0, 1, 1)),
        (stamped(0.0, None), stamped(203.0, 50, template=END), False, ["expired"], (0, 1, 1)),
        (stamped(0.0, 10), stamped(203.0, 50, template=END, log="b.log"), False, ["hit"], (1, 0, 0)),
        # The time that there is for that is over.
        (stamped(0.0, 10), stamped(206.0, 50, template=END), False, ["expired"], (0, 1, 1)),
        # It goes on, and the line was written a while ago.
        (stamped(170.0, 10), stamped(203.0, 50, template=END), True, ["hit"], (1, 0, 0)),
        (stamped(170.0, 10), stamped(203.0, 9, template=END), True, [], (0, 0, 0)),
        (stamped(170.0, None), stamped(203.0, None, template=END), True, ["hit"], (1, 0, 0)),
        (stamped(170.0, None), stamped(203.0, None, template=END, log="b.log"), True, [], (0, 0, 0)),
    ],
)
def test_a_failure_that_is_read_after_the_time_or_long_after_it_was_written(
    step: Seen, failure: Seen, is_late: bool, told: list[str], tally: tuple[int, int, int]
) -> None:
    first = Forecaster(chains())
    assert [event.state for event in first.see(step, "a.log", 0)] == ["open"]
    second = restarted(first, chains(), 200.0)
    assert [event.state for event in second.see(failure, failure.source, 7, is_late=is_late)] == told
    assert vars_of(second.total) == tally


def test_a_failure_of_long_ago_is_no_miss_and_leaves_the_tracks() -> None:
    forecaster = Forecaster(chains())
    play(forecaster, "0 half a")
    assert forecaster.see(stamped(1.0, None, template=END), "a.log", 0, is_late=True) == []
    assert vars_of(forecaster.total) == (0, 0, 0)
    (event,) = said(forecaster, 2.0, "step", "a")
    assert [line.template for line in event.evidence] == [OTHER, STEP]


def test_rates_are_none_as_long_as_there_is_nothing_to_count() -> None:
    assert (Tally().precision, Tally().recall) == (None, None)
    assert (Tally(3, 1, 2).precision, Tally(3, 1, 2).recall) == (0.75, 0.6)


def test_without_chains_every_failure_is_a_miss() -> None:
    forecaster = Forecaster(Chains())
    assert said(forecaster, 0.0, "fails", "a") == said(forecaster, 0.0, "step", "a") == []
    assert vars_of(forecaster.total) == (0, 0, 1)


class Stream(RuleBasedStateMachine):
    """Any stream of lines and times, beside the same rules written down without heap and tracks."""

    def __init__(self) -> None:
        super().__init__()
        self.forecaster = Forecaster(chains(), learning=False)
        self.now = 0.0
        self.open: dict[str, float] = {}
        self.tired: set[str] = set()
        self.failed: dict[tuple[str, str], float] = {}
        self.tally = [0, 0, 0]
        self.states: dict[str, str] = {}
        self.seen: dict[str, float] = {}  # per key its last step since its last failure

    @rule(by=st.sampled_from([0.0, 0.5, 3.0, 11.0, 49.0, 70.0]))
    def pass_time(self, by: float) -> None:
        self.now += by

    def told(self, events: list[LogForecast]) -> list[tuple[str, str]]:
        for event in events:
            before = self.states.get(event.id)
            assert before == (None if event.state == "open" else "open"), "open once, then hit or expired once"
            self.states[event.id] = event.state
        return sorted((event.state, event.key) for event in events)

    def expire(self) -> list[tuple[str, str]]:
        gone = sorted(key for key, at in self.open.items() if at + HORIZON_S < self.now)
        for key in gone:
            del self.open[key]
            self.tally[1] += 1
        return [("expired", key) for key in gone]

    @rule(what=st.sampled_from(["step", "half"]), key=st.sampled_from("abc"))
    def line(self, what: str, key: str) -> None:
        expected = self.expire()
        if self.now - self.seen.get(key, -1e9) > GAP_S:
            self.tired.discard(key)
        self.seen[key] = self.now
        if what == "half":
            self.tired.discard(key)
        elif key not in self.open and key not in self.tired:
            self.open[key] = self.now
            self.tired.add(key)
            expected.append(("open", key))
        assert self.told(said(self.forecaster, self.now, what, key)) == sorted(expected)
        self.now += 0.001  # lines are told apart by where they stand

    @rule(what=st.sampled_from(["fails", "burns", "unknown"]), key=st.sampled_from("abc"))
    def failure(self, what: str, key: str) -> None:
        expected = self.expire()
        class_ = "other" if what == "burns" else "disk"
        is_known = what == "fails" or (what == "unknown" and key in self.seen)
        place = (class_, key if is_known else "a.log")
        before, self.failed[place] = self.failed.get(place, -1e9), self.now
        if is_known and key in self.open:
            del self.open[key]
            self.tally[0] += 1
            expected.append(("hit", key))
        elif self.now - before >= 10:
            self.tally[2] += 1
        if is_known:
            self.tired.discard(key)
            self.seen.pop(key, None)
        assert self.told(said(self.forecaster, self.now, what, key)) == sorted(expected)
        self.now += 0.001

    @rule()
    @precondition(lambda self: self.open)
    def due(self) -> None:
        expected = self.expire()
        assert self.told(self.forecaster.due(self.now)) == expected

    @invariant()
    def counts(self) -> None:
        assert list(vars_of(self.forecaster.total)) == self.tally
        assert self.forecaster.open == len(self.open)


Stream.TestCase.settings = settings(max_examples=60, stateful_step_count=30)
TestStream = Stream.TestCase
