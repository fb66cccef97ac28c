"""Which lines come before failures, and which value do they share with them?

At each failure, a template is counted when a line of it, within a window before the failure, has one of the failure's
words; the same is asked of the window before that one. Lines that lead to failures stand in the first far more often,
lines that are there anyway in both. A slot is the number of a word in its line; the log itself is one more.

Source: protocols/logs.md 4, "Forecast": "a variable value the chain's lines share, found by the learner; else the
source".
"""

import math
from bisect import bisect_left, bisect_right
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from agent.logs.chains import BY_SOURCE, MAX_STEPS, Key, Seen, words

WINDOWS_S = (60.0, 300.0, 900.0, 1800.0)
LEAST = 5  # failures of a kind, to tell chance from chain

_MOST = 500  # failures of one kind and slot that are looked at
_KINDS = 512  # of failures
_TEMPLATES = 16_384  # that may be steps
_WORDS = 65_536  # of failures
_PLACES_OF_WORD = 1024  # in which one word stands
_PLACES = 16_384  # counted for one slot of one kind
_APART_S = 15.0  # between the times that are remembered of one place
_DENSE, _FEW = 0.7, 8  # share of lines that have a word since it came; of fewer it says nothing
_GRAIN_S = 5.0
_SHARE, _EXCESS, _SIGMAS = 0.3, 0.2, 2.5


class Precursors(NamedTuple):
    """What leads to one kind of failure: lines of the class `failure` whose template is in `ends`, and the key its word
    of that number; none: those that are too rare for a kind of their own. `steps` likewise: template -> key's word.
    """

    failure: str
    ends: dict[int, int]
    steps: dict[int, int]
    window_s: float


class _Pair:
    """When a word stood in one slot of one template."""

    __slots__ = ("last", "times")

    def __init__(self, at: float) -> None:
        self.last, self.times = at, [at]

    def add(self, at: float) -> None:
        self.last = at
        if at - self.times[-1] >= _APART_S:
            self.times.append(at)
            if len(self.times) > 512:
                del self.times[:256]

    def stood(self, begin: float, end: float) -> bool:
        return bisect_left(self.times, begin) < bisect_right(self.times, end)


_Place = tuple[int, int]  # template, slot


class _Tally:
    """How many lines there were until when, to _GRAIN_S."""

    __slots__ = ("counts", "times")

    def __init__(self) -> None:
        self.times, self.counts = [-math.inf], [0]

    def add(self, at: float) -> None:
        if at - self.times[-1] < _GRAIN_S:
            self.counts[-1] += 1
            return
        self.times.append(at)
        self.counts.append(self.counts[-1] + 1)
        if len(self.times) > 2048:
            del self.times[1:1024], self.counts[1:1024]

    def first(self, begin: float) -> float:
        """When the first line behind `begin` came, inf: none has."""
        place = bisect_right(self.times, begin)
        return self.times[place] if place < len(self.times) else math.inf

    def between(self, begin: float, end: float) -> int:
        return self.counts[bisect_right(self.times, end) - 1] - self.counts[bisect_right(self.times, begin) - 1]


class _Word:
    """In how many lines a word stood, and where, the place it stood in last at the end."""

    __slots__ = ("lines", "number", "places")

    def __init__(self) -> None:
        self.places: OrderedDict[_Place, _Pair] = OrderedDict()
        self.lines, self.number = _Tally(), 0

    def add(self, at: float, number: int, place: _Place) -> None:
        if number != self.number:
            self.number = number
            self.lines.add(at)
        pair = self.places.get(place)
        if pair is None:
            self.places[place] = _Pair(at)
            if len(self.places) > _PLACES_OF_WORD:
                self.places.popitem(last=False)
        else:
            pair.add(at)
            self.places.move_to_end(place)


