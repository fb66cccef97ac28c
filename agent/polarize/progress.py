"""One submission from the first try to its end: a state, and what each reply makes of it. Without I/O.

The state is a `Submission`, kept as a checkpoint, so that job ids survive a restart: then polling goes on, and nothing
is sent twice. `follow` applies a reply. Time is an argument.

Source: protocols/emissary.md, "Polarize".
"""

import math
from typing import Literal, assert_never

import msgspec

from agent.core.errors import ProtocolMisuse
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

POLL_S = 10.0
LISTEN_S = 24 * 3600.0  # how long a message on the bus is waited for, when only that can tell
FIRST_RETRY_S, MAX_RETRY_S = 1.0, 300.0
LOG_TRIES = 6  # a log may not be ready yet; after so many refusals the import is told without it
MAX_RESPONSES = 16  # how many earlier submissions of a run are still recognised on the bus

Phase = Literal["due", "polling", "log", "listening"]

# Which replies there are to what each phase asks.
_REPLIES: dict[Phase, tuple[type[Reply], ...]] = {
    "due": (Accepted, Pending, Finished, Refused, Later),
    "polling": (Running, JobsEnded, Refused, Later),
    "log": (Unmatched, Refused, Later),
    "listening": (Finished,),
}


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """How far the report of one run is. Kept as a checkpoint.

    `project` is Polarion's; `responses` are the values of its submissions, the newest last; `tries` counts failures in
    a row; `since` is the epoch time at which `listening` began; `failed` is the importer's verdict while its log is
    still to be read.
    """

    run: str
    phase: Phase = "due"
    project: str = ""
    responses: tuple[str, ...] = ()
    tries: int = 0
    jobs: tuple[int, ...] = ()
    failed: str | None = None
    why: str | None = None
    since: float = 0.0

    def sent_with(self, project: str, response: str) -> "Submission":
        """It is about to be sent to this project, with this response value."""
        responses = (*self.responses, response)[-MAX_RESPONSES:]
        return msgspec.structs.replace(self, project=project, responses=responses)

    def delay_s(self, now: float) -> float:
        """How long to wait before the next step; `now` is epoch seconds."""
        if self.phase == "listening":
            return max(0.0, min(self.since - now, 0.0) + LISTEN_S)  # a start to come: the clock was put back
        if self.tries:
            return min(math.ldexp(FIRST_RETRY_S, min(self.tries - 1, 20)), MAX_RETRY_S)
        return POLL_S if self.phase == "polling" else 0.0


def follow(submission: Submission, reply: Reply, now: float, *, listens: bool) -> Submission | Finished | Refused:
    """What a reply makes of a submission: its next state, its end, or that it is held. `listens`: there is a CI Bus.

    Raises ProtocolMisuse: that reply is none to what the phase asks.
    """
    if type(reply) not in _REPLIES[submission.phase]:
        raise ProtocolMisuse(
            f"a submission that is {submission.phase} got {type(reply).__name__}",
            remedy="This is a bug of the agent; report it.",
        )
    change = msgspec.structs.replace
    match reply:
        case Finished():
            return reply
        case Refused() if submission.phase != "log":
            return reply
        case Refused(why) if submission.tries + 1 >= LOG_TRIES:
            return _ended(submission, (), f"the import's log could not be read: {why}")
        case Later(why) | Refused(why):
            return change(submission, tries=submission.tries + 1, why=why)
        case Accepted(jobs):
            return change(submission, phase="polling", jobs=jobs, tries=0, why=None)
        case Running():
            return change(submission, tries=0, why=None)
        case JobsEnded(failed):
            return change(submission, phase="log", failed=failed, tries=0, why=None)
        case Unmatched(tests):
            return _ended(submission, tests, None)
        case Pending(why):
            if not listens:
                return Finished(outcome="unknown", reason=why)
            return change(submission, phase="listening", since=now, tries=0, why=why)
        case _:
            assert_never(reply)


def _ended(submission: Submission, unmatched: tuple[str, ...], reason: str | None) -> Finished:
    outcome: Literal["passed", "partial", "failed"] = "passed"
    if submission.failed:
        outcome = "failed"
    elif unmatched:
        outcome = "partial"
    return Finished(outcome=outcome, unmatched=unmatched, reason=submission.failed or reason)
