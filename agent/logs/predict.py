"""Forecasts of failures, from lines as they come.

    a step of a chain -> its probability >= threshold -> open -> the failure came    -> hit
                                                              -> horizon_s went by  -> expired

A forecast opens when the probability, less its standard error, reaches the threshold: what is hardly known is not said.
There is one for a class and key at a time. Another opens only when meanwhile the probability fell well below the
threshold, or nothing came of the key for longer than its chains pause. A failure that no forecast was open for is a
miss.

Source: protocols/logs.md 2.3 and 4, "Forecast".
"""

import hashlib
import heapq
import math
from collections import OrderedDict
from collections.abc import Callable

import msgspec

from agent.core.learned import LogEvidence, LogForecast
from agent.logs.chains import Chains, Judgement, Key, Reading, Seen, Track, Tracks

THRESHOLD = 0.7
HYSTERESIS = 0.2  # how far below the threshold a probability is for a new chance after a forecast that expired
BURST_S = 10.0  # failures of one class and key closer than this are one

_MOST_OPEN = 1024
_MOST_FAILED = 4096
_TEXT = 512  # bytes of a line in evidence


class Tally:
    """What became of the forecasts of a class, and how many of its failures had none."""

    __slots__ = ("expired", "hits", "misses")

    def __init__(self, hits: int = 0, expired: int = 0, misses: int = 0) -> None:
        self.hits, self.expired, self.misses = hits, expired, misses

    @property
    def precision(self) -> float | None:
        """The share of forecasts that came true; None: none has ended."""
        return self.hits / (self.hits + self.expired) if self.hits + self.expired else None

    @property
    def recall(self) -> float | None:
        """The share of failures that were forecast; None: there was none."""
        return self.hits / (self.hits + self.misses) if self.hits + self.misses else None


class _Open:
    __slots__ = ("event", "judgement", "reading", "until")

    def __init__(self, event: LogForecast, until: float, reading: Reading, judgement: Judgement) -> None:
        self.event, self.until, self.reading, self.judgement = event, until, reading, judgement


