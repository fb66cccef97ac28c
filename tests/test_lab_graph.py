"""The lab's graph: upserts, revisions, transitions, queries, changes, and deliveries that come twice."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from agent.core.errors import ActionError
from agent.lab.graph import Graph
from agent.lab.where import parse
from agent.mimir.messages import MAX_UPSERT, MAX_VERTICES, TRANSITIONS, Edge, Query, Upsert, Vertex

WRITER = ("lab-07", "i-1")


@pytest.fixture
def graph(tmp_path: Path) -> Iterator[Graph]:
    graph = Graph(tmp_path / "lab" / "mimir.db")
    yield graph
    graph.close()


def run(rev: int | None = None, key: str = "r-1", **props: Any) -> Vertex:
    return Vertex(id=key, label="Run", rev=rev, props=props)


def stored(graph: Graph, label: Any = "Run") -> dict[str, tuple[int | None, dict[str, Any]]]:
    page = graph.query(Query(label=label, limit=1000), ())
    return {vertex["id"]: (vertex["rev"], vertex["props"]) for vertex in page["vertices"]}


def upsert(graph: Graph, *vertices: Vertex) -> int:
    return graph.upsert(Upsert(vertices=vertices))


def test_props_merge_null_deletes_and_the_same_again_is_no_change(graph: Graph) -> None:
    assert upsert(graph, run(a=1, b=1, c=None)) == 1
    assert upsert(graph, run(b=2, d=3)) == 1
    assert upsert(graph, run(a=None)) == 1
    assert stored(graph) == {"r-1": (None, {"b": 2, "d": 3})}
    rows = graph.rows()
    assert upsert(graph, run(b=2, a=None)) == 0
    assert graph.rows() == rows


def test_a_lower_rev_is_ignored_and_a_missing_one_keeps_the_stored(graph: Graph) -> None:
    upsert(graph, run(2, a=2))
    assert upsert(graph, run(1, a=1, b=1)) == 0
    assert upsert(graph, run(c=1)) == 1
    assert upsert(graph, run(2, a=3)) == 1
    assert stored(graph) == {"r-1": (2, {"a": 3, "c": 1})}


def test_an_upsert_is_one_transaction(graph: Graph) -> None:
    upsert(graph, run(a=1))
    seq = graph.seq
    with pytest.raises(ActionError, match=r"vertices\[1\].props.state: 'x' is none of available lost"):
        upsert(graph, run(a=2), Vertex(id="l/0/1", label="Reservation", props={"state": "x"}))
    with pytest.raises(ActionError, match=r"vertices\[1\].label: r-1 is a Run, not a Suite"):
        upsert(graph, run(a=3), Vertex(id="r-1", label="Suite"))
    assert stored(graph) == {"r-1": (None, {"a": 1})}
    assert graph.seq == seq


def test_edges_are_a_set(graph: Graph) -> None:
    edge = Edge(src="r-1", label="ran on", dst="lab-07")
    assert graph.upsert(Upsert(edges=(edge, edge))) == 1
    assert graph.upsert(Upsert(edges=(edge,))) == 0
    assert graph.upsert(Upsert(edges=(Edge(src="r-1", label="ran on", dst="lab-07", props={"x": 1}),))) == 1
    upsert(graph, run())
    page = graph.query(Query(label="Run", edges=("ran on", "of")), ())
    assert page["edges"] == [{"from": "r-1", "label": "ran on", "to": "lab-07", "props": {"x": 1}}]


@pytest.mark.parametrize("old", TRANSITIONS)
@pytest.mark.parametrize("new", TRANSITIONS)
def test_a_reservation_goes_only_where_the_table_says(graph: Graph, old: Any, new: Any) -> None:
    upsert(graph, Vertex(id="l/0/1", label="Reservation", props={"state": old}))
    again = Vertex(id="l/0/1", label="Reservation", props={"state": new})
    if new == old:
        assert upsert(graph, again) == 0
    elif new in TRANSITIONS[old]:
        assert upsert(graph, again) == 1
    else:
        with pytest.raises(ActionError, match=f"cannot go from {old} to {new}"):
            upsert(graph, again)


@pytest.mark.parametrize(
    ("label", "key"),
    [
        ("Run", ".hidden"),
        ("Run", "a b"),
        ("Reservation", "lab-07/0"),
        ("TestOutcome", "r-1"),
        ("TestCase", ":x"),
        ("TestPlatform", "a/b"),
    ],
)
def test_an_id_that_is_none_of_its_label_is_refused(graph: Graph, label: Any, key: str) -> None:
    with pytest.raises(ActionError, match=f"is no id of a {label}"):
        upsert(graph, Vertex(id=key, label=label))


@pytest.mark.parametrize("result", ["passed", True, ["PASSED"], 3])
def test_a_result_is_one_of_five_words(graph: Graph, result: Any) -> None:
    with pytest.raises(ActionError, match="is none of BLOCKED FAILED PASSED PENDING SKIPPED"):
        upsert(graph, Vertex(id="r-1:x", label="TestOutcome", props={"result": result}))


def test_what_is_too_big_is_refused_whole(graph: Graph) -> None:
    with pytest.raises(ActionError) as many:
        upsert(graph, *[run(key=f"r-{n}") for n in range(MAX_VERTICES + 1)])
    assert many.value.reason == "too_big: 257 vertices, 0 edges; at most 256, 1024 fit"
    with pytest.raises(ActionError, match="bytes; at most 65536 fit"):
        upsert(graph, run(text="x" * MAX_UPSERT))
    assert stored(graph) == {}


def test_a_delivery_that_was_heard_changes_nothing_and_a_new_instance_begins_anew(graph: Graph) -> None:
    assert graph.upsert(Upsert(seq=5, vertices=(run(a=1),)), WRITER) == 1
    assert graph.last_seq(*WRITER) == 5
    for seq in (5, 4):
        assert graph.upsert(Upsert(seq=seq, vertices=(run(a=0),)), WRITER) == 0
    assert graph.last_seq("lab-07", "i-2") == 0
    assert graph.upsert(Upsert(seq=1, vertices=(run(a=2),)), ("lab-07", "i-2")) == 1
    assert stored(graph) == {"r-1": (None, {"a": 2})}


def test_a_refused_delivery_is_not_heard(graph: Graph) -> None:
    with pytest.raises(ActionError):
        graph.upsert(Upsert(seq=5, vertices=(Vertex(id="x", label="Reservation"),)), WRITER)
    assert graph.last_seq(*WRITER) == 0


def test_all_of_it_survives_a_restart(tmp_path: Path) -> None:
    first = Graph(tmp_path / "mimir.db")
    first.upsert(Upsert(seq=9, vertices=(run(1, a=1),), edges=(Edge(src="r-1", label="of", dst="s"),)), WRITER)
    rows, seq = first.rows(), first.seq
    first.close()
    second = Graph(tmp_path / "mimir.db")
    assert second.rows() == rows
    assert (second.seq, second.last_seq(*WRITER)) == (seq, 9)
    second.close()


def test_a_query_goes_page_by_page(graph: Graph) -> None:
    upsert(graph, *[run(key=f"r-{n:02}", n=n) for n in range(25)])
    got, after, pages = [], "", 0
    where = parse({"n": {"ge": 3}})
    while True:
        page = graph.query(Query(label="Run", after=after, limit=10), where)
        got += [vertex["props"]["n"] for vertex in page["vertices"]]
        pages += 1
        if page["next"] is None:
            break
        after = page["next"]
    assert (got, pages) == (list(range(3, 25)), 3)


def test_a_page_is_bounded_in_bytes_and_a_snapshot_says_what_to_do(graph: Graph) -> None:
    for n in range(20):
        upsert(graph, run(key=f"r-{n:02}", text="x" * 60_000))
    page = graph.query(Query(label="Run"), ())
    assert 1 <= len(page["vertices"]) < 20
    assert len(msgspec.json.encode(page)) < 600 * 1024
    with pytest.raises(ActionError) as refused:
        graph.snapshot("Run", ())
    assert refused.value.code == "too_big"
    assert "page by page" in refused.value.what


def test_a_change_is_a_create_an_update_or_a_delete_to_who_filters(graph: Graph) -> None:
    for props in ({"state": "running", "n": 1}, {"state": "done", "n": 1}, {"state": "done", "n": 2}, {"state": None}):
        upsert(graph, run(**props))
    changes = graph.changes("Run", 0)
    assert [change.seq for change in changes] == [1, 2, 3, 4]
    done = parse({"state": "done"})
    assert [change.seen(done) for change in changes] == [
        None,
        ("create", {"state": "done", "n": 1}),
        ("update", {"n": 2}),
        ("delete", {"state": None}),
    ]
    assert changes[0].seen(()) == ("create", {"state": "running", "n": 1})
    assert graph.changes("Suite", 0) == []
    assert [change.seq for change in graph.changes("Run", 2)] == [3, 4]


def test_only_the_last_changes_are_kept(tmp_path: Path) -> None:
    graph = Graph(tmp_path / "mimir.db", keep_changes=3)
    assert graph.oldest_change() == 1
    for n in range(10):
        upsert(graph, run(n=n))
    assert graph.oldest_change() == 8
    assert [change.seq for change in graph.changes("Run", 0)] == [8, 9, 10]
    graph.close()


def test_reservations_that_were_not_renewed_are_lost(graph: Graph) -> None:
    for n, state in enumerate(["available", "reserved", "running", "lost", "returned"]):
        upsert(graph, Vertex(id=f"l/0/{n}", label="Reservation", props={"state": state, "lease_until": 50.0}))
    upsert(graph, Vertex(id="l/0/9", label="Reservation", props={"state": "available"}))
    assert graph.lapse(49.9) == []
    assert graph.lapse(50.0) == ["l/0/0", "l/0/1", "l/0/2"]
    assert graph.lapse(51.0) == []
    states = [vertex["props"]["state"] for vertex in graph.snapshot("Reservation", ())]
    assert states == ["lost", "lost", "lost", "lost", "returned", "available"]


def test_outcomes_of_a_run_are_counted_by_result(graph: Graph) -> None:
    for n, result in enumerate(["PASSED", "PASSED", "FAILED"]):
        outcome = Vertex(id=f"r-1:{n}", label="TestOutcome", props={"result": result})
        graph.upsert(Upsert(vertices=(outcome,), edges=(Edge(src=f"r-1:{n}", label="in", dst="r-1"),)))
    assert graph.outcomes("r-1") == {"PASSED": 2, "FAILED": 1}
    assert graph.outcomes("r-2") == {}
