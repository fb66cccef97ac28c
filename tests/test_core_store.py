"""The store: durable in groups, numbered without gaps, owed until acknowledged, honest about a full disk."""

import os
import sqlite3
from pathlib import Path

import msgspec
import pytest
import trio

from agent.core.bus import Bus
from agent.core.errors import StoreError
from agent.core.events import Alert, AlertCleared, AnyEvent, Recorded, RunChanged, decode
from agent.core.store import MAX_PENDING, Depth, Outbox, Store, open_store


def cleared(code: str) -> AlertCleared:
    return AlertCleared(code=code)


def only_cleared(event: AnyEvent) -> bool:
    return isinstance(event, AlertCleared)


@pytest.fixture
async def store(tmp_path: Path, nursery: trio.Nursery) -> Store:
    store = open_store(tmp_path / "state", reserve=4096)
    await nursery.start(store.run)
    return store


def codes(owed: list) -> list[str]:  # type: ignore[type-arg]  # rows of any outbox
    return [msgspec.json.decode(o.event.data)["code"] for o in owed]


async def test_committed_events_are_numbered_from_one_without_gaps(store: Store) -> None:
    for code in "abc":
        store.append(cleared(code), 5.0)
    assert await store.commit() == 3
    store.append(cleared("d"), 6.0)
    assert await store.commit() == 4
    rows = await store.read()
    assert [(r.seq, r.at, r.kind) for r in rows] == [
        (n, at, "AlertCleared") for n, at in [(1, 5.0), (2, 5.0), (3, 5.0), (4, 6.0)]
    ]
    assert decode(rows[0].kind, rows[0].data) == cleared("a")


async def test_events_can_be_read_by_run_and_kind_and_from_a_number_on(store: Store) -> None:
    for run in ("r-1", "r-2"):
        store.append(RunChanged(run=run, state="running"), 1.0)
        store.append(cleared(run), 1.0)
    await store.commit()
    assert [r.seq for r in await store.read(run="r-2")] == [3]
    assert [r.seq for r in await store.read(kinds=["AlertCleared"])] == [2, 4]
    assert [r.seq for r in await store.read(2, limit=1)] == [3]
    assert await store.oldest() == 1


async def test_a_follower_gets_each_event_once_right_after_its_commit(store: Store) -> None:
    store.append(cleared("before"), 1.0)
    await store.commit()
    got: list[tuple[int, str]] = []
    with store.follow(lambda events: got.extend((event.seq, event.kind) for event in events)) as seq:
        assert seq == 1
        store.append(cleared("a"), 2.0)
        store.put("key", 1)
        store.append(RunChanged(run="r-1", state="running"), 2.0)
        assert got == []
        await store.commit()
        assert got == [(2, "AlertCleared"), (3, "RunChanged")]
    store.append(cleared("after"), 3.0)
    await store.commit()
    assert len(got) == 2


async def test_a_sink_is_owed_what_it_wants_until_it_acknowledges(store: Store) -> None:
    box = store.owe("mimir", only_cleared)
    store.append(Alert(code="x", text="t", remedy="r", since=0.0), 1.0)
    for code in "abc":
        store.append(cleared(code), 7.0)
    owed = await box.due()
    assert codes(owed) == ["a", "b", "c"]
    assert await store.depths() == {"mimir": Depth(3, 7.0, 0)}
    box.ack(owed[1].n)
    await store.commit()
    assert codes(await box.peek()) == ["c"]
    box.done(owed[2].n)
    await store.commit()
    assert await box.peek() == []
    assert await store.depths() == {"mimir": Depth(0, None, 0)}


async def test_due_waits_for_the_next_delivery(store: Store) -> None:
    box, got = store.owe("mimir", only_cleared), []

    async def take() -> None:
        got.extend(codes(await box.due()))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        assert got == []
        store.append(cleared("late"), 1.0)
    assert got == ["late"]


