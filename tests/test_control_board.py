"""What is so now: links, alerts, the tests that run."""

from agent.control.board import Board
from agent.control.messages import AlertShown, LinkShown
from agent.core.event import Event
from agent.core.events import (
    Alert,
    AlertCleared,
    LinkChanged,
    TestFinished,
    TestStarted,
)
from tests.ended_run import finished, started


def board(*events: Event) -> Board:
    built = Board()
    for at, event in enumerate(events):
        built.feed(event, float(at))
    return built


def begun(run: str, case: str) -> TestStarted:
    return TestStarted(run=run, suite="s", case=case, name=case, file=None, started=0.0)


def ended(run: str, case: str) -> TestFinished:
    return TestFinished(run=run, suite="s", case=case, name=case, file=None, state="passed", ended=1.0)


def test_a_link_has_the_state_it_went_to_last_and_since_when() -> None:
    built = board(LinkChanged(name="mimir", state="connecting"), LinkChanged(name="mimir", state="offline", error="x"))
    assert built.links == {"mimir": LinkShown(state="offline", since=1.0, error="x")}


def test_an_alert_lasts_until_it_is_cleared() -> None:
    alert = Alert(code="disk.full", text="Full.", remedy="Make room.", since=7.0)
    built = board(alert)
    assert built.alerts == {"disk.full": AlertShown(code="disk.full", text="Full.", remedy="Make room.", since=7.0)}
    built.feed(AlertCleared(code="disk.full"), 8.0)
    built.feed(AlertCleared(code="never.raised"), 8.0)
    assert built.alerts == {}


def test_a_run_and_a_test_are_told_when_there_is_exactly_one() -> None:
    built = board()
    assert built.active() == (None, None)
    for event, expected in [
        (begun("r-0", "z"), (None, None)),
        (started("r-1"), ("r-1", None)),
        (begun("r-1", "a"), ("r-1", "r-1:a")),
        (begun("r-1", "b"), ("r-1", None)),
        (ended("r-1", "a"), ("r-1", "r-1:b")),
        (ended("r-1", "never begun"), ("r-1", "r-1:b")),
        (started("r-2"), (None, None)),
    ]:
        built.feed(event, 0.0)
        assert built.active() == expected
    built.feed(finished("r-1"), 0.0)
    assert built.active() == ("r-2", None)
