"""The envelope by the sheet's table: one end of a connection, frames in and out."""

from typing import Any

import msgspec
import pytest

from agent.core.envelope import (
    BAD_IN_A_ROW,
    Answer,
    Envelope,
    Foreign,
    ReqId,
    Request,
    Stray,
    Unreadable,
    error,
    success,
)
from agent.core.payload import MAX_NESTED


def read(frame: str) -> Any:
    return msgspec.json.decode(frame)


@pytest.mark.parametrize(
    ("text", "half"),
    [
        (r"\ud800", r"\ud800"), (r"x\udc00x", r"\udc00"), (r"\ud83d\ude00\ude00", r"\ude00"), (r"\\\uDBFF", r"\uDBFF"),
    ],
)  # fmt: skip
def test_half_of_a_character_is_named(text: str, half: str) -> None:
    said = Envelope().feed(f'{{"action":"log","payload":{{"message":"{text}"}}}}')
    assert isinstance(said, Unreadable)
    assert said.reason == f"bad_json: not a JSON object: {half} is half of a character"


@pytest.mark.parametrize("text", [r"\ud83d\ude00", r"\\ud800"])
def test_what_only_looks_like_half_of_a_character_is_none(text: str) -> None:
    envelope = Envelope()
    assert isinstance(envelope.feed(f'{{"action":"{text}"}}'), Request)
    cut = envelope.feed(f'{{"action":"{text}"')
    assert isinstance(cut, Unreadable)
    assert cut.reason == "bad_json: not a JSON object: Input data was truncated"


@pytest.mark.parametrize("nest", ["[{}]", '{{"a":{}}}'])
def test_what_is_nested_too_deeply_to_be_handled_again_is_unreadable(nest: str) -> None:
    def nested(times: int) -> str:
        tree = "1"
        for _ in range(times):
            tree = nest.format(tree)
        return f'{{"rsp_id":{tree}}}'

    assert isinstance(Envelope().feed(nested(MAX_NESTED - 1)), Stray)
    for times in range(MAX_NESTED, 2000, 7):  # from some depth on the decoder gives up
        said = Envelope().feed(nested(times))
        assert isinstance(said, Unreadable), times
    assert isinstance(Envelope().feed(f'{{"rsp_id":[{",".join(["[]"] * 2 * MAX_NESTED)}]}}'), Stray)


def test_a_reason_is_cut_where_it_would_fill_logs_and_alerts() -> None:
    envelope = Envelope()
    envelope.ask("run", {})
    told = envelope.feed('{"result":"error","rsp_id":0,"reason":"busy: %s"}' % ("x" * 500_000))
    assert told == Answer(0, {}, f"busy: {'x' * 4090}")


def test_requests_are_numbered_from_zero_and_posted_ones_have_no_number() -> None:
    envelope = Envelope()
    first, frame = envelope.ask("run", {"a": 1})
    assert (first, read(frame)) == (0, {"action": "run", "req_id": 0, "posted": False, "payload": {"a": 1}})
    assert read(envelope.post("log", msgspec.Raw(b'{"b":2}'))) == {"action": "log", "posted": True, "payload": {"b": 2}}
    assert envelope.ask("run", {})[0] == 1


@pytest.mark.parametrize(
    ("frame", "request_"),
    [
        ('{"action":"run","req_id":7,"posted":true,"payload":{"a":1}}', Request("run", {"a": 1}, 7, True)),
        ('{"action":"run"}', Request("run", {}, 0, False)),
        ('{"action":"run","req_id":"x-1","more":[]}', Request("run", {}, "x-1", False)),
        ('{"action":"run","req_id":1.5}', Request("run", {}, 1.5, False)),
        ('{"action":"","req_id":2}', Request("identify", {}, 2, False)),
        ("{}", Request("identify", {}, 0, False)),
    ],
)
def test_what_a_request_leaves_out_has_a_default(frame: str, request_: Request) -> None:
    assert Envelope().feed(frame) == request_


