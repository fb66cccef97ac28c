"""The actions `children` and `get_tree` of a running agent."""

import trio
from trio.testing import wait_all_tasks_blocked

from agent.core.bus import Bus
from agent.gator import service
from tests.test_gator_trees import finished, started


async def test_the_agent_is_the_tier_above_its_runs() -> None:
    bus = Bus()
    async with trio.open_nursery() as nursery:

        async def run(*, task_status: trio.TaskStatus[None]) -> None:
            await service.run(bus, "lab-07", clock=lambda: 4.0, task_status=task_status)

        await nursery.start(run)
        assert await bus.ask("get_tree", {}) == {"lab-07": {}}
        bus.publish(started("r-1"))
        bus.publish(finished("x_0", "passed"))
        await wait_all_tasks_blocked()
        assert await bus.ask("get_tree", {}) == {"lab-07": {"r-1": {"g": {"t": {"x_0": "COMPLETE"}}}}}
        children = await bus.ask("children", {})
        assert children["r-1"]["metrics"]["sub_passed"] == 1
        nursery.cancel_scope.cancel()
