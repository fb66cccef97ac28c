"""Merged entries: nothing is ever forgotten that no pong has proved to be read, whatever the order of events."""

from collections import defaultdict
from collections.abc import Set

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent.coverage.catalog import Delta
from agent.coverage.merged import UNSPECIFIED, Batch, Budget, Entry, Merged, cost

KNOWN = {"./a.js", "./b.js", "a", "b", "c"}


def deltas(*entries: Entry) -> list[Delta]:
    return [Delta(class_id, probes, test) for class_id, test, probes in entries]


def taken(store: Merged, known: Set[str] = KNOWN) -> list[Entry]:
    return [entry for batch in store.take(known) for entry in batch.entries()]


def merged(limit: int = 2**20) -> Merged:
    return Merged(Budget(limit, lambda need: False))


def test_an_entry_is_sent_whole_and_once() -> None:
    store = merged()
    assert store.add(deltas(("./a.js", "t1", 1))) == set()
    assert taken(store) == [("./a.js", "t1", 1)]
    assert store.add(deltas(("./a.js", "t1", 1))) == set()
    assert taken(store) == []
    store.add(deltas(("./a.js", "t1", 4), ("./a.js", "t2", 2)))
    assert taken(store) == [("./a.js", "t1", 5), ("./a.js", "t2", 2)]


def test_what_the_admin_does_not_know_waits() -> None:
    store = merged()
    store.add(deltas(("./a.js", "t1", 1), ("./b.js", "t1", 1)))
    assert taken(store, {"./b.js"}) == [("./b.js", "t1", 1)]
    assert taken(store) == [("./a.js", "t1", 1)]


def test_no_room_refuses_new_classes_and_takes_old_ones() -> None:
    store = merged(limit=cost(("./a.js", "t"), 1))
    assert store.add(deltas(("./a.js", "t", 1), ("./b.js", "t", 1))) == {"./b.js"}
    assert store.add(deltas(("./a.js", "t", 2))) == set()
    assert store.entries() == [("./a.js", "t", 3)]


def test_folded_it_has_one_entry_for_each_class() -> None:
    store = merged()
    store.add(deltas(("./a.js", "t1", 1), ("./a.js", "t2", 2), ("./b.js", "t1", 4)))
    store.fold()
    assert taken(store) == [("./a.js", UNSPECIFIED, 3), ("./b.js", UNSPECIFIED, 4)]
    store.add(deltas(("./a.js", "t3", 8)))
    assert taken(store) == [("./a.js", UNSPECIFIED, 11)]


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("tu"), st.integers(1, 2**80))), st.integers(0, 3))
def test_its_size_is_that_of_its_entries(entries: list[Entry], then: int) -> None:
    budget = Budget(2**20, lambda need: False)
    store = Merged(budget)
    store.add(deltas(*entries))
    if then == 1:
        store.fold()
    if then == 2:
        store.forget({"a", "nothing"})
    if then == 3:
        store.clear()
    assert store.size == budget.used == sum(cost((name, test), probes) for name, test, probes in store.entries())


@given(
    st.lists(st.tuples(st.sampled_from("abcdef"), st.sampled_from("tuv"), st.integers(1, 2**80)), max_size=30),
    st.integers(0, 8),
)
def test_room_that_is_made_in_the_middle_loses_and_counts_nothing_twice(entries: list[Entry], room: int) -> None:
    def fold(need: int) -> bool:
        if not store.folded:
            store.fold()
        return budget.used + need <= budget.limit

    budget = Budget(room * cost(("a", "t"), 1), fold)
    store = Merged(budget)
    refused = store.add(deltas(*entries))
    assert store.size == budget.used == sum(cost((name, test), probes) for name, test, probes in store.entries())
    found = defaultdict[str, int](int)
    for class_id, _, probes in store.entries():
        found[class_id] |= probes
    for class_id, _, probes in entries:
        assert class_id in refused or probes & found[class_id] == probes
    assert {entry for batch in store.take(set("abcdef")) for entry in batch.entries()} == set(store.entries())


class Delivery(RuleBasedStateMachine):
    """Against an admin that reads in order, and a line that may break between any two things that are sent."""

    def __init__(self) -> None:
        super().__init__()
        self.store = merged()
        self.seen = defaultdict[str, int](int)  # by class: what the sources saw
        self.admin = defaultdict[str, int](int)  # by class: what the admin has read
        self.line: list[list[Batch] | int] = []  # sent, not read yet: a part, or a ping
        self.number = 0

    @rule(class_id=st.sampled_from("abc"), test=st.sampled_from("tuv"), probes=st.integers(1, 7))
    def collect(self, class_id: str, test: str, probes: int) -> None:
        assert self.store.add(deltas((class_id, test, probes))) == set()
        self.seen[class_id] |= probes

    @rule()
    def flush(self) -> None:
        self.number += 1
        batches = self.store.take(KNOWN)
        self.store.sent(batches, self.number)
        self.line += [batches, self.number]

    @rule(count=st.integers(1, 4))
    def read(self, count: int) -> None:
        for sent in self.line[:count]:
            if isinstance(sent, int):
                self.store.pong(sent)
            else:
                for class_id, _, probes in (entry for batch in sent for entry in batch.entries()):
                    self.admin[class_id] |= probes
        del self.line[:count]

    @rule()
    def cut(self) -> None:
        self.line.clear()
        self.store.lost()

    @rule()
    def begin_anew(self) -> None:
        self.store.soil()

    @rule()
    def fold(self) -> None:
        self.store.fold()

    @invariant()
    def what_it_calls_told_was_read(self) -> None:
        if self.store.told:
            assert self.admin == {name: probes for name, probes in self.seen.items() if probes}

    def teardown(self) -> None:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        self.flush()
        self.read(len(self.line))
        assert self.store.told
        assert self.admin == self.seen


TestDelivery = Delivery.TestCase
