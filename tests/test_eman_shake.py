"""The hub's mind and a service's side of the handshake, as transcripts."""

import itertools
import tracemalloc
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.eman import messages, shake
from agent.eman.messages import IAm
from agent.eman.shake import (
    MAX_OPEN,
    MAX_SUBSCRIPTIONS,
    Act,
    Caller,
    Emit,
    Hub,
    Leave,
    by_keys,
    by_salt,
    md5_key,
)


class Play:
    """A hub, and what each connection was sent."""

    def __init__(self, **settings: Any) -> None:
        ids = itertools.count(1)
        self.hub, self.now = Hub(by_salt("salt"), lambda name: f"{name}.{next(ids)}", **settings), 0.0
        self.ids: dict[int, str] = {}

    def said(self, acts: list[Act]) -> list[tuple[int, str, Any]]:
        """Who got which event with what, in order."""
        got: list[tuple[int, str, Any]] = []
        for act in acts:
            match act:
                case Emit(to, event, payload):
                    got.append(
                        (
                            to,
                            event,
                            None
                            if payload is msgspec.UNSET
                            else msgspec.to_builtins(msgspec.json.decode(msgspec.json.encode(payload))),
                        )
                    )
                case Leave(to, _, _):
                    got.append((to, "41", None))
        return got

    def do(self, number: int, event: str, payload: Any = None) -> list[tuple[int, str, Any]]:
        raw = msgspec.Raw(payload if isinstance(payload, bytes) else msgspec.json.encode(payload))
        return self.said(self.hub.event(number, event, raw, self.now))

    def at(self, now: float) -> list[tuple[int, str, Any]]:
        self.now = now
        return self.said(self.hub.tick(now))

    def online(self, number: int, *listens: str, name: str = "") -> None:
        name = name or f"service{number}"
        self.hub.opened(number, "127.0.0.1", self.now)
        assert self.said(self.hub.joined(number, self.now)) == [(number, "shake_who", None)]
        [(_, event, payload)] = self.do(number, "shake_i_am", {"name": name, "key": md5_key(name, "salt")})
        assert event == "shake_id"
        self.ids[number] = payload["id"]
        assert self.do(number, "shake_ready", payload) == [(number, "shake_online", None)]
        for each in listens:
            assert self.do(number, messages.SUBSCRIBE, {"name": each}) == []

    def ask(self, number: int, name: str, request_id: str = "1", **more: Any) -> list[tuple[int, str, Any]]:
        return self.do(number, "api:request", {"name": name, "request_id": request_id, "sender_id": "me", **more})

    def answer(self, number: int, asker: int, request_id: str = "1", **more: Any) -> list[tuple[int, str, Any]]:
        ids = {"request_id": request_id, "sender_id": self.ids[asker], "recipient_id": "x"}
        return self.do(number, "api:response", {"name": "post", **ids, **more})


def faulty(play: Play, got: list[tuple[int, str, Any]]) -> tuple[int, str, str, int]:
    [(to, event, payload)] = got
    return to, event, payload["error"]["code"], payload["error"]["status"]


def test_a_request_id_that_is_used_again_has_its_own_time() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    play.ask(2, "post", "1")
    play.answer(1, 2, "1", data=1)
    play.at(29.0)
    play.ask(2, "post", "1")
    assert play.at(30.0) == []  # the first one's time
    assert faulty(play, play.at(59.0)) == (2, "api:response", "timeout", 504)
    assert play.hub.due() == float("inf")


def test_what_is_left_of_answered_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shake, "MANY_DEADLINES", 100)
    play = Play()
    play.online(1, "post")
    play.online(2)
    for number in range(300):
        play.ask(2, "post", str(number), timeout_ms=3_600_000)
        play.answer(1, 2, str(number), data=1)
        assert len(play.hub._deadlines) <= 100 + 2 * 3  # one request and two services
    play.ask(2, "post", "last", timeout_ms=1000)
    assert play.hub.due() == 1.0


def test_a_request_goes_to_the_subscriber_alone_and_the_answer_to_the_asker() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    play.online(3, "other")
    asked = {"name": "post", "request_id": "1", "sender_id": "service2.2", "data": {"to": "é"}}
    assert play.ask(2, "post", data={"to": "é"}) == [(1, "post", asked)]  # sender_id is the hub's, not "me"
    assert play.answer(1, 2, data=[1]) == [
        (
            2,
            "api:response",
            {"name": "post", "request_id": "1", "sender_id": "service2.2", "recipient_id": "service1.1", "data": [1]},
        )
    ]
    assert faulty(play, play.answer(1, 2, data=2)) == (1, "api:response:error", "unknown_request", 404)


