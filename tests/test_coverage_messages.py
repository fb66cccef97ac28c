"""Drill's vocabulary: read leniently, said strictly, and a large part as three passes of an encoder would write it."""

import json
from contextlib import suppress
from itertools import groupby
from operator import itemgetter
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.coverage import messages
from agent.coverage.merged import Batch
from agent.coverage.messages import (
    AgentConfig,
    CoverDataPart,
    ExecClassData,
    InitActiveScope,
    OfSession,
    StartAgentSession,
    StartSession,
    StopAgentSession,
    Toggle,
    announcement,
    attach_header,
    delivered,
    parts,
    read_action,
    read_asked,
    read_frame,
    read_load,
    read_plugin_action,
    read_toggle,
    said,
)
from tests import no_json
from tests.drill_transcripts import action, content, message, unit

Row = tuple[str, list[bool], str]
ROWS = st.lists(
    st.tuples(st.text(max_size=6), st.lists(st.booleans(), max_size=70), st.text(max_size=6)),
    unique_by=lambda row: row[0],
    max_size=6,
)


def written(session: str, rows: list[Row]) -> list[str]:
    batches = [
        Batch(test, [name for name, _, _ in some], [sum(f << n for n, f in enumerate(flags)) for _, flags, _ in some])
        for test, some in ((test, list(some)) for test, some in groupby(rows, key=itemgetter(2)))
    ]
    return list(parts(session, batches, {name: len(flags) for name, flags, _ in rows}))


def slow(session: str, rows: list[Row]) -> str:
    data = [ExecClassData(name, flags, test) for name, flags, test in rows]
    return said(CoverDataPart(session, data))


def test_the_frames_of_the_recorded_talk() -> None:
    started = messages.SessionStarted(session_id="s1", test_type="AUTO", is_realtime=True, ts=1795294679934)
    assert said(started) == (
        r'{"type":"PLUGIN_DATA","text":"{\"pluginId\":\"test2code\",\"drillMessage\":{\"content\":\"{\\\"type\\\":'
        r"\\\"SESSION_STARTED\\\",\\\"sessionId\\\":\\\"s1\\\",\\\"testType\\\":\\\"AUTO\\\",\\\"isRealtime\\\":true,"
        r'\\\"ts\\\":1795294679934}\"}}"}'
    )
    assert delivered("/plugin/action") == '{"type":"MESSAGE_DELIVERED","destination":"/plugin/action"}'
    frame = read_frame(
        r'{"type":"MESSAGE","destination":"/plugin/action","text":"{\"id\":\"test2code\",\"message\":\"{\\\"type\\\":'
        r'\\\"STOP\\\",\\\"payload\\\":{\\\"sessionId\\\":\\\"s1\\\"}}\",\"confirmationKey\":\"9a2d14e4\"}"}'
    )
    asked = read_plugin_action(frame.text)
    assert (frame.destination, asked.confirmation_key) == ("/plugin/action", "9a2d14e4")
    assert read_action(asked.message) == StopAgentSession(OfSession("s1"))


def test_the_header_has_exactly_the_keys_of_the_sheet_in_ascii() -> None:
    header = attach_header(AgentConfig(id="lab-ü", instance_id="i\r\n1", build_version="1.4.2"))
    assert header.isascii()
    assert header.isprintable()
    assert json.loads(header) == {
        "id": "lab-ü", "instanceId": "i\r\n1", "buildVersion": "1.4.2", "serviceGroupId": "", "agentType": "NODEJS",
    }  # fmt: skip


def test_quoted_booleans_and_unknown_keys_are_taken_as_the_seed_has_them() -> None:
    read = read_action(
        '{"type":"START_AGENT_SESSION","more":1,"payload":{"sessionId":"some-id","testType":"Manual",'
        '"testName":"some-name","isRealtime":"true","isGlobal":"false","new":[]}}'
    )
    assert read == StartAgentSession(StartSession("some-id", "Manual", "some-name", True, False))
    assert read_toggle('{"pluginId":"test2code","forceValue":"true"}') == Toggle(force_value=True)
    assert read_toggle('{"pluginId":"test2code"}').force_value is None
    assert read_load('{"meta":{"id":"test2code"},"data":[1,2]}').meta.id == "test2code"
    assert isinstance(read_action('{"type":"INIT_ACTIVE_SCOPE"}'), InitActiveScope)


