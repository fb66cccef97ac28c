"""One connection's session: who it is, what it may ask, which subscriptions it has. Pure.

    open --auth--> read | control          a browser's, which shows its token within AUTH_S
    read | control                         shown in the head of the request

`take` turns a request into what is to be done; the role does it.

Source: protocols/emissary.md, "Control server", "Auth, limits".
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import msgspec

from agent.control.messages import ACTIONS, Auth, Nothing, RunSuite, Subscribe, Unsubscribe
from agent.control.streams import Subscription, topic_of
from agent.core.envelope import Request
from agent.core.errors import ActionError
from agent.core.guard import RANK
from agent.core.head import Scope
from agent.core.payload import read

AUTH_S = 5.0  # s in which a connection without a scope must get one
MAX_SUBSCRIPTIONS = 32


class Admitted(msgspec.Struct, frozen=True):
    """A token was shown and is good."""


class Opened(msgspec.Struct, frozen=True):
    """A subscription was made: replay what comes after `since`, then tell what comes."""

    subscription: Subscription
    since: int | None


class Closed(msgspec.Struct, frozen=True):
    """A subscription was ended."""

    subscription: Subscription


class Ask(msgspec.Struct, frozen=True):
    """Let whoever answers this action do it."""

    action: str
    payload: dict[str, Any]


Act: TypeAlias = Admitted | Opened | Closed | Ask


class Session:
    """The session of one connection. `authenticate` gives a token's scope or raises ActionError.

    `wake_for(number)` makes what is called whenever that subscription has something to take.
    """

    def __init__(
        self,
        scope: Scope,
        authenticate: Callable[[str], Scope],
        wake_for: Callable[[int], Callable[[], None]],
    ) -> None:
        self.scope = scope
        self.subscriptions: dict[int, Subscription] = {}
        self._authenticate, self._wake_for = authenticate, wake_for
        self._next = 1

    def take(self, request: Request) -> Act:
        """What a request asks to be done.

        Raises ActionError: `unauthorized`, `forbidden`, `rate`, `unknown_action`, `bad_payload`, `not_found`, `busy`.
        """
        action = ACTIONS.get(request.action)
        if self.scope == "open" and request.action != "auth":
            raise ActionError("unauthorized", f"{request.action} before a token was shown; the first request is auth")
        if action is None:
            raise ActionError("unknown_action", f"nothing here answers {request.action!r}")
        if RANK[self.scope] < RANK[action.scope]:
            raise ActionError(
                "forbidden", f"{request.action} takes a token with the scope {action.scope}; yours has {self.scope}"
            )
        if action.takes is None:
            return Ask(request.action, request.payload)
        match given := read(request.payload, action.takes):
            case Auth():
                self.scope = self._authenticate(given.token)
                return Admitted()
            case Subscribe():
                return self._open(given)
            case Unsubscribe():
                if given.sub not in self.subscriptions:
                    raise ActionError("not_found", f"subscription {given.sub} is not open")
                return Closed(self.subscriptions.pop(given.sub))
            case RunSuite():
                return Ask(request.action, {**msgspec.to_builtins(given), "origin": "control"})
            case Nothing():
                return Ask(request.action, {})
            case _:
                return Ask(request.action, msgspec.to_builtins(given))

    def _open(self, given: Subscribe) -> Opened:
        if len(self.subscriptions) == MAX_SUBSCRIPTIONS:
            raise ActionError("busy", f"{MAX_SUBSCRIPTIONS} subscriptions are open; end one of them first")
        number, self._next = self._next, self._next + 1
        subscription = Subscription(number, topic_of(given), given.policy, self._wake_for(number))
        self.subscriptions[number] = subscription
        return Opened(subscription, given.since)
