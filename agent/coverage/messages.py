"""The vocabulary of Drill: frames, topics and actions of the admin, and what an agent with its plugin part says.

What we read is read leniently: unknown keys are ignored, quoted booleans and numbers are taken. What we say has exactly
the keys listed here, bare booleans and numbers: the admin's decoder loses a frame with any other.

Source: seeds/drill-coverage-event-flow.md, "API", "Examples"; protocols/drill.md, "The wire".
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import lru_cache
from itertools import chain, repeat
from typing import Annotated, Any, TypeAlias, TypeVar

import msgspec

from agent.coverage.catalog import Unit
from agent.coverage.merged import Batch

T = TypeVar("T")

PLUGIN = "test2code"
MAX_OBJECTS = 65_535  # of one COVERAGE_DATA_PART: seed, step 5
MAX_TEXT = 64 * 2**20  # bytes of a frame, in either direction
MAX_ENTITIES = 1000  # of one INIT_DATA_PART

Text = Annotated[str, msgspec.Meta(max_length=1000)]
SessionId = Annotated[str, msgspec.Meta(min_length=1, max_length=1000)]


# ---- from the admin ------------------------------------------------------------------------------------------------


class Frame(msgspec.Struct, frozen=True):
    """A frame, in either direction. `text` holds JSON, or plain text."""

    type: str
    destination: str = ""
    text: str = ""


class PluginId(msgspec.Struct, frozen=True):
    """The part of `/agent/load` that we read: which plugin it is."""

    id: str = PLUGIN


class Load(msgspec.Struct, frozen=True):
    """`/agent/load`. The plugin's code in `data` is never read, let alone run."""

    meta: PluginId = PluginId()


class Toggle(msgspec.Struct, frozen=True, rename="camel"):
    """`/plugin/togglePlugin`: on, off, or without a value the other of the two."""

    plugin_id: str = PLUGIN
    force_value: bool | None = None


class PluginAction(msgspec.Struct, frozen=True, rename="camel"):
    """`/plugin/action`: an action as JSON in `message`. With a key it is acknowledged under the key too."""

    message: str
    id: str = PLUGIN
    confirmation_key: str | None = None


class StartSession(msgspec.Struct, frozen=True, rename="camel"):
    """What a session is started with. `is_global` changes nothing for us: there are no headers of a session here."""

    session_id: SessionId
    test_type: Text = ""
    test_name: Text | None = None
    is_realtime: bool = False
    is_global: bool = False


class OfSession(msgspec.Struct, frozen=True, rename="camel"):
    """Which session is meant."""

    session_id: SessionId


class SessionData(msgspec.Struct, frozen=True, rename="camel"):
    """Coverage that somebody else collected, for a session."""

    session_id: SessionId
    data: str


class Scope(msgspec.Struct, frozen=True, rename="camel"):
    """The admin's scope that is active from now on."""

    id: str = ""
    name: str = ""
    prev_id: str = ""


class StartAgentSession(msgspec.Struct, frozen=True, tag="START_AGENT_SESSION"):
    """Collect probes for a new session. Answered by SESSION_STARTED."""

    payload: StartSession


class AddAgentSessionData(msgspec.Struct, frozen=True, tag="ADD_SESSION_DATA"):
    """Coverage that another tool took, for a session that is open."""

    payload: SessionData


class AddAgentSessionTests(msgspec.Struct, frozen=True, tag="ADD_SESSION_TESTS"):
    """The tests that another tool ran. Acknowledged, and nothing is done."""

    payload: Any = None


class StopAgentSession(msgspec.Struct, frozen=True, tag="STOP"):
    """End a session: a last collection, its parts, then SESSION_FINISHED."""

    payload: OfSession


class StopAllAgentSessions(msgspec.Struct, frozen=True, tag="STOP_ALL"):
    """The same for all sessions, with one SESSIONS_FINISHED."""


class CancelAgentSession(msgspec.Struct, frozen=True, tag="CANCEL"):
    """Drop a session and its data. Answered by SESSION_CANCELLED."""

    payload: OfSession


class CancelAllAgentSessions(msgspec.Struct, frozen=True, tag="CANCEL_ALL"):
    """The same for all sessions, with one SESSIONS_CANCELLED."""


