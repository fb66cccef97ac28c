"""Events become the vertices and edges of the sheet's tables, and these become upserts of bounded size."""

from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import (
    AgentStarted,
    Alert,
    AnyEvent,
    Counts,
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
)
from agent.mimir import graph
from agent.mimir.graph import MAX_TEXT, RESULT, Batch, Told, is_told, tell
from agent.mimir.messages import Edge, Vertex

STARTED = RunStarted(
    run="r-1", suite="login", title="Log in", runner="ava", driver="events", source="git@main", origin="seneschal",
    slot=0, reservation="lab/0/1", polarion={"refuses": "RHEL9-1", "f › by case": "RHEL9-2"},
)  # fmt: skip


def said(event: AnyEvent, started: RunStarted | None = STARTED) -> tuple[dict[str, Any], set[tuple[str, str, str]]]:
    """Vertices by label and id, as (rev, props), and the edges."""
    told = tell(event, "lab", {"hostname": "h"}, started)
    assert is_told(event)
    vertices = {f"{vertex.label} {vertex.id}": (vertex.rev, vertex.props) for vertex in told.vertices}
    assert len(vertices) == len(told.vertices)
    return vertices, {(edge.src, edge.label, edge.dst) for edge in told.edges}


def record(**changes: Any) -> TestFinished:
    fields: dict[str, Any] = {
        "run": "r-1", "suite": "login", "case": "f › refuses", "name": "refuses", "file": "f", "state": "passed",
        "started": 5.0, "ended": 6.0,
    }  # fmt: skip
    return TestFinished(**{**fields, **changes})


def test_the_agents_start_tells_of_its_platform() -> None:
    assert said(AgentStarted(version="1", ident="lab", instance="i"), None) == (
        {"TestPlatform lab": (None, {"hostname": "h"})},
        set(),
    )


def test_the_platform_shows_its_entitlement() -> None:
    changed = EntitlementChanged(status=5, name="registration required", raw="Unknown", source="com.redhat.RHSM1")
    assert said(changed, None) == ({"TestPlatform lab": (None, {"entitlement": "registration required"})}, set())


def test_a_run_comes_with_suite_platform_and_reservation() -> None:
    assert said(STARTED) == (
        {
            "Suite login": (None, {"title": "Log in", "runner": "ava", "source": "git@main"}),
            "Run r-1": (1, {"state": "preparing"}),
        },
        {("r-1", "of", "login"), ("r-1", "ran on", "lab"), ("r-1", "under", "lab/0/1")},
    )
    _, edges = said(msgspec.structs.replace(STARTED, reservation=None))
    assert edges == {("r-1", "of", "login"), ("r-1", "ran on", "lab")}


def test_a_runs_rev_grows_with_its_state_and_with_each_attempt() -> None:
    revs = []
    states: tuple[RunState, ...] = ("preparing", "running", "stopping", "reporting", "done")
    for attempt in (1, 2):
        started = msgspec.structs.replace(STARTED, attempt=attempt)
        for state in states:
            vertices, _ = said(RunChanged(run="r-1", state=state), started)
            ((rev, props),) = vertices.values()
            assert props == {"state": state}
            revs.append(rev)
    assert revs == sorted(set(revs))


@pytest.mark.parametrize("state", ["received", "refused"])
def test_a_run_without_a_slot_is_not_told(state: Any) -> None:
    assert said(RunChanged(run="r-1", state=state), None) == ({}, set())


def test_a_tests_start_is_pending_at_rev_0() -> None:
    event = TestStarted(run="r-1", suite="login", case="f › refuses", name="refuses", file="f", started=5.0)
    assert said(event) == (
        {
            "TestOutcome r-1:f › refuses": (
                0,
                {"result": "PENDING", "start": 5.0, "attempt": 1, "kind": "test"},
            ),
            "TestCase login:f › refuses": (None, {"title": "refuses", "file": "f", "polarion": "RHEL9-1"}),
        },
        {
            ("r-1:f › refuses", "in", "r-1"),
            ("r-1:f › refuses", "of", "login:f › refuses"),
            ("login:f › refuses", "is in", "login"),
        },
    )


def test_a_tests_end_is_rev_1_and_a_correction_more() -> None:
    vertices, edges = said(record(duration=0.5, message="m" * 2000, rev=2, state="aborted"))
    rev, props = vertices["TestOutcome r-1:f › refuses"]
    assert rev == 2
    assert props == {
        "result": "BLOCKED", "state": "aborted", "duration": 0.5, "start": 5.0, "end": 6.0, "attempt": 1,
        "message": "m" * (MAX_TEXT - 1) + "…", "kind": "test", "count": None,
    }  # fmt: skip
    assert "TestCase login:f › refuses" in vertices
    assert len(edges) == 3


