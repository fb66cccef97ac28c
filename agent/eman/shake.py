"""Eman without a wire: the handshake from both sides, the hub's registry, who is asked and who is answered.

Events go in, acts come out. Times are seconds of a clock that never steps; connections are numbers of the caller.

    hub, a connection     open -> who -> identified -> online -> gone; refused from any of the first three
    service               wait_who -> wait_id -> wait_online -> online | refused

Source: seeds/eman-protocol.md; protocols/eman.md, "State machines", "Differences and decisions", "Limits and security".
"""

import heapq
import hmac
import itertools
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from hashlib import md5
from typing import Any, Literal, TypeAlias

import msgspec

from agent.core.payload import UNREADABLE
from agent.eman import messages
from agent.eman.messages import Fault, Faulty, IAm, Id, Named, Request, Response, ServiceError, name_fault

MAX_SUBSCRIPTIONS, MAX_OPEN = 200, 1000  # of a connection: more of the latter, and the oldest times out
ANSWER_S, MAX_ANSWER_S = 30.0, 3600.0
LEAVE_S = 1.0  # a refused service may close by itself
JOIN_S = 10.0
MANY_DEADLINES = 10_000

State = Literal["open", "who", "identified", "online", "refused"]


class Emit(msgspec.Struct, frozen=True):
    """Send an event to a connection. Without `payload` it has none."""

    to: int
    event: str
    payload: msgspec.Struct | dict[str, msgspec.Raw] | msgspec.UnsetType = msgspec.UNSET


class Leave(msgspec.Struct, frozen=True):
    """Leave the namespace of a connection, and close it when it has not closed within LEAVE_S.

    `name` is what it calls itself, "" if it never said so; `code` is the error's.
    """

    to: int
    name: str
    code: str


Act: TypeAlias = Emit | Leave


def md5_key(name: str, salt: str) -> str:
    """The key of a service by the seed's rule: lower-case hex of md5(name + "." + salt), in UTF-8."""
    return md5(f"{name}.{salt}".encode(), usedforsecurity=False).hexdigest()


def by_salt(salt: str) -> Callable[[IAm], bool]:
    """Takes the md5 key of any name."""
    return lambda who: hmac.compare_digest(md5_key(who.name, salt).encode(), who.key.encode())


def by_keys(keys: Mapping[str, str]) -> Callable[[IAm], bool]:
    """Takes the key that each name has; for an unknown name it compares too, and takes none."""

    def check(who: IAm) -> bool:
        key = keys.get(who.name)
        return hmac.compare_digest((key or "\0").encode(), who.key.encode()) and key is not None

    return check


class Service(msgspec.Struct):
    """A connection of the hub. `id` is there from `identified` on."""

    number: int
    peer: str
    deadline: float | None
    state: State = "open"
    name: str = ""
    id: str = ""
    subscribed: set[str] = msgspec.field(default_factory=set)
    asks: OrderedDict[str, "_Open"] = msgspec.field(default_factory=OrderedDict)
    answers: set[tuple[int, str]] = msgspec.field(default_factory=set)  # the open requests that wait for it


class _Open(msgspec.Struct):
    """A request that is not over: when it ends by itself, and whom it still waits for."""

    request: Request
    until: float
    waits_for: set[int]