@pytest.mark.parametrize(
    "text",
    [
        '{"type":"DANCE"}',
        '{"type":"STOP"}',
        '{"type":"STOP","payload":{}}',
        '{"type":"STOP","payload":{"sessionId":""}}',
        '{"type":"STOP","payload":{"sessionId":"' + 1001 * "s" + '"}}',
        '{"type":"START_AGENT_SESSION","payload":{"sessionId":"s","isRealtime":"perhaps"}}',
        '{"type":"STOP","more":' + 100_000 * "[",
        "[]",
        "{",
        "",
    ],
)
def test_what_is_no_action_is_an_error(text: str) -> None:
    with pytest.raises(msgspec.DecodeError):
        read_action(text)


def test_a_frame_is_read_as_far_as_it_can_be() -> None:
    stop = read_asked(action("STOP", {"sessionId": "s1"}, "k1"))
    assert stop.acks == ("/plugin/action/k1", "/plugin/action")
    assert stop.action == StopAgentSession(OfSession("s1"))
    dance = read_asked(action("DANCE", None, "k1"))
    assert (dance.acks, dance.action) == (stop.acks, None)
    assert "DANCE" in dance.why
    assert read_asked(message("/agent/load", "x")).acks == ("/agent/load",)
    nonsense = read_asked('{"type":7}')
    assert (nonsense.frame.type, nonsense.acks) == ("", ())
    assert nonsense.why


@pytest.mark.parametrize("read", [read_frame, read_asked, read_load, read_toggle, read_plugin_action, read_action])
@given(
    text=st.text()
    | st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=5) | st.sampled_from(["STOP", "test2code"]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(["type", "text", "destination", "payload", "sessionId", "message", "meta", "id", "x"]),
                inner,
                max_size=4,
            )
        ),
        max_leaves=8,
    ).map(json.dumps)
    | no_json.objects("type", "text", "payload", "message", "meta")
)
def test_any_text_is_read_or_is_one_error(read: Any, text: str | bytes) -> None:
    with suppress(msgspec.DecodeError):
        read(text)


@given(st.text(max_size=8), ROWS)
def test_a_part_is_what_three_passes_write(session: str, rows: list[Row]) -> None:
    frames = written(session, rows)
    assert frames == ([slow(session, rows)] if rows else [])


def test_classes_are_announced_a_thousand_at_a_time() -> None:
    units = [unit(f"src/c{n}.js", 2) for n in range(1001)]
    first, second = map(content, announcement(units))
    assert len(first["astEntities"]) == 1000
    method = {"name": "GLOBAL", "params": [], "returnType": "", "probes": [0, 1], "count": 2, "checksum": "c0"}
    assert second == {
        "type": "INIT_DATA_PART", "astEntities": [{"path": "src", "name": "c1000.js", "methods": [method]}],
    }  # fmt: skip
    assert list(announcement([])) == []


def test_an_announcement_has_at_most_its_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    units = [unit(f"src/c{n}.js", 2) for n in range(10)]
    monkeypatch.setattr(messages, "MAX_TEXT", len(next(announcement(units[:4])).encode()))
    frames = list(announcement(units))
    names = [entity["name"] for frame in frames for entity in content(frame)["astEntities"]]
    assert names == [f"c{n}.js" for n in range(10)]
    assert len(frames) == 4


def test_a_part_has_at_most_65535_objects() -> None:
    rows = [(f"src/c{n}.js", [bool(n >> bit & 1) for bit in range(8)], "t.test.js") for n in range(65_536)]
    assert len(written("s1", rows[:65_535])) == 1
    first, second = written("s1", rows)
    assert len(content(first)["data"]) == 65_535
    assert content(second)["data"] == [{"className": "src/c65535.js", "probes": 8 * [True], "testName": "t.test.js"}]


@pytest.mark.parametrize("room", [1, 2, 3, 4, 9])
def test_a_part_has_at_most_its_bytes(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    rows = [(f"src/ü{n}.js", [True, False, True], "t.test.js") for n in range(10)]
    limit = len(slow("s1", rows[:room]).encode()) + 1  # the comma that the last one has not
    monkeypatch.setattr(messages, "MAX_TEXT", limit)
    frames = written("s1", rows)
    assert all(len(frame.encode()) <= limit for frame in frames)
    assert [row["className"] for frame in frames for row in content(frame)["data"]] == [name for name, _, _ in rows]
    assert len(frames) <= 10 / room * 2


def test_one_entry_that_is_too_large_goes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(messages, "MAX_TEXT", 1)
    assert written("s1", [("a", [True], "t"), ("b", [True], "t")]) == [
        slow("s1", [("a", [True], "t")]),
        slow("s1", [("b", [True], "t")]),
    ]
