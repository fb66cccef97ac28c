"""The analysis of lines: templates and classes of matches, novelties, rates, sampling, failures to come."""

import pytest

from agent.core.events import AnyEvent, LogMatched
from agent.core.learned import LogNovelty, LogRate
from agent.logs.analysis import FAILURE, FULL, MAX_GONE, TOLD_BURST, Analysis, Stream
from agent.logs.anomalies import WARM_LINES, WARM_WINDOWS, WINDOW_S
from agent.logs.chains import Seen


class House:
    """An analysis and what it told; the wall clock shows the monotonic time."""

    def __init__(self) -> None:
        self.told: list[AnyEvent] = []
        self.now = 0.0
        self.analysis = Analysis(self.told.append, lambda: self.now, 0.0)

    def stream(self, path: str = "/log") -> Stream:
        return self.analysis.stream(path, lambda: ("r", "r:t"), self.now)

    def read(self, stream: Stream, block: bytes, *, offset: int = 0, is_live: bool = True) -> None:
        data = memoryview(block)
        self.analysis.read(stream, data, 1, offset.__add__, self.now, is_live=is_live).end()

    def warm(self, stream: Stream) -> None:
        self.read(stream, b"usual line\n" * (WARM_LINES + 1000))


def matched(text: str, *, class_: str | None = None, offset: int = 0) -> LogMatched:
    return LogMatched(
        id="lm-1",
        path="/log",
        generation=1,
        offset=offset,
        length=len(text),
        rule="r",
        severity="error",
        class_=class_,
        class_by=class_ and "rule",
        text=text,
    )


def test_a_match_has_the_template_of_its_line() -> None:
    house = House()
    block = b"one 1\ntwo 2\none 3\n"
    lines = house.analysis.read(house.stream(), memoryview(block), 1, int, 0.0, is_live=True)
    events = [
        lines.told(matched(text), at, text.encode(), {}, is_whole=True) for at, text in ((0, "one 1"), (12, "one 3"))
    ]
    assert [event.template for event in events] == [1, 1]
    assert dict(house.analysis.miner.counts()) == {1: 2, 2: 1}


def test_a_line_that_is_not_whole_has_no_template() -> None:
    house = House()
    lines = house.analysis.unread(house.stream(), memoryview(b"one 1"), is_live=False)
    assert lines.told(matched("one 1"), 0, b"one 1", {}, is_whole=False).template is None
    assert len(house.analysis.miner) == 0


def test_rules_with_a_class_teach_it_to_lines_without() -> None:
    house = House()
    lines = house.analysis.unread(house.stream(), memoryview(b""), is_live=False)
    for n in range(10):
        text = f"disk {n} is broken"
        assert lines.told(matched(text, class_="disk"), 0, text.encode(), {}, is_whole=True).class_ == "disk"
    event = lines.told(matched("disk 77 is broken"), 0, b"disk 77 is broken", {}, is_whole=True)
    assert (event.class_, event.class_by) == ("disk", "template")
    assert house.analysis.learned == 10


def test_a_new_template_of_a_warm_log_is_told() -> None:
    house = House()
    stream = house.stream()
    house.read(stream, b"first of all\n")
    house.warm(stream)
    assert house.told == []
    house.read(stream, b"usual line\r\nnever seen 17 before\r\n", offset=100)
    assert house.told == [
        LogNovelty(
            path="/log", generation=1, offset=112, template=3, pattern="never seen <*> before",
            text="never seen 17 before", run="r", test="r:t",
        )
    ]  # fmt: skip
    house.read(stream, b"never seen 18 before\n")
    assert len(house.told) == 1


def test_novelties_are_told_at_a_rate() -> None:
    house = House()
    stream = house.stream()
    house.warm(stream)
    house.read(stream, b"".join(b"%s is new\n" % (chr(97 + n) * 3).encode() for n in range(TOLD_BURST + 5)))
    assert len(house.told) <= TOLD_BURST
    house.warm(stream)
    house.now += 1000.0
    house.read(stream, b"another one that is quite new\n")
    last = house.told[-1]
    assert isinstance(last, LogNovelty)
    assert last.suppressed > 0