class _Index:
    """Where words stand that failures have, but for those that are always the same in their template; and the logs."""

    def __init__(self, failures: Iterable[Seen]) -> None:
        self.begin = math.inf  # of the log
        self._number, self._lines = 0, _Tally()
        self._words: dict[Key, _Word] = {}
        self._fixed: dict[int, dict[int, bytes]] = defaultdict(dict)  # per template: words that were always the same
        self._varying: set[_Place] = set()
        for seen in failures:
            for _, key in seen.places():
                if len(self._words) < _WORDS:
                    self._words.setdefault(key, _Word())

    def add(self, seen: Seen) -> None:
        self.begin = min(self.begin, seen.at)
        self._number += 1
        self._lines.add(seen.at)
        template, its = seen.template, words(seen.line)
        fixed = self._fixed.get(template)
        if fixed:
            for slot, word in [*fixed.items()]:
                if slot >= len(its) or its[slot] != word:
                    del fixed[slot]
                    self._varying.add((template, slot))
        for slot, key in enumerate(its):
            if key in self._words:
                place = (template, slot)
                if place in self._varying:
                    self._words[key].add(seen.at, self._number, place)
                elif len(self._fixed) < _TEMPLATES or template in self._fixed:
                    self._fixed[template][slot] = key
        if (log := self._words.get(seen.source)) is not None:
            log.add(seen.at, self._number, (template, BY_SOURCE))

    def near(self, key: Key, at: float) -> list[tuple[_Place, _Pair]]:
        """Where it stood not long ago."""
        found: list[tuple[_Place, _Pair]] = []
        word = self._words.get(key)
        if word is not None:
            for place, pair in reversed(word.places.items()):
                if pair.last < at - 2 * WINDOWS_S[-1]:
                    break
                found.append((place, pair))
        return found

    def shares(self, key: Key, at: float, window: float) -> tuple[float, float] | None:
        """The share of lines that have the word, since it came first in a window; and of those of the window before.

        None: these are too few to tell.
        """
        word, begin = self._words.get(key), at - window
        if word is None:
            return None
        came = word.lines.first(begin) - _GRAIN_S
        near, far = self._lines.between(came, at), self._lines.between(begin - window, begin)
        if near < _FEW:
            return None
        before = word.lines.between(begin - window, begin) / far if far else 0.0
        return min(1.0, word.lines.between(came, at) / near), before


class _Slot:
    """What stood before the failures of a kind with the word that they have in one slot."""

    def __init__(self) -> None:
        self.total = 0
        # Per window: failures of which all of it and of the one before is in the log; shares(), and of how many.
        self.failures = [0] * len(WINDOWS_S)
        self.shares = [(0.0, 0.0, 0)] * len(WINDOWS_S)
        self.places: dict[_Place, list[int]] = {}  # per window, the same of places: near, farther away

    def add(self, at: float, index: _Index, near: Iterable[tuple[_Place, _Pair]], key: Key | None = None) -> None:
        """A failure, and where its words stood before."""
        self.total += 1
        known = [n for n, window in enumerate(WINDOWS_S) if at - 2 * window >= index.begin]
        for n in known:
            self.failures[n] += 1
            if key is not None and (shares := index.shares(key, at, WINDOWS_S[n])):
                since, before, number = self.shares[n]
                self.shares[n] = (since + shares[0], before + shares[1], number + 1)
        for place, pair in near:
            counts = self.places.get(place)
            if counts is None:
                if len(self.places) >= _PLACES:
                    continue
                counts = self.places[place] = [0] * 2 * len(WINDOWS_S)
            for n in known:
                window = WINDOWS_S[n]
                counts[2 * n] += pair.last >= at - window
                counts[2 * n + 1] += pair.stood(at - 2 * window, at - window)

    def join(self, other: "_Slot") -> None:
        """Failures of another kind."""
        self.total += other.total
        self.failures = [a + b for a, b in zip(self.failures, other.failures, strict=True)]
        for place, counts in other.places.items():
            mine = self.places.get(place, [0] * len(counts))
            self.places[place] = [a + b for a, b in zip(counts, mine, strict=True)]

    def is_time(self) -> bool:
        """A word that all of a log has once it came, and had not before, is of the time: a minute, a session."""
        return any(since > _DENSE * max(LEAST, number) and before < since / 2 for since, before, number in self.shares)

    def steps(self) -> tuple[float, tuple[_Place, ...], float]:
        """How much more often its steps stood near than farther away; the steps; the window."""
        best = _NOTHING
        for n, window in enumerate(WINDOWS_S):
            failures, steps = self.failures[n], dict[int, tuple[float, int]]()
            for (template, slot), counts in self.places.items() if failures >= LEAST else ():
                near, far = counts[2 * n : 2 * n + 2]
                excess = (near - far) / failures
                if near < _SHARE * failures or excess < _EXCESS or near - far < _SIGMAS * math.sqrt(near + far):
                    continue
                if excess > steps.get(template, (0.0, 0))[0]:
                    steps[template] = (excess, slot)
            chosen = sorted(steps.items(), key=lambda step: step[1][0], reverse=True)[:MAX_STEPS]
            total = sum(excess for _, (excess, _) in chosen)
            if total > best[0]:
                best = (total, tuple((template, slot) for template, (_, slot) in chosen), window)
        return best


