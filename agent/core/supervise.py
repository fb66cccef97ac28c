"""Roles as nursery-scoped tasks: started, watched, restarted with backoff when they fail, stopped in order.

A role that raises is restarted after 1 s, doubling to 60 s, with jitter; the others never notice. A role wraps each
unit of work in `with health.busy(limit=s)`; outside of it, it is idle and healthy. What waits for a disk in a thread
does so in `with health.asking(path)`: a mount may hang for hours, which is told, and which no restart would end.

Source: ARCHITECTURE.md, "The house"; protocols/packaging.md 4, "Heartbeat"; protocols/settings.md, "Ends".
"""

import logging
import random
import traceback
from collections.abc import Awaitable, Callable, Generator
from contextlib import contextmanager
from typing import Literal

import msgspec
import trio

from agent.core.errors import AgentError, ProtocolMisuse, told, unwrap
from agent.core.events import RoleChanged

log = logging.getLogger(__name__)

RoleState = Literal["starting", "running", "backoff", "ended", "stopped"]
FIRST_BACKOFF_S, MAX_BACKOFF_S, GOOD_AFTER_S = 1.0, 60.0, 60.0
HUNG_S = 10.0  # without an answer of the disk


class Health:
    """What a role says of itself: which units of work are under way, and until when each should be done."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._units: dict[object, float] = {}
        self._asked: dict[object, tuple[Callable[[], str | None], float]] = {}

    def busy(self, limit: float) -> "_Unit":
        """A unit of work, while in its context; longer than `limit` seconds is a hang, and the watchdog may act."""
        return _Unit(self._units, trio.current_time() + limit)

    @contextmanager
    def asking(self, path: str | Callable[[], str | None], *, within_s: float = 0.0) -> Generator[None, None, None]:
        """A thread asks the disk about `path`, and nobody else waits for that thread.

        One that does more than ask has so many seconds for it, and tells about which path it asks just then, if any.
        """
        unit = object()
        self._asked[unit] = (path if callable(path) else lambda: path, trio.current_time() + within_s)
        try:
            yield
        finally:
            del self._asked[unit]

    def hung(self) -> dict[str, float]:
        """Of which paths the disk has told nothing for HUNG_S or more, and for how many seconds."""
        now = trio.current_time()
        late = ((path(), now - since) for path, since in self._asked.values() if now - since >= HUNG_S)
        return {path: for_s for path, for_s in late if path is not None}

    def overdue_s(self) -> float:
        """For how many seconds the worst unit has been overdue; 0 when none is."""
        return max(0.0, *(trio.current_time() - until for until in self._units.values()), 0.0)


class _Unit:
    """A context, for each line of a log: a generator's would take three times as long."""

    __slots__ = ("_units", "_until")

    def __init__(self, units: dict[object, float], until: float) -> None:
        self._units, self._until = units, until

    def __enter__(self) -> None:
        self._units[self] = self._until

    def __exit__(self, *_: object) -> None:
        del self._units[self]


class Role(msgspec.Struct, frozen=True):
    """A name and what to run. `start(health, task_status=...)` calls `task_status.started()` when it is up."""

    name: str
    start: Callable[..., Awaitable[None]]


class RoleStatus(msgspec.Struct):
    """How a role is. `since` is trio time, `error` what may be told of its last failure."""

    state: RoleState
    since: float
    restarts: int = 0
    error: str | None = None


