"""The head of an HTTP request: bytes in, a checked `Head` or a refusal out.

h11 reads it; what h11 lets pass and two readers could understand in two ways (a lone line feed, a folded line, a length
and chunks at once) is refused before or after it.

Source: protocols/emissary.md, "Auth, limits"; RFC 9112.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Literal, TypeAlias
from urllib.parse import parse_qsl, unquote_to_bytes

import h11
import msgspec

from agent.core.errors import AgentError

MAX_HEAD = 16 * 1024  # bytes
MAX_QUERY_FIELDS = 64

Scope: TypeAlias = Literal["open", "read", "control"]

# A line that does not end in CRLF, a folded line, a NUL. A CR at the very end may still become CRLF.
_BAD_LINE = re.compile(rb"(?<!\r)\n|\r(?!\n|\Z)|\r\n[ \t]|\0")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(:[0-9]{1,5})?")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
# What decides about the request must not be there twice: two readers could each believe another one.
_SINGLE = ("authorization", "host", "origin", "sec-websocket-key", "sec-websocket-version")


class HttpError(AgentError):
    """A request is answered by an error. `headers` are added to the answer; its body is the text."""

    def __init__(self, status: int, text: str, headers: tuple[tuple[str, str], ...] = ()) -> None:
        super().__init__(f"{status}: {text}", remedy="Nothing was changed.")
        self.status, self.text, self.headers = status, text, headers


class Headers:
    """Names and values of a head; names in any case."""

    def __init__(self, items: Iterable[tuple[str, str]]) -> None:
        self._items = tuple((name.lower(), value) for name, value in items)

    def get(self, name: str, default: str | None = None) -> str | None:
        """The first value of that name."""
        return next((value for known, value in self._items if known == name.lower()), default)

    def all(self, name: str) -> list[str]:
        """Every value of that name, in order."""
        return [value for known, value in self._items if known == name.lower()]

    def words(self, name: str) -> set[str]:
        """The members of a comma-separated list, in lower case."""
        return {word.strip().lower() for value in self.all(name) for word in value.split(",")} - {""}

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._items)


class Head(msgspec.Struct, frozen=True):
    """A request without its body.

    `target` is as it came, `path` its decoded path, `query` its fields (the last of a name); `peer` the client's
    address and `peer_port` its port there, `client_cert` the name in its certificate, `scope` what it may do.
    """

    method: str
    target: str
    path: str
    query: dict[str, str]
    headers: Headers
    peer: str
    client_cert: str | None = None
    scope: Scope = "open"
    peer_port: int = 0


def cut_head(buffer: bytearray) -> bytes | None:
    """Take the head off the front of what was received, with its blank line; None while it is not complete.

    Raises HttpError: 400 for a line that ends or goes on otherwise than by CRLF, 431 for more than MAX_HEAD bytes.
    """
    end = buffer.find(b"\r\n\r\n", 0, MAX_HEAD)
    if _BAD_LINE.search(buffer, 0, MAX_HEAD if end < 0 else end + 4):
        raise HttpError(400, "a line of the head does not end with CRLF, is folded, or holds a NUL")
    if end < 0:
        if len(buffer) >= MAX_HEAD:
            raise HttpError(431, f"the head has more than {MAX_HEAD} bytes")
        return None
    head = bytes(buffer[: end + 4])
    del buffer[: end + 4]
    return head


def read_head(http: h11.Connection, raw: bytes, peer: str, client_cert: str | None = None) -> Head:
    """Read a head that `cut_head` gave, by a fresh h11 connection, which then can read the body.

    Raises HttpError: 400 for what is no HTTP or could be read in two ways, 501 and 505 for what is not served.
    """
    http.receive_data(raw)
    try:
        request = http.next_event()
    except h11.RemoteProtocolError as err:
        raise HttpError(err.error_status_hint, str(err)) from err
    if not isinstance(request, h11.Request):
        raise HttpError(400, "no request line")
    if request.http_version not in (b"1.0", b"1.1"):
        raise HttpError(505, "HTTP/1.0 and HTTP/1.1 are served")
    headers = Headers((name.decode("ascii"), value.decode("latin-1")) for name, value in request.headers)
    for name in _SINGLE:
        if len(headers.all(name)) > 1:
            raise HttpError(400, f"the header {name} is there twice")
    if headers.all("transfer-encoding") and (headers.all("content-length") or request.http_version == b"1.0"):
        raise HttpError(400, "a length and chunks at once, or chunks in HTTP/1.0")
    host = headers.get("host")
    if host is not None and not _HOST.fullmatch(host):
        raise HttpError(400, "the header host names no host")
    target = request.target.decode("ascii")
    path, query = _split(target)
    return Head(request.method.decode("ascii"), target, path, query, headers, peer, client_cert)


def host_name(host: str) -> str:
    """The name in a Host header, in lower case, without port and brackets."""
    name = host.rpartition(":")[0] if re.search(r":[0-9]*$", host) else host
    return name.strip("[]").lower()


def _split(target: str) -> tuple[str, dict[str, str]]:
    if not target.startswith("/"):
        raise HttpError(400, "the target is no path")
    raw, _, query = target.partition("?")
    try:
        path = unquote_to_bytes(raw).decode("utf-8")
        fields = dict(parse_qsl(query, keep_blank_values=True, errors="strict", max_num_fields=MAX_QUERY_FIELDS))
    except ValueError as err:
        raise HttpError(400, "the target is not UTF-8, or has too many fields") from err
    if _CONTROL.search(path) or not {".", ".."}.isdisjoint(path.split("/")):
        raise HttpError(400, "the path has a control character, or a segment of dots")
    return path, fields
