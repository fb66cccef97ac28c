"""Gator's part of the service: tells of the trees that run as suites (suites/runners/gator.py starts them).

Source: protocols/emissary.md, "Control server" (`children`, `get_tree`).
"""

import time
from collections.abc import Callable
from typing import Any, NoReturn

import trio

from agent.core.bus import Bus
from agent.gator.trees import HEARD, Trees


async def run(
    bus: Bus,
    ident: str,
    *,
    clock: Callable[[], float] = time.time,
    task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
) -> NoReturn:
    """Answer `children` and `get_tree` for the machine `ident`, until cancelled."""
    trees = Trees()

    async def children(payload: dict[str, Any]) -> dict[str, Any]:
        return trees.children()

    async def get_tree(payload: dict[str, Any]) -> dict[str, Any]:
        return {ident: trees.states()}

    with bus.subscribe(*HEARD) as events, bus.answer("children", children), bus.answer("get_tree", get_tree):
        task_status.started()
        async for event in events:
            trees.feed(event, clock())
    raise AssertionError("a subscription never ends")
