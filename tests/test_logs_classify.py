"""Classes of lines: the native model against a slow twin, what it learns and when it keeps silent, drift, its bytes."""

import math
import random
import re
from array import array
from collections import defaultdict
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.logs.classify import WINDOW, Classifier, Drift, TooManyClasses, tail
from agent.logs.model import MAX_CLASSES, ModelDamaged
from agent.logs.templates import NONE

MASK = (1 << 64) - 1


def mix(hash: int, value: int) -> int:
    hash = (hash ^ value) * 0x9E3779B97F4A7C15 & MASK
    return hash ^ hash >> 29


def hash_word(word: bytes) -> int:
    hash, seen = len(word), word[:64]
    while len(seen) >= 8:
        hash, seen = mix(hash, int.from_bytes(seen[:8], "little")), seen[8:]
    return mix(hash, int.from_bytes(seen, "little"))


def tokens(line: bytes, template: int) -> dict[int, float]:
    """The tokens of a line and what each counts."""
    found: dict[int, float] = {}
    if template != NONE:
        found[mix(3, template) >> 32 & 4095] = 4.0
    before, words = 1, [word.strip(b".") for word in re.split(rb"[\x00-\x20,;:=()\[\]{}\"'<>|/]+", line[:4096])]
    for word in list(filter(None, words))[:160]:
        is_number = re.search(rb"[0-9]", word) is not None
        this = 2 if is_number else hash_word(word)
        if not is_number:
            found.setdefault(this >> 32 & 4095, 1.0)
        if not is_number or before != 2:
            found.setdefault(mix(before, this) >> 32 & 4095, 1.0)
        before = this
    norm = math.sqrt(sum(value * value for value in found.values()))
    return {token: value / norm for token, value in found.items()}


NOTHING: Mapping[int, float] = {}


class Twin:
    """The linear model, as plainly as it can be said."""

    def __init__(self) -> None:
        self.weights: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.squares: defaultdict[tuple[int, int], float] = defaultdict(float)
        self.labels: defaultdict[int, list[int]] = defaultdict(lambda: [0, 0, 0])  # class, how many are it, all

    def guess(self, line: bytes, template: int, classes: int) -> list[float]:
        """The shares of all classes when it is asked; labels of the template say something too."""
        class_, count, total = self.labels[template] if template != NONE else (0, 0, 0)
        return self.shares(line, template, classes, {class_: 3 * math.log1p(min(4, max(0, 2 * count - total)))})

    def shares(self, line: bytes, template: int, classes: int, leads: Mapping[int, float] = NOTHING) -> list[float]:
        sums = [sum(self.weights[t, c] * v for t, v in tokens(line, template).items()) for c in range(classes)]
        sums = [each + leads.get(class_, 0) for class_, each in enumerate(sums)]
        shares = [math.exp(each - max(sums)) for each in sums]
        return [share / sum(shares) for share in shares]

    def learn(self, line: bytes, template: int, classes: int, class_: int) -> None:
        label = self.labels[template]
        label[2] += 1
        if class_ == label[0] or 2 * label[1] < label[2]:
            label[:2] = class_, label[1] + 1 if class_ == label[0] else 1
        for number, share in enumerate(self.shares(line, template, classes)):
            error = share - (number == class_)
            for token, value in tokens(line, template).items() if abs(error) >= 1e-4 else ():
                self.squares[token, number] += (error * value) ** 2
                step = error * value / math.sqrt(1e-3 + self.squares[token, number])
                self.weights[token, number] -= step


WORDS = [
    b"error",
    b"link",
    b"severed",
    b"up",
    b"...",
    b"a.b.",
    b"eth0",
    b"17",
    b"x" * 70,
    b"0x1f",
    b"caf\xc3\xa9",
    b"\0",
]


def random_line(rng: random.Random) -> bytes:
    return b"".join(rng.choice(WORDS) + rng.choice([b" ", b": ", b"/", b"=[", b"\t"]) for _ in range(rng.randrange(12)))