async def test_a_held_delivery_lets_the_queue_go_on_and_comes_back_under_a_new_number(store: Store) -> None:
    box = store.owe("mimir", only_cleared)
    for code in "ab":
        store.append(cleared(code), 1.0)
    first, second = await box.due()
    box.hold(first.n, "bad_payload: poison", 100.0)
    box.ack(second.n)
    await store.commit()
    assert await box.peek() == []
    assert [(n, reason) for n, _, reason in await box.held()] == [(first.n, "bad_payload: poison")]
    assert (await store.depths())["mimir"].held == 1
    await box.retry_held(held_before=99)
    await store.commit()
    assert await box.peek() == []
    await box.retry_held(held_before=100)
    await store.commit()
    (again,) = await box.peek()
    assert codes([again]) == ["a"]
    assert again.n > second.n


async def test_numbers_are_never_given_twice_even_when_everything_was_delivered(tmp_path: Path) -> None:
    seen: list[int] = []
    for _ in range(3):
        store = open_store(tmp_path, reserve=4096)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            box = store.owe("mimir", only_cleared)
            store.append(cleared("x"), 1.0)
            (owed,) = await box.due()
            seen += [owed.n, owed.event.seq]
            box.ack(owed.n)
            await store.commit()
            nursery.cancel_scope.cancel()
        store.close()
    assert seen == [1, 1, 2, 2, 3, 3]


async def test_what_is_owed_and_the_instance_survive_a_restart(tmp_path: Path) -> None:
    store = open_store(tmp_path, reserve=4096)
    instance = store.instance
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        store.owe("polarize", only_cleared)
        store.append(cleared("kept"), 1.0)
        store.put("polarize.job", [17])
        nursery.cancel_scope.cancel()  # without a commit of ours: ending writes what is pending
    store.close()
    again = open_store(tmp_path, reserve=4096)
    assert again.instance == instance
    assert codes(await Outbox(again, "polarize").peek()) == ["kept"]
    assert await again.get("polarize.job", list[int]) == [17]
    assert await again.get("absent", str) is None
    again.close()


async def test_a_checkpoint_can_be_forgotten(store: Store) -> None:
    store.put("k", {"a": 1})
    await store.commit()
    assert await store.get("k", dict[str, int]) == {"a": 1}
    store.put("other", {})
    store.forget("k")
    await store.commit()
    assert (await store.keys("k"), await store.keys("oth")) == ([], ["other"])
    assert await store.get("k", dict[str, int]) is None


async def test_a_checkpoint_is_of_the_moment_it_is_written(tmp_path: Path) -> None:
    store, state, asked = open_store(tmp_path, reserve=4096), [1], list[int]()

    def now() -> list[int]:
        asked.append(len(state))
        return state

    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        store.keep_up("k", now)
        state.append(2)
        store.keep_up("k", now)
        await store.commit()
        assert (await store.get("k", list[int]), asked) == ([1, 2], [2])  # once for both
        for forget in (store.forget, lambda key: store.put(key, [])):
            store.keep_up("k", now)
            forget("k")
            await store.commit()
        assert (await store.get("k", list[int]), asked) == ([], [2])
        state.append(3)
        store.keep_up("k", now)
        nursery.cancel_scope.cancel()
    store.close()
    again = open_store(tmp_path, reserve=4096)
    assert await again.get("k", list[int]) == [1, 2, 3]
    again.close()


