"""Who may come in: tokens, certificates, Origin, Host, and the limit on guessing."""

from collections.abc import Mapping
from typing import Any

import pytest

from agent.core.errors import ActionError
from agent.core.guard import BLOCK_S, MAX_ADDRESSES, MAX_FAILURES, Guard, is_loopback, require
from agent.core.head import Head, Headers, HttpError, Scope


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def guard(clock: Clock | None = None, **given: Any) -> Guard:
    tokens: list[tuple[str, Scope]] = [("sesame", "control"), ("peek", "read")]
    usual: dict[str, Any] = {"client_names": {"laptop": "read"}, "insecure_loopback": False, "origins": []}
    return Guard(tokens, clock=clock or Clock(), **usual | given)


def head(headers: Mapping[str, str] | None = None, peer: str = "192.0.2.1", client_cert: str | None = None) -> Head:
    return Head("GET", "/", "/", {}, Headers(({"host": "lab:13172"} | dict(headers or {})).items()), peer, client_cert)


def status(guard: Guard, head: Head) -> int:
    with pytest.raises(HttpError) as refused:
        guard.admit(head)
    return refused.value.status


@pytest.mark.parametrize(
    ("authorization", "scope"),
    [("Bearer sesame", "control"), ("bearer  peek ", "read"), ("BEARER peek", "read")],
)
def test_a_token_has_its_scope(authorization: str, scope: Scope) -> None:
    assert guard().admit(head({"authorization": authorization})) == scope


@pytest.mark.parametrize(
    "authorization", ["Bearer wrong", "Bearer", "Bearer sesam", "Basic sesame", "sesame", "Bearer ü"]
)
def test_a_wrong_token_is_asked_for_again(authorization: str) -> None:
    with pytest.raises(HttpError) as refused:
        guard().admit(head({"authorization": authorization}))
    assert refused.value.status == 401
    assert refused.value.headers == (("WWW-Authenticate", 'Bearer realm="emissary"'),)


def test_without_credentials_a_client_is_in_the_open() -> None:
    assert guard().admit(head()) == "open"
    assert guard().admit(head(client_cert="stranger")) == "open"


def test_a_certificate_has_the_scope_of_its_name_and_a_token_goes_before_it() -> None:
    assert guard().admit(head(client_cert="laptop")) == "read"
    assert guard().admit(head({"authorization": "Bearer sesame"}, client_cert="laptop")) == "control"


@pytest.mark.parametrize(
    ("origin", "passes"),
    [
        ("http://lab:13172", True),
        ("https://LAB:13172", True),
        ("http://lab", False),
        ("http://lab:80", False),
        ("http://evil:13172", False),
        ("null", False),
        ("", False),
        ("http://[", False),
        ("https://dash.example", True),
        ("https://dash.example:443", True),
        ("http://dash.example", False),
    ],
)
def test_a_page_must_be_ours_or_allowed(origin: str, passes: bool) -> None:
    guarded = guard(origins=["https://dash.example"])
    if passes:
        assert guarded.admit(head({"origin": origin})) == "open"
    else:
        assert status(guarded, head({"origin": origin, "authorization": "Bearer sesame"})) == 403


def test_a_host_without_port_is_that_of_its_scheme() -> None:
    assert guard().admit(head({"host": "lab", "origin": "https://lab"})) == "open"
    assert guard().admit(head({"host": "lab", "origin": "http://lab:80"})) == "open"
    assert status(guard(), head({"host": "", "origin": "http://"})) == 403


@pytest.mark.parametrize("host", ["localhost", "localhost:13172", "127.0.0.1:13172", "127.9.9.9", "[::1]:13172"])
def test_loopback_without_token_may_do_all(host: str) -> None:
    assert guard(insecure_loopback=True).admit(head({"host": host}, peer="127.0.0.1")) == "control"
    assert guard(insecure_loopback=False).admit(head({"host": host}, peer="127.0.0.1")) == "open"
    assert guard(insecure_loopback=True).admit(head({"host": host}, peer="192.0.2.1")) == "open"


