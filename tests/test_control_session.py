"""The session of a connection: rights, what a request becomes, subscriptions."""

from typing import Any

import pytest

from agent.control.messages import ACTIONS
from agent.control.session import MAX_SUBSCRIPTIONS, Act, Admitted, Ask, Closed, Opened, Session
from agent.core.envelope import Request
from agent.core.errors import ActionError
from agent.core.guard import RANK
from agent.core.head import Scope

GIVEN: dict[str, dict[str, Any]] = {
    "auth": {"token": "sesame"},
    "unsubscribe": {"sub": 1},
    "cancel": {"run": "r-9"},
    "log": {"message": "hello"},
    "run_monitor": {"id": "ping"},
}


def authenticate(token: str) -> Scope:
    if token != "sesame":
        raise ActionError("unauthorized", "the token is not known here")
    return "control"


def session(scope: Scope = "control") -> Session:
    return Session(scope, authenticate, lambda number: lambda: None)


def take(session: Session, action: str, payload: dict[str, Any] | None = None) -> Act:
    return session.take(Request(action, GIVEN.get(action, {}) if payload is None else payload, 1, False))


def reason(session: Session, action: str, payload: dict[str, Any] | None = None) -> str:
    with pytest.raises(ActionError) as refused:
        take(session, action, payload)
    return refused.value.reason


@pytest.mark.parametrize("scope", ["read", "control"])
@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_each_action_is_for_its_scope(action: str, scope: Scope) -> None:
    talking = session(scope)
    if action == "unsubscribe":
        take(talking, "subscribe")
    if RANK[scope] < RANK[ACTIONS[action].scope]:
        assert reason(talking, action).startswith("forbidden: ")
    else:
        take(talking, action)


def test_what_the_sheet_gives_to_readers_is_just_that() -> None:
    assert {name for name, action in ACTIONS.items() if action.scope == "read"} == {
        "status", "subscribe", "unsubscribe", "search_log", "list_logs", "entitlement", "monitors", "coverage",
        "children", "get_tree", "config", "profile", "selftest", "metrics",
    }  # fmt: skip


def test_a_token_is_shown_first_and_then_opens_what_it_allows() -> None:
    talking = session("open")
    assert reason(talking, "nonsense").startswith("unauthorized: nonsense before a token was shown")
    assert reason(talking, "auth", {"token": "x"}) == "unauthorized: the token is not known here"
    assert reason(talking, "stop").startswith("unauthorized: stop before a token was shown")
    assert take(talking, "auth") == Admitted()
    assert take(talking, "stop") == Ask("stop", {})


@pytest.mark.parametrize("action", ["nonsense", "shut_down", "runs", "reservations", "identify"])
def test_what_is_not_in_the_table_is_unknown_also_when_a_role_answers_it(action: str) -> None:
    assert reason(session(), action) == f"unknown_action: nothing here answers {action!r}"


def test_an_order_carries_who_gave_it_and_nothing_that_is_not_its_own() -> None:
    given = {"suite": {"id": "x"}, "origin": "seneschal", "reservation": "lab-07/0/1"}
    assert take(session(), "run_suite", given) == Ask("run_suite", {"suite": {"id": "x"}, "origin": "control"})


def test_what_another_folder_checks_is_handed_on_as_it_came() -> None:
    assert take(session(), "watch_file", {"path": "/x", "more": [1]}) == Ask("watch_file", {"path": "/x", "more": [1]})


@pytest.mark.parametrize(
    ("action", "payload", "expected"),
    [
        ("auth", {}, "bad_payload: key token is missing"),
        ("log", {}, "bad_payload: key message is missing"),
        ("cancel", {"run": 7}, "bad_payload: key run: Expected `str`, got `int`"),
        ("subscribe", {"kinds": "Test*"}, "bad_payload: key kinds: Expected `array`, got `str`"),
        (
            "subscribe",
            {"policy": "wait"},
            "bad_payload: key policy: Invalid enum value 'wait', expected one of disconnect, drop_oldest",
        ),
        ("subscribe", {"filter": {"run": 1}}, "bad_payload: key filter.run: Expected `str | null`, got `int`"),
        ("run_suite", {"suite": []}, "bad_payload: key suite: Expected `object | null`, got `array`"),
        ("unsubscribe", {"sub": 9}, "not_found: subscription 9 is not open"),
    ],
)
def test_a_payload_that_does_not_fit_is_refused_by_its_key(action: str, payload: dict[str, Any], expected: str) -> None:
    assert reason(session(), action, payload) == expected


def test_subscriptions_are_numbered_bounded_and_ended_one_by_one() -> None:
    talking = session()
    opened = take(talking, "subscribe", {"kinds": ["B", "A", "B"], "since": 4})
    assert isinstance(opened, Opened)
    assert (opened.subscription.number, opened.since, opened.subscription.topic.kinds) == (1, 4, ("A", "B"))
    for n in range(2, MAX_SUBSCRIPTIONS + 1):
        again = take(talking, "subscribe")
        assert isinstance(again, Opened)
        assert again.subscription.number == n
    assert reason(talking, "subscribe").startswith("busy: 32 subscriptions are open")
    assert take(talking, "unsubscribe") == Closed(opened.subscription)
    assert reason(talking, "unsubscribe") == "not_found: subscription 1 is not open"
    take(talking, "subscribe")
    assert 33 in talking.subscriptions
