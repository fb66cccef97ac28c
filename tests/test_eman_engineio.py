"""Engine.IO packets and payloads of both protocols, byte for byte, and who has to be heard when."""

from contextlib import suppress
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.eman.engineio import (
    Eio,
    Handshake,
    Heartbeat,
    Packet,
    PacketBroken,
    Type,
    decode,
    decode_payload,
    encode,
    encode_payload,
    read_handshake,
    undo_second_encoding,
    write_handshake,
)
from tests import no_json

EMITTED = '42/communication,["echo",{"t":"é漢😀\\"\\\\\\n"}]'


def test_websocket_frames() -> None:
    assert encode(Packet("message", "40"), 3) == "440"
    assert decode("2probe", 4) == Packet("ping", "probe")
    assert encode(Packet("message", b"\x01"), 3) == b"\x04\x01"
    assert encode(Packet("message", b"\x01"), 4) == b"\x01"
    assert decode(b"\x04\x01", 3) == decode(b"\x01", 4) == Packet("message", b"\x01")


def test_payloads() -> None:
    packets = [Packet("open", "{}"), Packet("message", "0/communication")]
    assert encode_payload(packets[1:], 3) == "16:40/communication"
    assert list(decode_payload("2:4016:40/communication", 3)) == [
        Packet("message", "0"),
        Packet("message", "0/communication"),
    ]
    assert encode_payload(packets, 4) == "0{}\x1e40/communication"
    assert list(decode_payload("0{}\x1e40/communication", 4)) == packets
    assert next(decode_payload("1:2nonsense", 3)) == Packet("ping")  # what is behind it is read when it is asked for
    assert encode_payload([Packet("message", b"\x01\x02")], 3) == "6:b4AQI="
    assert encode_payload([Packet("message", b"\x01\x02")], 4) == "bAQI="


def test_lengths_count_utf_16_units_and_1_x_encodes_twice() -> None:
    assert list(decode_payload(f"44:{EMITTED}", 3)) == [Packet("message", EMITTED[1:])]
    twice = EMITTED.encode().decode("latin-1")
    [packet] = decode_payload(f"49:{twice}", 3)
    assert isinstance(packet.data, str)
    assert undo_second_encoding(packet.data) == EMITTED[1:]
    for not_twice in ("漢", "é", "plain"):
        assert undo_second_encoding(not_twice) == not_twice


@pytest.mark.parametrize(
    ("body", "eio"),
    [("", 4), ("9", 4), ("bA", 4), ("x:4", 3), ("5:40", 3), ("0:", 3), ("3:b5A", 3), ("99999999:4", 3), ("2:40x", 3)],
)
def test_what_is_no_payload(body: str, eio: Eio) -> None:
    with pytest.raises(PacketBroken):
        list(decode_payload(body, eio))


def test_what_is_no_frame() -> None:
    for frame, eio in (("", 3), ("7", 4), ("x", 3), (b"\x05", 3), (b"", 3)):
        with pytest.raises(PacketBroken):
            decode(frame, 3 if eio == 3 else 4)


PACKETS = st.builds(
    Packet,
    st.sampled_from(get_args(Type)),
    st.text(st.characters(exclude_characters="\x1e", exclude_categories=["Cs"]), max_size=20),
) | st.builds(Packet, st.just("message"), st.binary(max_size=20))


@given(st.lists(PACKETS, min_size=1, max_size=5), st.sampled_from([3, 4]))
def test_what_is_written_is_read(packets: list[Packet], eio: Eio) -> None:
    assert list(decode_payload(encode_payload(packets, eio), eio)) == packets
    assert [decode(encode(packet, eio), eio) for packet in packets] == packets


@given(st.text(st.sampled_from("0123456:b4\x1eAQ=é😀{}")) | st.text(), st.sampled_from([3, 4]))
def test_any_text_is_read_or_refused(text: str, eio: Eio) -> None:
    for read in (lambda: list(decode_payload(text, eio)), lambda: [decode(text, eio)], lambda: [read_handshake(text)]):
        with suppress(PacketBroken):
            assert all(isinstance(each, Packet | Handshake) for each in read())


@given(no_json.objects("sid", "upgrades"))
def test_any_open_packet_is_read_or_refused(data: bytes) -> None:
    with suppress(PacketBroken):
        read_handshake(data)


def test_the_open_packet() -> None:
    shake = Handshake("s", ("websocket",), 25_000, 60_000)
    assert write_handshake(shake, 3) == '{"sid":"s","upgrades":["websocket"],"pingInterval":25000,"pingTimeout":60000}'
    assert read_handshake(write_handshake(shake, 4)) == shake
    with pytest.raises(PacketBroken, match="sid"):
        read_handshake("{}")
    with pytest.raises(PacketBroken, match="pingInterval"):  # no float can hold its seconds
        read_handshake(f'{{"sid":"s","pingInterval":{"9" * 400}}}')


def test_the_client_pings_in_protocol_3_and_the_server_in_4() -> None:
    for eio, is_server in ((3, False), (4, True)):
        mine = Heartbeat(3 if eio == 3 else 4, is_server=is_server, interval_s=25, timeout_s=20, now=0.0)
        assert (mine.due(), mine.dead_at) == (25.0, float("inf"))
        mine.pinged(25.0)
        assert (mine.next_ping, mine.dead_at) == (50.0, 45.0)
        mine.heard(26.0)
        assert (mine.due(), mine.dead_at) == (50.0, float("inf"))
    theirs = Heartbeat(3, is_server=True, interval_s=25, timeout_s=20, now=0.0)
    assert theirs.due() == 45.0
    theirs.heard(40.0)
    assert theirs.due() == 85.0
