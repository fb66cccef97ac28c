"""What is unusual in a log: a template that was never seen, and one that comes far more or far less often than it did.

A template is told as new when its log is warm: at least WARM_LINES lines of it were looked at, and at most one in a
hundred of the last thousand or so was of a new template (a share that fades with each line). A log whose lines are all
different is never warm. "Never seen" is by this machine's miner, which forgets the templates seen longest ago when it
knows its limit: one that comes back after that is told again.

Rates are counted in windows of WINDOW_S, for each template of each log. For the count of a window a mean and a variance
are kept that fade by FADE with each window. A count is a jump when there were WARM_WINDOWS of them before, it is at
least LEAST and FACTOR times the mean, and SIGMAS_UP standard deviations above it; the deviation is never taken for less
than that of independent lines. That a template no longer comes as often is the same with count and mean exchanged, and
SIGMAS_DOWN; it is known at the end of a window. A rise is told as soon as it is one. After a jump the template is told
of again when it has settled: its old rate or the new one has become the usual. A window in which lines were read late
counts for nothing; neither does the first one after a restart, which has what was written meanwhile too.

Everything is bounded: TRACKED rates, of which the one that came longest ago goes first, and tokens for what is told.

Source: protocols/logs.md 2.3, 4.
"""

import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from typing import Literal, NamedTuple

import msgspec

WARM_LINES = 5_000
NEW_SHARE = 0.01
SHARE_LINES = 1_000

WINDOW_S = 60.0
FADE = 1 / 30  # of mean and variance, with each window
WARM_WINDOWS = 15
LEAST, FACTOR = 20, 4
SIGMAS_UP, SIGMAS_DOWN = 8, 4  # a count cannot fall by more than the root of its mean
TRACKED = 8_192


class Tokens:
    """How much may be told: `burst` at once, one more each `each_s`."""

    def __init__(self, burst: int, each_s: float, now: float) -> None:
        self._burst, self._each_s = burst, each_s
        self._left, self._at = float(burst), now
        self.dropped = 0  # since the last that was told

    def take(self, now: float) -> int | None:
        """How many were dropped before this one; None: it is dropped too."""
        self._left = min(self._burst, self._left + (now - self._at) / self._each_s)
        self._at = now
        if self._left < 1:
            self.dropped += 1
            return None
        self._left -= 1
        dropped, self.dropped = self.dropped, 0
        return dropped


class Warmth(msgspec.Struct):
    """How well a log is known: lines looked at, and the fading share of new templates. Kept with its checkpoint."""

    lines: int = 0
    share: float = 1.0

    def see(self, lines: int, new: int) -> None:
        """So many more lines were looked at, of which so many were of a new template."""
        self.lines += lines
        kept = (1 - 1 / SHARE_LINES) ** lines
        self.share = self.share * kept + (new / lines if lines else 0.0) * (1 - kept)

    @property
    def is_warm(self) -> bool:
        return self.lines >= WARM_LINES and self.share <= NEW_SHARE


class Jump(NamedTuple):
    """A template of a log came `lines` times in a window; `mean` times before that."""

    log: str
    template: int
    what: Literal["rose", "fell"]
    lines: int
    mean: float


class KeptRate(NamedTuple):
    """What is known of a template of the log of that number: `windows` were counted."""

    log: int
    template: int
    mean: float
    variance: float
    windows: int
    is_told: bool


class KeptRates(msgspec.Struct, frozen=True):
    """Rates as they are kept over restarts, the one that came longest ago first."""

    logs: list[str]
    rates: list[KeptRate]