def test_what_else_stands_in_a_request_or_an_answer_goes_along() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    [(to, event, request)] = play.ask(2, "post", data=1, trace={"id": 7}, recipient_id="x")
    known = {"name": "post", "request_id": "1", "sender_id": play.ids[2], "data": 1}
    assert (to, event, request) == (1, "post", known | {"trace": {"id": 7}, "recipient_id": "x"})
    [(to, event, response)] = play.answer(1, 2, error={"code": "no"}, trace=8)
    known = {"name": "post", "request_id": "1", "sender_id": play.ids[2], "recipient_id": play.ids[1]}
    assert (to, event, response) == (2, "api:response", known | {"error": {"code": "no"}, "trace": 8})
    bad = play.do(2, "api:request", {"name": "post", "more": 1})
    assert faulty(play, bad) == (2, "api:request:error", "no_required_fields", 400)


def test_every_listener_may_answer_once() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2, "post")
    play.online(3)
    assert [to for to, _, _ in play.ask(3, "post")] == [1, 2]
    assert [to for to, _, _ in play.answer(1, 3, data=1)] == [3]
    assert play.answer(1, 3, data=1)[0][1] == "api:response:error"
    assert [to for to, _, _ in play.answer(2, 3, error={"message": "m", "code": "c", "status": 500, "list": []})] == [3]
    assert play.ask(3, "post") != []  # the id is free again


def test_broadcast_reaches_everybody_the_asker_too() -> None:
    play = Play(broadcast=True)
    play.online(1)
    play.online(2)
    assert [to for to, _, _ in play.ask(2, "post")] == [1, 2]


def test_who_gets_no_answer_is_told_why() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    assert faulty(play, play.ask(2, "none")) == (2, "api:response", "no_listeners", 404)
    play.ask(2, "post", "a")
    assert faulty(play, play.said(play.hub.gone(1))) == (2, "api:response", "listener_gone", 502)
    play.online(3, "post")
    play.ask(2, "post", "b")
    play.ask(2, "post", "c", timeout_ms=1500)
    assert play.at(1.4) == []
    assert faulty(play, play.at(1.5)) == (2, "api:response", "timeout", 504)
    assert faulty(play, play.at(30.0)) == (2, "api:response", "timeout", 504)
    assert faulty(play, play.answer(3, 2, "b", data=1)) == (3, "api:response:error", "unknown_request", 404)


def test_a_time_too_long_to_be_one_is_an_hour() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    assert len(play.ask(2, "post", timeout_ms=10**400)) == 1
    assert play.at(3599.0) == []
    assert faulty(play, play.at(3600.0)) == (2, "api:response", "timeout", 504)


def test_a_request_that_wants_no_answer_leaves_no_record() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    assert [event for _, event, _ in play.ask(2, "post", timeout_ms=0)] == ["post"]
    assert play.ask(2, "nobody", timeout_ms=0) == []
    assert play.answer(1, 2, data=1)[0][1] == "api:response:error"


@pytest.mark.parametrize(
    ("payload", "code", "status"),
    [
        (b"null", "no_required_fields", 400),
        (b"[]", "no_required_fields", 400),
        ({"name": "post"}, "no_required_fields", 400),
        ({"name": "post", "request_id": 1, "sender_id": "x"}, "no_required_fields", 400),
        ({"name": "shake_online", "request_id": "2", "sender_id": "x"}, "no_required_fields", 400),
        ({"name": "a\nb", "request_id": "2", "sender_id": "x"}, "no_required_fields", 400),
        ({"name": "x" * 201, "request_id": "2", "sender_id": "x"}, "no_required_fields", 400),
        ({"name": "post", "request_id": "1", "sender_id": "x"}, "duplicate_request", 409),
    ],
)
def test_a_bad_request_is_an_error_and_the_connection_lives(payload: Any, code: str, status: int) -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    play.ask(2, "post")
    assert faulty(play, play.do(2, "api_request", payload)) == (2, "api:request:error", code, status)
    assert play.answer(1, 2, data=1)[0][1] == "api:response"


def test_a_forged_answer_reaches_nobody() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    play.online(3, "other")
    play.ask(2, "post")
    assert faulty(play, play.answer(3, 2, data="forged")) == (3, "api:response:error", "unknown_request", 404)
    assert faulty(play, play.do(3, "api:response", {"name": "post"})) == (
        3,
        "api:response:error",
        "no_required_fields",
        400,
    )


