"""What became of the runs of a monitor: counts by state and the last times of each step, for percentiles.

Source: protocols/monitors.md, "Results"; kept as a checkpoint of the store.
"""

import math

import msgspec

from agent.monitors.session import StepState

KEPT = 128  # times of a step: p99 says something, and 500 monitors of three steps stay below 2 MiB
RESERVED = 100  # numbers: one commit for a hundred runs, and not one for each
QUANTILES = (0.5, 0.95, 0.99)


class StepHistory(msgspec.Struct):
    """A step: how it ended how often, when and how it ended last (epoch seconds), its last times in milliseconds."""

    states: dict[StepState, int] = {}
    last: StepState | None = None
    at: float | None = None
    ms: list[float] = []


class History(msgspec.Struct):
    """A monitor: the number of its last run, up to which number runs may have begun, and its steps by name.

    `promised` is the run that somebody was told the id of and that has not begun.
    """

    runs: int = 0
    reserved: int = 0
    promised: int | None = None
    steps: dict[str, StepHistory] = {}

    def number(self) -> tuple[int, bool]:
        """The number of the next run, never given before; and whether this must be kept before the next one.

        A run that an agent's death cut off has told results under its number, which is not kept until a run ends.
        """
        self.runs += 1
        is_new = self.runs > self.reserved
        if is_new:
            self.reserved = self.runs + RESERVED
        return self.runs, is_new

    def resume(self) -> None:
        """Another agent kept this: what it reserved may be used."""
        self.runs = max(self.runs, self.reserved)

    def settle(self) -> None:
        """Nobody will use what is reserved, and what was promised is told of."""
        self.reserved, self.promised = self.runs, None

    def add(self, step: str, state: StepState, at: float, ms: float | None) -> None:
        """A step has ended."""
        kept = self.steps.setdefault(step, StepHistory())
        kept.states[state] = kept.states.get(state, 0) + 1
        kept.last, kept.at = state, at
        if ms is not None:
            kept.ms.append(round(ms, 3))
            del kept.ms[:-KEPT]

    def describe(self) -> dict[str, dict[str, object]]:
        """By step: `{states, last, at, ms, p50, p95, p99}`; `ms` is the last time, null without any."""
        return {
            name: {
                "states": step.states,
                "last": step.last,
                "at": step.at,
                "ms": step.ms[-1] if step.ms else None,
                **{f"p{round(q * 100)}": percentile(step.ms, q) for q in QUANTILES},
            }
            for name, step in self.steps.items()
        }

    def seconds(self, step: str, q: float) -> float:
        """A quantile of the last times of a step, in seconds; NaN of none."""
        value = percentile(self.steps[step].ms, q) if step in self.steps else None
        return math.nan if value is None else value / 1000


def percentile(values: list[float], q: float) -> float | None:
    """The nearest rank; None of nothing."""
    return sorted(values)[max(0, math.ceil(q * len(values)) - 1)] if values else None