def test_the_native_model_agrees_with_its_twin() -> None:
    rng, names = random.Random(10), [None, "a", "b", "c", "d", "e"]
    classifier, twin, known = Classifier(threshold=0), Twin(), 1
    for turn in range(600):
        line = random_line(rng) if turn % 100 else b"word " * 3000
        template = rng.choice([NONE, turn // 4, turn // 4])  # too few labels of each to settle it
        shares = twin.guess(line, template, known)
        guess = classifier.guess(template, line)
        assert (guess is None) == (known == 1)
        if guess:
            assert guess.confidence == pytest.approx(max(shares), abs=2e-3)
            assert shares[names.index(guess.class_)] == pytest.approx(max(shares), abs=2e-3)
        class_ = rng.randrange(len(names)) if known > 1 else 1
        class_ = min(class_, known)  # classes come one after the other
        classifier.learn(template, line, names[class_])
        known = max(known, class_ + 1)
        twin.learn(line, template, known, class_)


def test_it_knows_a_class_by_words_it_was_told_of() -> None:
    classifier = Classifier()
    assert classifier.guess(NONE, b"FATAL data TLB error interrupt") is None
    for number in range(3):
        classifier.learn(NONE, b"job %d started" % number, None)
        classifier.learn(NONE, b"node %d FATAL data TLB error interrupt" % number, "kernel.tlb")
        classifier.learn(NONE, b"node %d FATAL Lustre mount failed" % number, "fs.mount")
    guess = classifier.guess(NONE, b"node 9 FATAL data TLB error interrupt")
    assert guess is not None
    assert (guess.class_, guess.by, guess.confidence > 0.8) == ("kernel.tlb", "model", True)
    normal = classifier.guess(NONE, b"job 4711 started")
    assert normal is not None
    assert normal.class_ is None


def test_it_abstains_where_nothing_is_known() -> None:
    """Also when all that was ever labelled is of one class: a rule with a class labels nothing as normal."""
    classifier = Classifier()
    for number in range(100):
        classifier.learn(number, b"disk sd%d failed" % number, "disk")
    assert classifier.guess(1000, b"welcome to the machine") is None
    assert classifier.guess(NONE, b"") is None


def test_one_label_of_a_template_outweighs_what_its_words_say() -> None:
    classifier = Classifier()
    classifier.learn(1, b"error on stream socket, connection timed out", "timeout")
    for _ in range(4):
        classifier.learn(2, b"error on stream socket, connection reset by peer", "reset")
    known = classifier.guess(1, b"error on stream socket, connection timed out")
    assert known is not None
    assert (known.class_, known.by, known.confidence > 0.7) == ("timeout", "model", True)
    unknown = classifier.guess(3, b"error on stream socket, connection timed out")
    assert unknown is None or unknown.class_ == "reset" or unknown.confidence < known.confidence


def test_five_labels_settle_a_template() -> None:
    classifier = Classifier()
    for line in (b"one", b"two", b"three", b"four"):
        classifier.learn(7, line, "a")
    before = classifier.guess(7, b"five")
    assert before is not None
    assert before.by == "model"
    classifier.learn(7, b"five", "a")
    settled = classifier.guess(7, b"nothing like it")
    assert settled is not None
    assert (settled.class_, settled.by, round(settled.confidence, 6)) == ("a", "template", round(6 / 7, 6))
    classifier.learn(7, b"six", "b")  # 5 of 6 are less than 95 %
    after = classifier.guess(7, b"five")
    assert after is None or after.by == "model"


def test_templates_that_join_share_their_labels() -> None:
    classifier = Classifier()
    for template, class_ in [(1, "a"), (2, "a"), (3, None), (4, "b")]:
        for _ in range(3 if class_ == "a" else 10):
            classifier.learn(template, b"", class_)
    classifier.join([(2, 1), (4, 3), (5, 6)])
    one, three = classifier.guess(1, b""), classifier.guess(3, b"")
    assert one is not None
    assert (one.class_, one.by) == ("a", "template")  # six labels now
    assert three is None or three.by == "model"  # half of each
    classifier.join([(4, 7)])
    seven = classifier.guess(7, b"")
    assert seven is not None
    assert (seven.class_, seven.by) == ("b", "template")


def test_contradictory_labels_end_in_doubt() -> None:
    classifier = Classifier()
    for _ in range(200):
        classifier.learn(1, b"it broke", "a")
        classifier.learn(1, b"it broke", "b")
    guess = classifier.guess(1, b"it broke")
    assert guess is None or (guess.by == "model" and guess.confidence < 0.6)


def test_classes_are_bounded_in_number() -> None:
    classifier = Classifier()
    for number in range(MAX_CLASSES):
        classifier.learn(NONE, b"x", f"class {number}")
    with pytest.raises(TooManyClasses, match="63 classes already"):
        classifier.learn(NONE, b"x", "one more")
    classifier.learn(NONE, b"x", "class 0")
    assert len(classifier.classes) == MAX_CLASSES


def test_labels_of_more_templates_than_there_is_room_for_push_out_rare_ones() -> None:
    classifier = Classifier()
    for _ in range(100):
        classifier.learn(3_000_000_000, b"often", "a")
    for template in range(140_000):
        classifier.learn(template, b"", None)
    guess = classifier.guess(3_000_000_000, b"often")
    assert guess is not None
    assert guess.class_ == "a"
    assert len(classifier.dump()) < 65_536 * 13 + 4096 * (10 + 2 * 8) + 8


def test_a_line_of_a_megabyte_is_looked_at_for_its_beginning() -> None:
    classifier = Classifier()
    classifier.learn(NONE, b"begins like this " + b"x" * 1_000_000, "a")
    classifier.learn(NONE, bytes(range(256)) * 4000, None)
    guess = classifier.guess(NONE, b"begins like this " + b"y" * 1_000_000)
    assert guess is not None
    assert guess.class_ == "a"


def test_many_lines_at_once_are_guessed_as_one_by_one() -> None:
    rng, classifier = random.Random(4), Classifier()
    lines = [random_line(rng) for _ in range(300)]
    templates = [rng.choice([NONE, 1, 2, 3]) for _ in lines]
    for line, template in zip(lines, templates, strict=True):
        classifier.learn(template, line, rng.choice([None, "a", "b"]))
    starts = array("I", [0])
    for line in lines:
        starts.append(starts[-1] + len(line) + 1)
    guesses = classifier.guess_all(b"\n".join(lines) + b"\n", starts, array("I", templates))
    assert [guesses[n] for n in range(len(guesses))] == [
        classifier.guess(template, line) for template, line in zip(templates, lines, strict=True)
    ]


# ---- drift -----------------------------------------------------------------------------------------------------------


def drifts(classifier: Classifier, labels: list[tuple[bytes, str | None]]) -> list[Drift]:
    found = [classifier.learn(NONE, line, class_) for line, class_ in labels]
    return [drift for drift in found if drift]


def test_guesses_that_go_wrong_of_late_are_noticed_once() -> None:
    rng, classifier = random.Random(1), Classifier()

    def labels(count: int, noise: float) -> list[tuple[bytes, str | None]]:
        return [
            (b"mount failed", rng.choice(["fs", "net", "disk"]) if rng.random() < noise else "fs") for _ in range(count)
        ]

    assert drifts(classifier, labels(1000, 0.02)) == []
    (drift,) = drifts(classifier, labels(150, 1))
    assert (drift.what, drift.before < 0.1, drift.now > 0.1) == ("wrong", True, True)


def test_a_world_that_stays_as_it_is_does_not_drift() -> None:
    rng, classifier = random.Random(2), Classifier()
    labels = [
        (random_line(rng), rng.choice([None, "a", "b"])) for _ in range(3000)
    ]  # mostly wrong, but always as often
    assert drifts(classifier, labels) == []


def test_a_log_that_is_written_anew_is_noticed_without_labels() -> None:
    classifier = Classifier()
    for number in range(200):
        classifier.learn(number % 20, b"the old message of kind %d" % (number % 20), "a")
    asked = [classifier.ask(n % 20, b"the old message of kind %d" % (n % 20)) for n in range(300)]
    assert all(guess and not drift for guess, drift in asked)
    flood = [classifier.ask(99, b"unheard-of words") for n in range(300)]
    assert {drift for _, drift in flood} == {None}  # one message, however often
    told = [classifier.ask(100 + n, b"unheard-of words") for n in range(100)]
    (drift,) = [drift for _, drift in told if drift]
    assert drift.what == "unknown"


@pytest.mark.parametrize(("bad", "share"), [(0, 0.5), (1, 0.01), (30, 0.2), (64, 0.9)])
def test_tail_is_the_binomial_distribution_s(bad: int, share: float) -> None:
    rng, draws = random.Random(3), 20_000
    seen = sum(sum(rng.random() < share for _ in range(WINDOW)) >= bad for _ in range(draws)) / draws
    assert tail(bad, share) == pytest.approx(seen, abs=0.02)


# ---- bytes -----------------------------------------------------------------------------------------------------------


def taught() -> Classifier:
    rng, classifier = random.Random(5), Classifier()
    for _ in range(100):
        classifier.learn(rng.randrange(20), random_line(rng), rng.choice([None, "a", "b"]))
    return classifier


def test_what_was_learned_is_kept() -> None:
    rng, classifier = random.Random(6), taught()
    same = Classifier.load(classifier.dump(), tuple(classifier.classes))
    for _ in range(200):
        line, template = random_line(rng), rng.randrange(25)
        assert same.guess(template, line) == classifier.guess(template, line)
        classifier.learn(template, line, "b")
        same.learn(template, line, "b")
    assert same.dump() == classifier.dump()


DUMPED = taught().dump()


@given(st.data())
def test_damaged_bytes_are_refused_or_make_a_model_that_works(data: st.DataObject) -> None:
    """The checksum of the file is good when this is read: here are bugs, and other releases."""
    kept = bytearray(DUMPED)
    for _ in range(data.draw(st.integers(0, 4))):
        kept[data.draw(st.integers(0, len(kept) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.one_of(st.just(len(kept)), st.integers(0, len(kept))))
    try:
        classifier = Classifier.load(bytes(kept[:cut]) + data.draw(st.binary(max_size=3)), ("a", "b"))
    except ModelDamaged:
        return
    guess = classifier.guess(3, b"error: link severed")
    assert guess is None or 0.5 < guess.confidence <= 1
    classifier.learn(3, b"error: link severed", "a")


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_or_make_a_model(data: bytes) -> None:
    try:
        Classifier.load(data, ("a",)).guess(1, data)
    except ModelDamaged:
        assert data != bytes(8)  # no rows, no labels


def test_numbers_that_are_none_are_refused() -> None:
    whole = Classifier.load(bytes(8), ())
    whole.learn(1, b"x y", "a")
    good = whole.dump()
    Classifier.load(good, ("a",))
    for wrong in (b"\0\0\xc0\x7f", b"\0\0\x80\x7f"):  # not a number, infinite
        with pytest.raises(ModelDamaged):
            Classifier.load(good[:14] + wrong + good[18:], ("a",))
    with pytest.raises(ModelDamaged):
        Classifier.load(good, ())
    with pytest.raises(ModelDamaged):
        Classifier.load(good, tuple(map(str, range(64))))
