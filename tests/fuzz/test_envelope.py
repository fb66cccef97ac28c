"""The envelope under any frames: it always says what came, and answers fit requests."""

import math
from typing import Any

import msgspec
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from agent.core.envelope import BAD_IN_A_ROW, Answer, Envelope, Request, Stray, Unreadable, error, success

TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # JSON cannot carry lone surrogates
NUMBERS = st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXT, lambda inner: st.lists(inner) | st.dictionaries(TEXT, inner)
)
OBJECTS = st.dictionaries(TEXT, JSON, max_size=5)
FIELDS = ("action", "req_id", "rsp_id", "posted", "payload", "result", "reason")
HALF_RIGHT = st.dictionaries(st.sampled_from(FIELDS), JSON).map(lambda fields: msgspec.json.encode(fields).decode())


@given(st.lists(st.binary() | st.text() | HALF_RIGHT))
def test_any_frames_are_read_or_answered(frames: list[str | bytes]) -> None:
    envelope, bad = Envelope(), 0
    envelope.ask("a", {})
    for frame in frames:
        read = envelope.feed(frame)
        assert isinstance(read, Request | Answer | Unreadable | Stray)
        bad = bad + 1 if isinstance(read, Unreadable) else 0
        if isinstance(read, Unreadable):
            answer = msgspec.json.decode(read.answer)
            assert answer["result"] == "error"
            assert answer["reason"] == read.reason
            assert read.close == (bad >= BAD_IN_A_ROW)
        if isinstance(read, Request):
            assert isinstance(Envelope().feed(success(read.action, read.req_id, {})), Stray)


@given(TEXT.filter(bool), OBJECTS, st.booleans())
def test_what_one_end_sends_the_other_reads(action: str, payload: dict[str, Any], posted: bool) -> None:
    ours, theirs = Envelope(), Envelope()
    frame = ours.post(action, payload) if posted else ours.ask(action, payload)[1]
    assert theirs.feed(frame) == Request(action, payload, 0, posted)
    if not posted:
        assert ours.feed(success(action, 0, payload)) == Answer(0, payload, None)


@given(TEXT | NUMBERS, TEXT)
def test_a_request_number_comes_back_as_it_was(req_id: Any, reason: str) -> None:
    read = Envelope().feed(msgspec.json.encode({"action": "a", "req_id": req_id}).decode())
    assert isinstance(read, Request)
    answers = [msgspec.json.decode(error(read.req_id, reason)), msgspec.json.decode(success("a", read.req_id, {}))]
    for answer in answers:
        same = answer["rsp_id"] == req_id or (isinstance(req_id, float) and math.isclose(answer["rsp_id"], req_id))
        assert same
    assert answers[0]["reason"] == reason


class BothEnds(RuleBasedStateMachine):
    """Two ends ask each other in any order; every answer finds its own request, once."""

    asked: Bundle[tuple[bool, int, str]] = Bundle("asked")

    def __init__(self) -> None:
        super().__init__()
        self.ends = (Envelope(), Envelope())
        self.asked_by = [0, 0]

    @rule(target=asked, by=st.booleans(), action=st.sampled_from(["run", "status"]))
    def ask(self, by: bool, action: str) -> tuple[bool, int, str]:
        number, frame = self.ends[by].ask(action, {"n": self.asked_by[by]})
        read = self.ends[not by].feed(frame)
        assert read == Request(action, {"n": number}, number, False)
        self.asked_by[by] += 1
        return by, number, action

    @rule(request=consumes(asked), refuse=st.booleans(), twice=st.booleans())
    def answer(self, request: tuple[bool, int, str], refuse: bool, twice: bool) -> None:
        by, number, action = request
        frame = error(number, "busy: no") if refuse else success(action, number, {"of": number})
        reason = "busy: no" if refuse else None
        assert self.ends[by].feed(frame) == Answer(number, {} if refuse else {"of": number}, reason)
        if twice:
            assert self.ends[by].feed(frame) == Stray(number, reason)

    @rule(request=consumes(asked))
    def give_up(self, request: tuple[bool, int, str]) -> None:
        by, number, action = request
        self.ends[by].give_up(number)
        assert self.ends[by].feed(success(action, number, {})) == Stray(number, None)

    @invariant()
    def numbers_have_no_gaps(self) -> None:
        assert [end._next for end in self.ends] == self.asked_by


TestBothEnds = BothEnds.TestCase
