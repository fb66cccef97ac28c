"""STOMP 1.2: frames whatever the chunking, and the client's session as a transcript."""

import pytest

from agent.core.errors import PeerBrokeProtocol, ProtocolMisuse
from agent.polarize.stomp import (
    MAX_BODY,
    MAX_HEAD,
    Connected,
    Failed,
    Frame,
    Happening,
    Message,
    Reader,
    Receipt,
    Session,
    encode,
)

GREETING = b"CONNECTED\nversion:1.2\nheart-beat:10000,5000\nserver:ActiveMQ/5.17.2\n\n\0"


def session() -> Session:
    return Session(vhost="bus.lab", client_id="emissary-lab-07", login="lab", passcode="secret")


def connected() -> Session:
    ours = session()
    ours.connect()
    list(ours.feed(GREETING))
    return ours


def one(data: bytes) -> Frame:
    (frame,) = Reader().feed(data)
    return frame


def test_a_frame_is_written_as_the_specification_shows() -> None:
    frame = Frame("SEND", {"destination": "/queue/a", "note": "a:b\\c\r\nd"}, b"hello\0there")
    wire = b"SEND\ndestination:/queue/a\nnote:a\\cb\\\\c\\r\\nd\ncontent-length:11\n\nhello\0there\0"
    assert encode(frame) == wire
    assert one(wire) == Frame("SEND", {**frame.headers, "content-length": "11"}, frame.body)


def test_lines_may_end_with_carriage_returns_and_heart_beats_stand_between_frames() -> None:
    frames = Reader().feed(b"\n\r\n\nRECEIPT\r\nreceipt-id:r1\r\n\r\n\0\n\n\r\nRECEIPT\nreceipt-id:r2\n\n\0")
    assert [frame.headers["receipt-id"] for frame in frames] == ["r1", "r2"]


def test_a_line_end_cut_in_two_is_one_line_end() -> None:
    reader = Reader()
    assert reader.feed(b"\r") == []
    assert reader.feed(b"\nRECEIPT\nreceipt-id:r1\n\n\0") == [Frame("RECEIPT", {"receipt-id": "r1"})]


def test_of_a_repeated_header_the_first_counts_and_spaces_stay() -> None:
    assert one(b"MESSAGE\nfoo: World \nfoo:Hello\n\n\0").headers == {"foo": " World "}


def test_greetings_know_no_escapes() -> None:
    assert one(b"CONNECTED\nserver:a\\b\n\n\0").headers == {"server": "a\\b"}


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        (b"HELLO\n\n\0", "'HELLO' is no command"),
        (b"MESSAGE\nnothing\n\n\0", "the header line 'nothing' is not name:value"),
        (b"MESSAGE\n:x\n\n\0", "not name:value"),
        (b"MESSAGE\na:\\t\n\n\0", "is not defined"),
        (b"MESSAGE\na:\\\n\n\0", "is not defined"),
        (b"MESSAGE\na:\xff\n\n\0", "not UTF-8"),
        (b"MESSAGE\ncontent-length:-1\n\n\0", "not a number of bytes"),
        (b"MESSAGE\ncontent-length:1\n\nab\0", "no NUL after as many bytes"),
        (b"MESSAGE\na:" + b"x" * MAX_HEAD, "a head of more than"),
        (b"MESSAGE\na:" + b"x" * MAX_HEAD + b"\n\n\0", "a head of more than"),
    ],
)
def test_what_the_specification_forbids_is_said(wire: bytes, complaint: str) -> None:
    with pytest.raises(PeerBrokeProtocol, match=complaint):
        Reader().feed(wire)


@pytest.mark.parametrize("head", [b"MESSAGE\ncontent-length:%d\n\n" % (MAX_BODY + 3), b"MESSAGE\n\n"])
def test_a_huge_body_is_cut_and_the_next_frame_is_read(head: bytes) -> None:
    reader, wire = Reader(), head + b"x" * (MAX_BODY + 3) + b"\0RECEIPT\nreceipt-id:r1\n\n\0"
    frames = [frame for at in range(0, len(wire), 65536) for frame in reader.feed(wire[at : at + 65536])]
    assert [(frame.command, len(frame.body), frame.cut) for frame in frames] == [
        ("MESSAGE", MAX_BODY, 3),
        ("RECEIPT", 0, 0),
    ]


@pytest.mark.parametrize(
    "frame", [Frame("CONNECT", {"login": "a\nb"}), Frame("CONNECT", {"a:b": "c"}), Frame("SEND", {"a": "b\0c"})]
)
def test_what_no_frame_can_carry_is_not_sent(frame: Frame) -> None:
    with pytest.raises(ProtocolMisuse):
        encode(frame)


