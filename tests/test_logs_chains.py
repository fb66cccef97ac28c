"""How far a chain has come for a key, what experts say of that, and chains as bytes."""

import math
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent._native import lib
from agent.logs.chains import (
    BY_SOURCE,
    CHAINS,
    KEY_MAX,
    LINES,
    MAX_CLASSES,
    SUFFIX,
    SUFFIXES,
    TRACKS,
    WORDS,
    Chain,
    Chains,
    Evidence,
    FailureClass,
    KeptTrack,
    Reading,
    Seen,
    Track,
    Tracks,
    logit,
    words,
)
from agent.logs.learnchains import learn
from agent.logs.model import Model, ModelDamaged, room
from tests.log_chains import END, STEPS, line, log

UNIT = 1


def chain(*steps: int, gap_s: float = 50.0, slot: int = UNIT) -> Chain:
    return Chain({END: slot}, {t: (n, slot) for n, t in enumerate(steps)}, gap_s, [(1.0, 2.0)] * len(steps))


def chains() -> Chains:
    return Chains([FailureClass("broken", [chain(*STEPS)], 60.0)])


def state(rank: int, missing: int, extra: int) -> int:
    return rank << 4 | missing << 2 | extra


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ((0,), state(0, 0, 0)),
        ((0, 1, 2), state(2, 0, 0)),
        ((2,), state(2, 2, 0)),
        ((0, 2), state(2, 1, 0)),
        ((0, 0, 1), state(1, 0, 1)),
        ((2, 1, 0), state(0, 0, 2)),
        ((1, 0, 2), state(2, 1, 1)),
        ((0, 2, 1, 2), state(2, 0, 1)),
    ],
)
def test_a_state_is_the_step_what_it_lacks_and_what_is_too_much(ranks: tuple[int, ...], expected: int) -> None:
    track, its = Track(), [chain(*STEPS)]
    readings = [track.step(float(n), STEPS[rank], [(0, rank)], its, 50.0) for n, rank in enumerate(ranks)]
    assert readings[-1].states == [(0, expected, 1.0)]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_the_state_is_that_of_a_brute_force(ranks: list[int]) -> None:
    """Of all rising runs that end at the last step the longest."""
    track, its = Track(), [chain(*range(5))]
    readings = [track.step(float(n), rank, [(0, rank)], its, 50.0) for n, rank in enumerate(ranks)]
    longest, last = 0, ranks[-1]
    for chosen in range(1 << len(ranks) - 1, 1 << len(ranks)):
        run = [rank for n, rank in enumerate(ranks) if chosen >> n & 1]
        if all(a < b for a, b in pairwise(run)):
            longest = max(longest, len(run))
    assert readings[-1].states == [(0, state(last, min(2, last + 1 - longest), min(2, len(ranks) - longest)), 1.0)]


def test_a_pause_begins_anew_and_a_step_of_another_chain_lets_one_fade() -> None:
    track, its = Track(), [chain(1, 2, gap_s=10.0), chain(3, gap_s=40.0)]
    track.step(0.0, 1, [(0, 0)], its, 40.0)
    assert track.step(4.0, 3, [(1, 0)], its, 40.0) == Reading([(0, state(0, 0, 0), 0.6), (1, 0, 1.0)], (1, 3))
    assert track.step(20.0, 3, [(1, 0)], its, 40.0) == Reading([(1, state(0, 0, 1), 1.0)], (1, 3, 3))
    assert track.step(61.0, 2, [(0, 1)], its, 40.0) == Reading([(0, state(1, 1, 0), 1.0)], (2,))


def test_the_suffix_is_the_last_templates_only() -> None:
    track, its = Track(), [chain(*STEPS)]
    readings = [track.step(float(n), STEPS[n % 3], [(0, n % 3)], its, 50.0) for n in range(6)]
    assert readings[-1].suffix == (STEPS * 2)[-SUFFIX:]


def test_a_clock_that_goes_back_does_no_harm() -> None:
    track, its = Track(), [chain(*STEPS)]
    track.step(100.0, STEPS[0], [(0, 0)], its, 50.0)
    assert track.step(90.0, STEPS[1], [(0, 1)], its, 50.0).states == [(0, state(1, 0, 0), 1.0)]


def test_experts_back_off_to_what_they_know() -> None:
    class_ = FailureClass("broken", [chain(*STEPS)], 60.0, rate=0.25)
    unknown = class_.judge(Reading([(0, 0, 1.0)], (11,)))
    assert unknown.inputs == pytest.approx((logit(0.25),) * 3)
    assert unknown.rows == 0
    for failed in (True, True, True, False):
        class_.count(Reading([(0, state(1, 0, 0), 1.0)], (11, 12)), failed, 0 if failed else None)
    whole = (3 + 2 * (3 + 2 * (3 + 2 * 0.25) / 6) / 6) / 6
    suffix = (3 + 3 * (3 + 3 * 0.25) / 7) / 7
    known = class_.judge(Reading([(0, state(1, 0, 0), 1.0)], (10, 11, 12)))
    assert known.inputs == pytest.approx((logit(whole), logit(whole), logit(suffix)))
    assert known.rows == 4
    # Of what is too much nothing is known, of the rank and of what is missing all.
    assert class_.chains[0].chance(state(1, 0, 2), 0.25) == pytest.approx((3 + 2 * (3 + 2 * 0.25) / 6) / 6)