class InitActiveScope(msgspec.Struct, frozen=True, tag="INIT_ACTIVE_SCOPE"):
    """A new scope: all sessions are dropped, silently. Answered by SCOPE_INITIALIZED."""

    payload: Scope = Scope()


Action: TypeAlias = (
    StartAgentSession
    | AddAgentSessionData
    | AddAgentSessionTests
    | StopAgentSession
    | StopAllAgentSessions
    | CancelAgentSession
    | CancelAllAgentSessions
    | InitActiveScope
)

_frame = msgspec.json.Decoder(Frame, strict=False)
_load = msgspec.json.Decoder(Load, strict=False)
_toggle = msgspec.json.Decoder(Toggle, strict=False)
_plugin_action = msgspec.json.Decoder(PluginAction, strict=False)
_action: msgspec.json.Decoder[Action] = msgspec.json.Decoder(Action, strict=False)


def read_frame(text: str | bytes) -> Frame:
    """A frame of the admin. Raises msgspec.DecodeError for what is none, ValidationError for one with wrong fields."""
    return _decoded(_frame, text)


def read_load(text: str) -> Load:
    """The text of `/agent/load`. Raises as `read_frame`."""
    return _decoded(_load, text)


def read_toggle(text: str) -> Toggle:
    """The text of `/plugin/togglePlugin`. Raises as `read_frame`."""
    return _decoded(_toggle, text)


def read_plugin_action(text: str) -> PluginAction:
    """The text of `/plugin/action`. Raises as `read_frame`."""
    return _decoded(_plugin_action, text)


def read_action(text: str) -> Action:
    """The action in a PluginAction. Raises as `read_frame`; an unknown `type` is a ValidationError."""
    return _decoded(_action, text)


class Asked(msgspec.Struct, frozen=True):
    """A frame as far as it can be read: of a `/plugin/action` the action, or `why` there is none; and its acks."""

    frame: Frame
    acks: tuple[str, ...]
    action: Action | None = None
    why: str = ""


def read_asked(text: str | bytes) -> Asked:
    """A frame, with its action. What cannot be read is told in `why`; a frame that is none has no type."""
    try:
        frame = read_frame(text)
    except msgspec.DecodeError as err:
        return Asked(Frame(""), (), why=str(err))
    acks: tuple[str, ...] = (frame.destination,)
    if frame.type != "MESSAGE" or frame.destination != "/plugin/action":
        return Asked(frame, acks)
    try:
        asked = read_plugin_action(frame.text)
        if asked.confirmation_key:
            acks = (f"{frame.destination}/{asked.confirmation_key}", frame.destination)
        if asked.id != PLUGIN:
            return Asked(frame, acks, why=f"no plugin {asked.id[:100]!r} here")
        return Asked(frame, acks, read_action(asked.message))
    except msgspec.DecodeError as err:
        return Asked(frame, acks, why=str(err))


def _decoded(decoder: msgspec.json.Decoder[T], text: str | bytes) -> T:
    try:
        return decoder.decode(text)
    except (UnicodeError, RecursionError) as err:  # no UTF-8; a thousand brackets in a key that nobody reads
        raise msgspec.DecodeError(str(err)) from err


# ---- to the admin --------------------------------------------------------------------------------------------------


class AgentConfig(msgspec.Struct, frozen=True, rename="camel"):
    """The header `AgentConfig` of the attach. NODEJS makes the admin speak text frames with JSON."""

    id: str
    instance_id: str
    build_version: str
    service_group_id: str = ""
    agent_type: str = "NODEJS"


class AstMethod(msgspec.Struct, frozen=True, rename="camel"):
    """A method of an announced class; `count` is the number of its `probes`."""

    name: str
    params: tuple[str, ...]
    return_type: str
    probes: tuple[int, ...]
    count: int
    checksum: str


class AstEntity(msgspec.Struct, frozen=True):
    """An announced class: `path` is the folder below the root, "." for the root itself."""

    path: str
    name: str
    methods: tuple[AstMethod, ...]


