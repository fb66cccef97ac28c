"""Who may come in, and what for: tokens, certificates, Origin, Host, and a limit on guessing.

Pure: it decides on a `Head` and a clock. Tokens are compared in constant time, all of them each time.

Source: protocols/emissary.md, "Auth, limits".
"""

import hmac
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from math import ceil
from urllib.parse import urlsplit

from agent.core.errors import ActionError
from agent.core.head import Head, HttpError, Scope, host_name

MAX_FAILURES, WINDOW_S, BLOCK_S = 5, 60.0, 60.0
MAX_ADDRESSES = 4096  # addresses whose failures are remembered; the oldest are forgotten

RANK: Mapping[Scope, int] = {"open": 0, "read": 1, "control": 2}
_DEFAULT_PORTS = {"http": 80, "https": 443}


class Guard:
    """The one guard of a port. `client_names` maps names of client certificates; `origins` are allowed beside the Host.

    Without any credential a client has the scope "open", and with `insecure_loopback` "control" when it is on this
    machine. `clock` gives seconds that only grow.
    """

    def __init__(
        self,
        tokens: Sequence[tuple[str, Scope]],
        client_names: Mapping[str, Scope],
        insecure_loopback: bool,
        origins: Sequence[str],
        clock: Callable[[], float],
    ) -> None:
        self._tokens = [(token.encode(), scope) for token, scope in tokens]
        self._client_names, self._insecure_loopback = client_names, insecure_loopback
        self._origins = {_site(origin) for origin in origins}
        self._clock = clock
        self._failures: OrderedDict[str, deque[float]] = OrderedDict()

    def admit(self, head: Head) -> Scope:
        """What this client may do. Raises HttpError: 429 after too many failures, 403 for Host or Origin, 401."""
        self._refuse_guessing(head.peer)
        host = head.headers.get("host", "") or ""
        if self._insecure_loopback:
            must_name_loopback(head)
        origin = head.headers.get("origin")
        if origin is not None and not self._same_site(origin, host):
            raise HttpError(403, f"requests from pages of {origin!r} are not allowed")
        authorization = head.headers.get("authorization")
        if authorization is not None:
            scheme, _, token = authorization.partition(" ")
            scope = self._scope_of(token.strip()) if scheme.lower() == "bearer" else None
            if scope is None:
                raise unauthorized(self._failed(head.peer))
            return scope
        if head.client_cert is not None and head.client_cert in self._client_names:
            return self._client_names[head.client_cert]
        if self._insecure_loopback and is_loopback(head.peer):
            return "control"
        return "open"

    def check(self, token: str, peer: str) -> Scope:
        """What a token presented later, by the action `auth`, allows. Raises ActionError: `rate`, `unauthorized`."""
        try:
            self._refuse_guessing(peer)
        except HttpError as err:
            raise ActionError("rate", err.text) from err
        scope = self._scope_of(token)
        if scope is None:
            raise ActionError("unauthorized", self._failed(peer))
        return scope

    def _scope_of(self, token: str) -> Scope | None:
        presented = token.encode("utf-8", "surrogatepass")
        found: Scope | None = None
        for known, scope in self._tokens:
            if hmac.compare_digest(known, presented):
                found = scope
        return found

    def _same_site(self, origin: str, host: str) -> bool:
        scheme, name, port = _site(origin)
        if (scheme, name, port) in self._origins:
            return True
        here = _site(f"{scheme}://{host}")
        return name != "" and (name, port) == here[1:]

    def _refuse_guessing(self, peer: str) -> None:
        times = self._failures.get(peer)
        if times is None or len(times) < MAX_FAILURES or times[-1] - times[0] >= WINDOW_S:
            return
        left = times[-1] + BLOCK_S - self._clock()
        if left > 0:
            raise HttpError(
                429,
                f"{MAX_FAILURES} wrong tokens within {WINDOW_S:g} s from {peer}; try again in {ceil(left)} s",
                (("Retry-After", str(ceil(left))),),
            )

    def _failed(self, peer: str) -> str:
        """Count a wrong token; what is said of it."""
        times = self._failures.setdefault(peer, deque(maxlen=MAX_FAILURES))
        times.append(self._clock())
        self._failures.move_to_end(peer)
        if len(self._failures) > MAX_ADDRESSES:
            self._failures.popitem(last=False)
        if len(times) == MAX_FAILURES and times[-1] - times[0] < WINDOW_S:
            return f"the token is not known here; nobody at {peer} is let in for {BLOCK_S:g} s"
        return "the token is not known here"


def require(head: Head, scope: Scope) -> None:
    """Raises HttpError when the client's scope is not enough: 401 when it showed nothing, else 403."""
    if RANK[head.scope] >= RANK[scope]:
        return
    if head.scope == "open":
        raise unauthorized("a token is missing")
    raise HttpError(403, f"this takes a token with the scope {scope}; yours has {head.scope}")


def must_name_loopback(head: Head) -> None:
    """Raises HttpError for a page elsewhere whose name resolves to 127.0.0.1: it cannot choose the Host header."""
    if not is_loopback(host_name(head.headers.get("host") or "")):
        raise HttpError(403, "the header host does not name this machine's loopback")


def unauthorized(text: str) -> HttpError:
    """The refusal that asks for a token."""
    return HttpError(401, text, (("WWW-Authenticate", 'Bearer realm="emissary"'),))


def is_loopback(host: str) -> bool:
    """Does a host name or address (without port and brackets) mean this machine alone?"""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _site(origin: str) -> tuple[str, str, int | None]:
    """Scheme, host and port of an Origin; three empty ones for what is none ("null", a malformed one)."""
    try:
        parts = urlsplit(origin.lower())
        return parts.scheme, parts.hostname or "", parts.port or _DEFAULT_PORTS.get(parts.scheme)
    except ValueError:
        return "", "", None
