"""Numbers, words and bodies of the D-Bus services, as statuses."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.files.entitlement import (
    MAX_ENTITLEMENTS,
    MAX_RAW,
    NAMES,
    NOTHING,
    Status,
    from_certificates,
    from_json,
    from_number,
    from_properties,
    is_news,
)
from tests import no_json


@pytest.mark.parametrize("number", [-1, 0, 1, 2, 3, 4, 5])
def test_each_number_has_its_name(number: int) -> None:
    assert from_number((number,)) == Status(
        status=number, name=NAMES[number], raw=str(number), source="com.redhat.SubscriptionManager"
    )


def test_another_number_is_passed_on() -> None:
    status = from_number((77,))
    assert status is not None
    assert (status.status, status.name, status.raw) == (77, "unknown", "77")


@pytest.mark.parametrize("body", [(), ("0",), (True,), (0, 1), (None,)])
def test_what_is_no_number_is_no_status(body: tuple[Any, ...]) -> None:
    assert from_number(body) is None


@pytest.mark.parametrize(
    ("said", "is_registered", "number"),
    [
        ({"status": "Current", "valid": True}, True, 0),
        ({"status": "Aktuell", "valid": True}, True, 0),
        ({"status": "Current", "valid": False}, True, 0),
        ({"status": "Invalid", "valid": False}, True, 1),
        ({"status": "Insufficient", "valid": False, "reasons": {"RHEL": ["sockets"]}}, True, 4),
        ({"status": "Unknown", "valid": False}, True, -1),
        ({"status": "Unknown", "valid": False}, False, 5),
        ({"status": "Disabled", "valid": False}, True, 0),
        ({"status": "Registered"}, True, 0),
        ({"status": "Unzureichend", "valid": False, "status_id": "partial"}, True, 4),
        ({"status": "Ungültig", "valid": False}, True, 1),
        ({"status": "Unbekannt", "valid": False}, False, 5),
        ({"status": "Unbekannt"}, True, -1),
        ({"status": "Unbekannt", "status_id": "novel", "valid": None}, True, -1),
    ],
)
def test_the_words_of_rhsm1(said: dict[str, Any], is_registered: bool, number: int) -> None:
    status = from_json((json.dumps(said),), is_registered)
    assert status == Status(status=number, name=NAMES[number], raw=said["status"], source="com.redhat.RHSM1")


@pytest.mark.parametrize("body", [(), (5,), ("",), ("null",), ('{"valid": true}',), ('{"status": 3}',), ("{}", "{}")])
def test_what_does_not_fit_is_no_status(body: tuple[Any, ...]) -> None:
    assert from_json(body, True) is None


LAST = Status(status=4, name="partially valid", raw="4", source="com.redhat.SubscriptionManager")
ROWS = {"69": ("Red Hat Enterprise Linux", "not_subscribed", "Not supported by a valid subscription.")}


def properties(**changed: Any) -> tuple[Any, ...]:
    return ("com.redhat.SubscriptionManager.EntitlementStatus", changed, [])


def test_changed_properties() -> None:
    both = from_properties(properties(Status=("i", 1), Entitlements=("a{s(sss)}", ROWS)), None)
    assert both is not None
    assert (both.status, both.raw, both.entitlements) == (1, "1", ROWS)
    word = from_properties(properties(Status=("s", "Insufficient")), None)
    assert word is not None
    assert (word.status, word.raw) == (4, "Insufficient")
    products = from_properties(properties(Entitlements=("a{s(sss)}", ROWS)), LAST)
    assert products is not None
    assert (products.status, products.entitlements) == (4, ROWS)
    assert from_properties(properties(Entitlements=("a{s(sss)}", ROWS)), None) is None
    assert from_properties(properties(Other=("s", "x")), LAST) is None


def test_the_sizes_are_bounded() -> None:
    many = {str(n): ("x" * 5000, "", "") for n in range(MAX_ENTITLEMENTS + 5)}
    status = from_properties(properties(Status=("s", "y" * 5000), Entitlements=("a{s(sss)}", many)), None)
    assert status is not None
    assert (len(status.raw), len(status.entitlements)) == (MAX_RAW, MAX_ENTITLEMENTS)
    assert len(status.entitlements["0"][0]) == MAX_RAW


def test_without_d_bus_the_certificates_tell_who_is_registered() -> None:
    assert from_certificates(has_consumer=False, is_registered=False) == NOTHING
    assert from_certificates(has_consumer=True, is_registered=False).status == 5
    registered = from_certificates(has_consumer=True, is_registered=True)
    assert (registered.status, registered.raw, registered.source) == (-1, "registered", "certificates")


def test_news_is_another_status_word_or_source() -> None:
    assert is_news(None, LAST)
    assert not is_news(LAST, Status(status=4, name="x", raw="4", source=LAST.source, entitlements=dict(ROWS)))
    assert is_news(LAST, Status(status=4, name="x", raw="Insufficient", source=LAST.source))
    assert is_news(LAST, Status(status=4, name="x", raw="4", source="certificates"))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["Status", "Entitlements", "i"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.sampled_from(["Status", "Entitlements", "69"]), inner, max_size=3),
    ),
    max_leaves=10,
)


@given(
    st.lists(VALUES, max_size=3).map(tuple)
    | no_json.objects("status", "valid").map(lambda said: (said.decode("utf-8", "replace"),)),
    st.booleans(),
)
def test_any_body(body: tuple[Any, ...], is_registered: bool) -> None:
    for status in (from_number(body), from_json(body, is_registered), from_properties(body, LAST)):
        assert status is None or (isinstance(status.status, int) and len(status.raw) <= MAX_RAW)