class Init(msgspec.Struct, frozen=True, tag="INIT", rename="camel"):
    """Classes follow. `init` makes the admin forget those it knows."""

    classes_count: int
    message: str = ""
    init: bool = True


class InitDataPart(msgspec.Struct, frozen=True, tag="INIT_DATA_PART", rename="camel"):
    """Some of the classes, MAX_ENTITIES at most."""

    ast_entities: Sequence[AstEntity]


class Initialized(msgspec.Struct, frozen=True, tag="INITIALIZED"):
    """All classes are told."""

    msg: str = ""


class ScopeInitialized(msgspec.Struct, frozen=True, tag="SCOPE_INITIALIZED", rename="camel"):
    """The scope is active. `ts`, here and below, is milliseconds since 1970."""

    id: str
    name: str
    prev_id: str
    ts: int


class SessionStarted(msgspec.Struct, frozen=True, tag="SESSION_STARTED", rename="camel"):
    """Probes are being collected; `test_type` is as it came."""

    session_id: str
    test_type: str
    is_realtime: bool
    ts: int


class ExecClassData(msgspec.Struct, frozen=True, rename="camel"):
    """The probes of one class that one test reached: one flag for each announced probe."""

    class_name: str
    probes: Sequence[bool]
    test_name: str


class CoverDataPart(msgspec.Struct, frozen=True, tag="COVERAGE_DATA_PART", rename="camel"):
    """What was reached, in MAX_OBJECTS objects at most."""

    session_id: str
    data: Sequence[ExecClassData]


class SessionChanged(msgspec.Struct, frozen=True, tag="SESSION_CHANGED", rename="camel"):
    """What a realtime session has sent last: `probe_count` is the number of objects in it."""

    session_id: str
    probe_count: int


class SessionFinished(msgspec.Struct, frozen=True, tag="SESSION_FINISHED", rename="camel"):
    """Nothing follows for this session."""

    session_id: str
    ts: int


class SessionCancelled(msgspec.Struct, frozen=True, tag="SESSION_CANCELLED", rename="camel"):
    """This session's data was dropped, or there is no such session."""

    session_id: str
    ts: int


class SessionsFinished(msgspec.Struct, frozen=True, tag="SESSIONS_FINISHED"):
    """Nothing follows for these sessions."""

    ids: Sequence[str]
    ts: int


class SessionsCancelled(msgspec.Struct, frozen=True, tag="SESSIONS_CANCELLED"):
    """These sessions' data was dropped."""

    ids: Sequence[str]
    ts: int


class SyncMessage(msgspec.Struct, frozen=True, tag="SYNC_MESSAGE", rename="camel"):
    """The sessions that are open, and those whose end the admin may not have read."""

    active_sessions: Sequence[str]


CoverMessage: TypeAlias = (
    Init
    | InitDataPart
    | Initialized
    | ScopeInitialized
    | SessionStarted
    | CoverDataPart
    | SessionChanged
    | SessionFinished
    | SessionCancelled
    | SessionsFinished
    | SessionsCancelled
    | SyncMessage
)


def attach_header(config: AgentConfig) -> str:
    """The value of `AgentConfig`, in ASCII: nothing else may stand in a header."""
    return json.dumps(msgspec.to_builtins(config), separators=(",", ":"))


def delivered(destination: str) -> str:
    """The frame that acknowledges a message to `destination`."""
    return _json({"type": "MESSAGE_DELIVERED", "destination": destination})


def said(message: CoverMessage) -> str:
    """A message of the plugin part in its frame: JSON in JSON in JSON."""
    text = _json({"pluginId": PLUGIN, "drillMessage": {"content": _json(message)}})
    return _json({"type": "PLUGIN_DATA", "text": text})


def announcement(units: Sequence[Unit]) -> Iterator[str]:
    """The frames of INIT_DATA_PART for these classes. Meant for a thread."""
    for begin in range(0, len(units), MAX_ENTITIES):
        yield from _announced([_entity(unit) for unit in units[begin : begin + MAX_ENTITIES]])


def _announced(entities: Sequence[AstEntity]) -> Iterator[str]:
    frame = said(InitDataPart(entities))
    if len(entities) > 1 and len(frame.encode()) > MAX_TEXT:
        half = len(entities) // 2
        yield from _announced(entities[:half])
        yield from _announced(entities[half:])
    else:
        yield frame


