"""A role that a test ends and begins again."""

from collections.abc import Awaitable, Callable

import trio


class Restarted:
    """In a nursery, one start after the other."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._scope, self._ended = trio.CancelScope(), trio.Event()

    async def start(self, run: Callable[..., Awaitable[object]]) -> None:
        """Returns when `run` says that it is started."""

        async def in_scope(*, task_status: trio.TaskStatus[None]) -> None:
            try:
                with self._scope:
                    await run(task_status=task_status)
            finally:
                self._ended.set()

        self._scope, self._ended = trio.CancelScope(), trio.Event()
        await self._nursery.start(in_scope)

    async def stop(self) -> None:
        """Returns when it has ended."""
        self._scope.cancel()
        await self._ended.wait()