@pytest.mark.parametrize(
    ("frame", "reason", "rsp_id"),
    [
        (b"{}", "bad_json: a binary frame; messages are JSON in text frames", None),
        ("nonsense", "bad_json: not a JSON object: JSON is malformed", None),
        ("[]", "bad_json: not a JSON object: Expected `object`, got `array`", None),
        ("", "bad_json: not a JSON object: Input data was truncated", None),
        ("[" * 100_000, "bad_json: not a JSON object: ", None),
        ('{"action":1,"req_id":3}', "bad_payload: action is a number, not text", 3),
        ('{"action":null,"req_id":3}', "bad_payload: action is null, not text", 3),
        (f'{{"action":"{"a" * 257}","req_id":3}}', "bad_payload: action is text of more than 256 characters", 3),
        ('{"posted":"yes","req_id":"a"}', "bad_payload: posted is text, not true or false", "a"),
        ('{"payload":[],"req_id":0}', "bad_payload: payload is a list, not an object", 0),
        ('{"payload":true,"posted":true}', "bad_payload: payload is a boolean, not an object", 0),
        ('{"req_id":{}}', "bad_payload: req_id is an object, not a number or text", None),
        ('{"req_id":true}', "bad_payload: req_id is a boolean, not a number or text", None),
    ],
)
def test_what_cannot_be_read_is_answered_with_the_reason(frame: str | bytes, reason: str, rsp_id: ReqId) -> None:
    bad = Envelope().feed(frame)
    assert isinstance(bad, Unreadable)
    assert bad.reason.startswith(reason)
    assert read(bad.answer) == {"result": "error", "rsp_id": rsp_id, "reason": bad.reason}
    assert not bad.close


def test_ten_bad_frames_in_a_row_end_the_connection_and_a_good_one_between_does_not() -> None:
    envelope = Envelope()
    for frame in ["?"] * (BAD_IN_A_ROW - 1) + ["{}"] + ["?"] * (BAD_IN_A_ROW - 1):
        assert not getattr(envelope.feed(frame), "close", False)
    last = envelope.feed(b"?")
    assert isinstance(last, Unreadable)
    assert last.close


@pytest.mark.parametrize(
    ("frame", "answer"),
    [
        ('{"action":"run","rsp_id":0,"result":"success","payload":{"a":1}}', Answer(0, {"a": 1}, None)),
        ('{"rsp_id":0,"result":"success"}', Answer(0, {}, None)),
        ('{"result":"error","rsp_id":0,"reason":"busy: come later"}', Answer(0, {}, "busy: come later")),
        ('{"result":"error","rsp_id":0}', Answer(0, {}, "internal: no reason given")),
        ('{"rsp_id":0}', Answer(0, {}, "bad_json: an answer whose result is neither success nor error")),
        (
            '{"rsp_id":0,"result":"success","payload":3}',
            Answer(0, {}, "bad_json: an answer whose payload is a number, not an object"),
        ),
    ],
)
def test_an_answer_ends_its_request(frame: str, answer: Answer) -> None:
    envelope = Envelope()
    envelope.ask("run", {})
    assert envelope.feed(frame) == answer
    assert envelope.feed(frame) == Stray(0, answer.reason if '"error"' in frame else None)


@pytest.mark.parametrize("rsp_id", ["1", "0.0", "true", "null", '"0"', "[]"])
def test_an_answer_to_nothing_we_asked_is_stray(rsp_id: str) -> None:
    envelope = Envelope()
    envelope.ask("run", {})
    assert envelope.feed(f'{{"result":"error","rsp_id":{rsp_id},"reason":"x"}}') == Stray(read(rsp_id), "x")


def test_an_answer_that_comes_too_late_is_stray() -> None:
    envelope = Envelope()
    envelope.give_up(envelope.ask("run", {})[0])
    assert envelope.feed('{"rsp_id":0,"result":"success"}') == Stray(0, None)


def test_answers_have_the_shape_of_the_seed() -> None:
    assert read(success("run", "x", {"a": 1})) == {
        "action": "run",
        "rsp_id": "x",
        "result": "success",
        "payload": {"a": 1},
    }
    assert read(error(7, "busy: no slot")) == {"result": "error", "rsp_id": 7, "reason": "busy: no slot"}


def test_an_object_with_op_is_foreign_only_where_that_is_known() -> None:
    frame = '{"op":"get-status","from":"x"}'
    assert Envelope(knows_foreign=True).feed(frame) == Foreign({"op": "get-status", "from": "x"})
    assert Envelope().feed(frame) == Request("identify", {}, 0, False)
    for ours in ('{"op":1,"action":"x"}', '{"op":1,"rsp_id":0}', "{}"):
        assert not isinstance(Envelope(knows_foreign=True).feed(ours), Foreign)
