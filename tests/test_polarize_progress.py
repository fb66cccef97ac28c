"""One submission: states, delays, and what each reply makes of it."""

import msgspec
import pytest

from agent.core.errors import ProtocolMisuse
from agent.polarize.progress import LISTEN_S, LOG_TRIES, MAX_RESPONSES, Phase, Submission, follow
from agent.polarize.submit import (
    Accepted,
    Finished,
    JobsEnded,
    Later,
    Pending,
    Refused,
    Reply,
    Running,
    Unmatched,
)


def after(*replies: Reply, phase: Phase = "due", listens: bool = False) -> Submission | Finished | Refused:
    """What a submission is after these replies, all at epoch second 1000."""
    state: Submission | Finished | Refused = Submission(run="r-9", phase=phase)
    for reply in replies:
        assert isinstance(state, Submission), f"over before {reply}"
        state = follow(state, reply, 1000.0, listens=listens)
    return state


def delay_s(*replies: Reply, phase: Phase = "due", listens: bool = False, now: float = 1000.0) -> float:
    state = after(*replies, phase=phase, listens=listens)
    assert isinstance(state, Submission)
    return state.delay_s(now)


def test_retries_are_a_second_doubling_to_five_minutes_for_ever() -> None:
    assert delay_s() == 0
    assert [delay_s(*[Later("down")] * n) for n in (1, 2, 3, 9, 10, 5000)] == [1, 2, 4, 256, 300, 300]


def test_jobs_are_polled_every_ten_seconds() -> None:
    assert delay_s(Accepted((7,))) == 10
    assert delay_s(Accepted((7,)), Running()) == 10
    assert delay_s(Accepted((7,)), Later("down")) == 1
    assert delay_s(Accepted((7,)), Later("down"), Later("down"), Running()) == 10


def test_a_job_that_succeeded_is_judged_by_its_log() -> None:
    done = (Accepted((7,)), JobsEnded(None))
    assert delay_s(*done) == 0
    assert after(*done, Unmatched(())) == Finished(outcome="passed")
    assert after(*done, Unmatched(("a",))) == Finished(outcome="partial", unmatched=("a",))
    assert after(Accepted((7,)), JobsEnded("job 7: ERROR"), Unmatched(("a",))) == Finished(
        outcome="failed", unmatched=("a",), reason="job 7: ERROR"
    )


def test_a_log_that_is_refused_is_given_up_and_one_that_is_late_is_not() -> None:
    done = (Accepted((7,)), JobsEnded(None))
    assert isinstance(after(*done, *[Refused("HTTP 404")] * (LOG_TRIES - 1)), Submission)
    assert after(*done, *[Refused("HTTP 404")] * LOG_TRIES) == Finished(
        outcome="passed", reason="the import's log could not be read: HTTP 404"
    )
    assert isinstance(after(*done, *[Later("down")] * 100), Submission)


def test_what_cannot_be_told_here_waits_for_the_bus_for_a_day() -> None:
    assert delay_s(Pending("TIMED_OUT"), listens=True) == LISTEN_S
    assert delay_s(Pending("TIMED_OUT"), listens=True, now=1000 + LISTEN_S + 5) == 0
    assert delay_s(Pending("TIMED_OUT"), listens=True, now=1000 - 86_400) == LISTEN_S  # the clock was put back
    assert after(Pending("TIMED_OUT"), Finished(outcome="partial"), listens=True) == Finished(outcome="partial")


def test_without_a_bus_the_outcome_is_unknown() -> None:
    assert after(Pending("TIMED_OUT")) == Finished(outcome="unknown", reason="TIMED_OUT")


@pytest.mark.parametrize("phase", ["due", "polling"])
def test_a_refusal_is_held(phase: Phase) -> None:
    assert after(Refused("HTTP 403"), phase=phase) == Refused("HTTP 403")


def test_a_reply_to_something_else_is_a_bug_of_ours() -> None:
    with pytest.raises(ProtocolMisuse, match="a submission that is polling got Accepted"):
        after(Accepted((1,)), Accepted((2,)))


def test_a_checkpoint_brings_back_the_jobs() -> None:
    state = Submission(run="r-9", responses=("lab.a",), phase="polling", jobs=(7,), tries=3)
    assert msgspec.json.decode(msgspec.json.encode(state), type=Submission) == state


def test_earlier_responses_are_remembered_up_to_a_limit() -> None:
    state = Submission(run="r-9")
    for number in range(MAX_RESPONSES + 2):
        state = state.sent_with("RHEL9", f"lab.{number}")
    assert state.project == "RHEL9"
    assert len(state.responses) == MAX_RESPONSES
    assert state.responses[-1] == f"lab.{MAX_RESPONSES + 1}"
