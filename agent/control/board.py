"""What is so now, from what happened: links, alerts, and the tests that run. Pure.

Source: protocols/emissary.md, "Control server" (`status`, `log`); protocols/settings.md (loud events).
"""

from agent.control.messages import AlertShown, LinkShown
from agent.core.event import Event
from agent.core.events import (
    Alert,
    AlertCleared,
    LinkChanged,
    RunStarted,
    SuiteFinished,
    TestFinished,
    TestStarted,
)

HEARD = (LinkChanged, Alert, AlertCleared, RunStarted, SuiteFinished, TestStarted, TestFinished)


class Board:
    """The state of links and alerts by name, and which tests of which runs are active."""

    def __init__(self) -> None:
        self.links: dict[str, LinkShown] = {}
        self.alerts: dict[str, AlertShown] = {}
        self._active: dict[str, dict[str, None]] = {}

    def feed(self, event: Event, at: float) -> None:
        """Take an event of `HEARD`, which was published at that epoch time."""
        match event:
            case LinkChanged():
                self.links[event.name] = LinkShown(state=event.state, since=at, error=event.error)
            case Alert():
                self.alerts[event.code] = AlertShown(
                    code=event.code, text=event.text, remedy=event.remedy, since=event.since
                )
            case AlertCleared():
                self.alerts.pop(event.code, None)
            case RunStarted():
                self._active[event.run] = {}
            case SuiteFinished():
                self._active.pop(event.run, None)
            case TestStarted() if event.run in self._active:
                self._active[event.run][event.test] = None
            case TestFinished() if event.run in self._active:
                self._active[event.run].pop(event.test, None)

    def active(self) -> tuple[str | None, str | None]:
        """The one run and its one test (`run:case`); None for either that there is not exactly one of."""
        if len(self._active) != 1:
            return None, None
        ((run, tests),) = self._active.items()
        return run, next(iter(tests)) if len(tests) == 1 else None
