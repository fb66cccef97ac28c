"""What keeps one source from flooding: a rate for each rule, and a pause for a rule whose regex gives up too often.

Source: protocols/logs.md 2.1 (`rate`), 2.3 (`LogSuppressed`) and 3 ("Limit errors are never 'no match'").
"""

from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

from agent.logs.messages import Rate

TELL_S = 10.0  # how often it is told what a rate limit drops
ERRORS, WITHIN_S, PAUSE_S = 100, 60.0, 60.0  # so many limit errors within a minute pause a rule for one


class Suppressed(NamedTuple):
    """Matches of a rule that a rate limit dropped; the offsets are those of their lines."""

    rule: int
    dropped: int
    first_offset: int
    last_offset: int


class _Bucket:
    def __init__(self, rate: Rate) -> None:
        self.rate = rate
        self.tokens = float(rate.burst)
        self.filled_at = 0.0
        self.since_event = 0  # dropped since the last match that went through

    def take(self, now: float) -> bool:
        if not self.rate.per_s:
            return True
        self.tokens = min(self.rate.burst, self.tokens + (now - self.filled_at) * self.rate.per_s)
        self.filled_at = now
        if self.tokens < 1:
            return False
        self.tokens -= 1
        return True


class Rates:
    """The token buckets of all rules on one source."""

    def __init__(self, rates: Sequence[Rate], now: float) -> None:
        self._buckets = [_Bucket(rate) for rate in rates]
        for bucket in self._buckets:
            bucket.filled_at = now
        self._dropped: dict[int, Suppressed] = {}
        self._tell_at: float | None = None

    def take(self, rule: int, offset: int, now: float) -> int | None:
        """May a match of a rule, on the line at `offset`, be told? None: no. Else how many were dropped before it."""
        bucket = self._buckets[rule]
        if bucket.take(now):
            dropped, bucket.since_event = bucket.since_event, 0
            return dropped
        if self._tell_at is None:
            self._tell_at = now + TELL_S
        self.drop(rule, 1, offset)
        return None

    def drop(self, rule: int, count: int, last_offset: int) -> None:
        """So many matches of a rule of which take() allowed none are dropped, too."""
        self._buckets[rule].since_event += count
        before = self._dropped.get(rule, Suppressed(rule, 0, last_offset, last_offset))
        self._dropped[rule] = before._replace(dropped=before.dropped + count, last_offset=last_offset)

    def due(self) -> float | None:
        """When tell() has something to tell; None: nothing was dropped."""
        return self._tell_at

    def tell(self, now: float) -> list[Suppressed]:
        """What was dropped since it was told last, by rule; nothing before it is due."""
        if self._tell_at is None or now < self._tell_at:
            return []
        told, self._dropped, self._tell_at = sorted(self._dropped.values()), {}, None
        return told


class Pauses:
    """Which rules are left out on one source for now, because their regex gave up too often."""

    def __init__(self, mask: bytearray) -> None:
        """`mask`: the rules that do not apply to the source at all (RuleSet.mask); kept and added to."""
        self.mask = mask
        self._errors: dict[int, deque[float]] = {}
        self._until: dict[int, float] = {}

    def failed(self, rule: int, now: float) -> bool:
        """The regex of a rule gave up. Is it paused from now on?"""
        errors = self._errors.setdefault(rule, deque(maxlen=ERRORS))
        errors.append(now)
        if rule in self._until or len(errors) < ERRORS or now - errors[0] > WITHIN_S:
            return False
        errors.clear()
        self._until[rule] = now + PAUSE_S
        self.mask[rule] = 1
        return True

    def due(self) -> float | None:
        """When the next pause ends."""
        return min(self._until.values()) if self._until else None

    def resume(self, now: float) -> list[int]:
        """End the pauses that are over; returns their rules."""
        if not self._until:
            return []
        over = [rule for rule, until in self._until.items() if until <= now]
        for rule in over:
            del self._until[rule]
            self.mask[rule] = 0
        return over
