"""Context by backtracking, against a brute-force search; lines between, lines that follow, records."""

import random
import sys
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core import toml
from agent.logs import context, rules
from agent.logs.context import Anchor, Anchors, Around, Ask, Following, Place, Search, Size, look_back, record_before
from agent.logs.regex import Matcher
from agent.logs.rules import CompiledRule

MATCHER = Matcher()


def rule(regex: str = "fail (?<u>\\w+)", **keys: object) -> CompiledRule:
    text = "version = 1\n[[rule]]\nid = 'r'\n" + f"regex = '''{regex}'''\n"
    for key, value in keys.items():
        text += f"{key.replace('__', '.')} = {value}\n"
    (only,) = rules.from_documents([("x.toml", toml.parse(text))]).rules
    return only


class History:
    """Generations of a file, oldest first; the last is generation len(files)."""

    def __init__(self, *files: bytes) -> None:
        self.files, self.asked = files, 0

    def answer(self, wish: Ask | Size) -> bytes | int | None:
        if isinstance(wish, Size):
            return len(self.files[wish.generation - 1]) if wish.generation > 0 else None
        self.asked += 1
        return self.files[wish.generation - 1][wish.start : wish.start + wish.size]

    def run(self, search: Search[context.T]) -> context.T:
        try:
            wish = next(search)
            while True:
                wish = search.send(self.answer(wish))
        except StopIteration as end:
            result: context.T = end.value
            return result

    def match(self, compiled: CompiledRule, line: bytes, indexes: list[Anchors | None] | None = None) -> Around:
        """The context of the last line like that in the newest file."""
        at = self.files[-1].rindex(line)
        captures = MATCHER.match(compiled.regex, line)
        assert captures is not None
        return self.run(look_back(compiled, Place(len(self.files), at), captures, indexes or []))


def texts(anchors: list[Anchor]) -> list[bytes]:
    return [anchor.text for anchor in anchors]


LOG = b"begin a\nbegin b\nstep b 1\nother\nstep a 1\nstep b 2\nfail b\nfail a\n"


def test_lines_before() -> None:
    around = History(LOG).match(rule(context__before=2), b"fail a")
    assert around == Around(True, [], [b"step b 2", b"fail b"], 0, len(LOG) - 7)
    assert History(LOG).match(rule(context__before=99), b"fail b").before == LOG.split(b"\n")[:6]
    assert History(b"fail a\n").match(rule(context__before=3), b"fail a").before == []


def test_the_nearest_earlier_line_that_matches_and_agrees() -> None:
    compiled = rule(context__until="'begin (?<u>\\w)'", context__same="['u']")
    around = History(LOG).match(compiled, b"fail a")
    assert texts(around.anchors) == [b"begin a"]
    assert around.anchors[0].place == Place(1, 0)
    assert around.before == LOG.split(b"\n")[1:7]
    compiled = rule(context__until="'begin (?<u>\\w)'", context__same="['u']", context__lines="'same'")
    assert History(LOG).match(compiled, b"fail b").before == [b"step b 1", b"step b 2"]


def test_nothing_found_says_how_far_it_looked() -> None:
    compiled = rule(context__until="'never (?<u>\\w)'", context__same="['u']", context__before=1)
    around = History(LOG).match(compiled, b"fail a")
    assert (around.found, around.anchors, around.before) == (False, [], [b"fail b"])
    assert around.looked == len(LOG) - 7


def test_a_chain_goes_back_to_the_step_before_for_its_next_candidate() -> None:
    log = b"""begin a 1
load a x
open a 2
load a y
step a 2
fail a
"""
    compiled = rule(
        context__until=r"['step (?<u>\w) (?<n>\d)|load (?<u2>\w) (?<q>\w)', 'begin \w (?<n>\d)|open \w (?<n2>\d)']"
    )
    assert texts(History(log).match(compiled, b"fail a").anchors) == [b"step a 2", b"open a 2"]
    # The nearest "load" has no "begin" with its number; the one before has.
    log = b"begin 7\nload 7\nload 8\nfail a\n"
    compiled = rule(
        regex="fail (?<n>\\d)?\\w", context__until=r"['load (?<n>\d)', 'begin (?<n>\d)']", context__same="['n']"
    )
    assert texts(History(log).match(compiled, b"fail a").anchors) == [b"load 7", b"begin 7"]


def test_over_rotation_as_if_it_were_one_file() -> None:
    compiled = rule(context__until="'begin (?<u>\\w)'", context__same="['u']", context__before=3)
    around = History(LOG[:8], LOG[8:31], b"", LOG[31:]).match(compiled, b"fail a")
    assert texts(around.anchors) == [b"begin a"]
    assert around.anchors[0].place == Place(1, 0)
    assert around.before == LOG.split(b"\n")[1:7]
    assert History(LOG[:-7], b"fail a\n").match(rule(context__before=2), b"fail a").before == [b"step b 2", b"fail b"]


