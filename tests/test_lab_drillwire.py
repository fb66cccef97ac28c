"""What the lab's Drill admin reads: every message of the seed, and nothing that differs from it by a key or a quote."""

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.errors import PeerBrokeProtocol
from agent.core.head import HttpError
from agent.lab import drillwire
from agent.lab.drillwire import read_action, read_config, read_frame
from tests import no_json

CONFIG = {
    "id": "lab-07",
    "instanceId": "lab-07-1",
    "buildVersion": "1.4.2",
    "serviceGroupId": "",
    "agentType": "NODEJS",
}

MESSAGES: dict[str, dict[str, Any]] = {
    "INIT": {"classesCount": 1, "message": "", "init": True},
    "INIT_DATA_PART": {
        "astEntities": [
            {
                "path": ".",
                "name": "calc.js",
                "methods": [
                    {
                        "name": "div",
                        "params": ["a", "b"],
                        "returnType": "",
                        "probes": [0, 1],
                        "count": 2,
                        "checksum": "ab",
                    }
                ],
            }
        ]
    },
    "INITIALIZED": {"msg": "Initialized"},
    "SCOPE_INITIALIZED": {"id": "i", "name": "New Scope 1", "prevId": "", "ts": 1795294679934},
    "SESSION_STARTED": {"sessionId": "s1", "testType": "AUTO", "isRealtime": True, "ts": 1795294679934},
    "COVERAGE_DATA_PART": {
        "sessionId": "s1",
        "data": [{"className": "./calc.js", "probes": [True, False], "testName": "t1.test.js"}],
    },
    "SESSION_CHANGED": {"sessionId": "s1", "probeCount": 1},
    "SESSION_FINISHED": {"sessionId": "s1", "ts": 1795294679934},
    "SESSIONS_FINISHED": {"ids": ["s1"], "ts": 1795294679934},
    "SESSION_CANCELLED": {"sessionId": "s1", "ts": 1795294679934},
    "SESSIONS_CANCELLED": {"ids": [], "ts": 1795294679934},
    "SYNC_MESSAGE": {"activeSessions": ["s1"]},
}


def framed(message: dict[str, Any], **frame: Any) -> str:
    text = json.dumps({"pluginId": "test2code", "drillMessage": {"content": json.dumps(message)}})
    return json.dumps({"type": "PLUGIN_DATA", "text": text} | frame)


@pytest.mark.parametrize("kind", MESSAGES)
def test_each_message_of_the_seed_is_read(kind: str) -> None:
    _, message = read_frame(framed({"type": kind} | MESSAGES[kind]))
    assert message is not None
    assert json.loads(msgspec.json.encode(message)) == {"type": kind} | MESSAGES[kind]


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_key_too_many_or_too_few_loses_the_frame(kind: str) -> None:
    full = {"type": kind} | MESSAGES[kind]
    with pytest.raises(PeerBrokeProtocol, match="unknown field `more`"):
        read_frame(framed(full | {"more": 1}))
    for key in full.keys() - {"isRealtime"}:  # the one with a default in the seed
        with pytest.raises(PeerBrokeProtocol, match="missing required field"):
            read_frame(framed({name: value for name, value in full.items() if name != key}))


@pytest.mark.parametrize(
    ("kind", "change"),
    [
        ("SESSION_STARTED", {"isRealtime": "true"}),
        ("SESSION_STARTED", {"ts": "1795294679934"}),
        ("SESSION_CHANGED", {"probeCount": "1"}),
        ("INIT", {"init": "true"}),
        ("COVERAGE_DATA_PART", {"data": []}),
        ("COVERAGE_DATA_PART", {"data": [{"className": "./a", "probes": ["true"], "testName": ""}]}),
        ("COVERAGE_DATA_PART", {"data": [{"className": "./a", "probes": [1], "testName": ""}]}),
        ("COVERAGE_DATA_PART", {"data": [{"className": "./a", "probes": [True], "testName": "", "testId": ""}]}),
        ("INIT_DATA_PART", {"astEntities": [{"path": ".", "name": "a", "methods": [], "id": 1}]}),
    ],
)
def test_what_is_quoted_empty_or_nested_wrong_loses_the_frame(kind: str, change: dict[str, Any]) -> None:
    with pytest.raises(PeerBrokeProtocol, match=r"Expected|unknown field"):
        read_frame(framed({"type": kind} | MESSAGES[kind] | change))


