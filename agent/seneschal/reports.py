"""What the Seneschal is told of runs: owed messages and the heartbeat's figures, from events and the live state. Pure.

Source: protocols/emissary.md, "Seneschal" (`accepted`, `refused`, `complete`, `update`).
"""

import signal
from typing import Any
from urllib.parse import quote, urlsplit, urlunsplit

import msgspec

from agent.core.events import Counts, Logged, RunRefused, RunStarted, RunState, SuiteFinished
from agent.seneschal.messages import Accepted, Complete, Link, Log, Refused, RunReport

ORIGIN = "seneschal"
MAX_REASON = 4096  # characters of a `reason`
MAX_ARTIFACTS = 256
MAX_LOG = 16 * 1024  # characters of a `log` message; the whole of it is in the journal
UNKNOWN = "unknown after restart"


class LiveRun(msgspec.Struct, frozen=True, kw_only=True):
    """A run in the answer to the action `runs`."""

    run: str
    state: RunState
    since: float
    origin: str
    test: str | None = None
    counts: dict[str, int] = {}
    reservation: str | None = None


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """The answer to the action `runs`: the slots, what runs, and the versions of the runners' programs."""

    slots: int = 0
    free: int = 0
    draining: bool = False
    runs: tuple[LiveRun, ...] = ()
    runners: dict[str, str] = {}

    def reports(self) -> tuple[RunReport, ...]:
        """The Seneschal's own runs; those of others are none of its business."""
        return tuple(
            RunReport(run=run.run, state=run.state, since=run.since, test=run.test)
            for run in self.runs
            if run.origin == ORIGIN
        )

    def metrics(self) -> dict[str, int]:
        """`sub_*`: the tests of all that runs now."""
        counts = [run.counts for run in self.runs]
        active = sum(run.test is not None for run in self.runs)
        ended = sum(n for count in counts for state, n in count.items() if state != "total")
        passed = sum(count.get("passed", 0) for count in counts)
        failed = sum(count.get(state, 0) for count in counts for state in ("failed", "blocked", "aborted", "lost"))
        return {"sub_total": ended + active, "sub_active": active, "sub_passed": passed, "sub_failed": failed}


def accepted(seq: int, event: RunStarted) -> Accepted:
    """The decision, when it is yes."""
    return Accepted(seq=seq, run=event.run, reservation=event.reservation or "")


def refused(seq: int, event: RunRefused) -> Refused:
    """The decision, when it is no."""
    return Refused(seq=seq, run=event.run, reason=event.reason[:MAX_REASON])


def complete(seq: int, event: SuiteFinished, ident: str, server: str, *, late: bool) -> Complete:
    """The end. `server` is the control URL: artifacts are fetched from its port."""
    counts = event.counts
    metrics = {
        "sub_total": counts.total,
        "sub_active": 0,
        "sub_passed": counts.passed,
        "sub_failed": counts.failed + counts.blocked + counts.aborted + counts.lost,
    }
    base = _http(server)
    artifacts = {
        name: Link(url=f"{base}/runs/{quote(event.run)}/{quote(name)}", sha256=artifact.sha256, size=artifact.size)
        for name, artifact in list(event.artifacts.items())[:MAX_ARTIFACTS]
    }
    return Complete(
        seq=seq,
        ident=ident,
        run=event.run,
        result=event.result,
        code=_code(event),
        metrics=metrics,
        verdict=event.verdict,
        counts=counts,
        started=event.started,
        ended=event.ended,
        reason=event.reason and event.reason[:MAX_REASON],
        late=late,
        artifacts=artifacts,
    )


def unknown(seq: int, run: str, ident: str) -> Complete:
    """The end of a run that only the Seneschal has."""
    nothing: dict[str, Any] = {"sub_total": 0, "sub_active": 0, "sub_passed": 0, "sub_failed": 0}
    return Complete(
        seq=seq,
        ident=ident,
        run=run,
        result="ABORTED",
        code=-1,
        metrics=nothing,
        verdict="aborted",
        counts=Counts(),
        reason=UNKNOWN,
    )


def log_entry(event: Logged) -> Log:
    """A client's message, passed on."""
    return Log(
        message=event.message[:MAX_LOG],
        timestamp=event.timestamp,
        severity=event.severity,
        run=event.run,
        test=event.test,
    )


def _code(event: SuiteFinished) -> int:
    if event.code is not None:
        return event.code
    number = signal.Signals.__members__.get(event.signal or "")
    return -1 if number is None else 128 + number


def _http(server: str) -> str:
    parts = urlsplit(server)
    scheme = {"ws": "http", "wss": "https"}.get(parts.scheme, parts.scheme)
    return urlunsplit((scheme, parts.netloc, "", "", ""))