class Hub:
    """The hub's mind. `new_id` makes the id of a service from its name; `is_right` says whether a key is.

    With `broadcast` every online service gets a request, as the original does.
    """

    def __init__(
        self,
        is_right: Callable[[IAm], bool],
        new_id: Callable[[str], str],
        *,
        handshake_s: float = 2.0,
        broadcast: bool = False,
    ) -> None:
        self._is_right, self._new_id = is_right, new_id
        self._handshake_s, self._broadcast = handshake_s, broadcast
        self._services: dict[int, Service] = {}
        self._by_id: dict[str, Service] = {}
        self._listeners: dict[str, dict[int, None]] = {}
        self._deadlines: list[tuple[float, int, int, str]] = []  # when, a tie-break, connection, request or ""
        self._ties = itertools.count()
        self._open = 0  # requests

    # ---- what happens ----------------------------------------------------------------------------------------------

    def opened(self, number: int, peer: str, now: float) -> list[Act]:
        """A connection is there; it has JOIN_S to join the namespace."""
        self._services[number] = Service(number, peer, now + JOIN_S)
        self._remind(now + JOIN_S, number, "")
        return []

    def joined(self, number: int, now: float) -> list[Act]:
        """It joined the namespace: who is it?"""
        service = self._services[number]
        if service.state != "open":
            return []
        service.state, service.deadline = "who", now + self._handshake_s
        self._remind(service.deadline, number, "")
        return [Emit(number, messages.WHO)]

    def event(self, number: int, name: str, payload: msgspec.Raw, now: float) -> list[Act]:
        """It said something. What cannot be read is answered, and the connection stays."""
        service = self._services.get(number)
        if service is None or service.state == "refused":
            return []
        match name:
            case messages.I_AM:
                return self._introduce(service, payload)
            case messages.READY:
                return self._ready(service, payload)
            case messages.SUBSCRIBE | messages.UNSUBSCRIBE:
                return self._subscribe(service, name, payload)
            case messages.REQUEST | messages.SLIPPED_REQUEST:
                return self._request(service, payload, now)
            case messages.RESPONSE:
                return self._response(service, payload)
            case _:
                return self._complain(service, "unknown_event", f"the hub knows no event {name[:200]!r}")

    def gone(self, number: int) -> list[Act]:
        """The connection is closed: its subscriptions, its requests and its place in others' end."""
        service = self._services.get(number)
        if service is None:
            return []
        self._by_id.pop(service.id, None)
        for name in list(service.subscribed):
            self._unlisten(service, name)
        for request_id in list(service.asks):
            self._close(service, request_id)  # it may wait for itself
        del self._services[number]
        acts: list[Act] = []
        for asker, request_id in list(service.answers):
            acts += self._answered(asker, request_id, service, is_gone=True)
        return acts

    def name(self, number: int) -> str:
        """What a connection calls itself, "" if it never said so."""
        service = self._services.get(number)
        return service.name if service else ""

    def due(self) -> float:
        """When `tick` has something to do."""
        return self._deadlines[0][0] if self._deadlines else float("inf")

    def tick(self, now: float) -> list[Act]:
        """Time has passed: handshakes and requests that took too long end."""
        acts: list[Act] = []
        while self._deadlines and self._deadlines[0][0] <= now:
            at, _, number, request_id = heapq.heappop(self._deadlines)
            if not self._is_meant(at, number, request_id):
                continue
            service = self._services[number]
            if request_id:
                acts += self._time_out(service, request_id)
            elif service.state == "identified":
                acts += self._online(service)  # the seed shows no shake_ready: who never says it is online too
            else:
                acts += self._refuse(service, "request_timeout", 408, "Handshake Request Timeout")
        return acts

    def online(self) -> dict[str, dict[str, Any]]:
        """What `GET /services` shows."""
        return {
            service.id: {"id": service.id, "name": service.name, "subscribed_events": sorted(service.subscribed)}
            for service in self._services.values()
            if service.state == "online"
        }

    # ---- handshake -------------------------------------------------------------------------------------------------

    def _introduce(self, service: Service, payload: msgspec.Raw) -> list[Act]:
        if service.state != "who":
            return self._complain(service, "not_expected", "shake_i_am is said once, after shake_who")
        given = _read(payload, dict[str, Any])
        name, key = (given.get("name"), given.get("key")) if isinstance(given, dict) else (None, None)
        if not isinstance(name, str) or name_fault(name):
            return self._refuse(service, "invalid_name", 400, "Invalid name")
        service.name = name
        if not isinstance(key, str) or not key:
            return self._refuse(service, "invalid_secret_key", 400, "Invalid secret key")
        if not self._is_right(IAm(name, key)):
            return self._refuse(service, "invalid_key", 403, "Invalid key")
        service.state, service.id = "identified", self._new_id(name)
        self._by_id[service.id] = service
        return [Emit(service.number, messages.ID, Id(service.id))]

    def _ready(self, service: Service, payload: msgspec.Raw) -> list[Act]:
        if service.state == "online":
            return []  # it came late, or twice
        if service.state != "identified":
            return self._complain(service, "not_expected", "shake_ready is said after shake_id")
        given = _read(payload, Id)
        if not isinstance(given, Id) or given.id != service.id:
            return self._refuse(service, "invalid_id", 400, "Invalid id")
        return self._online(service)

    def _online(self, service: Service) -> list[Act]:
        service.state, service.deadline = "online", None
        return [Emit(service.number, messages.ONLINE)]

    def _refuse(self, service: Service, code: str, status: int, message: str) -> list[Act]:
        service.state, service.deadline = "refused", None
        for name in list(service.subscribed):
            self._unlisten(service, name)
        fault = Emit(service.number, messages.SHAKE_ERROR, Faulty(Fault(message, code, status)))
        return [fault, Leave(service.number, service.name, code)]

    # ---- subscriptions ---------------------------------------------------------------------------------------------

    def _subscribe(self, service: Service, event: str, payload: msgspec.Raw) -> list[Act]:
        if service.state not in ("identified", "online"):
            return self._complain(service, "not_online", "subscribe once the hub has given an id")
        given = _read(payload, Named)
        fault = name_fault(given.name) if isinstance(given, Named) else "expected {name}"
        if not isinstance(given, Named) or fault:
            return self._complain(service, f"invalid_data_on{event}", str(fault))
        if event == messages.UNSUBSCRIBE:
            self._unlisten(service, given.name)
        elif given.name not in service.subscribed:
            if len(service.subscribed) >= MAX_SUBSCRIPTIONS:
                return self._complain(
                    service, "too_many_subscriptions", f"more than {MAX_SUBSCRIPTIONS} names at a time"
                )
            service.subscribed.add(given.name)
            self._listeners.setdefault(given.name, {})[service.number] = None
        return []

    def _unlisten(self, service: Service, name: str) -> None:
        service.subscribed.discard(name)
        listeners = self._listeners.get(name, {})
        listeners.pop(service.number, None)
        if not listeners:
            self._listeners.pop(name, None)

    # ---- requests --------------------------------------------------------------------------------------------------

    def _request(self, service: Service, payload: msgspec.Raw, now: float) -> list[Act]:
        acts = self._begins(service)
        if service.state != "online":
            return acts
        given, more = _read_all(payload, Request)
        fault = name_fault(given.name) if isinstance(given, Request) else given
        if not isinstance(given, Request) or fault:
            return [*acts, _fault(service, messages.REQUEST_ERROR, "no_required_fields", 400, str(fault))]
        if given.request_id in service.asks:
            text = f"request_id {given.request_id!r} is open already"
            return [*acts, _fault(service, messages.REQUEST_ERROR, "duplicate_request", 409, text)]
        request = msgspec.structs.replace(given, sender_id=service.id)
        targets = list(self._targets(given.name))
        said = _with(request, more)
        acts += [Emit(number, given.name, said) for number in targets]
        if given.timeout_ms == 0:
            return acts
        if not targets:
            return [*acts, _made(service, request, "no_listeners", 404, f"No listeners for {given.name!r}")]
        if len(service.asks) >= MAX_OPEN:
            acts += self._time_out(service, next(iter(service.asks)))
        limit_s = answer_limit_s(given)
        without = msgspec.structs.replace(request, data=msgspec.UNSET)  # a thousand of them may be kept, a MB each
        service.asks[given.request_id] = _Open(without, now + limit_s, set(targets))
        self._open += 1
        for number in targets:
            self._services[number].answers.add((service.number, given.request_id))
        self._remind(now + limit_s, service.number, given.request_id)
        return acts

    def _targets(self, name: str) -> Iterator[int]:
        if not self._broadcast:
            return iter(self._listeners.get(name, ()))
        return (service.number for service in self._services.values() if service.state == "online")

    def _response(self, service: Service, payload: msgspec.Raw) -> list[Act]:
        acts = self._begins(service)
        if service.state != "online":
            return acts
        given, more = _read_all(payload, Response)
        if not isinstance(given, Response):
            return [*acts, _fault(service, messages.RESPONSE_ERROR, "no_required_fields", 400, str(given))]
        asker = self._by_id.get(given.sender_id)
        if asker is None or (asker.number, given.request_id) not in service.answers:
            text = f"no request {given.request_id!r} of {given.sender_id!r} waits for an answer from here"
            return [*acts, _fault(service, messages.RESPONSE_ERROR, "unknown_request", 404, text)]
        said = msgspec.structs.replace(given, recipient_id=service.id, name=asker.asks[given.request_id].request.name)
        acts.append(Emit(asker.number, messages.RESPONSE, _with(said, more)))
        return [*acts, *self._answered(asker.number, given.request_id, service, is_gone=False)]

    def _begins(self, service: Service) -> list[Act]:
        """A service that never says shake_ready is online by its first request."""
        if service.state == "identified":
            return self._online(service)
        if service.state != "online":
            return self._complain(service, "not_online", "the handshake comes first")
        return []

    def _answered(self, asker: int, request_id: str, by: Service, *, is_gone: bool) -> list[Act]:
        by.answers.discard((asker, request_id))
        service = self._services[asker]
        waiting = service.asks[request_id]
        waiting.waits_for.discard(by.number)
        if waiting.waits_for:
            return []
        self._close(service, request_id)
        if not is_gone:
            return []
        return [_made(service, waiting.request, "listener_gone", 502, "The last listener left without an answer")]

    def _time_out(self, service: Service, request_id: str) -> list[Act]:
        request = service.asks[request_id].request
        self._close(service, request_id)
        return [_made(service, request, "timeout", 504, "No answer in time")]

    def _close(self, service: Service, request_id: str) -> None:
        self._open -= 1
        for number in service.asks.pop(request_id).waits_for:
            if number in self._services:
                self._services[number].answers.discard((service.number, request_id))

    def _complain(self, service: Service, code: str, text: str) -> list[Act]:
        return [Emit(service.number, messages.SERVICE_ERROR, ServiceError(text, code))]

    def _remind(self, at: float, number: int, request_id: str) -> None:
        heapq.heappush(self._deadlines, (at, next(self._ties), number, request_id))
        if len(self._deadlines) > MANY_DEADLINES + 2 * (self._open + len(self._services)):
            # Most requests are answered long before: what is left of them would wait for an hour, if they said so.
            self._deadlines = [each for each in self._deadlines if self._is_meant(each[0], each[2], each[3])]
            heapq.heapify(self._deadlines)

    def _is_meant(self, at: float, number: int, request_id: str) -> bool:
        """Does a deadline still hold? Not one of a request that is over, though its id may be used again."""
        service = self._services.get(number)
        if service is None:
            return False
        if not request_id:
            return service.deadline == at
        waiting = service.asks.get(request_id)
        return waiting is not None and waiting.until == at