def test_a_session_from_greeting_to_leaving() -> None:
    ours = session()
    assert one(ours.connect()) == Frame(
        "CONNECT",
        {
            "accept-version": "1.2",
            "host": "bus.lab",
            "heart-beat": "10000,10000",
            "client-id": "emissary-lab-07",
            "login": "lab",
            "passcode": "secret",
        },
    )
    assert list(ours.feed(GREETING)) == [Connected("ActiveMQ/5.17.2", 10.0, 10.0)]
    receipt, wire = ours.subscribe("ci", "/topic/VirtualTopic.qe.ci.>", {"selector": "emissary LIKE 'lab-07.%'"})
    assert one(wire).headers == {
        "id": "ci",
        "destination": "/topic/VirtualTopic.qe.ci.>",
        "ack": "client-individual",
        "selector": "emissary LIKE 'lab-07.%'",
        "receipt": receipt,
    }
    came = list(ours.feed(b"RECEIPT\nreceipt-id:%b\n\n\0MESSAGE\nack:7\nmessage-id:1\n\n{}\0" % receipt.encode()))
    message = Message({"ack": "7", "message-id": "1"}, b"{}", 0)
    assert came == [Receipt(receipt), message]
    assert message.ack == "7"
    assert one(ours.acknowledge("7")) == Frame("ACK", {"id": "7"})
    sent, wire = ours.send("/topic/a", b"{}", {"content-type": "application/json"})
    assert sent != receipt
    assert one(wire).body == b"{}"
    left, _ = ours.disconnect()
    assert list(ours.feed(f"RECEIPT\nreceipt-id:{sent}\n\n\0RECEIPT\nreceipt-id:{left}\n\n\0".encode())) == [
        Receipt(sent),
        Receipt(left),
    ]


def test_heart_beats_are_what_both_sides_can() -> None:
    ours = session()
    ours.connect()
    assert list(ours.feed(b"CONNECTED\nversion:1.2\nheart-beat:0,30000\n\n\0")) == [Connected("", 30.0, 0.0)]


@pytest.mark.parametrize(
    ("greeting", "complaint"),
    [
        (b"CONNECTED\n\n\0", "speaks STOMP 1.0"),
        (b"CONNECTED\nversion:1.1\n\n\0", "speaks STOMP 1.1"),
        (b"CONNECTED\nversion:1.2\nheart-beat:often\n\n\0", "heart-beat is 'often'"),
        (b"MESSAGE\nack:1\n\n\0", "a MESSAGE frame while connecting"),
    ],
)
def test_a_greeting_that_does_not_fit_is_said(greeting: bytes, complaint: str) -> None:
    ours = session()
    ours.connect()
    with pytest.raises(PeerBrokeProtocol, match=complaint):
        list(ours.feed(greeting))


@pytest.mark.parametrize(
    ("wire", "complaint"),
    [
        (GREETING, "a CONNECTED frame while connected"),
        (b"SEND\ndestination:a\n\n\0", "a SEND frame while connected"),
        (b"ERROR\n\n\0RECEIPT\nreceipt-id:r1\n\n\0", "a RECEIPT frame while closed"),
        (b"MESSAGE\nack:a\0b\n\n\0", "a NUL in a head"),
    ],
)
def test_a_frame_out_of_turn_names_the_state(wire: bytes, complaint: str) -> None:
    with pytest.raises(PeerBrokeProtocol, match=complaint):
        list(connected().feed(wire))


def test_an_error_frame_tells_whether_we_were_taken_at_all() -> None:
    refusal, ours = b"ERROR\nmessage:User name is invalid\n\njava.lang.SecurityException: no\n\tat x\0", session()
    ours.connect()
    expected: list[Happening] = [Failed("User name is invalid: java.lang.SecurityException: no", in_greeting=True)]
    assert list(ours.feed(refusal)) == expected
    assert list(connected().feed(b"ERROR\nmessage:too much\n\n\0")) == [Failed("too much", in_greeting=False)]


def test_a_message_may_need_no_acknowledgement() -> None:
    (message,) = connected().feed(b"MESSAGE\nmessage-id:1\n\n{}\0")
    assert isinstance(message, Message)
    assert message.ack is None


def test_an_unknown_receipt_is_dropped() -> None:
    assert list(connected().feed(b"RECEIPT\nreceipt-id:r9\n\n\0")) == []


def test_nothing_is_sent_before_the_broker_took_us() -> None:
    with pytest.raises(ProtocolMisuse, match="needs a session that is connected, and it is new"):
        session().send("/topic/a", b"", {})
