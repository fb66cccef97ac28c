"""Socket.IO packets: every form that the versions use."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.eman.engineio import PacketBroken
from agent.eman.socketio import Event, Packet, decode, encode, event, read_event

NS = "/communication"


@pytest.mark.parametrize(
    ("text", "packet"),
    [
        ("0", Packet("connect")),
        ("0/communication", Packet("connect", NS, with_comma=False)),  # 1.x
        ("0/communication?x=1", Packet("connect", NS, with_comma=False)),
        ("0/communication,", Packet("connect", NS)),
        ('0/communication,{"sid":"a"}', Packet("connect", NS, '{"sid":"a"}')),
        ("1/communication,", Packet("disconnect", NS)),
        ('2["a"]', Packet("event", data='["a"]')),
        ('2/communication,["a",{"b":1}]', Packet("event", NS, '["a",{"b":1}]')),
        ('2/communication,7["a"]', Packet("event", NS, '["a"]', id=7)),
        ("3/communication,7[]", Packet("ack", NS, "[]", id=7)),
        ('4/ns,"Invalid namespace"', Packet("error", "/ns", '"Invalid namespace"')),
        (
            '51-/communication,["a",{"_placeholder":true,"num":0}]',
            Packet("binary_event", NS, '["a",{"_placeholder":true,"num":0}]', attachments=1),
        ),
    ],
)
def test_packets(text: str, packet: Packet) -> None:
    assert decode(text) == packet
    if packet.with_comma:
        assert encode(packet) == text


@pytest.mark.parametrize("text", ["", "7", "x", "5[]", "2-[]", "2abc", "599-[]", "517-[]"])
def test_what_is_no_packet(text: str) -> None:
    with pytest.raises(PacketBroken):
        decode(text)


def test_events_are_pure_ascii() -> None:
    assert event("shake_who") == '["shake_who"]'
    assert event("echo", {"t": 'é😀"'}) == '["echo",{"t":"\\u00e9\\ud83d\\ude00\\""}]'
    read = read_event('["echo",{"t":"é"},2]')
    assert (read.name, bytes(read.payload)) == ("echo", '{"t":"é"}'.encode())
    assert bytes(read_event('["shake_who"]').payload) == b"null"


@pytest.mark.parametrize(
    "payload", ['{"t":"é","n":1e999}', '{"t":"é","n":1.10}', '{"é":' + "[" * 5000 + "]" * 5000 + "}"]
)
def test_what_a_payload_is_made_of_stays_as_it_was(payload: str) -> None:
    """Numbers that no float holds, and depths that nobody wants to read, are the listener's matter."""
    written = event("a", msgspec.Raw(payload.encode()))
    assert written == f'["a",{payload}]'.replace("é", "\\u00e9")


@pytest.mark.parametrize(
    ("sent", "heard"),
    [
        ("\\ud83d", "\ufffd"),  # half an emoji, as `text.slice(0, 1)` makes it in JavaScript
        ("a\\uDE00b", "a\ufffdb"),
        ("\\ud83d\\ud83d\\ude00", "\ufffd😀"),
        ("\\ud83d\\ude00", "😀"),
        ("\\\\ud83d", "\\ud83d"),  # a backslash, and letters
        ("\\\\\\ud83d", "\\\ufffd"),
    ],
)
def test_half_a_character_costs_no_more_than_itself(sent: str, heard: str) -> None:
    read = read_event(f'["a",{{"t":"{sent}"}}]')
    assert json.loads(bytes(read.payload)) == {"t": heard}


@pytest.mark.parametrize("data", ["", "{}", "[]", "[1]", '["a"', "[null]", '["a",' + "[" * 100_000 + "]" * 100_001])
def test_what_is_no_event(data: str) -> None:
    with pytest.raises(PacketBroken):
        read_event(data)


@given(st.text(max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        packet = decode(text)
    except PacketBroken:
        return
    if packet.type == "event":
        try:
            assert isinstance(read_event(packet.data), Event)
        except PacketBroken:
            return