def test_a_file_without_lines_is_not_the_end_of_history() -> None:
    history = History(b"begin a\nx\n", b"", b"fail a\n")
    assert history.match(rule(context__before=2), b"fail a").before == [b"begin a", b"x"]
    assert texts(history.match(rule(context__until="'begin'"), b"fail a").anchors) == [b"begin a"]
    assert History(b"", b"fail a\n").match(rule(context__before=2), b"fail a").before == []


def test_over_the_limit_the_middle_goes() -> None:
    log = b"begin a\n" + b"".join(b"line %d\n" % n for n in range(1000)) + b"fail a\n"
    compiled = rule(context__until="'begin'", context__max_lines=5)
    around = History(log).match(compiled, b"fail a")
    assert around.before == [b"line 0", b"line 1", b"line 2", b"line 998", b"line 999"]
    assert (around.elided, texts(around.anchors)) == (995, [b"begin a"])
    compiled = rule(context__until="'begin'", context__max_bytes=1024)
    around = History(log).match(compiled, b"fail a")
    assert sum(map(len, around.before)) <= 1024
    assert (around.before[0], around.before[-1]) == (b"line 0", b"line 999")
    assert len(around.before) + around.elided == 1000


@given(rng=st.randoms(use_true_random=False), pieces=st.integers(1, 3), has_index=st.booleans())
def test_anchors_are_those_of_a_brute_force_search(rng: random.Random, pieces: int, has_index: bool) -> None:
    lines = [
        b"%s %s %d%s" % (rng.choice([b"begin", b"load", b"step"]), rng.choice([b"ab", b"cd"]), rng.randrange(3), pad)
        for pad in rng.choices([b"", b"\r", b" " + b"z" * 3000], k=rng.randrange(60))
    ]
    lines.append(b"fail ab")
    compiled = rule(
        context__until=r"['load (?<u>\w+) (?<n>\d)', 'begin (?<u>\w+) (?<n>\d)']", context__same="['u', 'n']"
    )
    files, place = split(rng, lines, pieces)
    indexes: list[Anchors | None] = [None, None]
    if has_index:
        since = rng.randrange(len(lines))
        indexes = [Anchors(["u"], place[since]), Anchors(["u", "n"], place[since])]
        for number, line in list(enumerate(lines))[since:]:
            for index, until in zip(indexes, compiled.until, strict=True):
                captures = MATCHER.match(until, line.removesuffix(b"\r"))
                if index and captures is not None:
                    index.add(Anchor(place[number], line.removesuffix(b"\r"), captures))
    around = History(*files).run(look_back(compiled, place[-1], {"u": b"ab"}, indexes))
    assert [anchor.place for anchor in around.anchors] == brute(compiled, lines, place)


def split(rng: random.Random, lines: list[bytes], pieces: int) -> tuple[list[bytes], list[Place]]:
    files, places = [b""], list[Place]()
    for line in lines:
        if len(files) < pieces and rng.random() < 0.1:
            files.append(b"")
        places.append(Place(len(files), len(files[-1])))
        files[-1] += line + b"\n"
    return files, places


def brute(compiled: CompiledRule, lines: list[bytes], place: list[Place]) -> list[Place]:
    def matched(step: int, number: int) -> dict[str, bytes | None]:
        return MATCHER.match(compiled.until[step], lines[number].removesuffix(b"\r")) or {}

    for first in reversed(range(len(lines) - 1)):
        load = matched(0, first)
        if load.get("u") != b"ab":
            continue
        for second in reversed(range(first)):
            begin = matched(1, second)
            if begin and (begin["u"], begin["n"]) == (load["u"], load["n"]):
                return [place[first], place[second]]
    return []


def test_an_index_forgets_the_oldest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "RECENT", 3)
    index = Anchors(["u"], Place(1, 0))
    for n in range(5):
        index.add(Anchor(Place(1, n * 10), b"%d" % n, {"u": b"ab"[n % 2 : n % 2 + 1]}))
    assert index.since == Place(1, 20)
    assert texts(list(index.before(Place(1, 99), {"u": b"a"}))) == [b"4", b"2"]
    assert texts(list(index.before(Place(1, 40), {}))) == [b"3", b"2"]
    assert list(index.before(Place(1, 99), {"u": b"c"})) == []


