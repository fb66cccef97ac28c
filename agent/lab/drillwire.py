"""What the lab's Drill admin reads: frames and cover messages of agents, actions of users. Pure.

As strict as the real admin: a key too many, a missing one, a quoted boolean or number lose the frame. The structs are
this end's own: what the agent's side took for granted would else never be checked.

Source: protocols/drill.md, "The wire", "The lab's admin"; seeds/drill-coverage-event-flow.md, "API".
"""

from typing import Annotated, Any, Literal, TypeAlias, get_args

import msgspec

from agent.core.errors import PeerBrokeProtocol
from agent.core.head import HttpError
from agent.core.payload import UNREADABLE

PLUGIN = "test2code"
MAX_OBJECTS = 65_535  # of one COVERAGE_DATA_PART

Millis: TypeAlias = Annotated[int, msgspec.Meta(ge=0)]  # since 1970


# ---- What an agent sends ---------------------------------------------------------------------------------------------


class _Sent(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A key that is not listed loses the frame."""


class AgentConfig(_Sent, frozen=True):
    """The header AgentConfig: who attaches."""

    id: Annotated[str, msgspec.Meta(pattern=r"^[^/\x00-\x1f]{1,128}$")]
    instance_id: str
    build_version: str
    service_group_id: str
    agent_type: str


class Frame(_Sent, frozen=True):
    """One text frame; `text` is JSON again, or plain text."""

    type: Literal["MESSAGE", "MESSAGE_DELIVERED", "PLUGIN_DATA"]
    destination: str = ""
    text: str = ""


class DrillMessage(_Sent, frozen=True):
    """What holds a cover message, as text."""

    content: str


class PluginData(_Sent, frozen=True):
    """The text of a PLUGIN_DATA frame."""

    plugin_id: str
    drill_message: DrillMessage


class Method(_Sent, frozen=True):
    """A method of an announced class: `probes` are the numbers of its probes, `count` how many."""

    name: str
    params: tuple[str, ...]
    return_type: str
    probes: tuple[int, ...]
    count: int
    checksum: str


class AstEntity(_Sent, frozen=True):
    """An announced class; its id is `path/name`."""

    path: str
    name: str
    methods: tuple[Method, ...]


class ExecClassData(_Sent, frozen=True):
    """The probes of a class that a test reached."""

    class_name: str
    probes: list[bool]
    test_name: str


class Init(_Sent, frozen=True, tag_field="type", tag="INIT"):
    """Classes follow; `init` forgets those that were announced before."""

    classes_count: int
    message: str
    init: bool


class InitDataPart(_Sent, frozen=True, tag_field="type", tag="INIT_DATA_PART"):
    """Some of the classes."""

    ast_entities: tuple[AstEntity, ...]


class Initialized(_Sent, frozen=True, tag_field="type", tag="INITIALIZED"):
    """All classes are announced."""

    msg: str


class ScopeInitialized(_Sent, frozen=True, tag_field="type", tag="SCOPE_INITIALIZED"):
    """A scope began."""

    id: str
    name: str
    prev_id: str
    ts: Millis


class SessionStarted(_Sent, frozen=True, tag_field="type", tag="SESSION_STARTED"):
    """Probes are being collected."""

    session_id: str
    test_type: str
    ts: Millis
    is_realtime: bool = False


class CoverageDataPart(_Sent, frozen=True, tag_field="type", tag="COVERAGE_DATA_PART"):
    """What was reached."""

    session_id: str
    data: Annotated[list[ExecClassData], msgspec.Meta(min_length=1, max_length=MAX_OBJECTS)]


class SessionChanged(_Sent, frozen=True, tag_field="type", tag="SESSION_CHANGED"):
    """A flush of a realtime session is complete; it had `probe_count` objects."""

    session_id: str
    probe_count: int


class SessionFinished(_Sent, frozen=True, tag_field="type", tag="SESSION_FINISHED"):
    """Nothing follows for this session."""

    session_id: str
    ts: Millis


class SessionsFinished(_Sent, frozen=True, tag_field="type", tag="SESSIONS_FINISHED"):
    """Nothing follows for these sessions."""

    ids: tuple[str, ...]
    ts: Millis


class SessionCancelled(_Sent, frozen=True, tag_field="type", tag="SESSION_CANCELLED"):
    """This session's data was dropped."""

    session_id: str
    ts: Millis


class SessionsCancelled(_Sent, frozen=True, tag_field="type", tag="SESSIONS_CANCELLED"):
    """These sessions' data was dropped."""

    ids: tuple[str, ...]
    ts: Millis


class SyncMessage(_Sent, frozen=True, tag_field="type", tag="SYNC_MESSAGE"):
    """The sessions that the agent has."""

    active_sessions: tuple[str, ...]


CoverMessage: TypeAlias = (
    Init
    | InitDataPart
    | Initialized
    | ScopeInitialized
    | SessionStarted
    | CoverageDataPart
    | SessionChanged
    | SessionFinished
    | SessionsFinished
    | SessionCancelled
    | SessionsCancelled
    | SyncMessage
)

_configs = msgspec.json.Decoder(AgentConfig)
_frames = msgspec.json.Decoder(Frame)
_plugin_data = msgspec.json.Decoder(PluginData)
_messages: msgspec.json.Decoder[CoverMessage] = msgspec.json.Decoder(CoverMessage)


def read_config(header: str | None) -> AgentConfig:
    """The header AgentConfig of an attach. Raises PeerBrokeProtocol."""
    if header is None:
        raise PeerBrokeProtocol("an agent attaches without the header AgentConfig", remedy="It is not let in.")
    try:
        return _configs.decode(header)
    except UNREADABLE as err:
        raise PeerBrokeProtocol(f"the header AgentConfig cannot be read: {err}", remedy="It is not let in.") from err


def read_frame(raw: str | bytes) -> tuple[Frame, CoverMessage | None]:
    """A frame, and what its three layers of JSON hold when it is PLUGIN_DATA. Raises PeerBrokeProtocol."""
    try:
        if isinstance(raw, bytes):
            raise msgspec.DecodeError("it is binary; agents of type NODEJS send text")
        frame = _frames.decode(raw)
        if frame.type != "PLUGIN_DATA":
            return frame, None
        data = _plugin_data.decode(frame.text)
        if data.plugin_id != PLUGIN:
            raise msgspec.DecodeError(f"it is for the plugin {data.plugin_id!r}")
        return frame, _messages.decode(data.drill_message.content)
    except UNREADABLE as err:
        raise PeerBrokeProtocol(f"a frame cannot be read: {err}", remedy="It is dropped.") from err


# ---- What a user asks for --------------------------------------------------------------------------------------------


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename="camel"):
    """A key that is not known is refused."""