def answer_limit_s(request: Request) -> float:
    """How long who asks waits for an answer, in seconds."""
    return ANSWER_S if request.timeout_ms is None else min(request.timeout_ms, 1000 * MAX_ANSWER_S) / 1000


def _fault(service: Service, event: str, code: str, status: int, text: str) -> Emit:
    return Emit(service.number, event, Faulty(Fault(text, code, status)))


def _made(service: Service, request: Request, code: str, status: int, text: str) -> Emit:
    """An answer of the hub itself."""
    return Emit(
        service.number, messages.RESPONSE, messages.answer(request, messages.HUB, error=Fault(text, code, status))
    )


def _read(payload: msgspec.Raw, kind: Any) -> Any:
    """The payload as `kind`, or what is wrong with it."""
    try:
        return msgspec.json.decode(payload, type=kind)
    except UNREADABLE as err:
        return str(err)


class _OnlyRequest(Request, frozen=True, forbid_unknown_fields=True):
    """A request as the sheet has it, and nothing else."""


class _OnlyResponse(Response, frozen=True, forbid_unknown_fields=True):
    """The same of a response."""


_FIELDS = msgspec.json.Decoder(dict[str, msgspec.Raw])
_ONLY: dict[type, msgspec.json.Decoder[Any]] = {
    Request: msgspec.json.Decoder(_OnlyRequest),
    Response: msgspec.json.Decoder(_OnlyResponse),
}


