"""Which runs are under way, for a role that begins after them."""

from pathlib import Path
from typing import Any

import trio

from agent.core.bus import Bus
from agent.core.events import RunReceived
from agent.core.store import open_store
from agent.core.underway import order_of, underway


async def test_the_orders_of_the_runs_that_are_not_over(tmp_path: Path) -> None:
    async def runs(payload: dict[str, Any]) -> dict[str, Any]:
        return {"runs": [{"run": "r-2"}, {"run": "r-3"}]}  # the journal does not know the latter

    first, second = (RunReceived(run=run, suite={"id": run}, origin="control") for run in ("r-1", "r-2"))
    store = open_store(tmp_path, reserve=4096)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(store.run)
            bus = Bus(store)
            bus.publish(first)
            bus.publish(second)
            assert await underway(bus, store) == []  # nobody answers: the suites role is not up
            with bus.answer("runs", runs):
                assert await underway(bus, store) == [second]
            assert await order_of("r-1", store) == first
            assert await order_of("r-3", store) is None
            nursery.cancel_scope.cancel()
    finally:
        store.close()