def test_the_handshake_and_all_its_refusals() -> None:
    good = {"name": "a", "key": md5_key("a", "salt")}
    for said, code, status in (
        ({"name": "a", "key": "wrong"}, "invalid_key", 403),
        ({"name": "unknown", "key": md5_key("a", "salt")}, "invalid_key", 403),
        ({"name": "", "key": "k"}, "invalid_name", 400),
        ({"key": "k"}, "invalid_name", 400),
        (7, "invalid_name", 400),
        ({"name": "a"}, "invalid_secret_key", 400),
        ({"name": "a", "key": ""}, "invalid_secret_key", 400),
    ):
        play = Play()
        play.hub.opened(1, "", 0.0)
        play.hub.joined(1, 0.0)
        fault, left = play.do(1, "shake_i_am", said)
        assert faulty(play, [fault]) == (1, "shake_error", code, status)
        assert left == (1, "41", None)
    play = Play()
    play.hub.opened(1, "", 0.0)
    play.hub.joined(1, 0.0)
    play.do(1, "shake_i_am", good)
    fault, _ = play.do(1, "shake_ready", {"id": "another's"})
    assert faulty(play, [fault]) == (1, "shake_error", "invalid_id", 400)


def test_who_is_refused_cannot_try_again_and_is_asked_no_more() -> None:
    play = Play()
    play.online(2)
    play.hub.opened(1, "", 0.0)
    play.hub.joined(1, 0.0)
    play.do(1, "shake_i_am", {"name": "a", "key": md5_key("a", "salt")})
    play.do(1, messages.SUBSCRIBE, {"name": "post"})
    assert len(play.do(1, "shake_ready", {"id": "another's"})) == 2
    for event in ("shake_i_am", "shake_ready", messages.SUBSCRIBE, "api:request", "x"):
        assert play.do(1, event, {"name": "post", "key": md5_key("post", "salt"), "id": "a.2"}) == []
    assert play.ask(2, "post")[0][2]["error"]["code"] == "no_listeners"
    assert play.at(60.0) == []


def test_a_handshake_that_stops_is_ended_after_two_seconds() -> None:
    play = Play()
    play.hub.opened(1, "", 0.0)
    play.hub.joined(1, 1.0)
    assert play.at(2.9) == []
    fault, left = play.at(3.0)
    assert faulty(play, [fault]) == (1, "shake_error", "request_timeout", 408)
    assert left == (1, "41", None)
    play.hub.opened(2, "", 3.0)
    assert faulty(play, play.at(13.0)[:1])[2] == "request_timeout"  # it never joined


def test_a_service_without_shake_ready_is_online_too() -> None:
    play = Play()
    play.hub.opened(1, "", 0.0)
    play.hub.joined(1, 0.0)
    play.do(1, "shake_i_am", {"name": "a", "key": md5_key("a", "salt")})
    assert play.do(1, messages.SUBSCRIBE, {"name": "post"}) == []
    assert play.at(2.0) == [(1, "shake_online", None)]
    assert play.do(1, "shake_ready", {"id": "a.1"}) == []
    assert play.hub.online() == {"a.1": {"id": "a.1", "name": "a", "subscribed_events": ["post"]}}


def test_before_the_handshake_nothing_else_is_taken() -> None:
    play = Play()
    play.hub.opened(1, "", 0.0)
    play.hub.joined(1, 0.0)
    for event in ("api:request", "api:response", messages.SUBSCRIBE):
        [(_, complaint, payload)] = play.do(1, event, {"name": "post", "request_id": "1", "sender_id": "x"})
        assert (complaint, payload["code"]) == ("_service:error", "not_online")
    assert play.do(1, "made_up", {})[0][2]["code"] == "unknown_event"


def test_subscriptions_are_idempotent_bounded_and_checked() -> None:
    play = Play()
    play.online(1, "post", "post")
    play.online(2)
    assert [to for to, _, _ in play.ask(2, "post", "a")] == [1]
    play.do(1, messages.UNSUBSCRIBE, {"name": "post"})
    play.do(1, messages.UNSUBSCRIBE, {"name": "post"})
    assert play.ask(2, "post", "b")[0][2]["error"]["code"] == "no_listeners"
    assert (
        play.do(1, messages.SUBSCRIBE, {"name": "api:request"})[0][2]["code"] == f"invalid_data_on{messages.SUBSCRIBE}"
    )
    assert play.do(1, messages.SUBSCRIBE, {})[0][2]["code"] == f"invalid_data_on{messages.SUBSCRIBE}"
    for n in range(MAX_SUBSCRIPTIONS):
        assert play.do(1, messages.SUBSCRIBE, {"name": f"n{n}"}) == []
    assert play.do(1, messages.SUBSCRIBE, {"name": "more"})[0][2]["code"] == "too_many_subscriptions"


def test_the_oldest_of_too_many_open_requests_ends() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    for n in range(MAX_OPEN):
        play.ask(2, "post", str(n))
    (to, event, _), timed_out = play.ask(2, "post", "one more")
    assert (to, event) == (1, "post")
    assert (timed_out[2]["request_id"], timed_out[2]["error"]["code"]) == ("0", "timeout")


