"""Any requests in any order, while events come: rights hold, and each subscription is told each number once."""

from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from agent.control.messages import ACTIONS
from agent.control.session import MAX_SUBSCRIPTIONS, Act, Admitted, Ask, Closed, Opened, Session
from agent.control.streams import QUEUE_BYTES, QUEUE_EVENTS, Feed, Subscription, Topic
from agent.core.envelope import Envelope, Request
from agent.core.errors import ActionError
from agent.core.events import Recorded
from agent.core.guard import RANK
from agent.core.head import Scope

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
KEYS = ("token", "kinds", "since", "filter", "policy", "sub", "suite", "path", "run", "message", "origin")
PAYLOADS = st.dictionaries(st.sampled_from(KEYS) | st.text(max_size=8), JSON, max_size=4)
CODES = {"unauthorized", "forbidden", "unknown_action", "bad_payload", "not_found", "busy"}
SCOPES: dict[str, Scope] = {"peek": "read", "sesame": "control"}


def authenticate(token: str) -> Scope:
    if token not in SCOPES:
        raise ActionError("unauthorized", "the token is not known here")
    return SCOPES[token]


@given(st.sampled_from(["open", "read", "control"]), st.sampled_from(sorted(ACTIONS)) | st.text(max_size=12), PAYLOADS)
def test_any_request_is_an_act_its_sender_may_ask_for_or_an_error(
    scope: Scope, action: str, payload: dict[str, Any]
) -> None:
    session = Session(scope, authenticate, lambda number: lambda: None)
    act = taken(session, action, payload)
    if isinstance(act, str):
        assert act in CODES
    else:
        assert RANK[scope] >= RANK[ACTIONS[action].scope]
    if isinstance(act, Ask) and action == "run_suite":
        assert act.payload["origin"] == "control"


@given(
    st.lists(st.text(max_size=60) | st.binary(max_size=20) | JSON.map(lambda tree: msgspec.json.encode(tree).decode()))
)
def test_any_frames_leave_the_session_alive(frames: list[str | bytes]) -> None:
    session, envelope = Session("control", authenticate, lambda number: lambda: None), Envelope()
    for frame in frames:
        if isinstance(request := envelope.feed(frame), Request):
            act = taken(session, request.action, request.payload)
            assert not isinstance(act, str) or act in CODES


def taken(session: Session, action: str, payload: dict[str, Any]) -> Act | str:
    """What a request asks to be done, or the code it is refused with."""
    try:
        return session.take(Request(action, payload, 0, False))
    except ActionError as err:
        return err.code


class Client:
    """What one subscription was told so far; it follows the feed from number `after` on."""

    def __init__(self, subscription: Subscription, after: int) -> None:
        self.subscription, self.after, self.is_open = subscription, after, True
        self.seen: list[int] = []

    def read(self) -> None:
        while (text := self.subscription.take()) is not None:
            for event in msgspec.json.decode(text)["payload"]["events"]:
                if event["kind"] == "Gap":
                    self.seen += range(event["data"]["from"], event["data"]["to"] + 1)
                else:
                    self.seen.append(event["seq"])


class Connection(RuleBasedStateMachine):
    """One connection's session on a feed, with clients that read when they like."""

    def __init__(self) -> None:
        super().__init__()
        self.session = Session("open", authenticate, lambda number: lambda: None)
        self.scope: Scope = "open"
        self.feed = Feed(0)
        self.clients: dict[int, Client] = {}

    @rule(token=st.sampled_from(["peek", "sesame", "wrong"]))
    def shows_a_token(self, token: str) -> None:
        act = taken(self.session, "auth", {"token": token})
        assert act == (Admitted() if token in SCOPES else "unauthorized")
        self.scope = SCOPES.get(token, self.scope)

    @rule(kinds=st.sampled_from([[], ["A"], ["B*"]]))
    def subscribes(self, kinds: list[str]) -> None:
        act = taken(self.session, "subscribe", {"kinds": kinds})
        if self.scope == "open":
            assert act == "unauthorized"
        elif sum(client.is_open for client in self.clients.values()) == MAX_SUBSCRIPTIONS:
            assert act == "busy"
        else:
            assert isinstance(act, Opened)
            self.feed.attach(act.subscription)
            self.clients[act.subscription.number] = Client(act.subscription, self.feed.seq)

    @rule(number=st.integers(1, 6))
    def unsubscribes(self, number: int) -> None:
        client = self.clients.get(number)
        act = taken(self.session, "unsubscribe", {"sub": number})
        if client is None or not client.is_open:
            assert act == ("unauthorized" if self.scope == "open" else "not_found")
        else:
            assert act == Closed(client.subscription)
            client.read()
            self.feed.detach(client.subscription)
            client.is_open = False

    @rule(kinds=st.lists(st.sampled_from("AB"), min_size=1, max_size=5), times=st.sampled_from([1, 10, 2500]))
    def events_are_committed(self, kinds: list[str], times: int) -> None:
        rows = [
            Recorded(seq=self.feed.seq + n, at=1.0, kind=kind, data=msgspec.Raw(b"{}"))
            for n, kind in enumerate(kinds * times, 1)
        ]
        self.feed.publish(rows)
        for client in self.clients.values():
            if client.is_open and not client.subscription.topic.kinds:
                assert client.subscription._events <= QUEUE_EVENTS
                assert client.subscription._bytes <= QUEUE_BYTES

    @rule(number=st.integers(1, 6))
    def reads(self, number: int) -> None:
        if number in self.clients:
            self.clients[number].read()

    @invariant()
    def numbers_grow_and_none_is_missing(self) -> None:
        for client in self.clients.values():
            assert client.seen == sorted(set(client.seen))
            if client.subscription.topic == Topic() and client.seen:
                assert client.seen == list(range(client.after + 1, client.seen[-1] + 1))


TestConnection = Connection.TestCase