def _entity(unit: Unit) -> AstEntity:
    return AstEntity(
        path=unit.path,
        name=unit.name,
        methods=tuple(
            AstMethod(each.name, each.params, each.return_type, each.probes, len(each.probes), each.checksum)
            for each in unit.methods
        ),
    )


def parts(session_id: str, batches: Iterable[Batch], counts: Mapping[str, int]) -> Iterator[str]:
    """The frames of COVERAGE_DATA_PART for these batches, each of at most MAX_OBJECTS and, but for one entry, MAX_TEXT.

    `counts` are of the probes of each class. An entry is written at once as it stands in its frame, where quotes are
    escaped twice: three passes over the whole would take twice the time. Meant for a thread; the interpreter lets
    others run between the slices.
    """
    empty = said(CoverDataPart(session_id=session_id, data=()))
    head, _, tail = empty.rpartition("[]")
    room = MAX_TEXT - len(empty.encode())
    found: list[str] = []
    count = size = 0
    for batch in chain.from_iterable(map(_slices, batches)):
        for number, text in _texts(batch, counts, room):
            length = _bytes(text)
            if found and (count + number > MAX_OBJECTS or size + length > room):
                yield _part(head, found, tail)
                found, count, size = [], 0, 0
            found.append(text)
            count, size = count + number, size + length
    if found:
        yield _part(head, found, tail)


def _part(head: str, found: Sequence[str], tail: str) -> str:
    *others, last = found
    return "".join((head, "[", _CLASS, *others, last.removesuffix(_NEXT), "]", tail))


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


_Q = json.dumps(json.dumps('"')[1:-1])[1:-1]
_CLASS, _PROBES, _TEST = f"{{{_Q}className{_Q}:{_Q}", f"{_Q},{_Q}probes{_Q}:[", f"],{_Q}testName{_Q}:{_Q}"
_END, _NEXT = f"{_Q}}}", f",{_CLASS}"
_SLICE = MAX_OBJECTS // 15  # entries: few enough for a heartbeat in between, and so many times that a part is full


def _slices(batch: Batch, size: int = _SLICE) -> Iterator[Batch]:
    for begin in range(0, len(batch.classes), size):
        end = begin + size
        yield Batch(batch.test, batch.classes[begin:end], batch.probes[begin:end])


def _texts(batch: Batch, counts: Mapping[str, int], room: int) -> Iterator[tuple[int, str]]:
    """How many objects, and they, less the begin of the first and with that of one more: all entries, or each half
    where they have no room.
    """
    names = batch.classes
    numbers = map(counts.__getitem__, names)
    if not _is_plain("".join(names)):  # one look at them all is a third of the time
        names = list(map(_escaped, names))
    # Behind a name comes the rest of its object and the begin of the next, which is the same for many.
    behind = map(_behind_name, batch.probes, numbers, repeat(batch.test))
    text = "".join(chain.from_iterable(zip(names, behind, strict=True)))
    half = len(names) // 2
    if half and _bytes(text) > room:
        for part in _slices(batch, len(names) - half):
            yield from _texts(part, counts, room)
    else:
        yield len(names), text


def _is_plain(text: str) -> bool:
    """Does it stand in a JSON string as it is?"""
    return text.isascii() and text.isprintable() and '"' not in text and "\\" not in text


@lru_cache(maxsize=4096)
def _escaped(text: str) -> str:
    """What stands between the quotes of a string of the innermost JSON, as it stands in the outermost."""
    return text if _is_plain(text) else _json(_json(_json(text)[1:-1])[1:-1])[1:-1]


@lru_cache(maxsize=4096)
def _behind_name(probes: int, count: int, test: str) -> str:
    return f"{_PROBES}{_flags(probes, count)}{_TEST}{_escaped(test)}{_END}{_NEXT}"


@lru_cache(maxsize=4096)
def _flags(probes: int, count: int) -> str:
    bits = f"{probes & ((1 << count) - 1):0{count}b}"[::-1] if count else ""
    return bits.replace("1", "true,").replace("0", "false,")[:-1]


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()