def test_two_chains_together_are_more_probable_than_each() -> None:
    class_ = FailureClass("broken", [chain(1), chain(1)], 60.0)
    for part in class_.chains:
        part.counts = {0: [100, 50], 3: [100, 50], 15: [100, 50]}
    most, any_, _ = class_.judge(Reading([(0, 0, 1.0), (1, 0, 0.5)], (1,))).inputs
    assert most == pytest.approx(logit(0.49), abs=0.1)
    assert any_ == pytest.approx(logit(1 - 0.5 * 0.75), abs=0.1)


def test_tracks_belong_to_keys_and_the_oldest_are_forgotten() -> None:
    tracks = Tracks(chains())
    assert tracks.see(line(0.0, 99, "a")) == []
    assert [key for _, key, _, _ in tracks.see(line(0.0, STEPS[0], "a"))] == [b"a"]
    for n in range(TRACKS):
        tracks.see(line(1.0, STEPS[0], f"b{n}"))
    ((_, _, _, reading),) = tracks.see(line(2.0, STEPS[1], "a"))
    assert reading.suffix == (STEPS[1],)


def test_a_failure_ends_the_track_of_its_key() -> None:
    tracks = Tracks(chains())
    tracks.see(line(0.0, STEPS[0], "a"))
    assert tracks.failed(0, line(1.0, END, "b", failure="broken")) == b"b"
    assert tracks.failed(0, line(1.0, END, "a", failure="broken")) == b"a"
    ((_, _, _, reading),) = tracks.see(line(2.0, STEPS[1], "a"))
    assert reading.suffix == (STEPS[1],)


def test_a_failure_of_an_unknown_template_has_the_key_that_is_tracked() -> None:
    tracks = Tracks(chains())
    tracks.see(line(0.0, STEPS[0], "a"))
    assert tracks.failed(0, Seen(1.0, "a.log", 999, b"panic on b", "broken")) is None
    assert tracks.failed(0, Seen(1.0, "a.log", 999, b"panic on (a)", "broken")) == b"a"
    assert tracks.failed(0, Seen(1.0, "a.log", 999, b"panic on a", "broken")) is None


def test_what_was_seen_outlives_a_restart_as_long_as_it_counts() -> None:
    first, end = Tracks(chains()), 30.0
    for at, unit in ((0.0, "a"), (20.0, "b"), (21.0, "\xff")):
        first.see(line(at, STEPS[0], unit))
    (_, _, track, _) = first.see(line(25.0, STEPS[1], "b"))[0]
    for n in range(LINES + 1):
        track.add(Evidence("a.log", n, b"\xff", 7))
    track.armed = False
    kept = msgspec.json.decode(msgspec.json.encode(first.kept(end)), type=list[KeptTrack])
    assert first.kept(end) == kept
    assert [one.word for one in kept] == [b"a", "\xff".encode(), b"b"]
    assert first.kept(51.0) == kept[1:]  # the pause of the other is too long
    second = Tracks(chains())
    second.resume(kept)
    (_, key, again, reading) = second.see(line(31.0, STEPS[2], "b"))[0]
    assert (key, reading.states, reading.suffix) == (b"b", [(0, state(2, 0, 0), 1.0)], STEPS[:3])
    assert (again.armed, [one.offset for one in again.lines]) == (False, list(range(1, LINES + 1)))
    other = Tracks(Chains())
    other.resume(kept)  # of another model
    assert other.kept(end) == []
    shorter = chains()
    shorter.classes[0].chains = [chain(STEPS[0])]
    third = Tracks(shorter)
    third.resume(kept)  # what its chain does not have
    assert [one.word for one in third.kept(end)] == [b"a", "\xff".encode()]


def test_slots_are_words_or_captures() -> None:
    failure = Seen(0.0, "a.log", END, b"write to vol-3 failed", "broken", (b"x", b"vol-3"))
    assert failure.places() == [(WORDS, b"x"), (WORDS + 1, b"vol-3"), (BY_SOURCE, "a.log")]
    assert [failure.key(slot) for slot in (BY_SOURCE, WORDS + 1, 2, WORDS + 2, 4)] == [
        "a.log",
        b"vol-3",
        b"vol-3",
        None,
        None,
    ]
    assert failure._replace(captures=()).places()[:-1] == [(0, b"write"), (1, b"to"), (2, b"vol-3"), (3, b"failed")]


def test_a_key_that_was_a_capture_is_found_where_there_is_none() -> None:
    known = chains()
    known.classes[0].chains[0].ends = {END: WORDS}
    tracks = Tracks(known)
    tracks.see(line(0.0, STEPS[0], "a"))
    assert tracks.failed(0, Seen(1.0, "a.log", END, b"panic on a", "broken")) == b"a"