class StartPayload(_Asked, frozen=True):
    """A session to start; an empty id becomes a UUID."""

    session_id: Annotated[str, msgspec.Meta(max_length=256)] = ""
    test_type: str = "MANUAL"
    test_name: str | None = None
    is_realtime: bool = False
    is_global: bool = False


class SessionPayload(_Asked, frozen=True):
    """Which session."""

    session_id: str


class DataPayload(_Asked, frozen=True):
    """A V8 profile of a session, taken by another tool: `{"testId", "coverage", "scripts"}` as text."""

    session_id: str
    data: str


class TestsPayload(_Asked, frozen=True):
    """The tests that ran in a session."""

    session_id: str
    tests: tuple[dict[str, Any], ...]


class Start(_Asked, frozen=True, tag_field="type", tag="START"):
    """Start a session."""

    payload: StartPayload = StartPayload()


class Stop(_Asked, frozen=True, tag_field="type", tag="STOP"):
    """Finish a session."""

    payload: SessionPayload


class StopAll(_Asked, frozen=True, tag_field="type", tag="STOP_ALL"):
    """Finish all sessions."""


class Cancel(_Asked, frozen=True, tag_field="type", tag="CANCEL"):
    """Drop a session and its data."""

    payload: SessionPayload


class CancelAll(_Asked, frozen=True, tag_field="type", tag="CANCEL_ALL"):
    """Drop all sessions."""


class AddSessionData(_Asked, frozen=True, tag_field="type", tag="ADD_SESSION_DATA"):
    """Coverage that another tool took."""

    payload: DataPayload


class AddTests(_Asked, frozen=True, tag_field="type", tag="ADD_TESTS"):
    """Tests that another tool ran."""

    payload: TestsPayload


Action: TypeAlias = Start | Stop | StopAll | Cancel | CancelAll | AddSessionData | AddTests

_actions: msgspec.json.Decoder[Action] = msgspec.json.Decoder(Action)
_TYPES = ", ".join(str(kind.__struct_config__.tag) for kind in get_args(Action))


def read_action(body: bytes) -> Action:
    """The body of a dispatch-action. Raises HttpError 400."""
    try:
        return _actions.decode(body)
    except UNREADABLE as err:
        known = f"; types are {_TYPES}" if "$.type" in str(err) or "`type`" in str(err) else ""
        raise HttpError(400, f"the action cannot be read: {err}{known}") from err


class AgentSession(msgspec.Struct, frozen=True, rename="camel"):
    """The payload of START_AGENT_SESSION."""

    session_id: str
    test_type: str
    test_name: str | None
    is_realtime: bool
    is_global: bool


class AgentAction(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an agent's plugin part is told to do."""

    type: str
    payload: AgentSession | SessionPayload | DataPayload | TestsPayload | None = None
