"""One run as a state machine: its states, its counts, its limits. Pure.

    received -> refused | preparing -> running -> stopping -> reporting -> done

`ALLOWED` is the table of the sheet. The limits give a time to look again (`next_check`) and, when it has passed, the
reason for which we end the run (`overdue`). Every time is an argument, in seconds of a clock that never steps: a
machine that learns the date in mid-run must not lose the run. `deadline` is on that clock too.

Source: protocols/suites.md, "A run", "The suite document" (limits); protocols/emissary.md, "Run states on the agent".
"""

from typing import Any

import msgspec

from agent.core.errors import ProtocolMisuse
from agent.core.events import AnyEvent, RunState, TestFinished, TestStarted
from agent.suites.messages import Limits, Suite

ALLOWED: dict[RunState, frozenset[RunState]] = {
    "received": frozenset({"refused", "preparing"}),
    "preparing": frozenset({"running", "reporting"}),
    "running": frozenset({"stopping", "reporting"}),
    "stopping": frozenset({"reporting"}),
    "reporting": frozenset({"done"}),
    "refused": frozenset(),
    "done": frozenset(),
}

_DEFAULT = Limits()


class Run:
    """A run on this machine. `stop_reason` is why we end it; the first reason stays."""

    def __init__(
        self,
        run: str,
        suite: Suite,
        *,
        origin: str,
        now: float,
        slot: int,
        reservation: str | None = None,
        deadline: float | None = None,
        timeout_factor: float = 1.0,
        attempt: int = 1,
    ) -> None:
        self.run, self.suite, self.origin, self.slot = run, suite, origin, slot
        self.reservation, self.deadline, self.attempt = reservation, deadline, attempt
        self.limits = scaled(suite.limits, timeout_factor)
        self.state: RunState = "received"
        self.since = self.began = now
        self.stop_reason: str | None = None
        self._ended: dict[str, int] = {}
        self._tests: dict[str, float] = {}  # case -> when it began, of those that run now
        self._last_result = now

    def advance(self, state: RunState, now: float) -> None:
        """Go to another state. Raises ProtocolMisuse where the table forbids it."""
        if state not in ALLOWED[self.state]:
            raise ProtocolMisuse(
                f"run {self.run} cannot go from {self.state} to {state}", remedy="This is a bug of the agent."
            )
        self.state, self.since = state, now
        if state == "running":
            self._last_result = now

    def stop(self, reason: str) -> bool:
        """We end the run. False when it was being ended already, or is over."""
        if self.stop_reason is not None or self.state in ("reporting", "refused", "done"):
            return False
        self.stop_reason = reason
        return True

    def feed(self, event: AnyEvent, now: float) -> None:
        """Take what the driver says."""
        match event:
            case TestStarted():
                self._tests[event.case] = now
            case TestFinished():
                self._tests.pop(event.case, None)
                self._last_result = now
                if event.kind == "test" and event.rev == 1:
                    self._ended[event.state] = self._ended.get(event.state, 0) + 1

    def overdue(self, now: float) -> str | None:
        """Why the run must be ended now, or None. Source: the sheet's `limits`, and the Seneschal's `deadline`."""
        for at, reason in self._checks():
            if now >= at:
                return reason
        return None

    def next_check(self) -> float | None:
        """The earliest time at which `overdue` may say something; None without any limit."""
        return min((at for at, _ in self._checks()), default=None)

    def _checks(self) -> list[tuple[float, str]]:
        limits, checks = self.limits, []
        if self.deadline is not None:
            checks.append((self.deadline, "deadline: the lab's deadline has passed"))
        if self.state == "preparing" and limits.setup:
            checks.append((self.began + limits.setup, f"limits.setup: not prepared within {limits.setup:g} s"))
        if self.state == "running":
            if limits.run:
                checks.append((self.since + limits.run, f"limits.run: not over within {limits.run:g} s"))
            if limits.stall:
                checks.append((self._last_result + limits.stall, f"limits.stall: no new result for {limits.stall:g} s"))
            if limits.test and self._tests:
                case, began = min(self._tests.items(), key=lambda item: item[1])
                checks.append((began + limits.test, f"limits.test: {case!r} took more than {limits.test:g} s"))
        return checks

    def describe(self, now: float, epoch: float) -> dict[str, Any]:
        """The run in `status` and in the Seneschal's heartbeat; `since` is epoch seconds, which `epoch` is at `now`."""
        test = next(iter(self._tests), None)
        since = self._tests[test] if test is not None else self.since
        return {
            "run": self.run,
            "suite": self.suite.id,
            "state": self.state,
            "test": test,
            "since": epoch - (now - since),
            "counts": dict(self._ended),
            "reservation": self.reservation,
            "origin": self.origin,
        }


def scaled(limits: Limits, factor: float) -> Limits:
    """The limits of a slow machine: `timeout_factor` multiplies the defaults, not what a document says itself."""
    return msgspec.structs.replace(
        limits,
        **{
            name: getattr(limits, name) * factor
            for name in ("setup", "run", "stall", "grace")
            if getattr(limits, name) == getattr(_DEFAULT, name)
        },
    )