_NOTHING: tuple[float, tuple[_Place, ...], float] = (0.0, (), 0.0)


class _Kind:
    """Failures of one class and template."""

    def __init__(self) -> None:
        self.count = 0
        self.slots: dict[int, _Slot] = defaultdict(_Slot)
        self.anywhere = _Slot()  # as far as it is too rare for slots
        self._failed: dict[tuple[int, Key], float] = {}  # when

    def add(self, seen: Seen, index: _Index) -> None:
        self.count += 1
        anywhere: dict[_Place, _Pair] = {}
        for number, key in seen.places():
            before, self._failed[number, key] = self._failed.get((number, key), -math.inf), seen.at
            slot = self.slots[number]
            # Of a burst only the first line tells something.
            if seen.at - before > WINDOWS_S[0] and slot.total < _MOST:
                near = index.near(key, seen.at)
                slot.add(seen.at, index, near, key)
                if number != BY_SOURCE:
                    anywhere.update(near)
        if self.anywhere.total < LEAST:
            self.anywhere.add(seen.at, index, anywhere.items())

    def best(self) -> tuple[float, int, tuple[_Place, ...], float]:
        """The word that explains most, else the log: how much, its slot, the steps, the window."""
        options = [
            (slot.steps(), number) for number, slot in self.slots.items() if number != BY_SOURCE and not slot.is_time()
        ]
        (excess, steps, window), number = max(options, default=(_NOTHING, BY_SOURCE))
        if not steps:
            (excess, steps, window), number = self.slots[BY_SOURCE].steps(), BY_SOURCE
        return excess, number, steps, window


def find(lines: Callable[[], Iterable[Seen]]) -> list[Precursors]:
    """What leads to each kind of failure, the best explained first. `lines` gives all lines in order of time, twice."""
    index = _Index(seen for seen in lines() if seen.failure is not None)
    kinds: dict[tuple[str, int], _Kind] = {}
    for seen in lines():
        if seen.failure is None:
            index.add(seen)
        elif (kind := kinds.get((seen.failure, seen.template))) is not None:
            kind.add(seen, index)
        elif len(kinds) < _KINDS:
            kind = kinds[seen.failure, seen.template] = _Kind()
            kind.add(seen, index)
    return _choose(kinds)


def _choose(kinds: dict[tuple[str, int], _Kind]) -> list[Precursors]:
    found: list[tuple[float, Precursors]] = []
    rare: dict[str, _Slot] = defaultdict(_Slot)
    for (failure, template), kind in kinds.items():
        if kind.count < LEAST:
            rare[failure].join(kind.anywhere)
            continue
        excess, number, steps, window = kind.best()
        if steps:
            found.append((excess * kind.count, Precursors(failure, {template: number}, dict(steps), window)))
    for failure, pool in rare.items():
        excess, steps, window = pool.steps()
        if steps:
            found.append((excess * pool.total, Precursors(failure, {}, dict(steps), window)))
    return [precursors for _, precursors in sorted(found, key=lambda f: f[0], reverse=True)]