def _read_all(
    payload: msgspec.Raw, kind: type[Request] | type[Response]
) -> tuple[Request | Response | str, dict[str, msgspec.Raw]]:
    """The payload as `kind`, or what is wrong with it; and the fields that it has beside, which are few peers' way."""
    try:
        return _ONLY[kind].decode(payload), {}
    except UNREADABLE as err:
        if "unknown field" not in str(err):
            return str(err), {}
    given: Request | Response | str = _read(payload, kind)
    if isinstance(given, str):
        return given, {}
    fields = _FIELDS.decode(payload)
    return given, {name: value for name, value in fields.items() if name not in kind.__struct_fields__}


def _with(said: Request | Response, more: dict[str, msgspec.Raw]) -> msgspec.Struct | dict[str, msgspec.Raw]:
    return {**_FIELDS.decode(msgspec.json.encode(said)), **more} if more else said


# ---- the service's side --------------------------------------------------------------------------------------------

ServiceState = Literal["wait_who", "wait_id", "wait_online", "online", "refused"]


class Say(msgspec.Struct, frozen=True):
    """Emit an event to the hub."""

    event: str
    payload: msgspec.Struct


class IsOnline(msgspec.Struct, frozen=True):
    """The handshake is over: subscribe now."""

    id: str


class IsRefused(msgspec.Struct, frozen=True):
    """The hub does not want us, and says why."""

    fault: Fault


