"""The frames of the older services' endpoints. Pure.

| endpoint | frames |
|---|---|
| `/` | `{"op", "body", "to", "from"}`: the agent's entitlement status; quit and disconnect |
| `/ws/rhsm/status` | the status on connect, on change, on any frame |
| `/ws/monitor/<path>` | a file's content on connect and on change, `pong` on any frame |

Source: protocols/emissary.md, "Older services' endpoints"; RedHatQE/rhsm-services@38ae860.
"""

from base64 import b64encode
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from agent.core.payload import read

STATUS_PATH = "/ws/rhsm/status"
MONITOR_PATH = "/ws/monitor/"
UNKNOWN_STATUS = -1
_OVERALL = {0: "Current", 1: "Invalid", 5: "Unknown"}

_encode = msgspec.json.Encoder().encode


class OpFrame(msgspec.Struct, frozen=True, kw_only=True, rename={"from_": "from"}):
    """A frame of `/`. `to` and `from` are whatever the client calls them."""

    op: str
    body: Any = None
    to: Any = None
    from_: Any = None


class StatusFrame(msgspec.Struct, frozen=True, kw_only=True, rename="camel"):
    """A frame of `/ws/rhsm/status`. `time` is ISO 8601."""

    time: str
    entitlement_status: int
    overall_status: str


class FileFrame(msgspec.Struct, frozen=True, kw_only=True):
    """A frame of `/ws/monitor/<path>`. `content` is base64; empty where the settings allow none."""

    time: str
    event: Literal["open", "change", "pong"]
    file: str
    content: str


def read_op(message: Mapping[str, Any]) -> OpFrame:
    """A frame of an older client. Raises ActionError `bad_payload`."""
    return read(message, OpFrame)


def op_status(asked: OpFrame, status: int, ident: str) -> str:
    """The answer to `get-status`, which the original never gave: to who asked, from us."""
    answer = OpFrame(op=asked.op, body=str(status), to=asked.from_, from_=ident)
    return _encode(answer).decode()


def status_frame(status: int, at: float) -> str:
    """The entitlement status at an epoch time."""
    overall = _OVERALL.get(status, "Unknown status number")
    return _encode(StatusFrame(time=_iso(at), entitlement_status=status, overall_status=overall)).decode()


def file_frame(event: Literal["open", "change", "pong"], file: str, content: bytes | str | None, at: float) -> str:
    """What became of a file. A `content` that is text is base64 already."""
    text = b64encode(content).decode() if isinstance(content, bytes) else content or ""
    return _encode(FileFrame(time=_iso(at), event=event, file=file, content=text)).decode()


def monitored(path: str) -> str:
    """The absolute path in the path of a request, which may have one slash or two before it."""
    return "/" + path.removeprefix(MONITOR_PATH).lstrip("/")


def _iso(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")
