"""The trees of jobs that run as suites, from what happens to their tests. Pure.

The agent is the tier above them: its children are the runs, and below a run stand its groups and jobs.

Source: protocols/emissary.md, "Control server" (`children`, `get_tree`); seeds/gator-websocket-api.md, "Children",
"Get Tree".
"""

from typing import Final

import msgspec

from agent.core.event import Event
from agent.core.events import RunStarted, SuiteFinished, TestFinished, TestsSelected, TestStarted
from agent.gator.layer import States
from agent.gator.messages import ChildState, Number, Result, State

HEARD: Final = (RunStarted, TestsSelected, TestStarted, TestFinished, SuiteFinished)
MAX_ENDED: Final = 20  # trees that are shown when they have ended; the oldest go first
RUNNER: Final = "gator"


class _Tree:
    def __init__(self, at: float) -> None:
        self.started, self.updated = at, at
        self.ended: float | None = None
        self.result: Result = "UNKNOWN"
        self.code = 0
        self.states: dict[tuple[str, ...], State] = {}
        self.metrics: dict[str, Number] = {}
        self.done = self.passed = self.failed = 0

    def put(self, file: str | None, name: str, state: State, at: float) -> None:
        self.states[(*(file.split("/") if file else ()), name)] = state
        self.updated = at


class Trees:
    """Fed with the events of HEARD, in order."""

    def __init__(self) -> None:
        self._trees: dict[str, _Tree] = {}

    def feed(self, event: Event, at: float) -> None:
        """Take an event that was published at that epoch time."""
        if isinstance(event, RunStarted):
            if event.runner == RUNNER:
                self._trees[event.run] = _Tree(at)
                ended = [run for run, tree in self._trees.items() if tree.ended is not None]
                for run in ended[: max(0, len(ended) - MAX_ENDED)]:
                    del self._trees[run]
            return
        match event:
            case TestsSelected() if tree := self._trees.get(event.run):
                for file, name in event.tests:
                    tree.put(file, name, "PENDING", at)
            case TestStarted() if tree := self._trees.get(event.run):
                tree.put(event.file, event.name, "STARTED", at)
            case TestFinished() if (tree := self._trees.get(event.run)) and event.kind == "test":
                tree.put(event.file, event.name, "COMPLETE", at)
                tree.done += event.state != "skipped"  # the pruned are in no sum
                tree.passed += event.state == "passed"
                tree.failed += event.state not in ("passed", "skipped")
                for metric, value in event.details.get("metrics", {}).items():
                    tree.metrics[metric] = tree.metrics.get(metric, 0) + value
            case SuiteFinished() if tree := self._trees.get(event.run):
                tree.ended = tree.updated = at
                tree.result = "SUCCESS" if event.verdict == "passed" else "FAILURE"
                tree.code = event.code or 0
            case _:
                pass

    def children(self) -> dict[str, object]:
        """Each run as a child, in the seed's shape."""
        return {run: msgspec.to_builtins(_child(tree)) for run, tree in self._trees.items()}

    def states(self) -> States:
        """Every job of every run with its state, below its groups."""
        return {run: _nested(tree.states) for run, tree in self._trees.items()}


def _child(tree: _Tree) -> ChildState:
    skipped = sum(state == "COMPLETE" for state in tree.states.values()) - tree.done
    sums: dict[str, Number] = {
        "sub_total": len(tree.states) - skipped,
        "sub_active": sum(state == "STARTED" for state in tree.states.values()),
        "sub_passed": tree.passed,
        "sub_failed": tree.failed,
    }
    return ChildState(
        state="STARTED" if tree.ended is None else "COMPLETE",
        result=tree.result,
        server="",
        metrics={**tree.metrics, **sums},
        exitcode=tree.code,
        started=int(tree.started),
        updated=int(tree.updated),
        completed=int(tree.ended or 0),
    )


def _nested(states: dict[tuple[str, ...], State]) -> States:
    root: States = {}
    for path, state in states.items():
        below = root
        for group in path[:-1]:
            inner = below.setdefault(group, {})
            below = inner if isinstance(inner, dict) else {}
        below[path[-1]] = state
    return root
