"""What is learned of the lines of all logs: their templates, the classes of those that matched, forecasts, novelties.

Matches are always looked at, other lines up to FULL a second and log; of more, every n-th: what would be a core for a
flood is a few milliseconds then. Lines that are read late (after a restart, or behind a flood) are mined, but tell
nothing of rates and of failures to come.

Source: protocols/logs.md 2.3 and 4.
"""

import hashlib
import logging
import math
from array import array
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping

from msgspec.structs import replace

from agent.core.events import AnyEvent, LogMatched
from agent.core.learned import LogDrift, LogForecast, LogNovelty, LogRate
from agent.logs.anomalies import WINDOW_S, Jump, Rates, Tokens, Warmth
from agent.logs.chains import Chains, Seen
from agent.logs.classify import Classifier, Drift, TooManyClasses
from agent.logs.context import Captures
from agent.logs.matched import classed, shown
from agent.logs.messages import Learned, Rule
from agent.logs.predict import Forecaster
from agent.logs.templates import NONE, Mined, Miner

log = logging.getLogger(__name__)

FULL = 20_000  # lines a second of a log that are all looked at
TOLD_BURST, TOLD_S = 10, 30.0  # novelties and rates of a log at once, and s until the next
MAX_TEXT = 1024  # bytes of a line in a LogNovelty
MAX_GONE = 1024  # logs that are followed no longer, and may be again
FAILURE = "failure"  # the class of one that has none
FAILURES = ("error", "critical")  # severities


class Stream:
    """One log, as far as analysis goes. `every`: one line of so many is looked at; `active`: see Source."""

    def __init__(
        self, path: str, active: Callable[[], tuple[str | None, str | None]], warmth: Warmth, now: float
    ) -> None:
        self.path, self.active, self.warmth = path, active, warmth
        self.every = 1
        self.tokens = Tokens(TOLD_BURST, TOLD_S, now)
        self._left, self._at = float(FULL), now

    def share(self, lines: int, now: float) -> int:
        """Of so many more lines every which is looked at?"""
        self._left = min(FULL, self._left + max(0.0, now - self._at) * FULL)
        self._at = now
        self.every = math.ceil(lines / max(1.0, self._left)) if lines > self._left else 1
        self._left -= math.ceil(lines / self.every)
        return self.every


class Lines:
    """The lines of one block. Matches are told in the order of their lines; then comes end()."""

    __slots__ = (
        "_analysis", "_block", "_ids", "_is_live", "_is_new", "_miner", "_next", "_place", "_starts", "_stream",
        "_wanted", "has_forecast",
    )  # fmt: skip

    def __init__(
        self,
        analysis: "Analysis",
        stream: Stream,
        block: memoryview,
        place: Callable[[int], int],
        mined: Mined | None,
        is_live: bool,
    ) -> None:
        self._analysis, self._stream, self._block, self._place = analysis, stream, block, place
        self._ids, self._starts = (mined.ids, mined.starts) if mined else (array("I"), array("I"))
        self._miner = analysis.miner  # that the ids are of
        self._is_live = is_live
        self._is_new = mined is not None
        self.has_forecast = False  # something was told of forecasts
        forecaster = analysis.forecaster
        self._wanted = mined.having(forecaster.wanted) if mined and is_live and forecaster.wanted else []
        self._next = 0  # of the wanted lines

    def told(self, event: LogMatched, at: int, text: bytes, captures: Captures, *, is_whole: bool) -> LogMatched:
        """The event with the template and the class of its line, which begins `at` bytes into the block.

        `is_whole`: `text` is all of the line, and it has ended.
        """
        template = self._template(at, text) if is_whole else NONE
        event = self._analysis.classified(event, template, text)
        if event.severity in FAILURES and (self._is_live or (self._is_new and self._analysis.forecaster.open)):
            self._look_until(at)
            named = tuple(value for value in captures.values() if value is not None)
            if not is_whole:  # what there is of it may tell all the same
                template = self._analysis.miner.find(text) or NONE
            self._see(template, text, event.offset, event.class_ or FAILURE, named)
        return event

    def end(self) -> None:
        """No more of the block's lines are told."""
        if self._wanted:
            self._look_until(len(self._block) + 1)

    def _template(self, at: int, text: bytes) -> int:
        n = bisect_left(self._starts, at)
        if n < len(self._ids) and self._starts[n] == at and self._miner is self._analysis.miner:
            return self._ids[n]
        return self._analysis.mined(text or b"\n").ids[0]

    def _look_until(self, at: int) -> None:
        """Show the wanted lines before that to the forecaster; the one there is a failure."""
        if self._miner is not self._analysis.miner:  # another model was taken up while the block was looked at
            self._wanted = []
        while self._next < len(self._wanted) and self._starts[self._wanted[self._next]] <= at:
            n = self._wanted[self._next]
            self._next += 1
            start = self._starts[n]
            if start < at:
                line = bytes(self._block[start : self._line_end(n)])
                self._see(self._ids[n], line, self._place(start), None, ())

    def _line_end(self, n: int) -> int:
        if self._stream.every == 1:
            return self._starts[n + 1]
        end = bytes(self._block[self._starts[n] : self._starts[n + 1]]).find(b"\n")
        return self._starts[n + 1] if end < 0 else self._starts[n] + end

    def _see(self, template: int, line: bytes, offset: int, failure: str | None, captures: tuple[bytes, ...]) -> None:
        analysis, path = self._analysis, self._stream.path
        now = self._analysis.miner.resolve(template)
        seen = Seen(analysis.clock(), path, template if now is None else now, line, failure, captures)
        scope = self._stream.active()
        forecasts = analysis.forecaster.see(seen, path, offset, scope=scope, is_late=not self._is_live)
        if forecasts or failure:
            analysis.tell(forecasts)
            self.has_forecast |= bool(forecasts)


