"""Which runs and tests are active, from what is told of them: what a matched line is tagged with.

Source: protocols/logs.md 2.3; protocols/suites.md, "A run".
"""

from agent.core.event import Event
from agent.core.events import RunStarted, SuiteFinished, TestFinished, TestStarted


class Active:
    """The runs and tests that are active now."""

    def __init__(self) -> None:
        self.tests: dict[str, set[str]] = {}  # by run

    def feed(self, event: Event) -> None:
        match event:
            case SuiteFinished(run=run):
                self.tests.pop(run, None)
            case TestStarted(run=run, test=test):
                self.tests.setdefault(run, set()).add(test)
            case TestFinished(run=run, test=test):
                self.tests.get(run, set()).discard(test)
            case RunStarted(run=run):
                self.tests.setdefault(run, set())

    def now(self, run: str | None) -> tuple[str | None, str | None]:
        """The run, `run` itself where the watch is a run's, and the test, each where there is one alone."""
        if run is None and len(self.tests) == 1:
            run = next(iter(self.tests))
        tests = self.tests.get(run or "", set())
        return run, next(iter(tests)) if len(tests) == 1 else None