async def test_the_journal_is_pruned_from_its_oldest_end_but_never_what_is_owed_or_kept(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    store = open_store(tmp_path, reserve=4096, journal_max=200_000)
    await nursery.start(store.run)
    store.keep("r-kept")
    store.append(RunChanged(run="r-kept", state="running"), 1.0)
    for n in range(3000):
        store.append(cleared(f"{n} " + "x" * 200), 1.0)
    await store.commit()
    for _ in range(4):  # a commit prunes at most 2,000 rows
        store.append(cleared("more"), 1.0)
        await store.commit()
    assert [r.seq for r in await store.read(run="r-kept")] == [1]
    oldest_but_kept = (await store.read(1, limit=1))[0].seq
    assert 1000 < oldest_but_kept <= store.seq
    box = store.owe("mimir", only_cleared)
    store.append(cleared("owed"), 1.0)
    await store.commit()
    store.release("r-kept")
    for _ in range(4):
        store.append(RunChanged(run="r", state="done"), 1.0)
        await store.commit()
    assert codes(await box.peek()) == ["owed"]


async def test_a_sink_that_was_switched_off_keeps_nothing_back(tmp_path: Path) -> None:
    for sinks in (("mimir", "gone"), ("mimir",)):
        store = open_store(tmp_path, reserve=4096, journal_max=50_000)
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            boxes = {sink: store.owe(sink, only_cleared) for sink in sinks}
            for n in range(300):
                store.append(cleared(f"{n} " + "x" * 200), 1.0)
            await store.commit()
            if "gone" not in boxes:
                boxes["mimir"].ack((await boxes["mimir"].due(limit=1000))[-1].n)
                await store.commit()
                store.append(cleared("more"), 1.0)
                await store.commit()
                assert await store.oldest() > 300
                assert len(await Outbox(store, "gone").peek(limit=1000)) == 0
                assert (await store.depths())["mimir"].waiting == 1
            nursery.cancel_scope.cancel()
        store.close()


async def test_a_peer_that_is_taken_out_of_the_settings_is_owed_nothing_more(store: Store) -> None:
    boxes = [store.owe(sink, only_cleared) for sink in ("mimir", "gone")]
    store.append(cleared("before"), 1.0)
    store.owe_only({"mimir", "polarize"})
    store.append(cleared("behind"), 1.0)
    await store.commit()
    assert [codes(await box.peek()) for box in boxes] == [["before", "behind"], ["before"]]


async def test_only_the_last_value_of_a_checkpoint_waits_for_a_full_disk(tmp_path: Path) -> None:
    store, had_room = open_store(tmp_path, reserve=4096), list[bool]()
    for n in range(100_000):
        store.put("k", [n])
    store.put("other", "x" * (MAX_PENDING - 100))
    had_room.append(store.has_room)
    store.put("other", "x" * (MAX_PENDING + 100))
    store.forget("gone")
    had_room.append(store.has_room)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    async with trio.open_nursery() as nursery:
        store._db.execute(f"PRAGMA max_page_count = {pages}")  # what SQLite sees of a full disk
        nursery.start_soon(store.run)
        await store.wait_full()
        store.put("other", "last")
        store.put("gone", "again")
        store._db.execute("PRAGMA max_page_count = 1000000")
        await store.commit()
        kept = [await store.get("k", list[int]), await store.get("other", str), await store.get("gone", str)]
        assert kept == [[99_999], "last", "again"]
        had_room.append(store.has_room)
        nursery.cancel_scope.cancel()
    store.close()
    assert had_room == [True, False, True]


def test_nobody_else_may_read_the_store(tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        store = open_store(tmp_path, reserve=4096)
        store.close()
    finally:
        os.umask(before)
    assert {path.name for path in tmp_path.iterdir() if path.stat().st_mode & 0o077} == set()


def test_a_store_of_an_earlier_version_is_closed_to_others(tmp_path: Path) -> None:
    open_store(tmp_path, reserve=4096)  # as a killed agent leaves it: with its log, and the index of that
    files = sorted(tmp_path.glob("store.db*"))
    assert len(files) == 3
    for path in files:
        path.chmod(0o644)
    (tmp_path / "lock").unlink()  # the file that is locked: as if its process were gone
    open_store(tmp_path, reserve=4096)
    assert [path.stat().st_mode & 0o777 for path in files] == [0o600] * 3


async def test_a_full_disk_gives_up_the_reserve_and_loses_nothing(tmp_path: Path, nursery: trio.Nursery) -> None:
    store = open_store(tmp_path, reserve=4096)
    pages = store._db.execute("PRAGMA page_count").fetchone()[0]
    store._db.execute(f"PRAGMA max_page_count = {pages + 2}")  # what SQLite sees of a full disk: SQLITE_FULL
    await nursery.start(store.run)
    for n in range(200):
        store.append(cleared("x" * 500), float(n))
    await store.wait_full()
    assert not (tmp_path / "reserve").exists()
    assert await store.read() == []
    store._db.execute("PRAGMA max_page_count = 1000000")
    with trio.fail_after(60):
        await store.commit()
    assert len(await store.read()) == 200
    assert not store.full
    assert (tmp_path / "reserve").stat().st_size == 4096


def test_a_second_agent_on_the_same_directory_is_refused(tmp_path: Path) -> None:
    store = open_store(tmp_path, reserve=4096)
    with pytest.raises(StoreError, match=rf"another agent \(pid {os.getpid()}\) uses this state directory"):
        open_store(tmp_path, reserve=4096)
    store.close()
    open_store(tmp_path, reserve=4096).close()


def test_a_newer_schema_is_refused_by_name(tmp_path: Path) -> None:
    open_store(tmp_path, reserve=4096).close()
    db = sqlite3.connect(tmp_path / "store.db")
    db.execute("PRAGMA user_version = 9")
    db.close()
    with pytest.raises(StoreError, match=r"schema 9 is newer than this agent's 1\. Install the newer release again"):
        open_store(tmp_path, reserve=4096)


def test_a_damaged_file_is_refused_with_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "store.db").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreError, match=r"file is not a database\. Move the file away"):
        open_store(tmp_path, reserve=4096)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(StoreError, match="cannot be used as state directory"):
        open_store(tmp_path / "state")