class Analysis:
    """Of all logs of the machine. For one thread. `publish` takes its events; `clock` gives epoch seconds.

    `keep` is called in one stretch with it when forecasts, or their numbers, have changed. Templates are told by ids
    `base` above the miner's own: those up to there were told of templates of another.
    """

    def __init__(
        self,
        publish: Callable[[AnyEvent], None],
        clock: Callable[[], float],
        now: float,
        *,
        miner: Miner | None = None,
        classifier: Classifier | None = None,
        chains: Chains | None = None,
        warmths: Mapping[str, Warmth] | None = None,
        base: int = 0,
        keep: Callable[[Forecaster], None] = lambda forecaster: None,
    ) -> None:
        self.publish, self.clock, self.base, self._keep = publish, clock, base, keep
        self.miner = Miner() if miner is None else miner
        self.classifier = classifier or Classifier()
        self.forecaster = Forecaster(chains or Chains(), base=base)
        self.streams: dict[str, Stream] = {}
        self.labels = 0  # learned
        self.rules = ""  # a digest of those whose classes are learned
        self._warmths = dict(warmths or {})
        self.rates = Rates(now)
        self._refused: set[str] = set()  # classes that found no room, which is told once

    def use(self, rules: Iterable[Rule]) -> None:
        """These rules hold."""
        named = sorted((rule.id, rule.class_) for rule in rules if rule.class_ is not None)
        self.rules = hashlib.blake2b(repr(named).encode(), digest_size=16).hexdigest() if named else ""

    def take_up(
        self, miner: Miner, classifier: Classifier | None, chains: Chains | None, base: int, now: float
    ) -> None:
        """Another model holds from now on; what was usual was by other templates. Open forecasts go on."""
        before = self.forecaster
        self.miner, self.classifier, self.base = miner, classifier or Classifier(), base
        self.forecaster = Forecaster(chains or Chains(), base=base)
        self.forecaster.resume(before.waiting, before.total, self.clock())
        self.forecaster.suppressed = before.suppressed
        self.rates = Rates(now)
        self._warmths.clear()
        for stream in self.streams.values():
            stream.warmth = self._warmths.setdefault(stream.path, Warmth())

    def stream(self, path: str, active: Callable[[], tuple[str | None, str | None]], now: float) -> Stream:
        """The log at a path is followed from now on."""
        stream = Stream(path, active, self._warmths.setdefault(path, Warmth()), now)
        self.streams[path] = stream
        return stream

    def leave(self, stream: Stream) -> None:
        """It is followed no longer."""
        if self.streams.get(stream.path) is stream:
            del self.streams[stream.path]

    @property
    def learned(self) -> int:
        """How often the model has changed."""
        total = self.forecaster.total
        return self.labels + total.hits + total.expired

    @property
    def warmths(self) -> dict[str, Warmth]:
        """How well each log is known; of those that are followed no longer only the last ones."""
        gone = [path for path in self._warmths if path not in self.streams]
        for path in gone[: max(0, len(gone) - MAX_GONE)]:
            del self._warmths[path]
        return self._warmths

    def shown(self) -> Learned:
        """For list_logs."""
        total = self.forecaster.total
        return Learned(
            templates=len(self.miner),
            classes=list(self.classifier.classes),
            open=self.forecaster.open,
            hits=total.hits,
            expired=total.expired,
            misses=total.misses,
            suppressed=self.forecaster.suppressed,
            precision=total.precision,
            recall=total.recall,
        )

    # ---- lines -------------------------------------------------------------------------------------------------------

    def read(
        self,
        stream: Stream,
        block: memoryview,
        generation: int,
        place: Callable[[int], int],
        now: float,
        *,
        is_live: bool,
    ) -> Lines:
        """Look at the whole lines of a block. `place`: the offset in the log of a line's start in the block.

        `is_live`: they were written just now.
        """
        data = bytes(block)
        lines = data.count(b"\n") + (not data.endswith(b"\n") and bool(data))
        mined = self.mined(data, every=stream.share(lines, now))
        new = [id for id in mined.new if self.miner.resolve(id) == id] if mined.new else []
        novel = new if new and stream.warmth.is_warm else []
        stream.warmth.see(len(mined.ids), len(new))
        if is_live:
            if jumps := self.rates.see(stream.path, mined.ids, stream.every):
                self._tell_jumps(jumps, now)
        else:
            self.rates.late(stream.path)
        for id in novel:
            self._tell_novelty(stream, data, mined, id, generation, place, now)
        return Lines(self, stream, block, place, mined, is_live)

    def mined(self, block: bytes, *, every: int = 1) -> Mined:
        """Mine lines. All that knows templates is told which have become others."""
        mined = self.miner.mine(block, every=every)
        if mined.joined:
            self.rates.restart({into for _, into in mined.joined})
            self.classifier.join(mined.joined)
            for id, into in mined.joined:
                self.forecaster.joined(id, into)
        return mined

    def unread(self, stream: Stream, block: memoryview, *, is_live: bool) -> Lines:
        """The same for lines that were looked at before, or are no whole ones: only matches among them are.

        `is_live`: they were not looked at, and were written just now.
        """
        return Lines(self, stream, block, int, None, is_live=is_live)

    def tick(self, now: float) -> None:
        """Every few seconds: tell what is over."""
        self.forecaster.sampled = any(stream.every > 1 for stream in self.streams.values())
        self.tell(self.forecaster.due(self.clock()))
        self._tell_jumps(self.rates.tick(now), now)

    def tell(self, forecasts: Iterable[LogForecast]) -> None:
        """Tell what changed, and keep it."""
        for forecast in forecasts:
            self.publish(forecast)
        self._keep(self.forecaster)

    def find(self, line: bytes) -> int | None:
        """The id that is told for the template of a line, which is not counted; None: it would be a new one."""
        found = self.miner.find(line)
        return None if found is None else self.base + found

    def classified(self, event: LogMatched, template: int, line: bytes) -> LogMatched:
        """The event with the template and the class of its line. That of a rule is learned."""
        if template != NONE:
            event = replace(event, template=self.base + template)
        if event.class_ is not None:
            self._learn(template, line, event.class_)
            return event
        guess, drift = self.classifier.ask(template, line)
        self._drifted(drift)
        return event if guess is None else classed(event, guess)

    def label(self, line: bytes, class_: str | None) -> None:
        """Somebody says of which class the line is; None: it is normal. Raises TooManyClasses."""
        self._label(self.mined(line or b"\n").ids[0], line, class_)

    def _drifted(self, drift: Drift | None) -> None:
        """Tell that guesses do not fit any more, if they do not."""
        if drift is not None:
            self.publish(LogDrift(what=drift.what, before=drift.before, now=drift.now, window=drift.window))

    def _label(self, template: int, line: bytes, class_: str | None) -> None:
        self._drifted(self.classifier.learn(template, line, class_))
        self.labels += 1

    def _learn(self, template: int, line: bytes, class_: str) -> None:
        try:
            self._label(template, line, class_)
        except TooManyClasses as err:
            if class_ not in self._refused:
                self._refused.add(class_)
                log.warning("class of a rule is not learned class=%s why=%s", class_, err)

    # ---- what is unusual ---------------------------------------------------------------------------------------------

    def _tell_novelty(
        self,
        stream: Stream,
        data: bytes,
        mined: Mined,
        id: int,
        generation: int,
        place: Callable[[int], int],
        now: float,
    ) -> None:
        suppressed = stream.tokens.take(now)
        if suppressed is None:
            return
        start = mined.starts[mined.ids.index(id)]
        run, test = stream.active()
        self.publish(
            LogNovelty(
                path=stream.path,
                generation=generation,
                offset=place(start),
                template=self.base + id,
                pattern=self.miner.text(id),
                text=shown(data[start : start + MAX_TEXT].split(b"\n")[0].removesuffix(b"\r")),
                suppressed=suppressed,
                run=run,
                test=test,
            )
        )

    def _tell_jumps(self, jumps: list[Jump], now: float) -> None:
        for jump in jumps:
            stream = self.streams.get(jump.log)
            if stream is None or self.miner.resolve(jump.template) is None:
                continue
            suppressed = stream.tokens.take(now)
            if suppressed is not None:
                self.publish(
                    LogRate(
                        path=jump.log,
                        template=self.base + jump.template,
                        pattern=self.miner.text(jump.template),
                        what=jump.what,
                        count=jump.lines,
                        mean=round(jump.mean, 2),
                        window_s=WINDOW_S,
                        suppressed=suppressed,
                    )
                )
