"""Forecasts of failures, from lines as they come.

    a step of a chain -> its probability >= threshold -> open -> the failure came    -> hit
                                                              -> horizon_s went by  -> expired

A forecast opens when the probability, less its standard error, reaches the threshold: what is hardly known is not said.
There is one for a class and key at a time. Another opens only when meanwhile the probability fell well below the
threshold, or nothing came of the key for longer than its chains pause. A failure that no forecast was open for is a
miss.

Forecasts live on over restarts, also when their class is none of the model's any more. Time is that of reading: one
whose horizon went by while nobody read waits CATCH_UP_S more for its failure among the lines that were written
meanwhile. A line that is read too late for its forecast, or long after it was written, is its failure where both bear
stamps that are at most the horizon apart; without stamps the first is not, and the second is in the forecast's own log.

Source: protocols/logs.md 2.3 and 4, "Forecast".
"""

import hashlib
import heapq
import math
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

import msgspec

from agent.core.learned import LogEvidence, LogForecast
from agent.logs import stamps
from agent.logs.chains import Chains, Evidence, Judgement, Key, Reading, Seen, Track, Tracks

THRESHOLD = 0.7
HYSTERESIS = 0.2  # how far below the threshold a probability is for a new chance after a forecast that expired
BURST_S = 10.0  # failures of one class and key closer than this are one
CATCH_UP_S = 5.0
MOST_OPEN = 1024

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


class Open(msgspec.Struct, frozen=True):
    """A forecast that waits for its failure `until` an epoch time. `word` is its key; None: its log is, `event.path`.

    The rest is what it was based on.
    """

    event: LogForecast
    until: float
    word: bytes | None
    reading: Reading
    judgement: Judgement

    @property
    def place(self) -> tuple[str, Key]:
        """Its class and key, of which it is the only one."""
        return self.event.class_, self.event.path if self.word is None else self.word

    def is_failure(self, seen: Seen, *, is_late: bool) -> bool:
        """Is a failure of its class and key the one that it waits for? `is_late`: it was written long ago."""
        if seen.at <= self.until and not is_late:
            return True
        step, failure = stamps.at(self.event.evidence[-1].text.encode()), stamps.at(seen.line)
        if step is None or failure is None:
            return seen.at <= self.until and seen.source == self.event.path
        return 0 <= failure - step <= self.event.horizon_s