class Forecaster:
    """Forecasts from `chains`. `learning`: what becomes of forecasts corrects these; `heard` is told of each
    probability (class's number, key, probability), and of each failure (its class's number, key, None).
    """

    def __init__(
        self,
        chains: Chains,
        *,
        threshold: float = THRESHOLD,
        learning: bool = True,
        heard: Callable[[int, Key | None, float | None], None] | None = None,
    ) -> None:
        self.chains, self.wanted = chains, chains.wanted
        self.sampled = False
        self.tallies: dict[str, Tally] = {class_.name: Tally() for class_ in chains.classes}
        self._threshold, self._learning, self._heard = threshold, learning, heard
        self._numbers = {class_.name: number for number, class_ in enumerate(chains.classes)}
        self._ends_of = {template: number for number, class_ in enumerate(chains.classes) for template in class_.ends}
        self._tracks = Tracks(chains)
        self._open: dict[tuple[int, Key], _Open] = {}
        self._ends: list[tuple[float, int, tuple[int, Key], _Open]] = []  # a heap; some ended before
        self._count = 0
        self._known = self.wanted | {template for class_ in chains.classes for template in class_.ends}
        self._was: dict[int, int] = {}  # templates that chains know by another number
        self._failed: OrderedDict[tuple[str, Key], float] = OrderedDict()

    @property
    def open(self) -> int:
        """How many forecasts wait for their failure."""
        return len(self._open)

    @property
    def total(self) -> Tally:
        """Over all classes."""
        tallies = self.tallies.values()
        return Tally(sum(t.hits for t in tallies), sum(t.expired for t in tallies), sum(t.misses for t in tallies))

    def see(self, seen: Seen, path: str, offset: int) -> list[LogForecast]:
        """A line of a wanted template, or a failure; `path` and `offset` say where it stands. What changed."""
        changed = self.due(seen.at) if self._ends and self._ends[0][0] < seen.at else []
        if self._was and seen.template in self._was:
            seen = seen._replace(template=self._was[seen.template])
        if seen.failure is not None:
            return changed + self._fail(seen, path, offset)
        for number, key, track, reading in self._tracks.see(seen):
            class_ = self.chains.classes[number]
            track.lines.append((path, offset, seen.line, seen.template))
            judgement = class_.judge(reading)
            probability = self.chains.probability(judgement)
            if self._heard is not None:
                self._heard(number, key, probability)
            error = math.sqrt(probability * (1 - probability) / max(1, judgement.rows))
            if probability - error < self._threshold:
                track.armed = track.armed or probability < self._threshold - HYSTERESIS
            elif track.armed and (number, key) not in self._open and len(self._open) < _MOST_OPEN:
                track.armed = False
                changed.append(self._opened(seen.at, number, key, track, reading, judgement))
        return changed

    def joined(self, template: int, now: int) -> None:
        """Two templates turned out to be one: what was of `template` is of `now` from here on."""
        was = self._was.get(template, template)
        if was in self._known and now not in self._known:
            self._was[now] = was
            self._known.add(now)
            if was in self.wanted:
                self.wanted.add(now)

    def warm(self, seen: Seen) -> None:
        """A line from before forecasts are asked for: it only leaves its tracks."""
        if seen.failure is None:
            self._tracks.see(seen)
        elif (number := self._numbers.get(seen.failure)) is not None:
            self._tracks.failed(number, seen)

    def due(self, now: float) -> list[LogForecast]:
        """The forecasts whose time went by before `now`."""
        changed = []
        while self._ends and self._ends[0][0] < now:
            _, _, place, forecast = heapq.heappop(self._ends)
            if self._open.get(place) is forecast:
                changed.append(self._closed(place, None))
        return changed

    def _opened(
        self, at: float, number: int, key: Key, track: Track, reading: Reading, judgement: Judgement
    ) -> LogForecast:
        class_ = self.chains.classes[number]
        evidence = tuple(
            LogEvidence(path, offset, _text(line), template) for path, offset, line, template in track.lines
        )
        last = evidence[-1]
        digest = hashlib.blake2b(f"{class_.name}\0{_text(key)}\0{last.path}\0{last.offset}".encode(), digest_size=8)
        early, late = class_.expected(reading)
        event = LogForecast(
            path=last.path,
            id=f"lf-{digest.hexdigest()}",
            state="open",
            class_=class_.name,
            probability=round(self.chains.probability(judgement), 4),
            horizon_s=class_.horizon_s,
            expected_s=(round(early, 3), round(late, 3)),
            key=_text(key),
            evidence=evidence,
            sampled=self.sampled,
        )
        forecast = self._open[number, key] = _Open(event, at + class_.horizon_s, reading, judgement)
        self._count += 1
        heapq.heappush(self._ends, (forecast.until, self._count, (number, key), forecast))
        return event

    def _fail(self, seen: Seen, path: str, offset: int) -> list[LogForecast]:
        # A line that is known to end a chain is that failure, whatever class others see in it.
        number = self._numbers.get(seen.failure or "", self._ends_of.get(seen.template))
        name = (seen.failure or "") if number is None else self.chains.classes[number].name
        key = None if number is None else self._tracks.failed(number, seen)
        if self._heard is not None and number is not None:
            self._heard(number, key, None)
        place = (name, seen.source if key is None else key)
        before, self._failed[place] = self._failed.get(place, -math.inf), seen.at
        self._failed.move_to_end(place)
        if len(self._failed) > _MOST_FAILED:
            self._failed.popitem(last=False)
        if number is not None and key is not None and (number, key) in self._open:
            return [self._closed((number, key), seen, LogEvidence(path, offset, _text(seen.line), seen.template))]
        if seen.at - before >= BURST_S:
            self.tallies.setdefault(name, Tally()).misses += 1
        return []

    def _closed(self, place: tuple[int, Key], failure: Seen | None, line: LogEvidence | None = None) -> LogForecast:
        """It came true by `failure`, or its time went by."""
        forecast = self._open.pop(place)
        class_ = self.chains.classes[place[0]]
        tally = self.tallies[class_.name]
        if failure is None:
            tally.expired += 1
        else:
            tally.hits += 1
        if self._learning:
            class_.count(forecast.reading, failure is not None, failure and class_.led_by(failure.template))
            self.chains.correct(forecast.judgement, failure is not None)
        if line is None:
            return msgspec.structs.replace(forecast.event, state="expired")
        return msgspec.structs.replace(forecast.event, state="hit", evidence=(*forecast.event.evidence, line))


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw[:_TEXT].rstrip(b"\r\n").decode(errors="backslashreplace")
