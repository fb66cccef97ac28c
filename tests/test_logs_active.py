"""Which run and test a line belongs to."""

from agent.core.event import Event
from agent.core.events import Counts, RunStarted, SuiteFinished, TestFinished, TestStarted
from agent.logs.active import Active


def started(run: str) -> Event:
    return RunStarted(run=run, suite="s", title="", runner="tap", driver="", source="", origin="demo", slot=0)


def begun(run: str, case: str) -> Event:
    return TestStarted(run=run, suite="s", case=case, name=case, file=None, started=0.0)


def ended(run: str, case: str) -> Event:
    return TestFinished(run=run, suite="s", case=case, name=case, file=None, state="passed", ended=1.0)


def over(run: str) -> Event:
    return SuiteFinished(
        run=run, suite="s", runner="tap", driver="", verdict="passed", result="SUCCESS", code=0, signal=None,
        reason=None, started=0.0, ended=1.0, counts=Counts(),
    )  # fmt: skip


def test_what_is_active_alone_is_told() -> None:
    active = Active()
    assert active.now(None) == (None, None)
    for event, now in (
        (started("r1"), ("r1", None)),
        (begun("r1", "a"), ("r1", "r1:a")),
        (begun("r1", "b"), ("r1", None)),  # which of them wrote it?
        (ended("r1", "a"), ("r1", "r1:b")),
        (started("r2"), (None, None)),
        (over("r1"), ("r2", None)),
        (over("r2"), (None, None)),
        (ended("r2", "x"), (None, None)),
    ):
        active.feed(event)
        assert active.now(None) == now


def test_the_watch_of_a_run_is_that_runs() -> None:
    active = Active()
    for event in (started("r1"), begun("r1", "a"), started("r2")):
        active.feed(event)
    assert (active.now("r1"), active.now("r2"), active.now("r3")) == (("r1", "r1:a"), ("r2", None), ("r3", None))