class _Rate:
    def __init__(self, mean: float = 0.0, variance: float = 0.0, windows: int = 0, is_told: bool = False) -> None:
        self.mean, self.variance = mean, variance
        self.windows = windows  # counted
        self.is_told = is_told
        self.limit = math.inf  # the count that is a jump
        self._set_limit()

    def end(self, count: int) -> bool:
        """A window with that count is over. Was it far too low?"""
        is_usual = abs(count - self.mean) <= SIGMAS_DOWN * self._deviation(max(self.mean, count))
        fell = (
            self.windows >= WARM_WINDOWS
            and self.mean >= max(LEAST, FACTOR * count)
            and self.mean - count > SIGMAS_DOWN * self._deviation(self.mean)
        )
        fade = max(FADE, 1 / (self.windows + 1))
        off = count - self.mean
        self.mean += fade * off
        self.variance = (1 - fade) * (self.variance + fade * off * off)
        self.windows += 1
        tells = fell and not self.is_told
        self.is_told = (self.is_told or fell) and not is_usual
        self._set_limit()
        return tells

    def _deviation(self, mean: float) -> float:
        return math.sqrt(max(self.variance, mean, 1.0))

    def _set_limit(self) -> None:
        if self.windows < WARM_WINDOWS:
            return
        self.limit = max(LEAST, FACTOR * self.mean, self.mean + SIGMAS_UP * self._deviation(self.mean))


class Rates:
    """How often templates come. `now` is in seconds, of any clock that does not go back."""

    def __init__(self, now: float) -> None:
        self._rates: OrderedDict[tuple[str, int], _Rate] = OrderedDict()
        self._counts: Counter[tuple[str, int]] = Counter()
        self._late: set[str] = set()
        self._ends = now + WINDOW_S
        self._is_resumed = False
        self.windows = 0  # that are over

    def resume(self, kept: KeptRates, is_known: Callable[[int], bool]) -> None:
        """Go on with these, as far as their templates are still known."""
        self._is_resumed = True
        for one in kept.rates:
            if is_known(one.template):
                rate = _Rate(one.mean, one.variance, one.windows, one.is_told)
                self._rates[kept.logs[one.log], one.template] = rate

    def kept(self) -> KeptRates:
        """All, for resume()."""
        logs = {log: number for number, log in enumerate(dict.fromkeys(log for log, _ in self._rates))}
        rates = [
            KeptRate(logs[log], template, rate.mean, rate.variance, rate.windows, rate.is_told)
            for (log, template), rate in self._rates.items()
        ]
        return KeptRates([*logs], rates)

    def see(self, log: str, templates: Sequence[int], weight: int) -> list[Jump]:
        """Lines of these templates came, each for `weight` of them."""
        jumps: list[Jump] = []
        counts = Counter(templates).items() if len(templates) != 1 else ((templates[0], 1),)
        for template, count in counts:
            key = (log, template)
            self._counts[key] += count * weight
            rate = self._rates.get(key)
            if rate is None:
                self._rates[key] = _Rate()
                if len(self._rates) > TRACKED:
                    gone, _ = self._rates.popitem(last=False)
                    del self._counts[gone]
            else:
                self._rates.move_to_end(key)
                if self._counts[key] >= rate.limit and not rate.is_told and not self._is_resumed:
                    rate.is_told = True
                    jumps.append(Jump(log, template, "rose", self._counts[key], rate.mean))
        return jumps

    def late(self, log: str) -> None:
        """Lines of the log are read late: this window is not counted."""
        self._late.add(log)

    def restart(self, templates: AbstractSet[int]) -> None:
        """These templates have taken in others: how often they came is not known any more."""
        for key in [key for key in self._rates if key[1] in templates]:
            self._rates[key] = _Rate()

    def tick(self, now: float) -> list[Jump]:
        """The templates that fell, when a window is over."""
        if now < self._ends:
            return []
        counts, late, self._counts, self._late = self._counts, self._late, Counter(), set()
        missed = self._is_resumed or now >= self._ends + WINDOW_S  # nobody counted in between
        self._ends, self._is_resumed = now + WINDOW_S, False
        self.windows += 1
        if missed:
            return []
        jumps: list[Jump] = []
        for (log, template), rate in self._rates.items():
            mean = rate.mean
            if log not in late and rate.end(counts[log, template]):
                jumps.append(Jump(log, template, "fell", counts[log, template], mean))
        return jumps
