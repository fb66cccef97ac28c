"""When each monitor runs: exact ticks, a first come first served line, caps, backoff, and the difference of settings.

A monitor's ticks lie `interval` apart on the wall clock, at an offset made of the machine and the monitor: the same
after every restart, and not all at once. A tick that finds the monitor waiting, running or in backoff is skipped and
counted. Times are epoch seconds. Whoever was down for many ticks has one of them.

Source: protocols/monitors.md, "Settings and schedule".
"""

import hashlib
import heapq
import math
from collections import Counter, deque
from collections.abc import Mapping
from typing import Literal

import msgspec

from agent.monitors.settings import Monitor

FIRST_WITHIN_S = 30.0
MAX_BACKOFF_S = 900.0

Reason = Literal["overlap", "backoff"]


class Skipped(msgspec.Struct, frozen=True):
    """Ticks of a monitor that were left out, told when what made them so is over."""

    monitor: str
    reason: Reason
    count: int


class _Place:
    """One monitor on the schedule. A changed one keeps its ticks only if its interval is the same."""

    def __init__(self, monitor: Monitor) -> None:
        self.monitor, self.next_at = monitor, math.inf
        self.failures, self.backoff_until = 0, -math.inf
        self.skipped: Counter[Reason] = Counter()


class Schedule:
    """What is to run when. `waiting` are the monitors in line, oldest first, `running` those that have a slot."""

    def __init__(self, machine: str, *, most: int, groups: Mapping[str, int]) -> None:
        self._machine = machine
        self.limit(most, groups)
        self._places: dict[str, _Place] = {}
        self._ticks: list[tuple[float, str]] = []  # a heap; a tick that its place no longer has is passed by
        self._seen = -math.inf
        self.waiting: deque[str] = deque()
        self.running: dict[str, str] = {}  # monitor to the group it was started in

    def limit(self, most: int, groups: Mapping[str, int]) -> None:
        """How many run at a time, in all and of a group."""
        self._most, self._groups = most, groups

    def arrange(self, monitors: Mapping[str, Monitor], now: float) -> list[str]:
        """Take other settings; returns the monitors that are gone. Those that are the same notice nothing."""
        gone = [name for name in self._places if name not in monitors]
        for name in gone:
            del self._places[name]
        for name, monitor in monitors.items():
            place = self._places.get(name)
            if place is None:
                self._places[name] = _Place(monitor)
                self._set(name, self._first(monitor, now))
            elif place.monitor != monitor:
                if place.monitor.interval != monitor.interval:
                    self._set(name, self._after(monitor, now))
                place.monitor = monitor
        self.waiting = deque(name for name in self.waiting if name in monitors)
        return gone

    def __contains__(self, name: str) -> bool:
        return name in self._places

    def monitor(self, name: str) -> Monitor:
        """The settings that hold for a monitor now. Raises KeyError."""
        return self._places[name].monitor

    def next_at(self) -> float:
        """The next tick of all; infinite without a monitor."""
        while self._ticks and not self._is_set(*self._ticks[0]):
            heapq.heappop(self._ticks)
        return self._ticks[0][0] if self._ticks else math.inf

    def tick(self, now: float) -> None:
        """Put in line whose tick has come, or skip it."""
        if now < self._seen:  # the clock was set back
            for name, place in self._places.items():
                place.backoff_until = min(place.backoff_until, now + MAX_BACKOFF_S)
                if place.next_at - now > place.monitor.interval + FIRST_WITHIN_S:
                    self._set(name, self._after(place.monitor, now))
        self._seen = now
        while self.next_at() <= now:
            _, name = heapq.heappop(self._ticks)
            place = self._places[name]
            self._set(name, self._after(place.monitor, now))
            if name in self.running or name in self.waiting:
                place.skipped["overlap"] += 1
            elif now < place.backoff_until:
                place.skipped["backoff"] += 1
            else:
                self.waiting.append(name)

    def run_now(self, name: str) -> bool:
        """Put it in line beside its ticks; False when it is there, or runs. Raises KeyError."""
        self._places[name]
        if name in self.running or name in self.waiting:
            return False
        self.waiting.append(name)
        return True

    def begin(self) -> tuple[str, list[Skipped]] | None:
        """Give the next slot, if there is one for somebody in line; with what was skipped in a backoff that it ends."""
        if len(self.running) >= self._most:
            return None
        taken = Counter(self.running.values())
        for name in self.waiting:
            group = self._places[name].monitor.group
            if not group or taken[group] < self._groups.get(group, self._most):
                self.waiting.remove(name)
                self.running[name] = group
                return name, self._told(name, "backoff")
        return None

    def end(self, name: str, *, has_result: bool, now: float) -> list[Skipped]:
        """The run is over: its slot is free. Without any result the next ticks are left out for a while."""
        del self.running[name]
        place = self._places.get(name)
        if place is None:
            return []
        place.failures = 0 if has_result else place.failures + 1
        # After 1,023 failures, eleven days of them, the power alone is no float any more.
        backoff = min(2.0 ** min(place.failures, 32), MAX_BACKOFF_S) if place.failures else -math.inf
        place.backoff_until = now + backoff
        return self._told(name, "overlap")

    def describe(self, name: str) -> dict[str, object]:
        """`{state, next, failures, backoff_until, skipped}` of a monitor; times are epoch seconds."""
        place = self._places[name]
        state = "running" if name in self.running else "waiting" if name in self.waiting else "idle"
        backoff = place.backoff_until if place.failures else None
        return {
            "state": state,
            "next": place.next_at,
            "failures": place.failures,
            "backoff_until": backoff,
            "skipped": dict(place.skipped),
        }

    def _set(self, name: str, at: float) -> None:
        self._places[name].next_at = at
        heapq.heappush(self._ticks, (at, name))

    def _is_set(self, at: float, name: str) -> bool:
        return name in self._places and self._places[name].next_at == at

    def _told(self, name: str, reason: Reason) -> list[Skipped]:
        count = self._places[name].skipped.pop(reason, 0)
        return [Skipped(name, reason, count)] if count else []

    def _first(self, monitor: Monitor, now: float) -> float:
        within = min(monitor.interval, FIRST_WITHIN_S)
        return min(now + _share(self._machine, monitor.id) * within, self._after(monitor, now))

    def _after(self, monitor: Monitor, now: float) -> float:
        """The next point of its grid."""
        offset = _share(self._machine, monitor.id) * monitor.interval
        at = offset + (math.floor((now - offset) / monitor.interval) + 1) * monitor.interval
        return at if at > now else at + monitor.interval


def _share(machine: str, monitor: str) -> float:
    """A number of [0, 1), always the same for the two."""
    digest = hashlib.blake2b(f"{machine}\0{monitor}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big") / 2**48
