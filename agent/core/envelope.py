"""The request/response envelope of every link that is ours: text frames in, requests and answers out.

Sans-IO: `Envelope` is one end of a connection; both ends may ask on the same socket. It numbers our requests, finds the
request an answer belongs to, answers what cannot be read, and tells when the other side must be given up.

Source: seeds/gator-websocket-api.md, "Basic Format"; protocols/emissary.md, "The envelope".
"""

import re
from collections.abc import Mapping
from typing import Any

import msgspec

from agent.core.payload import MAX_NESTED, UNREADABLE, is_too_deep

MAX_MESSAGE = 1024 * 1024  # bytes; the control server's limit, and that of every link of ours
MAX_ACTION = 256  # characters of a name: answers and logs repeat it, also for who has shown no token
MAX_REASON = 4096  # characters of an error answer that are kept: it goes on into logs, alerts and the store
BAD_IN_A_ROW = 10  # undecodable frames in a row, then the connection is closed with 1007

ReqId = int | float | str | None


class Request(msgspec.Struct, frozen=True):
    """The other side asks. A posted one gets no answer."""

    action: str
    payload: dict[str, Any]
    req_id: ReqId
    posted: bool


class Answer(msgspec.Struct, frozen=True):
    """An answer to request `req_id` of ours. `reason` is None for success."""

    req_id: int
    payload: dict[str, Any]
    reason: str | None


class Unreadable(msgspec.Struct, frozen=True):
    """A frame that is no message, and why. `answer` goes back; with `close` the connection then ends with 1007."""

    reason: str
    answer: str
    close: bool


class Stray(msgspec.Struct, frozen=True):
    """An answer to no request of ours: counted and dropped. `reason` is that of an error answer.

    With `rsp_id` None the peer tells that it could not read a frame of ours.
    """

    rsp_id: Any
    reason: str | None


class Foreign(msgspec.Struct, frozen=True):
    """An object of an older protocol on the same path: it has `op`, and neither `action` nor `rsp_id`."""

    message: dict[str, Any]


# One of a pair of surrogates alone; what the decoder says of it may be that the text was cut.
_HALF = re.compile(
    r"(?<!\\)(?:\\\\)*(\\u[dD](?:[89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])"
    r"|(?<!\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD])[c-fC-F][0-9a-fA-F]{2}))"
)
_decode = msgspec.json.Decoder(dict[str, Any]).decode
_encode = msgspec.json.Encoder().encode


class Envelope:
    """One end of a connection. Numbers requests from 0; remembers which of ours are open.

    With `knows_foreign` an object of an older protocol is a Foreign; else it is a request without action.
    """

    def __init__(self, *, knows_foreign: bool = False) -> None:
        self._knows_foreign = knows_foreign
        self._next = 0
        self._open: set[int] = set()
        self._bad = 0

    def ask(self, action: str, payload: Mapping[str, Any]) -> tuple[int, str]:
        """A request that wants an answer: its number and the frame's text."""
        number, self._next = self._next, self._next + 1
        self._open.add(number)
        return number, _encode({"action": action, "req_id": number, "posted": False, "payload": payload}).decode()

    def post(self, action: str, payload: Mapping[str, Any] | msgspec.Raw) -> str:
        """A request that wants none."""
        return _encode({"action": action, "posted": True, "payload": payload}).decode()

    def give_up(self, number: int) -> None:
        """Nobody waits for that answer any more; a late one is a Stray."""
        self._open.discard(number)

    def feed(self, frame: str | bytes) -> Request | Answer | Unreadable | Stray | Foreign:
        """Take one frame. A binary frame is unreadable, whatever it holds."""
        if isinstance(frame, bytes):
            return self._unreadable("bad_json: a binary frame; messages are JSON in text frames")
        try:
            message = _decode(frame)
        except UNREADABLE as err:
            half = _HALF.search(frame)
            why = f"{half[1]} is half of a character" if half else err
            return self._unreadable(f"bad_json: not a JSON object: {why}")
        if is_too_deep(frame, message):
            return self._unreadable(f"bad_json: more than {MAX_NESTED} objects and lists in each other")
        read = self._read(message)
        if not isinstance(read, Unreadable):
            self._bad = 0
        return read

    def _read(self, message: dict[str, Any]) -> Request | Answer | Unreadable | Stray | Foreign:
        if "rsp_id" in message:
            return self._read_answer(message)
        if self._knows_foreign and "op" in message and "action" not in message:
            return Foreign(message)
        action, posted, payload = message.get("action", ""), message.get("posted", False), message.get("payload", {})
        req_id = message.get("req_id", 0)
        if isinstance(req_id, bool) or not isinstance(req_id, int | float | str):
            return self._unreadable(f"bad_payload: req_id is {_kind(req_id)}, not a number or text")
        if not isinstance(action, str):
            return self._unreadable(f"bad_payload: action is {_kind(action)}, not text", req_id)
        if len(action) > MAX_ACTION:
            return self._unreadable(f"bad_payload: action is text of more than {MAX_ACTION} characters", req_id)
        if not isinstance(posted, bool):
            return self._unreadable(f"bad_payload: posted is {_kind(posted)}, not true or false", req_id)
        if not isinstance(payload, dict):
            return self._unreadable(f"bad_payload: payload is {_kind(payload)}, not an object", req_id)
        return Request(action or "identify", payload, req_id, posted)

    def _read_answer(self, message: dict[str, Any]) -> Answer | Stray:
        rsp_id, result, payload = message["rsp_id"], message.get("result"), message.get("payload", {})
        reason = None
        if result == "error":
            reason = str(message.get("reason", "internal: no reason given"))[:MAX_REASON]
        if isinstance(rsp_id, bool) or not isinstance(rsp_id, int) or rsp_id not in self._open:
            return Stray(rsp_id, reason)
        self._open.discard(rsp_id)
        if reason is not None:
            return Answer(rsp_id, {}, reason)
        if result != "success":
            return Answer(rsp_id, {}, "bad_json: an answer whose result is neither success nor error")
        if not isinstance(payload, dict):
            return Answer(rsp_id, {}, f"bad_json: an answer whose payload is {_kind(payload)}, not an object")
        return Answer(rsp_id, payload, None)

    def _unreadable(self, reason: str, req_id: ReqId = None) -> Unreadable:
        self._bad += 1
        return Unreadable(reason, error(req_id, reason), close=self._bad >= BAD_IN_A_ROW)


def success(action: str, req_id: ReqId, payload: Mapping[str, Any] | msgspec.Raw) -> str:
    """The frame of a successful answer."""
    return _encode({"action": action, "rsp_id": req_id, "result": "success", "payload": payload}).decode()


def error(req_id: ReqId, reason: str) -> str:
    """The frame of an error answer; `reason` is "code: text"."""
    return _encode({"result": "error", "rsp_id": req_id, "reason": reason}).decode()


def _kind(value: object) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return "a boolean"
        case int() | float():
            return "a number"
        case str():
            return "text"
        case list():
            return "a list"
        case _:
            return "an object"
