"""A session is the same after a restart, wherever it stood."""

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from agent.coverage.catalog import Delta
from agent.coverage.merged import Budget
from agent.coverage.messages import StartSession
from agent.coverage.session import Saved, Session


@given(
    st.lists(st.tuples(st.text(max_size=4), st.text(max_size=4), st.integers(1, 2**200)), max_size=8),
    st.booleans(),
    st.sampled_from(["running", "stopping", "owed"]),
)
def test_it_survives_its_checkpoint(entries: list[tuple[str, str, int]], by_all: bool, state: str) -> None:
    budget = Budget(2**20, lambda need: False)
    session = Session(StartSession("s1", "AUTO", None, True), budget, since=5.5, began=1.0)
    session.state = state  # type: ignore[assignment]  # one of them
    session.by_all, session.seen = by_all, bool(entries)
    session.merged.add(Delta(class_id, probes, test) for class_id, test, probes in entries)
    kept = msgspec.json.decode(msgspec.json.encode(session.saved()), type=Saved)
    other = Session.restored(kept, Budget(2**20, lambda need: False), now=9.0)
    assert other.state == ("running" if state == "running" else "owed")
    assert sorted(other.merged.entries()) == sorted(session.merged.entries())
    assert other.saved() == msgspec.structs.replace(session.saved(), entries=other.saved().entries)
    taken = other.merged.take({class_id for class_id, _, _ in entries})
    assert [entry for batch in taken for entry in batch.entries()] == other.merged.entries()


def test_what_is_shown_says_whether_the_admin_has_it_all() -> None:
    session = Session(StartSession("s1", "AUTO", "smoke"), Budget(2**20, lambda need: False), since=5.5, began=1.0)
    assert not session.shown().waiting
    session.merged.add([Delta("./a.js", 1, "t")])
    assert session.shown().waiting
    session.merged.sent(session.merged.take({"./a.js"}), 1)
    assert session.shown().waiting
    session.merged.pong(1)
    assert not session.shown().waiting
