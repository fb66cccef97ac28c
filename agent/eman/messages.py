"""The events of Eman: what services and the hub say in the namespace /communication.

Source: seeds/eman-protocol.md; protocols/eman.md, "Events".
"""

import re
from typing import Annotated, Any

import msgspec

NAMESPACE = "/communication"
HUB = "eman"  # `recipient_id` of answers that the hub makes itself

WHO, I_AM, ID, READY, ONLINE = "shake_who", "shake_i_am", "shake_id", "shake_ready", "shake_online"
SHAKE_ERROR = "shake_error"
SUBSCRIBE, UNSUBSCRIBE = "_service:api:request:subscribe", "_service:api:request:unsubscribe"
SERVICE_ERROR = "_service:error"
REQUEST, RESPONSE = "api:request", "api:response"
SLIPPED_REQUEST = "api_request"  # as one arrow of the seed has it
REQUEST_ERROR, RESPONSE_ERROR = "api:request:error", "api:response:error"

# What would be a control event at the listener cannot be asked for.
_RESERVED = re.compile(
    r"(connect|disconnect|reconnect|api:|shake_|_service:).*|error|ping|pong|newListener|removeListener"
)
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


class IAm(msgspec.Struct, frozen=True):
    """Who a service is, and what proves it."""

    name: str
    key: str


class Id(msgspec.Struct, frozen=True):
    """The id that the hub gives a connection; `shake_ready` repeats it."""

    id: str


class Named(msgspec.Struct, frozen=True):
    """The event that is subscribed, or no more."""

    name: str


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """A request, and the event that a listener gets of it. `timeout_ms` 0: no answer is wanted."""

    name: str
    request_id: Text
    sender_id: Text
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    timeout_ms: Annotated[int, msgspec.Meta(ge=0)] | None = None


class Fault(msgspec.Struct, frozen=True):
    """What went wrong; `status` as in HTTP."""

    message: str
    code: str
    status: int


class Response(msgspec.Struct, frozen=True, omit_defaults=True):
    """An answer: `data`, or `error` as a Fault with perhaps more in it. `recipient_id` is who answered."""

    name: str
    request_id: Text
    sender_id: Text
    recipient_id: Text
    data: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    error: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET


class Faulty(msgspec.Struct, frozen=True):
    """A `shake_error`, `api:request:error` or `api:response:error`."""

    error: Fault


class ServiceError(msgspec.Struct, frozen=True):
    """A `_service:error`."""

    message: str
    code: str


def name_fault(name: str) -> str | None:
    """Why a name cannot be asked for or subscribed, or None."""
    if not 1 <= len(name) <= 200:
        return f"a name has 1 to 200 characters, not {len(name)}"
    if _CONTROL.search(name):
        return "a name has no control characters"
    if _RESERVED.fullmatch(name):
        return f"{name!r} is an event of the bus itself"
    return None


def answer(request: Request, recipient: str, *, data: Any = msgspec.UNSET, error: Any = msgspec.UNSET) -> Response:
    """The response to a request, with either `data` or `error`."""
    return Response(
        name=request.name,
        request_id=request.request_id,
        sender_id=request.sender_id,
        recipient_id=recipient,
        data=data if data is msgspec.UNSET else msgspec.Raw(msgspec.json.encode(data)),
        error=error if error is msgspec.UNSET else msgspec.Raw(msgspec.json.encode(error)),
    )
