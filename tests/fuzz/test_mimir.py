"""Mimir: any batching, any lost answer gives the same graph; any payload is answered or refused by name.

Source: protocols/emissary.md, "Mimir", "Acceptance" 9.
"""

import string
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.core.errors import ActionError
from agent.core.events import (
    AnyEvent,
    Counts,
    ImportFinished,
    RunChanged,
    RunStarted,
    SuiteFinished,
    TestFinished,
    TestStarted,
)
from agent.core.payload import read
from agent.lab.graph import Graph
from agent.lab.queue import Queue
from agent.lab.where import parse
from agent.mimir.graph import Batch, Told, tell
from agent.mimir.messages import Live, Query, Register, Registered, Upsert
from agent.seneschal import messages as seneschal

STARTED = RunStarted(
    run="r-1", suite="s", title="S", runner="tap", driver="tap", source=".", origin="control", slot=0
)  # fmt: skip
CASES = st.sampled_from(["a", "b", "f › c", "ü 🦆"])
TEXT = st.text(max_size=30)


@st.composite
def starts_of_tests(draw: st.DrawFn) -> AnyEvent:
    case = draw(CASES)
    return TestStarted(run="r-1", suite="s", case=case, name=case, file=None, started=draw(st.integers(0, 99)))


@st.composite
def records(draw: st.DrawFn) -> AnyEvent:
    case = draw(CASES)
    return TestFinished(
        run="r-1",
        suite="s",
        case=case,
        name=case,
        file=draw(st.none() | TEXT),
        kind=draw(st.sampled_from(["test", "test", "crash", "rest"])),
        state=draw(st.sampled_from(["passed", "failed", "aborted", "lost"])),
        started=draw(st.none() | st.just(1.0)),
        ended=draw(st.integers(0, 99)),
        message=draw(st.none() | st.text(max_size=2000)),
        rev=draw(st.integers(1, 3)),
    )


EVENTS = st.one_of(
    starts_of_tests(),
    records(),
    records(),
    st.builds(
        RunChanged,
        run=st.just("r-1"),
        state=st.sampled_from(["received", "preparing", "running", "stopping", "reporting", "done"]),
    ),
    st.builds(ImportFinished, run=st.just("r-1"), mode=st.just("polarion"), outcome=st.just("passed"), reason=TEXT),
    st.just(STARTED),
    st.just(
        SuiteFinished(
            run="r-1", suite="s", runner="tap", driver="tap", verdict="passed", result="SUCCESS", code=0, signal=None,
            reason=None, started=1.0, ended=2.0, counts=Counts(total=1, passed=1),
        )
    ),
)  # fmt: skip


@settings(max_examples=100)
@given(st.lists(EVENTS, max_size=25), st.data())
def test_however_it_is_batched_and_repeated_the_graph_is_the_same(events: list[AnyEvent], data: st.DataObject) -> None:
    told = [tell(event, "lab", {}, STARTED) for event in events]
    with closing(Graph(Path(":memory:"))) as one_by_one, closing(Graph(Path(":memory:"))) as batched:
        for one in told:
            one_by_one.upsert(Upsert(vertices=tuple(one.vertices), edges=tuple(one.edges)))
        at = 0
        while at < len(told):
            batch = _batch(told, at, data.draw(st.integers(1, 8), "events in the batch"))
            heard, acted = batched.last_seq("lab", "i"), batch.events[-1][0]
            if batch:
                upsert = read(msgspec.json.decode(msgspec.json.encode(batch.payload())), Upsert)
                batched.upsert(upsert, ("lab", "i"))
                assert batched.last_seq("lab", "i") == max(heard, acted)
            if data.draw(st.integers(0, 3), "answered unless 0"):
                at += len(batch.events)
            else:  # the agent does not know; after the next connection it is told, and goes on above it
                at = max(at, batched.last_seq("lab", "i"))
        assert content(batched) == content(one_by_one)


def _batch(told: list[Told], at: int, count: int) -> Batch:
    batch = Batch()
    for n, one in enumerate(told[at : at + count], at + 1):
        if not batch.take(n, one):
            break
    return batch


def content(graph: Graph) -> list[Any]:
    """All rows without their change numbers."""
    return [row[:-1] for row in graph.rows()]


# ---- payloads ------------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(
    ["r-1", "lab", "lab/0/1", "Run", "Reservation", "TestOutcome", "lost", "of", "eq", "r-1:x", "PASSED", ".x", ""]
)
LEAF = st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(string.printable, max_size=20)
NAMES = """
    ident instance seq vertices edges id label rev props from to where since state result limit after slots lease
    reservations runs run metrics reason reservation code verdict counts server version message in prefix
"""
KEYS = st.sampled_from(NAMES.split())
TREE = st.recursive(
    LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=5), max_leaves=12
)
PAYLOAD = st.dictionaries(KEYS, TREE, max_size=8)
VERTEX = st.fixed_dictionaries(
    {"id": WORDS, "label": WORDS}, optional={"rev": LEAF, "props": st.dictionaries(KEYS, LEAF, max_size=3)}
)
EDGE = st.fixed_dictionaries({"from": WORDS, "label": WORDS, "to": WORDS}, optional={"props": TREE})
UPSERT = st.fixed_dictionaries(
    {"vertices": st.lists(VERTEX, max_size=3), "edges": st.lists(EDGE, max_size=3)}, optional={"seq": st.integers()}
)


@given(st.lists(PAYLOAD | UPSERT, max_size=6))
def test_any_payload_is_answered_or_refused_by_name(payloads: list[dict[str, Any]]) -> None:
    graph = Graph(Path(":memory:"))
    for payload in payloads:
        before = graph.rows()
        for kind in (Register, Registered, Upsert, Query, Live):
            try:
                message = read(payload, kind)
                if isinstance(message, Upsert):
                    graph.upsert(message, ("lab", "i"))
                elif isinstance(message, Query):
                    graph.query(message, parse(message.where))
            except ActionError as err:
                assert err.code in ("bad_payload", "too_big")  # noqa: PT017 - either outcome is right
                if kind is Upsert:
                    assert graph.rows() == before
    graph.close()


@given(st.lists(PAYLOAD, max_size=10))
def test_any_payload_to_the_seneschal_is_answered_or_refused_by_name(payloads: list[dict[str, Any]]) -> None:
    queue = Queue(lambda: "r-new")
    queue.enqueue({"id": "s"})
    hello = {"ident": "lab", "server": "", "version": "1", "instance": "i", "slots": 1}
    queue.register(read(hello, seneschal.Register), 0.0)
    for t, payload in enumerate(payloads):
        for kind in (
            *(seneschal.Register, seneschal.Available, seneschal.Update, seneschal.Accepted, seneschal.Refused),
            *(
                seneschal.Complete,
                seneschal.Log,
                seneschal.Run,
                seneschal.Cancel,
                seneschal.Registered,
                seneschal.Updated,
            ),
        ):
            try:
                match read(payload, kind):
                    case seneschal.Available() as available:
                        queue.available("lab", available, t)
                    case seneschal.Update() as update:
                        queue.update("lab", update, t)
                    case seneschal.Accepted() | seneschal.Refused() | seneschal.Complete() as owed:
                        queue.owed("lab", "i", owed, t)
            except ActionError as err:
                assert err.code in ("bad_payload", "no_such_run")  # noqa: PT017 - either outcome is right
        queue.tick(t)