def test_an_index_tells_of_the_lines_that_it_does_not_know() -> None:
    index = Anchors(["u"], Place(1, 0))
    for n in range(0, 100, 20):
        index.add(Anchor(Place(1, n), b"begin a", {"u": b"a"}))
        index.give_up(Place(1, n + 10))
    history = History(b"x" * 99 + b"\n")
    compiled = rule(regex="x (?<u>\\w)", context__until="'begin (?<u>\\w)'", context__same="['u']")
    found = [history.run(look_back(compiled, Place(1, at), {"u": b"a"}, [index])) for at in (25, 35, 100)]
    assert [(around.anchors[0].place.offset, around.limit_errors) for around in found] == [(20, 0), (20, 1), (80, 1)]
    none = history.run(look_back(compiled, Place(1, 100), {"u": b"b"}, [index]))
    assert (none.found, none.limit_errors) == (False, 5)


def test_a_walk_ends_at_its_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(context, "REACH", 10_000)
    monkeypatch.setattr(context, "BLOCK", 1000)
    log = b"begin a\n" + b"x\n" * 20_000 + b"fail a\n"
    history = History(log)
    around = history.match(rule(context__until="'begin'"), b"fail a")
    assert not around.found
    assert 10_000 <= around.looked < 11_001


def test_an_until_that_gives_up_again_and_again_ends_the_walk() -> None:
    log = b"anchor\n" + (b"a" * 100 + b"!\n") * 20_000 + b"fail b\n"
    around = History(log).match(rule(context__until="'(a+)+$|anchor'"), b"fail b")
    assert (around.found, around.anchors) == (False, [])
    assert context.LIMITS <= around.limit_errors <= around.looked / 102 < 20_000  # of the block that it ended in all
    few = History(log[: 7 + 102 * 3] + b"fail b\n").match(rule(context__until="'(a+)+$|anchor'"), b"fail b")
    assert (few.found, few.limit_errors) == (True, 3)


def test_a_line_longer_than_a_block_is_walked_over() -> None:
    log = b"begin a\n" + b"x" * 700_000 + b"\nfail a\n"
    assert texts(History(log).match(rule(context__until="'begin'"), b"fail a").anchors) == [b"begin a"]


TRACE = b"""2026 ok
2026 error: oops
  at one
  at two
Caused by: x
  at three
2026 next
"""
RECORD = {"multiline": "{ start = '^\\d{4}', continuation = '^(\\s+at |Caused by:)' }"}


def test_a_record_reaches_back_to_its_start_and_forward_while_lines_continue() -> None:
    compiled = rule(regex="Caused by", **RECORD)
    assert compiled.spec.multiline
    assert compiled.start
    assert compiled.continuation
    place = Place(1, TRACE.index(b"Caused"))
    search = record_before(
        compiled.spec.multiline, compiled.start, compiled.continuation, MATCHER, place, b"Caused by: x"
    )
    assert History(TRACE).run(search) == [b"2026 error: oops", b"  at one", b"  at two"]
    following = Following(compiled, MATCHER, now=5)
    assert (following.due, following.is_complete) == (7, False)
    assert not following.feed(b"  at three")
    assert following.feed(b"2026 next")
    assert following.record == [b"  at three"]


def test_a_matched_start_reaches_back_to_nothing() -> None:
    compiled = rule(regex="oops", **RECORD)
    assert compiled.spec.multiline
    assert compiled.start
    assert compiled.continuation
    place = Place(1, 8)
    search = record_before(
        compiled.spec.multiline, compiled.start, compiled.continuation, MATCHER, place, b"2026 error: oops"
    )
    assert History(TRACE).run(search) == []


def test_the_lines_after_a_match() -> None:
    following = Following(rule(context__after=2, context__wait_s=3), MATCHER, now=1)
    assert following.due == 4
    assert not following.feed(b"one")
    assert following.feed(b"two")
    assert following.after == [b"one", b"two"]


def test_a_match_that_waits_for_nothing_is_complete() -> None:
    assert Following(rule(), MATCHER, now=1).is_complete


def test_64_mib_are_walked_back_by_few_calls() -> None:
    """However fast the machine is; tests/bench measures."""
    log = b"begin blk_4711\n" + b"2026-01-05 step of another thing blk_1234\n" * 1_500_000 + b"fail blk_4711\n"
    compiled = rule(context__until="'begin (?<u>\\w+)'", context__same="['u']", context__lines="'same'")
    calls = Counter[str]()
    sys.setprofile(lambda frame, event, _: calls.update((event,)))
    try:
        around = History(log).match(compiled, b"fail blk_4711")
    finally:
        sys.setprofile(None)
    assert around.found
    assert calls.total() < 100_000
