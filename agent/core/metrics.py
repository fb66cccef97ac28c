"""Counters and gauges of the process, read by `/metrics` and the `metrics` action.

Source: protocols/settings.md, "Names that several folders share" (counters).
"""

from collections.abc import Callable, Iterator

Labels = tuple[tuple[str, str], ...]


class Metrics:
    """Every number by name and labels. Names follow Prometheus: `_total` for what only grows."""

    def __init__(self) -> None:
        self._values: dict[tuple[str, Labels], float] = {}
        self._live: dict[tuple[str, Labels], Callable[[], float | None]] = {}

    def count(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter; it begins at 0."""
        key = (name, tuple(sorted(labels.items())) if labels else ())
        self._values[key] = self._values.get(key, 0) + by

    def gauge(self, name: str, read: Callable[[], float | None], **labels: str) -> None:
        """A number that is read when it is asked for; None: there is none yet. Same name and labels: a new reader."""
        self._live[name, tuple(sorted(labels.items()))] = read

    def forget(self, **labels: str) -> None:
        """Drop every number that has these labels, perhaps among others: what they name is gone."""
        gone = set(labels.items())
        for numbers in (self._values, self._live):
            for key in [key for key in numbers if gone <= set(key[1])]:
                del numbers[key]

    def __iter__(self) -> Iterator[tuple[str, Labels, float]]:
        """Name, labels and value of each, sorted."""
        live = {key: value for key, read in self._live.items() if (value := read()) is not None}
        values = self._values | live
        for (name, labels), value in sorted(values.items()):
            yield name, labels, value