@pytest.mark.parametrize("host", ["evil.example:13172", "127.0.0.1.evil.example", "localhost.evil.example", ""])
def test_a_name_that_only_resolves_to_loopback_is_refused(host: str) -> None:
    assert status(guard(insecure_loopback=True), head({"host": host}, peer="127.0.0.1")) == 403


def test_five_failures_in_a_minute_block_the_address_for_a_minute() -> None:
    clock = Clock()
    guarded, wrong, right = guard(clock), head({"authorization": "Bearer no"}), head({"authorization": "Bearer sesame"})
    for _ in range(MAX_FAILURES):
        assert status(guarded, wrong) == 401
        clock.now += 10
    with pytest.raises(HttpError) as blocked:
        guarded.admit(right)
    assert (blocked.value.status, blocked.value.headers) == (429, (("Retry-After", "50"),))
    with pytest.raises(ActionError) as refused:
        guarded.check("sesame", "192.0.2.1")
    assert refused.value.code == "rate"
    assert guarded.admit(head({"authorization": "Bearer sesame"}, peer="192.0.2.2")) == "control"
    clock.now += 50
    assert guarded.admit(right) == "control"
    assert status(guarded, wrong) == 401  # one new failure does not block again
    assert guarded.admit(right) == "control"


def test_failures_over_more_than_a_minute_do_not_block() -> None:
    clock = Clock()
    guarded = guard(clock)
    for _ in range(3 * MAX_FAILURES):
        assert status(guarded, head({"authorization": "Bearer no"})) == 401
        clock.now += 15


def test_a_missing_token_is_no_guess() -> None:
    guarded = guard()
    for _ in range(3 * MAX_FAILURES):
        assert guarded.admit(head()) == "open"


def test_a_token_may_come_later() -> None:
    guarded = guard()
    assert guarded.check("peek", "192.0.2.1") == "read"
    reasons = []
    for _ in range(MAX_FAILURES):
        with pytest.raises(ActionError) as refused:
            guarded.check("\ud800", "192.0.2.1")
        reasons.append(refused.value.reason)
    unknown = "unauthorized: the token is not known here"
    assert reasons == [unknown] * 4 + [f"{unknown}; nobody at 192.0.2.1 is let in for 60 s"]
    assert status(guarded, head()) == 429


def test_addresses_are_forgotten_before_they_fill_the_memory_but_not_who_guesses_on() -> None:
    guarded, wrong = guard(), {"authorization": "Bearer no"}
    seen = []
    for number in range(4 * MAX_ADDRESSES):
        assert status(guarded, head(wrong, peer=str(number))) == 401
        if number >= MAX_ADDRESSES and number % (MAX_ADDRESSES // 2) == 0:
            seen.append(status(guarded, head(wrong, peer="the same")))
    assert seen == [401] * MAX_FAILURES + [429]
    assert len(guarded._failures) == MAX_ADDRESSES


def test_a_scope_includes_the_lesser_ones() -> None:
    order: list[Scope] = ["open", "read", "control"]
    for given in order:
        for needed in order:
            asking = Head("GET", "/", "/", {}, Headers([]), "192.0.2.1", None, given)
            if order.index(given) >= order.index(needed):
                require(asking, needed)
                continue
            with pytest.raises(HttpError) as refused:
                require(asking, needed)
            assert refused.value.status == (401 if given == "open" else 403)


@pytest.mark.parametrize(
    ("host", "answer"),
    [("localhost", True), ("127.0.0.1", True), ("::1", True), ("0.0.0.0", False), ("::", False), ("lab", False)],
)
def test_only_this_machine_is_loopback(host: str, answer: bool) -> None:
    assert is_loopback(host) == answer


def test_a_block_lasts_from_the_last_failure() -> None:
    clock = Clock()
    guarded = guard(clock)
    for _ in range(MAX_FAILURES):
        assert status(guarded, head({"authorization": "Bearer no"})) == 401
    clock.now += BLOCK_S - 0.5
    assert status(guarded, head()) == 429
    clock.now += 0.5
    assert guarded.admit(head()) == "open"