@pytest.mark.parametrize(
    ("state", "result"),
    [
        ("passed", "PASSED"), ("failed", "FAILED"), ("blocked", "BLOCKED"), ("skipped", "SKIPPED"),
        ("todo", "SKIPPED"), ("aborted", "BLOCKED"), ("lost", "BLOCKED"),
    ],
)  # fmt: skip
def test_each_state_has_its_result(state: State, result: str) -> None:
    assert RESULT[state] == result
    vertices, _ = said(record(state=state))
    assert vertices["TestOutcome r-1:f › refuses"][1]["result"] == result


def test_hooks_crashes_and_the_rest_are_outcomes_of_no_case() -> None:
    vertices, edges = said(record(kind="rest", case="(not reported)", name="(not reported)", state="lost", count=3))
    assert list(vertices) == ["TestOutcome r-1:(not reported)"]
    assert vertices["TestOutcome r-1:(not reported)"][1]["count"] == 3
    assert edges == {("r-1:(not reported)", "in", "r-1")}


def test_where_only_ends_are_told_the_run_says_which_came_last() -> None:
    vertices, _ = said(record(started=None))
    assert vertices["Run r-1"] == (2, {"last_test": "f › refuses", "last_at": 6.0})
    assert "Run r-1" not in said(record())[0]


def test_a_cases_polarion_id_is_found_by_case_or_name() -> None:
    assert said(record(case="f › by case", name="by case"))[0]["TestCase login:f › by case"][1]["polarion"] == "RHEL9-2"
    assert said(record(case="other", name="other"))[0]["TestCase login:other"][1]["polarion"] is None
    assert said(record(), None)[0]["TestCase login:f › refuses"][1]["polarion"] is None


def test_all_attempts_of_a_test_are_of_one_case() -> None:
    event = TestStarted(run="r-1", suite="login", case="f › by case@2", name="by case", file="f", started=5, attempt=2)
    for told in (event, record(case="f › by case@2", name="by case", attempt=2)):
        vertices, edges = said(told)
        assert vertices["TestCase login:f › by case"][1] == {"title": "by case", "file": "f", "polarion": "RHEL9-2"}
        assert ("r-1:f › by case@2", "of", "login:f › by case") in edges


def test_a_runs_end_carries_verdict_and_counts() -> None:
    event = SuiteFinished(
        run="r-1", suite="login", runner="ava", driver="events", verdict="failed", result="FAILURE", code=1,
        signal=None, reason=None, started=1.0, ended=9.0,
        counts=Counts(total=8, passed=1, failed=2, blocked=1, skipped=1, todo=1, aborted=1, lost=1),
    )  # fmt: skip
    assert said(event) == (
        {
            "Run r-1": (
                5,
                {
                    "state": "done", "verdict": "failed", "passes": 1, "fails": 2, "blocked": 1, "skipped": 1,
                    "todo": 1, "aborted": 1, "lost": 1, "total": 8, "started": 1.0, "ended": 9.0, "code": 1,
                    "reason": None,
                },
            )
        },
        set(),
    )  # fmt: skip


def test_an_imports_outcome_is_on_the_run() -> None:
    event = ImportFinished(run="r-1", mode="polarion", outcome="partial", unmatched=("x",) * 200, jobs=(7,))
    ((rev, props),) = said(event)[0].values()
    assert rev == 5
    assert (props["import_mode"], props["import_outcome"], props["import_jobs"]) == ("polarion", "partial", [7])
    assert len(props["import_unmatched"]) == 100


@pytest.mark.parametrize(("state", "rev"), [("available", 0), ("reserved", 1), ("running", 2), ("returned", 3)])
def test_a_reservation_tells_what_it_knows(state: Any, rev: int) -> None:
    event = ReservationChanged(id="lab/0/1", state=state, run="r-1", available_at=1.0)
    no_lease = {"lease_until": None} if state == "returned" else {}
    assert said(event, None) == (
        {"Reservation lab/0/1": (rev, {"state": state, "run": "r-1", "available_at": 1.0, **no_lease})},
        {("lab/0/1", "of", "lab")},
    )


def test_a_run_whose_suite_says_so_is_not_told() -> None:
    silent = msgspec.structs.replace(STARTED, to_mimir=False)
    for event in (silent, record(), RunChanged(run="r-1", state="done")):
        assert said(event, silent) == ({}, set())


