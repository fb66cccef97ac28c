"""From events to vertices and edges, and from these to upserts. Pure.

A test's start is rev 0, its end rev 1, a correction more. A run's rev grows with its state, a reservation's too, so
that a message that comes again, or late, changes nothing.

Source: protocols/emissary.md, "Mimir" (the tables of vertices and edges); protocols/suites.md, "States".
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import msgspec

from agent.core.events import (
    AgentStarted,
    AnyEvent,
    EntitlementChanged,
    ImportFinished,
    ReservationChanged,
    RunChanged,
    RunStarted,
    RunState,
    State,
    SuiteFinished,
    TestFinished,
    TestStarted,
    of_all_attempts,
)
from agent.mimir.messages import MAX_UPSERT, MAX_VERTICES, RESERVATION_REV, Edge, Result, Vertex

MAX_TEXT = 1024  # characters of a message in the graph; the whole of it is in the result document
MAX_NAMES = 100  # unmatched tests of an import; all of them are in its event

RESULT: dict[State, Result] = {
    "passed": "PASSED",
    "failed": "FAILED",
    "blocked": "BLOCKED",
    "skipped": "SKIPPED",
    "todo": "SKIPPED",
    "aborted": "BLOCKED",
    "lost": "BLOCKED",
}
_RUN_REV: dict[RunState, int] = {"preparing": 1, "running": 2, "stopping": 3, "reporting": 4, "done": 5}

TOLD = (
    AgentStarted,
    ReservationChanged,
    RunStarted,
    RunChanged,
    TestStarted,
    TestFinished,
    SuiteFinished,
    ImportFinished,
    EntitlementChanged,
)
_encode = msgspec.json.Encoder().encode


class Told(NamedTuple):
    """What an event means to the graph; often nothing."""

    vertices: list[Vertex]
    edges: list[Edge]


def is_told(event: AnyEvent) -> bool:
    """Is the event owed to Mimir?"""
    return isinstance(event, TOLD)


def tell(event: AnyEvent, ident: str, platform: Mapping[str, Any], started: RunStarted | None) -> Told:
    """The vertices and edges of an event.

    `platform` are the props of this TestPlatform, `started` the last RunStarted of the event's run where the journal
    has it. A run whose suite says `report.mimir = false` is not told.
    """
    if started is not None and not started.to_mimir:
        return Told([], [])
    match event:
        case AgentStarted():
            return Told([Vertex(id=ident, label="TestPlatform", props=dict(platform))], [])
        case EntitlementChanged():
            return Told([Vertex(id=ident, label="TestPlatform", props={"entitlement": event.name})], [])
        case ReservationChanged():
            return _reservation(event, ident)
        case RunStarted():
            return _run_started(event, ident)
        case RunChanged() if event.state in _RUN_REV:
            return Told([_run(event.run, event.state, started, {"state": event.state})], [])
        case TestStarted():
            return _test_started(event, started)
        case TestFinished():
            return _test_finished(event, started)
        case SuiteFinished():
            return Told([_run(event.run, "done", started, _verdict(event))], [])
        case ImportFinished():
            return Told([_run(event.run, "done", started, _imported(event))], [])
        case _:
            return Told([], [])


class Batch:
    """The events that go into one upsert: what they say of a vertex at one rev becomes one vertex.

    At different revs they stay apart: the graph may know of a rev between them, and ignores the lower ones only.
    """

    def __init__(self) -> None:
        self.events: list[tuple[int, Told]] = []
        self._vertices: list[Vertex] = []
        self._last: dict[str, int] = {}  # id -> where its last vertex is
        self._edges: dict[tuple[str, str, str], Edge] = {}
        self._size = 0

    @property
    def seq(self) -> int:
        """The outbox number of the last event."""
        return self.events[-1][0]

    def take(self, n: int, told: Told) -> bool:
        """Add an event; False, and nothing added, where the upsert would be too big. The first one always fits."""
        size = sum(len(_encode(part)) + 1 for part in (*told.vertices, *told.edges))
        added = sum(not self._merges(vertex) for vertex in told.vertices)
        if self.events and (len(self._vertices) + added > MAX_VERTICES or self._size + size > MAX_UPSERT):
            return False
        self._size += size
        self.events.append((n, told))
        for vertex in told.vertices:
            if self._merges(vertex):
                earlier = self._vertices[self._last[vertex.id]]
                merged = msgspec.structs.replace(vertex, props={**earlier.props, **vertex.props})
                self._vertices[self._last[vertex.id]] = merged
            else:
                self._last[vertex.id] = len(self._vertices)
                self._vertices.append(vertex)
        self._edges.update(((edge.src, edge.label, edge.dst), edge) for edge in told.edges)
        return True

    def halves(self) -> tuple["Batch", "Batch"]:
        """The same events in two batches, to find the one that is refused."""
        first, second, middle = Batch(), Batch(), len(self.events) // 2
        for i, (n, told) in enumerate(self.events):
            (first if i < middle else second).take(n, told)
        return first, second

    def payload(self) -> dict[str, Any]:
        """The payload of `upsert`."""
        parts = {"vertices": self._vertices, "edges": list(self._edges.values())}
        return {"seq": self.seq, **msgspec.to_builtins(parts)}

    def __bool__(self) -> bool:
        """Is there anything to write?"""
        return bool(self._vertices or self._edges)

    def _merges(self, vertex: Vertex) -> bool:
        return vertex.id in self._last and self._vertices[self._last[vertex.id]].rev == vertex.rev


def _reservation(event: ReservationChanged, ident: str) -> Told:
    named = msgspec.to_builtins(event)
    props = {key: value for key, value in named.items() if key != "id" and value is not None}
    if event.state == "returned":
        props["lease_until"] = None
    vertex = Vertex(id=event.id, label="Reservation", rev=RESERVATION_REV[event.state], props=props)
    return Told([vertex], [Edge(src=event.id, label="of", dst=ident)])


def _run(run: str, state: RunState, started: RunStarted | None, props: dict[str, Any]) -> Vertex:
    attempt = 1 if started is None else started.attempt
    return Vertex(id=run, label="Run", rev=10 * (attempt - 1) + _RUN_REV[state], props=props)


def _run_started(event: RunStarted, ident: str) -> Told:
    suite = Vertex(
        id=event.suite,
        label="Suite",
        props={"title": event.title, "runner": event.runner, "source": event.source},
    )
    edges = [Edge(src=event.run, label="of", dst=event.suite), Edge(src=event.run, label="ran on", dst=ident)]
    if event.reservation is not None:
        edges.append(Edge(src=event.run, label="under", dst=event.reservation))
    return Told([suite, _run(event.run, "preparing", event, {"state": "preparing"})], edges)


def _test_started(event: TestStarted, started: RunStarted | None) -> Told:
    props = {"result": "PENDING", "start": event.started, "attempt": event.attempt, "kind": "test"}
    outcome = Vertex(id=event.test, label="TestOutcome", rev=0, props=props)
    return _with_case(outcome, event, started)


def _test_finished(event: TestFinished, started: RunStarted | None) -> Told:
    props = {
        "result": RESULT[event.state],
        "state": event.state,
        "duration": event.duration,
        "start": event.started,
        "end": event.ended,
        "message": _cut(event.message),
        "attempt": event.attempt,
        "kind": event.kind,
        "count": event.count,
    }
    outcome = Vertex(id=event.test, label="TestOutcome", rev=event.rev, props=props)
    if event.kind == "test":
        told = _with_case(outcome, event, started)
    else:
        told = Told([outcome], [Edge(src=event.test, label="in", dst=event.run)])
    if event.started is None:  # the runner tells only ends: no PENDING shows where the run is
        told.vertices.append(_run(event.run, "running", started, {"last_test": event.case, "last_at": event.ended}))
    return told


def _with_case(outcome: Vertex, event: TestStarted | TestFinished, started: RunStarted | None) -> Told:
    polarion = {} if started is None else started.polarion
    name = of_all_attempts(event.case, event.attempt)
    case = Vertex(
        id=f"{event.suite}:{name}",
        label="TestCase",
        props={
            "title": event.name,
            "file": event.file,
            "polarion": polarion.get(name, polarion.get(event.name)),
        },
    )
    edges = [
        Edge(src=outcome.id, label="in", dst=event.run),
        Edge(src=outcome.id, label="of", dst=case.id),
        Edge(src=case.id, label="is in", dst=event.suite),
    ]
    return Told([outcome, case], edges)


def _verdict(event: SuiteFinished) -> dict[str, Any]:
    counts = event.counts
    return {
        "state": "done",
        "verdict": event.verdict,
        "passes": counts.passed,
        "fails": counts.failed,
        "blocked": counts.blocked,
        "skipped": counts.skipped,
        "todo": counts.todo,
        "aborted": counts.aborted,
        "lost": counts.lost,
        "total": counts.total,
        "started": event.started,
        "ended": event.ended,
        "code": event.code,
        "reason": _cut(event.reason),
    }


def _imported(event: ImportFinished) -> dict[str, Any]:
    return {
        "import_mode": event.mode,
        "import_outcome": event.outcome,
        "import_unmatched": [_cut(name) for name in event.unmatched[:MAX_NAMES]],
        "import_jobs": list(event.jobs[:MAX_NAMES]),
        "import_reason": _cut(event.reason),
        "testrun_url": _cut(event.testrun_url),
        "log_url": _cut(event.log_url),
    }


def _cut(text: str | None) -> str | None:
    return text if text is None or len(text) <= MAX_TEXT else f"{text[: MAX_TEXT - 1]}…"