def test_words_are_without_what_is_around_them_and_without_the_time() -> None:
    cut = words(b"2026-01-05T08:00:00.1Z host (vol-3: /dev/sdb) blk_-16, user=\xc3\xa4bc; 10.0.0.1:80 ...\r\n")
    assert cut == [b"host", b"vol-3", b"dev/sdb", b"blk_-16", b"user", b"\xc3\xa4bc", b"10.0.0.1", b"80"]


@given(st.binary(max_size=300))
def test_any_bytes_have_words(raw: bytes) -> None:
    assert all(words(raw))


def test_of_a_key_so_many_bytes_are_kept() -> None:
    long = b"k" * 60_000
    tracks = Tracks(chains())
    ((_, key, _, _),) = tracks.see(Seen(0.0, "a.log", STEPS[0], b"unit " + long))
    assert key == long[:KEY_MAX]
    by_line, by_capture = (
        Seen(1.0, "a.log", END, b"unit " + long, "broken"),
        Seen(1.0, "a", END, b"", "broken", (long,)),
    )
    assert by_line.places()[UNIT] == (UNIT, key)
    assert by_capture.places()[0] == (WORDS, key)
    assert (by_line.key(UNIT), by_capture.key(WORDS)) == (key, key)
    assert tracks.failed(0, by_line) == key


def test_chains_are_the_same_as_bytes() -> None:
    lines = log()
    learned = learn(lambda: lines)
    assert learned.classes
    assert Chains.decode(*learned.encode()) == learned
    assert Chains.decode(b"", b"") == Chains()


def test_all_that_may_be_known_fits_into_a_model_file() -> None:
    huge = (1 << 32) - 1
    chains = []
    for _ in range(CHAINS):
        its = chain(*range(huge - 12, huge))
        its.ends = dict.fromkeys(range(huge - 12, huge), 127)
        its.counts = {state: [huge, huge] for state in range(12 << 4)}
        chains.append(its)
    known = Chains([FailureClass("\N{GRINNING FACE}" * 256, part, 60.0) for part in batches(chains, MAX_CLASSES)])
    for class_ in known.classes:
        class_.suffixes = {(huge, huge, huge - rows % 2, rows): [huge + rows, huge] for rows in range(1000)}
    known.classes[0].suffixes[7, 7, 7, 7] = [2 * huge, 0]
    known.trim()
    assert sum(len(class_.suffixes) for class_ in known.classes) == SUFFIXES
    assert (7, 7, 7, 7) in known.classes[0].suffixes
    assert (huge, huge, huge, 0) not in known.classes[0].suffixes
    weights = 4096 * (2 + 8 + 8 * lib.MODEL_CLASSES) + 13 * lib.MODEL_LABELS  # native/model.c, "On disk"
    names = ["\N{GRINNING FACE}" * 120 + str(n) for n in range(lib.MODEL_CLASSES - 1)]
    model = Model(classes=tuple(names), weights=bytes(weights), chains=known.encode()[0], calibration=known.encode()[1])
    assert room(model) > 0


def batches(chains: list[Chain], count: int) -> list[list[Chain]]:
    return [chains[n::count] for n in range(count)]


@given(st.binary(max_size=200), st.integers(0, 10_000), st.integers(1, 255))
def test_damaged_bytes_are_refused_or_harmless(raw: bytes, place: int, change: int) -> None:
    good, weights = chains().encode()
    bad = bytearray(good)
    bad[place % len(bad)] ^= change
    for sections in ((raw, weights), (good, raw), (bytes(bad), weights), (good[: place % len(good)], weights)):
        try:
            decoded = Chains.decode(*sections)
        except ModelDamaged:
            continue
        tracks = Tracks(decoded)
        for template in [*decoded.wanted][:5]:
            for number, _, _, reading in tracks.see(Seen(1.0, "a.log", template, b"a b c")):
                probability = decoded.probability(decoded.classes[number].judge(reading))
                assert 0 <= probability <= 1
                assert all(map(math.isfinite, decoded.classes[number].expected(reading)))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda s: s[1][0]["chains"][0]["leads"].pop(), "a step of broken has no lead"),
        (lambda s: s[1].append(s[1][0]), "a class is there twice"),
        (lambda s: s[1][0]["chains"][0]["counts"].update({3: [1, 2]}), "more lines of broken failed than there were"),
        (lambda s: s[1][0]["chains"][0]["sure"].append(4711), "a failure of broken has no key"),
        (lambda s: s.__setitem__(0, 9), "version 9 is not known"),
    ],
)
def test_what_cannot_be_is_refused_by_name(change: object, why: str) -> None:
    sections, weights = chains().encode()
    tree = msgspec.msgpack.decode(sections, strict=False)
    assert callable(change)
    change(tree)
    with pytest.raises(ModelDamaged, match=why):
        Chains.decode(msgspec.msgpack.encode(tree), weights)


def test_a_forecast_corrects_the_weights_a_little() -> None:
    known = chains()
    judgement = known.classes[0].judge(Reading([(0, 0, 1.0)], (11,)))
    before = known.probability(judgement)
    known.correct(judgement, True)
    assert before < known.probability(judgement) < before + 0.25
