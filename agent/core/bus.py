"""Publish / subscribe and ask / answer inside the process: how roles meet without knowing each other.

A published event goes to the journal (core/store.py) and to every subscription of its kind, at once and without
waiting: a subscription is bounded, and what a slow subscriber cannot take is dropped, oldest first, and counted in
`dropped`. Who must not miss anything reads the store's outbox or journal instead.

Source: ARCHITECTURE.md, rule 3; protocols/settings.md, "Names that several folders share" (actions, event id).
"""

import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

import trio

from agent.core.errors import ActionError, told, unwrap
from agent.core.event import Event
from agent.core.events import Alert, AlertCleared, AnyEvent

log = logging.getLogger(__name__)

E = TypeVar("E", bound=Event)
Handler = Callable[[dict[str, Any]], Awaitable[Mapping[str, Any]]]


class Journal(Protocol):
    """Where published events are kept: core/store.py."""

    def append(self, event: AnyEvent, at: float) -> None: ...


class Subscription(Generic[E]):
    """The events of some kinds, in order of publication. An async iterator that never ends by itself."""

    def __init__(self, limit: int) -> None:
        self.dropped = 0
        self._queue: deque[E] = deque(maxlen=limit)
        self._came = trio.Event()

    def __aiter__(self) -> "Subscription[E]":
        return self

    async def __anext__(self) -> E:
        while not self._queue:
            self._came = trio.Event()
            await self._came.wait()
        return self._queue.popleft()

    def _put(self, event: E) -> None:
        if len(self._queue) == self._queue.maxlen:
            self.dropped += 1
        self._queue.append(event)
        self._came.set()


class Bus:
    """The one bus of a process. `clock` gives epoch seconds."""

    def __init__(self, journal: Journal | None = None, *, clock: Callable[[], float] = time.time) -> None:
        self._journal, self._clock = journal, clock
        self._subscriptions: dict[type[Event], list[Subscription[Any]]] = {}
        self._handlers: dict[str, Handler] = {}
        self._alerts: set[str] = set()

    def publish(self, event: AnyEvent) -> None:
        """Tell everybody. Returns at once; the event is durable when `Store.commit()` returns.

        AlertCleared is news only where the alert stands: who begins or ends clears what it may have raised.
        """
        match event:
            case Alert():
                self._alerts.add(event.code)
            case AlertCleared() if event.code not in self._alerts:
                return
            case AlertCleared():
                self._alerts.remove(event.code)
        if self._journal is not None:
            self._journal.append(event, self._clock())
        for subscription in self._subscriptions.get(type(event), ()):
            subscription._put(event)

    @contextmanager
    def subscribe(self, *kinds: type[E], limit: int = 10_000) -> Generator[Subscription[E], None, None]:
        """The events of these kinds from now on; at most `limit` wait."""
        subscription: Subscription[E] = Subscription(limit)
        for kind in kinds:
            self._subscriptions.setdefault(kind, []).append(subscription)
        try:
            yield subscription
        finally:
            for kind in kinds:
                self._subscriptions[kind].remove(subscription)

    @contextmanager
    def answer(self, action: str, handler: Handler) -> Iterator[None]:
        """Answer an action while the context lasts. An action has one handler at a time."""
        if action in self._handlers:
            raise ValueError(f"action {action} has a handler already")
        self._handlers[action] = handler
        try:
            yield
        finally:
            del self._handlers[action]

    async def ask(self, action: str, payload: dict[str, Any]) -> Mapping[str, Any]:
        """Let the handler of an action do it; its answer's payload.

        Raises ActionError: `unknown_action` without a handler, else what the handler says. What else it raises is a bug
        of its role and not the asker's: it is logged, an alert until the action is carried out again, and `internal`.
        """
        handler = self._handlers.get(action)
        if handler is None:
            raise ActionError("unknown_action", f"nothing here answers {action!r}")
        try:
            done = await handler(payload)
        except Exception as err:
            cause = unwrap(err)
            if isinstance(cause, ActionError):
                raise cause from cause.__cause__
            log.exception("action failed action=%s", action)
            self._fail(action, cause)
            raise ActionError("internal", f"{action!r} failed here; the log has the details") from err
        self.publish(AlertCleared(code=_alert_of(action)))
        return done

    def _fail(self, action: str, err: BaseException) -> None:
        if _alert_of(action) in self._alerts:
            return
        text = f"{action!r} failed: {told(err)}"
        remedy = "Look at the agent's log; it is over once the action is carried out again."
        self.publish(Alert(code=_alert_of(action), text=text[:1000], remedy=remedy, since=self._clock()))


def _alert_of(action: str) -> str:
    return f"action.{action}"