class Forecaster:
    """Forecasts from `chains`. `learning`: what becomes of forecasts corrects these; `heard` is told of each
    probability (class's number, key, probability), and of each failure (its class's number, key, None). Evidence has
    templates by ids `base` above those that chains and lines know them by. `suppressed` forecasts were not made because
    MOST_OPEN others were open; the next one that opens tells those since the last. `tracks`: how far chains have come.
    """

    def __init__(
        self,
        chains: Chains,
        *,
        threshold: float = THRESHOLD,
        learning: bool = True,
        base: int = 0,
        heard: Callable[[int, Key | None, float | None], None] | None = None,
    ) -> None:
        self.chains, self._sure = chains, chains.sure
        self.wanted = chains.wanted | self._sure
        self.sampled = False
        self.suppressed = self._untold = 0
        self.tallies: dict[str, Tally] = {class_.name: Tally() for class_ in chains.classes}
        self._threshold, self._learning, self._base, self._heard = threshold, learning, base, heard
        self._numbers = {class_.name: number for number, class_ in enumerate(chains.classes)}
        self._ends_of = {template: number for number, class_ in enumerate(chains.classes) for template in class_.ends}
        self.tracks = Tracks(chains)
        self._open: dict[tuple[str, Key], Open] = {}
        self._ends: list[tuple[float, int, Open]] = []  # a heap; some ended before
        self._count = 0
        self._known = self.wanted | {template for class_ in chains.classes for template in class_.ends}
        self._was: dict[int, int] = {}  # templates that chains know by another number
        self._failed: OrderedDict[tuple[str, Key], float] = OrderedDict()
        self._before = Tally()

    def resume(self, open: Iterable[Open], before: Tally, now: float) -> None:
        """Go on with the forecasts that waited when the last process ended, and with what it had counted."""
        self._before = before
        for forecast in open:
            left = min(forecast.until - now, forecast.event.horizon_s)  # less: the clock was put back
            self._wait(forecast, now + (left if left > 0 else CATCH_UP_S))

    @property
    def open(self) -> int:
        """How many forecasts wait for their failure."""
        return len(self._open)

    @property
    def waiting(self) -> Collection[Open]:
        """These."""
        return self._open.values()

    @property
    def total(self) -> Tally:
        """Over all classes and processes."""
        tallies = [self._before, *self.tallies.values()]
        return Tally(sum(t.hits for t in tallies), sum(t.expired for t in tallies), sum(t.misses for t in tallies))

    def see(
        self,
        seen: Seen,
        path: str,
        offset: int,
        *,
        scope: tuple[str | None, str | None] = (None, None),
        is_late: bool = False,
    ) -> list[LogForecast]:
        """A line of a wanted template, or a failure; `path` and `offset` say where it stands. What changed. A line as
        those that failures were learned from is one, also where nobody says so. A forecast that opens here has the run
        and the test of `scope` for good.

        `is_late`: a failure that was written long ago. It may end a forecast, and is no miss.
        """
        changed = self.due(seen.at) if self._ends and self._ends[0][0] < seen.at else []
        if self._was and seen.template in self._was:
            seen = seen._replace(template=self._was[seen.template])
        if seen.failure is None and seen.template in self._sure:
            seen = seen._replace(failure=self.chains.classes[self._ends_of[seen.template]].name)
        if seen.failure is not None:
            return changed + self._fail(seen, path, offset, is_late)
        for number, key, track, reading in self.tracks.see(seen):
            class_ = self.chains.classes[number]
            track.add(Evidence(path, offset, seen.line[:_TEXT], self._base + seen.template))
            judgement = class_.judge(reading)
            probability = self.chains.probability(judgement)
            if self._heard is not None:
                self._heard(number, key, probability)
            error = math.sqrt(probability * (1 - probability) / max(1, judgement.rows))
            if probability - error < self._threshold:
                track.armed = track.armed or probability < self._threshold - HYSTERESIS
            elif not track.armed or (class_.name, key) in self._open:
                continue
            elif len(self._open) >= MOST_OPEN:
                self.suppressed += not track.refused
                self._untold += not track.refused
                track.refused = True
            else:
                track.armed = False
                changed.append(self._opened(seen.at, number, key, track, reading, judgement, scope))
        return changed

    def joined(self, template: int, now: int) -> None:
        """Two templates turned out to be one: what was of `template` is of `now` from here on."""
        was = self._was.get(template, template)
        if was in self._known and now not in self._known:
            self._was[now] = was
            self._known.add(now)
            if was in self.wanted:
                self.wanted.add(now)
            self._sure.discard(was)  # lines of others are among them now

    def warm(self, seen: Seen) -> None:
        """A line from before forecasts are asked for: it only leaves its tracks."""
        if seen.failure is None:
            self.tracks.see(seen)
        elif (number := self._numbers.get(seen.failure)) is not None:
            self.tracks.failed(number, seen)

    def due(self, now: float) -> list[LogForecast]:
        """The forecasts whose time went by before `now`."""
        changed = []
        while self._ends and self._ends[0][0] < now:
            _, _, forecast = heapq.heappop(self._ends)
            if self._open.get(forecast.place) is forecast:
                changed.append(self._closed(forecast, None))
        return changed

    def _wait(self, forecast: Open, end: float) -> None:
        self._open[forecast.place] = forecast
        self._count += 1
        heapq.heappush(self._ends, (end, self._count, forecast))
        if len(self._ends) > 2 * MOST_OPEN:  # most of them came true before, and would stay for their horizon
            self._ends = [one for one in self._ends if self._open.get(one[2].place) is one[2]]
            heapq.heapify(self._ends)

    def _opened(
        self,
        at: float,
        number: int,
        key: Key,
        track: Track,
        reading: Reading,
        judgement: Judgement,
        scope: tuple[str | None, str | None],
    ) -> LogForecast:
        class_ = self.chains.classes[number]
        evidence = tuple(LogEvidence(one.path, one.offset, _text(one.line), one.template) for one in track.lines)
        last = evidence[-1]
        # Of the line too: a log that was rotated has another one there.
        named = "\0".join((class_.name, _text(key), last.path, str(last.offset), last.text))
        digest = hashlib.blake2b(named.encode(), digest_size=8)
        early, late = class_.expected(reading)
        event = LogForecast(
            path=last.path,
            id=f"lf-{digest.hexdigest()}",
            state="open",
            class_=class_.name,
            probability=round(self.chains.probability(judgement), 4),
            horizon_s=round(class_.horizon_s, 3),
            expected_s=(round(early, 3), round(late, 3)),
            key=_text(key),
            evidence=evidence,
            sampled=self.sampled,
            suppressed=self._untold,
            run=scope[0],
            test=scope[1],
        )
        self._untold = 0
        word = key if isinstance(key, bytes) else None
        self._wait(Open(event, at + class_.horizon_s, word, reading, judgement), at + class_.horizon_s)
        return event

    def _fail(self, seen: Seen, path: str, offset: int, is_late: bool) -> list[LogForecast]:
        # A line that is known to end a chain is that failure, whatever class others see in it.
        number = self._numbers.get(seen.failure or "", self._ends_of.get(seen.template))
        name = (seen.failure or "") if number is None else self.chains.classes[number].name
        key = None if number is None else self.tracks.key(number, seen)
        if key is None:  # forecasts outlive their tracks, and the model that they are of
            key = next((key for _, key in seen.places() if (name, key) in self._open), None)
        forecast = None if key is None else self._open.get((name, key))
        line = LogEvidence(path, offset, _text(seen.line), self._base + seen.template)
        if is_late:
            is_its = forecast is not None and forecast.is_failure(seen, is_late=True)
            return [self._closed(forecast, seen, line)] if forecast and is_its else []
        if number is not None:
            if key is not None:
                self.tracks.end(number, key)
            if self._heard is not None:
                self._heard(number, key, None)
        place = (name, seen.source if key is None else key)
        before, self._failed[place] = self._failed.get(place, -math.inf), seen.at
        self._failed.move_to_end(place)
        if len(self._failed) > _MOST_FAILED:
            self._failed.popitem(last=False)
        if forecast is not None and forecast.is_failure(seen, is_late=False):
            return [self._closed(forecast, seen, line)]
        if seen.at - before >= BURST_S:
            self.tallies.setdefault(name, Tally()).misses += 1
        return [self._closed(forecast, None)] if forecast else []

    def _closed(self, forecast: Open, failure: Seen | None, line: LogEvidence | None = None) -> LogForecast:
        """It came true by `failure`, or its time went by."""
        event = forecast.event
        del self._open[forecast.place]
        tally = self.tallies.setdefault(event.class_, Tally())
        if failure is None:
            tally.expired += 1
        else:
            tally.hits += 1
        number = self._numbers.get(event.class_)
        class_ = None if number is None else self.chains.classes[number]
        if self._learning and class_ and all(n < len(class_.chains) for n, _, _ in forecast.reading.states):
            class_.count(forecast.reading, failure is not None, failure and class_.led_by(failure.template))
            self.chains.correct(forecast.judgement, failure is not None)
        if line is None:
            return msgspec.structs.replace(event, state="expired")
        return msgspec.structs.replace(event, state="hit", evidence=(*event.evidence, line))


def _text(raw: bytes | str) -> str:
    return raw if isinstance(raw, str) else raw[:_TEXT].rstrip(b"\r\n").decode(errors="backslashreplace")
