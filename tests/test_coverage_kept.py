"""Checkpoints: what changed is written, what is over is forgotten, what cannot be read is no crash."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from agent.core.store import Store, open_store
from agent.coverage.catalog import Delta
from agent.coverage.kept import SESSIONS, Kept
from agent.coverage.merged import Budget
from agent.coverage.messages import StartSession
from agent.coverage.session import Session
from tests.drill_transcripts import unit


@asynccontextmanager
async def stored(folder: Path) -> AsyncIterator[Store]:
    store = open_store(folder, reserve=4096)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield store
            nursery.cancel_scope.cancel()
    finally:
        store.close()


def session(name: str) -> Session:
    made = Session(StartSession(name, "AUTO"), Budget(2**20, lambda need: False), since=5.0, began=1.0)
    made.state = "running"
    made.merged.add([Delta("./a.js", 1, "t1")])
    return made


async def test_sessions_and_classes_are_there_after_a_restart(tmp_path: Path) -> None:
    one, two = session("s1"), session("s2 ü/..")
    async with stored(tmp_path) as store:
        kept = Kept(store)
        assert await kept.read() == ("", [], [])
        await kept.keep_catalog([unit("./a.js")])
        kept.keep_build("cat-1")
        kept.keep([one, two])
    async with stored(tmp_path) as store:
        kept = Kept(store)
        assert await kept.read() == ("cat-1", [unit("./a.js")], [one.saved(), two.saved()])
        one.merged.add([Delta("./a.js", 2, "t1")])
        one.revision += 1
        kept.keep([one])
    async with stored(tmp_path) as store:
        kept = Kept(store)
        assert await kept.read() == ("cat-1", [unit("./a.js")], [one.saved()])
        kept.keep([])
        assert await kept.read() == ("cat-1", [unit("./a.js")], [])


async def test_on_a_full_disk_nothing_piles_up_and_the_newest_is_kept_later(tmp_path: Path) -> None:
    made = session("s1")
    async with stored(tmp_path) as store:
        kept = Kept(store)
        store.full = True
        for _ in range(100):
            made.revision += 1
            kept.keep([made])
        assert store.behind_s(trio.current_time()) == 0
        store.full = False
        kept.keep([made])
        assert (await kept.read())[2] == [made.saved()]


async def test_one_that_has_only_been_asked_for_is_not_kept(tmp_path: Path) -> None:
    made = session("s1")
    made.state = "starting"
    async with stored(tmp_path) as store:
        kept = Kept(store)
        kept.keep([made])
        assert await kept.read() == ("", [], [])


async def test_a_checkpoint_of_another_version_is_left_alone(tmp_path: Path) -> None:
    async with stored(tmp_path) as store:
        store.put(SESSIONS, {"not": "a list"})
        assert await Kept(store).read() == ("", [], [])