def test_a_log_of_noise_has_no_novelties() -> None:
    house = House()
    stream = house.stream()
    for n in range(WARM_LINES + 2000):
        word = "".join(chr(103 + n // 20**k % 20) for k in range(4))
        house.read(stream, f"{word}\n".encode())
    assert house.told == []


def test_a_rate_that_jumps_is_told() -> None:
    house = House()
    stream = house.stream()
    for _ in range(WARM_WINDOWS + 1):
        house.read(stream, b"beat 1\n" * 30)
        house.now += WINDOW_S
        house.analysis.tick(house.now)
    house.read(stream, b"beat 1\n" * 1000)
    house.now += WINDOW_S
    house.analysis.tick(house.now)
    assert house.told == [
        LogRate(path="/log", template=1, pattern="beat <*>", what="rose", count=1000, mean=30.0, window_s=WINDOW_S)
    ]


def test_lines_read_late_tell_nothing_of_rates() -> None:
    house = House()
    stream = house.stream()
    for _ in range(WARM_WINDOWS + 1):
        house.read(stream, b"beat 1\n" * 30)
        house.now += WINDOW_S
        house.analysis.tick(house.now)
    house.read(stream, b"beat 1\n" * 1000, is_live=False)
    house.now += WINDOW_S
    house.analysis.tick(house.now)
    assert house.told == []


def test_of_a_flood_every_nth_line_is_looked_at() -> None:
    house = House()
    stream = house.stream()
    house.read(stream, b"x 1\n" * FULL)
    assert stream.every == 1
    house.now += 0.5
    house.read(stream, b"x 1\n" * (2 * FULL))
    assert stream.every == 4
    assert dict(house.analysis.miner.counts()) == {1: FULL + FULL // 2}
    house.analysis.tick(house.now)
    assert house.analysis.forecaster.sampled
    house.now += 10.0
    house.read(stream, b"x 1\n")
    assert stream.every == 1


def test_matches_of_a_flood_are_all_looked_at() -> None:
    house = House()
    stream = house.stream()
    block = b"x 1\n" * (3 * FULL) + b"seldom 1\n"
    lines = house.analysis.read(stream, memoryview(block), 1, int, 0.0, is_live=True)
    event = lines.told(matched("seldom 1"), len(block) - 9, b"seldom 1", {}, is_whole=True)
    assert event.template == 2


def test_the_forecaster_sees_wanted_lines_and_failures_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    seen: list[tuple[Seen, int]] = []

    def see(
        line: Seen, path: str, offset: int, *, scope: tuple[str | None, str | None], is_late: bool
    ) -> list[AnyEvent]:
        assert (scope, is_late) == (("r", "r:t"), False)
        seen.append((line, offset))
        return []

    monkeypatch.setattr(house.analysis.forecaster, "see", see)
    house.analysis.forecaster.wanted.add(1)
    stream = house.stream()
    block = b"step 1\nother\nfailed 2\nstep 3\n"
    house.now = 5.0
    lines = house.analysis.read(stream, memoryview(block), 1, (100).__add__, 5.0, is_live=True)
    lines.told(matched("failed 2", offset=113), 13, b"failed 2", {"n": b"2", "m": None}, is_whole=True)
    lines.end()
    assert seen == [
        (Seen(5.0, "/log", 1, b"step 1\n"), 100),
        (Seen(5.0, "/log", 3, b"failed 2", FAILURE, (b"2",)), 113),
        (Seen(5.0, "/log", 1, b"step 3\n"), 122),
    ]


def test_logs_that_are_gone_are_forgotten() -> None:
    house = House()
    for n in range(MAX_GONE + 10):
        house.analysis.leave(house.stream(f"/{n}"))
    kept = house.stream("/kept")
    assert len(house.analysis.warmths) == MAX_GONE + 1
    assert house.analysis.warmths["/kept"] is kept.warmth
