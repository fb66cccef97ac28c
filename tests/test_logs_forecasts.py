"""What waits for its failure, on the disk."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from agent.core.store import Store, open_store
from agent.logs.chains import Chains, Seen
from agent.logs.forecasts import KEY, Ended, Forecasts
from agent.logs.predict import Forecaster
from tests.test_logs_predict import END, STEP, chains, vars_of


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Store]:
    store = open_store(folder / "state", reserve=4096)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            yield store
            nursery.cancel_scope.cancel()
    finally:
        store.close()


async def rows(store: Store) -> list[str]:
    await store.commit()
    return [key for (key,) in await store._query("SELECT key FROM checkpoint WHERE key LIKE 'logs.%' ORDER BY key")]


def see(forecaster: Forecaster, at: float, word: bytes, template: int, source: str = "a.log") -> None:
    line = b"line " + word + b" text"
    forecaster.see(Seen(at, source, template, line, "disk" if template == END else None), source, round(at * 100))


async def test_what_is_open_has_a_row_each_and_comes_back(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        kept, forecaster = Forecasts(store), Forecaster(chains())
        assert (await kept.read())[0] == []
        for at, word in enumerate((b"a", b"b", b"\xff")):
            see(forecaster, float(at), word, STEP)
            kept.keep(forecaster)
        see(forecaster, 3.0, b"a", END)
        see(forecaster, 20.0, b"x", END)
        kept.keep(forecaster)
        assert await rows(store) == sorted([KEY, *(f"logs.forecast:{one.event.id}" for one in forecaster.waiting)])
        open, tally = await Forecasts(store).read()
        assert open == list(forecaster.waiting)
        assert [one.place for one in open] == [("disk", b"b"), ("disk", b"\xff")]
        assert vars_of(tally) == (1, 0, 1)


async def test_what_ended_after_a_restart_has_no_row_any_more(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        first, forecaster = Forecasts(store), Forecaster(chains())
        await first.read()
        see(forecaster, 0.0, b"a", STEP)
        first.keep(forecaster)
        await store.commit()
        again, second = Forecasts(store), Forecaster(Chains())
        second.resume(*await again.read(), 1000.0)
        assert [event.state for event in second.due(2000.0)] == ["expired"]
        again.keep(second)
        assert await rows(store) == [KEY]
        assert vars_of((await Forecasts(store).read())[1]) == (0, 1, 0)


async def test_a_damaged_checkpoint_is_told_and_left(tmp_path: Path) -> None:
    async with opened(tmp_path) as store:
        store.put(KEY, Ended(hits=2, open=("lf-1", "lf-2")))
        store.put("logs.forecast:lf-2", ["nonsense"])
        await store.commit()
        kept = Forecasts(store)
        open, tally = await kept.read()
        assert (open, vars_of(tally)) == ([], (0, 0, 0))
        kept.keep(Forecaster(chains()))
        assert await rows(store) == [KEY]