class Asked(msgspec.Struct, frozen=True):
    """Somebody asks for an event that we are subscribed to."""

    request: Request


class Answered(msgspec.Struct, frozen=True):
    """An answer to a request of ours."""

    response: Response


class Complaint(msgspec.Struct, frozen=True):
    """The hub could not use what we said."""

    event: str
    text: str


Heard: TypeAlias = Say | IsOnline | IsRefused | Asked | Answered | Complaint


class Caller:
    """A service's side of one connection."""

    def __init__(self, name: str, key: str) -> None:
        self.state: ServiceState = "wait_who"
        self.id = ""
        self._who = IAm(name, key)

    def feed(self, name: str, payload: msgspec.Raw) -> list[Heard]:
        """Take an event of the hub."""
        match name:
            case messages.WHO if self.state == "wait_who":
                self.state = "wait_id"
                return [Say(messages.I_AM, self._who)]
            case messages.ID if self.state == "wait_id":
                given = _read(payload, Id)
                if not isinstance(given, Id):
                    return [Complaint(name, str(given))]
                self.state, self.id = "wait_online", given.id
                return [Say(messages.READY, given)]
            case messages.ONLINE if self.state == "wait_online":
                self.state = "online"
                return [IsOnline(self.id)]
            case messages.SHAKE_ERROR:
                fault = _read(payload, Faulty)
                self.state = "refused"
                return [IsRefused(fault.error if isinstance(fault, Faulty) else Fault(str(fault), "unreadable", 400))]
            case messages.RESPONSE:
                response = _read(payload, Response)
                return [Answered(response) if isinstance(response, Response) else Complaint(name, response)]
            case messages.SERVICE_ERROR | messages.REQUEST_ERROR | messages.RESPONSE_ERROR:
                return [Complaint(name, bytes(payload).decode(errors="replace")[:1000])]
            case _ if name_fault(name) is None:
                request = _read(payload, Request)
                return [Asked(request) if isinstance(request, Request) else Complaint(name, request)]
            case _:
                return [Complaint(name, f"not expected while {self.state}")]
