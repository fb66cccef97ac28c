"""A run's states, limits and counts, as the tables of suites.md say."""

import pytest

from agent.core.errors import ProtocolMisuse
from agent.core.events import RunState, TestFinished, TestStarted
from agent.suites.messages import Limits, Suite
from agent.suites.runs import ALLOWED, Run, scaled


def a_run(**limits: float) -> Run:
    suite = Suite(id="login", runner="tap", limits=Limits(**limits))  # type: ignore[arg-type]  # floats by name
    return Run("r-1", suite, origin="control", now=100.0, slot=0)


def started(case: str) -> TestStarted:
    return TestStarted(run="r-1", suite="login", case=case, name=case, file=None, started=0)


def ended(case: str, rev: int = 1) -> TestFinished:
    return TestFinished(run="r-1", suite="login", case=case, name=case, file=None, state="passed", ended=0, rev=rev)


def test_a_good_run_goes_through_its_states() -> None:
    run = a_run()
    states: tuple[RunState, ...] = ("preparing", "running", "stopping", "reporting", "done")
    for n, state in enumerate(states):
        run.advance(state, 100.0 + n)
    assert run.since == 104


@pytest.mark.parametrize(("state", "to"), [(a, b) for a in ALLOWED for b in ALLOWED if b not in ALLOWED[a]])
def test_a_forbidden_step_names_both_states(state: RunState, to: RunState) -> None:
    run = a_run()
    run.state = state
    with pytest.raises(ProtocolMisuse, match=f"run r-1 cannot go from {state} to {to}"):
        run.advance(to, 1.0)


def test_each_limit_gives_its_reason_at_its_time() -> None:
    run = a_run(setup=30, run=60, stall=20, test=7)
    run.advance("preparing", 100)
    assert (run.next_check(), run.overdue(129.9)) == (130, None)  # the others count from the runner's start
    assert run.overdue(130) == "limits.setup: not prepared within 30 s"
    run.advance("running", 130)
    assert (run.next_check(), run.overdue(149.9)) == (150, None)
    assert run.overdue(150) == "limits.stall: no new result for 20 s"
    run.feed(ended("a"), 145)
    assert (run.overdue(150), run.next_check()) == (None, 165)
    run.feed(started("slow"), 155)
    assert (run.overdue(161.9), run.next_check()) == (None, 162)
    assert run.overdue(162) == "limits.test: 'slow' took more than 7 s"
    run.feed(ended("slow"), 162)
    assert (run.overdue(181.9), run.next_check()) == (None, 182)
    run.feed(ended("b"), 180)
    assert (run.overdue(189.9), run.overdue(190)) == (None, "limits.run: not over within 60 s")


def test_without_limits_nothing_is_ever_overdue_but_the_labs_deadline() -> None:
    run = a_run(setup=0, run=0, stall=0)
    run.advance("preparing", 100)
    run.advance("running", 100)
    assert (run.next_check(), run.overdue(1e12)) == (None, None)
    run.deadline = 500.0
    assert run.overdue(500) == "deadline: the lab's deadline has passed"


def test_the_first_reason_to_stop_stays_and_a_run_that_is_over_is_not_stopped() -> None:
    run = a_run()
    assert run.stop("cancel: by lab")
    assert not run.stop("limits.run")
    assert run.stop_reason == "cancel: by lab"
    over = a_run()
    over.state = "reporting"
    assert not over.stop("too late")


def test_a_run_describes_what_it_does_now() -> None:
    run = a_run()
    run.advance("preparing", 101)
    run.advance("running", 102)
    now = run.describe(now=110, epoch=1_000_110)
    assert (now["test"], now["since"], now["counts"]) == (None, 1_000_102, {})
    run.feed(ended("a"), 103)
    run.feed(ended("a", rev=2), 103)
    run.feed(started("b"), 104)
    assert run.describe(now=110, epoch=1_000_110) == {
        "run": "r-1", "suite": "login", "state": "running", "test": "b", "since": 1_000_104, "counts": {"passed": 1},
        "reservation": None, "origin": "control",
    }  # fmt: skip


def test_a_slow_machine_stretches_defaults_and_not_what_a_document_says() -> None:
    limits = scaled(Limits(stall=30), 1.5)
    assert (limits.run, limits.stall, limits.test) == (5400, 30, 0)
