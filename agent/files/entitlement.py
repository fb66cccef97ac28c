"""What the two D-Bus services and the certificate directories say, as one status. Pure.

    -1 unknown       0 valid             1 expired or invalid
     2 warning       3 RHN classic       4 partially valid        5 registration required

Source: protocols/emissary.md, "Entitlement and file monitor" (the services, the numbers, the words of the JSON).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeGuard

import msgspec

from agent.core.payload import UNREADABLE
from agent.files.messages import Rhsm1Status

SUBSCRIPTION_MANAGER: Final = "com.redhat.SubscriptionManager"
RHSM1: Final = "com.redhat.RHSM1"
UNKNOWN, VALID, INVALID, PARTIAL, UNREGISTERED = -1, 0, 1, 4, 5
NAMES: Final = {
    UNKNOWN: "unknown",
    VALID: "valid",
    INVALID: "expired or invalid",
    2: "warning",
    3: "RHN classic",
    PARTIAL: "partially valid",
    UNREGISTERED: "registration required",
}
MAX_RAW = 1024  # characters
MAX_ENTITLEMENTS = 256

# The words of `status`, and those of `status_id`, which nobody translates. The last two: Simple Content Access,
# candlepin/subscription-manager#3504.
_WORDS: Final = {
    "current": VALID,
    "valid": VALID,
    "invalid": INVALID,
    "expired": INVALID,
    "insufficient": PARTIAL,
    "partial": PARTIAL,
    "unknown": UNKNOWN,
    "disabled": VALID,
    "registered": VALID,
}


class Status(msgspec.Struct, frozen=True, kw_only=True):
    """`raw` is what the source said. `entitlements` maps a product to its name, state and message, where told."""

    status: int
    name: str
    raw: str
    source: str
    entitlements: dict[str, tuple[str, str, str]] = {}


NOTHING: Final = Status(status=UNKNOWN, name=NAMES[UNKNOWN], raw="", source="none")


def from_number(body: Sequence[Any]) -> Status | None:
    """The answer of check_status, or the body of entitlement_status_changed: (i). None: it is neither."""
    if len(body) != 1 or not _is_number(body[0]):
        return None
    return _status(body[0], str(body[0]), SUBSCRIPTION_MANAGER)


def from_properties(body: Sequence[Any], last: Status | None) -> Status | None:
    """The body of PropertiesChanged: (interface, {name: (signature, value)}, [names]).

    `last` is the status before, for a change of the entitlements alone. None: it has neither, or does not fit.
    """
    if len(body) != 3 or not isinstance(body[1], Mapping):
        return None
    values = {name: held[1] for name, held in body[1].items() if isinstance(held, tuple) and len(held) == 2}
    value, entitlements = values.get("Status"), values.get("Entitlements")
    if _is_number(value):
        status = _status(value, str(value), SUBSCRIPTION_MANAGER)
    elif isinstance(value, str):
        status = _status(_WORDS.get(value.casefold(), UNKNOWN), value, SUBSCRIPTION_MANAGER)
    elif last is not None and isinstance(entitlements, Mapping):
        status = last
    else:
        return None
    if isinstance(entitlements, Mapping):
        status = msgspec.structs.replace(status, entitlements=_entitlements(entitlements))
    return status


def from_json(body: Sequence[Any], is_registered: bool) -> Status | None:
    """The answer of GetStatus: (s) with JSON `{status, valid, reasons[, status_id]}`. None: it does not fit.

    `is_registered`: there is a consumer certificate; without one what is unknown is an unregistered machine.
    """
    if len(body) != 1 or not isinstance(body[0], str):
        return None
    try:
        said = msgspec.json.decode(body[0], type=Rhsm1Status)
    except UNREADABLE:
        return None
    word = _WORDS.get((said.status_id or "").casefold(), _WORDS.get(said.status.casefold()))
    if said.valid:
        number = VALID
    elif word is not None:
        number = word
    else:  # a translated word
        number = INVALID if said.valid is False and is_registered else UNKNOWN
    if number == UNKNOWN and not is_registered:
        number = UNREGISTERED
    return _status(number, said.status, RHSM1)


def from_certificates(has_consumer: bool, is_registered: bool) -> Status:
    """What is known without D-Bus: is there /etc/pki/consumer, and a cert.pem in it?"""
    if not has_consumer:
        return NOTHING
    if is_registered:
        return _status(UNKNOWN, "registered", "certificates")
    return _status(UNREGISTERED, "not registered", "certificates")


def is_news(before: Status | None, now: Status) -> bool:
    """Is it another status, in the eyes of who hears EntitlementChanged?"""
    return before is None or (before.status, before.raw, before.source) != (now.status, now.raw, now.source)


def _status(number: int, raw: str, source: str) -> Status:
    return Status(status=number, name=NAMES.get(number, NAMES[UNKNOWN]), raw=raw[:MAX_RAW], source=source)


def _is_number(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _entitlements(told: Mapping[Any, Any]) -> dict[str, tuple[str, str, str]]:
    rows: dict[str, tuple[str, str, str]] = {}
    for product, row in told.items():
        if isinstance(row, tuple | list) and len(row) == 3 and len(rows) < MAX_ENTITLEMENTS:
            name, state, message = (str(part)[:MAX_RAW] for part in row)
            rows[str(product)[:MAX_RAW]] = (name, state, message)
    return rows