@pytest.mark.parametrize(
    ("raw", "why"),
    [
        (b"\x01", "binary"),
        ("", "truncated"),
        ("[]", "Expected `object`"),
        ('{"type":"MESSAGE_DELIVERED","destination":"/x","more":1}', "unknown field"),
        ('{"type":"message","destination":"/x"}', "Invalid enum value"),
        (framed({"type": "SESSION_BEGUN"}), "Invalid value 'SESSION_BEGUN'"),
        ('{"type":"PLUGIN_DATA","text":"{"}', "truncated"),
        (framed({}).replace("test2code", "other"), "for the plugin 'other'"),
        ('"\ud800"', "cannot be read"),
    ],
)
def test_a_frame_that_is_none_is_refused(raw: str | bytes, why: str) -> None:
    with pytest.raises(PeerBrokeProtocol, match=why):
        read_frame(raw)


def test_a_part_has_at_most_65535_objects() -> None:
    one = {"className": "./a", "probes": [True], "testName": ""}
    part = {"type": "COVERAGE_DATA_PART", "sessionId": "s1", "data": [one] * drillwire.MAX_OBJECTS}
    assert read_frame(framed(part))[1] is not None
    part["data"] = [one] * (drillwire.MAX_OBJECTS + 1)
    with pytest.raises(PeerBrokeProtocol, match="length <= 65535"):
        read_frame(framed(part))


def test_an_acknowledgement_is_read() -> None:
    frame, message = read_frame('{"type":"MESSAGE_DELIVERED","destination":"/plugin/action"}')
    assert (frame.destination, message) == ("/plugin/action", None)


@pytest.mark.parametrize(
    "header",
    [
        *(json.dumps({name: value for name, value in CONFIG.items() if name != key}) for key in CONFIG),
        *(json.dumps(CONFIG | change) for change in ({"agentVersion": "1"}, {"id": ""}, {"id": "a/b"}, {"id": 7})),
        *("", "{", "\x80", None),
    ],
)
def test_the_header_has_exactly_its_keys(header: str | None) -> None:
    assert read_config(json.dumps(CONFIG)).instance_id == "lab-07-1"
    with pytest.raises(PeerBrokeProtocol, match="AgentConfig"):
        read_config(header)


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{}", b"[]", b'{"type":"PAUSE"}', b'{"type":"STOP"}', b'{"type":"STOP_ALL","payload":{}}'),
        b'{"type":"STOP","payload":{"sessionId":1}}',
        b'{"type":"START","payload":{"isRealtime":"true"}}',
        b'{"type":"START","payload":{"session":"s1"}}',
        b'{"type":"ADD_SESSION_DATA","payload":{"sessionId":"s1","data":{}}}',
    ],
)
def test_a_bad_action_is_refused(body: bytes) -> None:
    with pytest.raises(HttpError, match="the action cannot be read") as refused:
        read_action(body)
    assert refused.value.status == 400


@pytest.mark.parametrize("body", [b"{}", b'{"type":"PAUSE"}'])
def test_of_an_action_without_a_known_type_it_is_said_which_are_known(body: bytes) -> None:
    known = "types are START, STOP, STOP_ALL, CANCEL, CANCEL_ALL, ADD_SESSION_DATA, ADD_TESTS"
    with pytest.raises(HttpError, match=known):
        read_action(body)


@given(
    st.binary()
    | st.text()
    | st.recursive(st.text() | st.booleans(), lambda x: st.dictionaries(st.text(), x))
    | no_json.objects("type", "payload", "pluginId")
)
def test_no_input_makes_the_readers_fail_otherwise(value: Any) -> None:
    text = (
        value.decode("latin-1") if isinstance(value, bytes) else value if isinstance(value, str) else json.dumps(value)
    )
    with pytest.raises(PeerBrokeProtocol):
        read_frame(value if isinstance(value, bytes) else text)
    with pytest.raises(PeerBrokeProtocol):
        read_config(text)
    inner = json.dumps({"pluginId": "test2code", "drillMessage": {"content": text}})
    for layer in (text, inner):
        with pytest.raises(PeerBrokeProtocol):
            read_frame(json.dumps({"type": "PLUGIN_DATA", "text": layer}))
    with pytest.raises(HttpError):
        read_action(value if isinstance(value, bytes) else text.encode(errors="surrogatepass"))