def test_other_events_are_not_owed() -> None:
    assert not is_told(Alert(code="c", text="t", remedy="r", since=1.0))
    assert tell(Alert(code="c", text="t", remedy="r", since=1.0), "lab", {}, None) == Told([], [])


# ---- batches -------------------------------------------------------------------------------------------------------


def test_what_a_batch_says_of_a_vertex_at_one_rev_becomes_one() -> None:
    batch = Batch()
    start = TestStarted(run="r-1", suite="login", case="f › refuses", name="refuses", file="f", started=5.0)
    events: list[AnyEvent] = [STARTED, start, record(message="late")]
    for n, event in enumerate(events, 10):
        assert batch.take(n, tell(event, "lab", {}, STARTED))
    assert batch.take(13, Told([], []))
    payload = batch.payload()
    assert (payload["seq"], batch.seq) == (13, 13)
    assert len(payload["edges"]) == 6
    outcomes = [vertex for vertex in payload["vertices"] if vertex["label"] == "TestOutcome"]
    assert [(outcome["rev"], outcome["props"]["result"]) for outcome in outcomes] == [(0, "PENDING"), (1, "PASSED")]
    assert [vertex["label"] for vertex in payload["vertices"]].count("TestCase") == 1
    assert {"from": "r-1", "label": "of", "to": "login"} in payload["edges"]


def test_different_revs_stay_apart_and_equal_ones_merge() -> None:
    batch = Batch()
    writes: list[tuple[int | None, dict[str, Any]]]
    writes = [(2, {"a": 1, "b": 1}), (2, {"b": 2}), (1, {"a": 0}), (None, {"c": 1}), (None, {"c": None})]
    for n, (rev, props) in enumerate(writes):
        batch.take(n, Told([Vertex(id="x", label="Run", rev=rev, props=props)], []))
    assert batch.payload()["vertices"] == [
        {"id": "x", "label": "Run", "rev": 2, "props": {"a": 1, "b": 2}},
        {"id": "x", "label": "Run", "rev": 1, "props": {"a": 0}},
        {"id": "x", "label": "Run", "props": {"c": None}},
    ]


def test_an_empty_batch_is_nothing_to_write() -> None:
    batch = Batch()
    batch.take(4, Told([], []))
    assert not batch
    assert batch.seq == 4


VERTEX = st.builds(
    Vertex,
    id=st.integers(0, 400).map(str),
    label=st.just("TestCase"),
    rev=st.none() | st.integers(0, 3),
    props=st.dictionaries(st.sampled_from("abc"), st.none() | st.integers() | st.text(max_size=2000), max_size=3),
)
EDGE = st.builds(
    Edge, src=st.integers(0, 9).map(str), label=st.just("of"), dst=st.integers(0, 9).map(str), props=st.just({})
)
TOLD = st.builds(Told, st.lists(VERTEX, max_size=4, unique_by=lambda v: v.id), st.lists(EDGE, max_size=4))


@given(st.lists(TOLD, max_size=30))
def test_batches_keep_the_bounds_and_lose_nothing_of_what_fits(told: list[Told]) -> None:
    """With bounds that a few events reach."""
    batches = [Batch()]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(graph, "MAX_VERTICES", 6)
        monkeypatch.setattr(graph, "MAX_UPSERT", 1500)
        for n, one in enumerate(told, 1):
            if not batches[-1].take(n, one):
                batches.append(Batch())
                assert batches[-1].take(n, one)
    assert [n for batch in batches for n, _ in batch.events] == list(range(1, len(told) + 1))
    for batch, behind in zip(batches, [*batches[1:], None], strict=True):
        if not batch.events:
            continue
        payload = batch.payload()
        size = size_of([*payload["vertices"], *payload["edges"]])
        assert (len(payload["vertices"]) <= 6 and size <= 1500) or len(batch.events) == 1
        if behind is not None:  # what would have fitted is not in the next one
            sent = [part for _, one in (*batch.events, behind.events[0]) for part in (*one.vertices, *one.edges)]
            assert len(payload["vertices"]) + len(behind.events[0][1].vertices) > 6 or size_of(sent) > 1500
        first, second = batch.halves()
        assert [*first.events, *second.events] == batch.events
        assert abs(len(second.events) - len(first.events)) <= 1


def size_of(parts: list[Any]) -> int:
    """As JSON, each with a comma."""
    return sum(len(msgspec.json.encode(part)) + 1 for part in parts)