class Supervisor:
    """Runs roles until cancelled. `publish` takes a RoleChanged at each change of state."""

    def __init__(
        self, publish: Callable[[RoleChanged], None], *, jitter: Callable[[float, float], float] = random.uniform
    ) -> None:
        self.status: dict[str, RoleStatus] = {}
        self.health: dict[str, Health] = {}
        self._publish, self._jitter = publish, jitter
        self._scopes: dict[str, trio.CancelScope] = {}
        self._tasks: dict[str, trio.lowlevel.Task] = {}
        self._ended: dict[str, trio.Event] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, roles: list[Role], *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Start the roles one after the other; `started` once each is up or in backoff."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for role in roles:
                await self.start(role)
            task_status.started()
            await trio.sleep_forever()

    async def start(self, role: Role) -> None:
        """Start one more role, or one that was stopped; returns once it is up or in backoff."""
        if self._nursery is None:
            raise ProtocolMisuse("the supervisor is not running", remedy="Start roles from inside `run`.")
        await self._nursery.start(self._keep, role)

    async def stop(self, name: str) -> None:
        """Cancel a role and wait for its end. An unknown one is stopped already."""
        if name in self._scopes:
            self._scopes[name].cancel()
            await self._ended[name].wait()

    def runs(self, name: str) -> bool:
        """Was the role started, and neither stopped nor over? In backoff it runs, too."""
        return name in self._scopes

    def overdue(self) -> dict[str, float]:
        """The roles that hang, with the seconds since they should have been done."""
        return {name: late for name, health in self.health.items() if (late := health.overdue_s()) > 0}

    def hung(self) -> dict[str, float]:
        """What the disk does not answer for, of all roles; see Health."""
        found: dict[str, float] = {}
        for health in self.health.values():
            for path, for_s in health.hung().items():
                found[path] = max(for_s, found.get(path, 0.0))
        return found

    def stacks(self, name: str) -> list[str]:
        """The lines of the stacks that a role's tasks wait in; none where no such role runs."""
        return _stacks_of(self._tasks[name]) if name in self._tasks else []

    async def _keep(self, role: Role, *, task_status: trio.TaskStatus[None]) -> None:
        self._ended[role.name] = ended = trio.Event()
        with trio.CancelScope() as scope:
            self._scopes[role.name] = scope
            self._tasks[role.name] = trio.lowlevel.current_task()
            self.status[role.name] = RoleStatus("starting", trio.current_time())
            try:
                await self._restart_for_ever(role, _Once(task_status))
                self._become(role.name, "ended")
            finally:
                del self._scopes[role.name], self._tasks[role.name], self.health[role.name]
                ended.set()
        if scope.cancelled_caught:
            self._become(role.name, "stopped")

    async def _restart_for_ever(self, role: Role, up: "_Once") -> None:
        backoff = FIRST_BACKOFF_S
        while True:
            health = self.health[role.name] = Health(role.name)
            began, failure = trio.current_time(), None
            try:
                async with trio.open_nursery() as nursery:
                    await nursery.start(role.start, health)
                    self._become(role.name, "running")
                    up.started()
            except* Exception as group:  # noqa: BLE001 - a role's border: logged, counted, restarted
                failure = unwrap(group)
                _log_failure(role.name, failure)  # here: who is cancelled meanwhile gets no further
            if failure is None:
                return
            if trio.current_time() - began >= GOOD_AFTER_S:
                backoff = FIRST_BACKOFF_S
            status = self.status[role.name]
            status.restarts, status.error = status.restarts + 1, told(failure)
            self._become(role.name, "backoff")
            up.started()
            await trio.sleep(backoff * self._jitter(0.5, 1.0))
            backoff = min(2 * backoff, MAX_BACKOFF_S)

    def _become(self, name: str, state: RoleState) -> None:
        status = self.status[name]
        status.state, status.since = state, trio.current_time()
        log.info("role=%s state=%s restarts=%d", name, state, status.restarts)
        self._publish(RoleChanged(name=name, state=state, restarts=status.restarts, error=status.error))


def _log_failure(name: str, failure: BaseException) -> None:
    # What was raised on purpose says all in its sentence; of anything else we need to know where.
    is_known = isinstance(failure, AgentError) and not isinstance(failure, ProtocolMisuse)
    log.error("role failed role=%s error=%s", name, failure, exc_info=None if is_known else failure)


def _stacks_of(task: trio.lowlevel.Task) -> list[str]:
    """What a task waits in, outermost frame first, and then the tasks below it."""
    lines = [f"  task {task.name}\n", *traceback.StackSummary.extract(task.iter_await_frames()).format()]
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            lines += _stacks_of(child)
    return lines


class _Once:
    """`task_status.started()` may be called once; a role comes up many times."""

    def __init__(self, task_status: trio.TaskStatus[None]) -> None:
        self._task_status: trio.TaskStatus[None] | None = task_status

    def started(self) -> None:
        if self._task_status is not None:
            self._task_status.started()
            self._task_status = None