def test_what_is_asked_is_not_kept_until_it_is_answered() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    tracemalloc.start()
    for n in range(50):
        play.ask(2, "post", str(n), data="x" * 100_000)
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1_000_000
    assert len(play.answer(1, 2, "49", data=1)) == 1


def test_who_leaves_takes_all_of_it_along() -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    play.ask(2, "post")
    assert play.hub.gone(2) == []
    assert play.answer(1, 2, data=1)[0][2]["error"]["code"] == "unknown_request"
    assert play.at(31.0) == []
    assert play.hub.gone(2) == []


def test_who_asks_itself_and_leaves_takes_others_requests_along_too() -> None:
    play = Play()
    play.online(1)
    play.online(2, "post")
    play.ask(2, "post", "own")
    play.ask(1, "post")
    [(to, event, payload)] = play.said(play.hub.gone(2))
    assert (to, event, payload["error"]["code"]) == (1, "api:response", "listener_gone")


def test_keys() -> None:
    assert md5_key("a", "b") == "e32b629f658481c8aa169aa08acc0625"
    check = by_keys({"a": "key-a"})
    assert check(IAm("a", "key-a"))
    assert not check(IAm("a", "key-b"))
    assert not check(IAm("b", "key-a"))
    assert not check(IAm("b", "\0"))


EVENTS = st.sampled_from(
    ["shake_i_am", "shake_ready", "api:request", "api:response", messages.SUBSCRIBE, messages.UNSUBSCRIBE, "x"]
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=5) | st.sampled_from(["post", "1", "service1.1"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["name", "key", "id", "request_id", "sender_id", "recipient_id", "data"]), inner
        )
    ),
    max_leaves=8,
)


STEPS = st.tuples(
    st.sampled_from(["ask", "answer", "leave"]), st.integers(1, 3), st.integers(1, 3), st.sampled_from("ab")
)


@given(st.booleans(), st.lists(STEPS))
def test_every_request_ends_whoever_leaves(broadcast: bool, steps: list[tuple[str, int, int, str]]) -> None:
    play, left = Play(broadcast=broadcast), set[int]()
    answered: dict[tuple[int, str], bool] = {}
    for number in (1, 2, 3):
        play.online(number, "post")
    for what, one, other, request_id in steps:
        if one in left:
            continue
        match what:
            case "ask":
                got = play.ask(one, "post", request_id)
                if got[0][1] == "post":
                    answered[one, request_id] = False
            case "answer":
                got = play.answer(one, other, request_id, data=1)
            case _:
                left.add(one)
                got = play.said(play.hub.gone(one))
        for to, event, payload in got:
            if event == "api:response":
                answered[to, payload["request_id"]] = True
    for to, _, payload in play.at(31.0):
        answered[to, payload["request_id"]] = True
    assert all(is_answered or asker in left for (asker, _), is_answered in answered.items())
    assert play.hub.due() == float("inf")


@given(st.lists(st.tuples(st.integers(1, 3), EVENTS, JSON), max_size=30))
def test_whatever_is_said_the_hub_goes_on(said: list[tuple[int, str, Any]]) -> None:
    play = Play()
    play.online(1, "post")
    play.online(2)
    play.hub.opened(3, "", 0.0)
    for number, event, payload in said:
        play.do(number, event, payload)
    play.at(100.0)
    for number in (1, 2, 3):
        play.hub.gone(number)
    assert play.hub.online() == {}


def test_the_services_side() -> None:
    caller = Caller("a", "key")

    def hear(event: str, payload: Any = None) -> list[str]:
        return [str(heard) for heard in caller.feed(event, msgspec.Raw(msgspec.json.encode(payload)))]

    assert hear("shake_online") == ["Complaint(event='shake_online', text='not expected while wait_who')"]
    assert hear("shake_who") == ["Say(event='shake_i_am', payload=IAm(name='a', key='key'))"]
    assert hear("shake_id", {"id": "a.1"}) == ["Say(event='shake_ready', payload=Id(id='a.1'))"]
    assert hear("shake_online") == ["IsOnline(id='a.1')"]
    assert "Complaint" in hear("a.status", {"name": "a.status"})[0]
    assert "Asked" in hear("a.status", {"name": "a.status", "request_id": "1", "sender_id": "b.1"})[0]
    assert "Complaint" in hear("_service:error", {"message": "m", "code": "c"})[0]
    error = {"error": {"message": "Invalid key", "code": "invalid_key", "status": 403}}
    assert hear("shake_error", error) == [
        "IsRefused(fault=Fault(message='Invalid key', code='invalid_key', status=403))"
    ]
    assert caller.state == "refused"