def test_a_file_in_place_of_the_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state").write_text("")
    with pytest.raises(StoreError, match=r"cannot be used as state directory.*Set state\.dir"):
        open_store(tmp_path / "state")


async def test_numbers_that_were_given_in_another_life_are_not_given_again(store: Store) -> None:
    box, other = store.owe("mimir", only_cleared), store.owe("seneschal", lambda event: False)
    for code in "abc":
        store.append(cleared(code), 1.0)
    await store.commit()
    box.hold((await box.peek())[0].n, "no", 1.0)
    await box.heard(1000)  # this store is a copy of an hour ago
    assert [owed.n for owed in await box.peek()] == [1001, 1002]
    assert codes(await box.peek()) == ["b", "c"]
    store.append(cleared("d"), 1.0)
    await store.commit()
    await box.heard(1001)
    await store.commit()
    assert [owed.n for owed in await box.peek()] == [1002, 1003]
    assert codes(await box.peek()) == ["c", "d"]
    assert len(await box.held()) == 1
    await other.heard(0)
    assert len(await box.peek()) == 2


async def test_what_comes_while_numbers_are_given_anew_gets_one_above_too(store: Store) -> None:
    box = store.owe("mimir", only_cleared)
    store.append(cleared("a"), 1.0)

    def go_on(events: list[Recorded]) -> None:
        if events[-1].seq == 1:  # heard() begins with its commit
            store.append(cleared("b"), 1.0)

    with store.follow(go_on):
        await box.heard(1000)
        await store.commit()
    assert [owed.n for owed in await box.peek()] == [1001, 1002]
    assert codes(await box.peek()) == ["a", "b"]


async def test_the_bus_writes_to_the_store(store: Store) -> None:
    bus = Bus(store, clock=lambda: 3.0)
    raised = Alert(code="via bus", text="it is full", remedy="Make room.", since=2.0)
    bus.publish(raised)
    await store.commit()
    (row,) = await store.read()
    assert (row.at, decode(row.kind, row.data)) == (3.0, raised)


async def test_producers_wait_while_too_much_waits_for_the_disk(tmp_path: Path) -> None:
    store = open_store(tmp_path, reserve=4096)
    for _ in range(40):
        store.append(cleared("x" * 1_000_000), 1.0)
    had_room = store.has_room
    assert not had_room
    with trio.move_on_after(0.01) as gave_up:
        await store.room()
    assert gave_up.cancelled_caught
    assert store.behind_s(trio.current_time() + 9) > 8
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        await store.room()
        assert store.has_room
        await store.commit()
        assert store.behind_s(trio.current_time()) == 0
        nursery.cancel_scope.cancel()
    store.close()
