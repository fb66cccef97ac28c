"""Logs as learning and scoring read them: several times, line by line, in the order of time, with labels.

Lines are numbered through all logs in the order these are named. One log is in its own order; the lines of several are
put together by their times, each log in its own order. A line without a time has that of the one before it in its log;
where no line has one, line n is at n seconds.

Source: protocols/logs.md 2.4.
"""

import heapq
import math
import os
import stat
from array import array
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from agent.core.errors import AgentError
from agent.core.lines import Lines
from agent.logs import stamps
from agent.logs.labels import FIRST_TOKEN, NONE, Labels, without_token

REMEDY = "Name files that can be read; they are read several times."
LINE_MAX = 1 << 20  # bytes; what a line has beyond is not looked at
BLOCK = 1 << 18  # bytes read at a time
CHUNK = 4096  # lines


class Line(NamedTuple):
    """`number` is the line's place among all lines, `log` that of its log; `text` has neither its end nor its label."""

    number: int
    log: int
    text: bytes


class Corpus:
    """Reads the logs once to see what is there: how many `lines`, their `labels`, their `times` where wanted.

    `labels` names a file, or is "first-token"; None: there are none. Raises ConfigError for labels that cannot be used,
    and AgentError for what cannot be read.
    """

    def __init__(self, paths: Sequence[str], labels: str | None, *, wants_times: bool) -> None:
        self.paths = tuple(paths)
        self.labels = Labels()
        self.times = array("d")
        self._is_first_token = labels == FIRST_TOKEN
        wants_times = wants_times or len(paths) > 1
        self._bounds = [0]
        for path in self.paths:
            count = 0
            for count, text in enumerate(_texts(path), 1):
                if self._is_first_token:
                    self.labels.take_token(path, count, text)
                if wants_times:
                    at = stamps.at(without_token(text) if self._is_first_token else text)
                    self.times.append(math.nan if at is None else at)
            self._bounds.append(self._bounds[-1] + count)
            if wants_times:
                self._fill(self._bounds[-2])
        self.lines = self._bounds[-1]
        if labels and not self._is_first_token:
            self.labels.read(labels, _texts(labels), self.lines)

    def label(self, line: Line) -> int:
        """The label of a line as a number of `labels`, or NONE."""
        return self.labels.numbers[line.number] if self.labels.numbers else NONE

    def class_of(self, line: Line) -> str | None:
        """The class it is labelled with; None: normal, or without a label."""
        return None if (label := self.label(line)) == NONE else self.labels.class_of(label)

    def chunks(self, cut: int) -> Iterator[list[Line]]:
        """All lines in the order of time, some thousand at a time; line `cut` of that order begins a list."""
        lines = self._ordered()
        while chunk := list(islice(lines, min(cut, CHUNK) or CHUNK)):
            cut = max(0, cut - len(chunk))
            yield chunk

    def _ordered(self) -> Iterator[Line]:
        logs = [self._log(log) for log in range(len(self.paths))]
        if len(logs) == 1:
            return logs[0]
        return heapq.merge(*logs, key=lambda line: self.times[line.number])

    def _log(self, log: int) -> Iterator[Line]:
        first, behind = self._bounds[log : log + 2]
        for number, text in zip(range(first, behind), _texts(self.paths[log]), strict=False):  # it may grow meanwhile
            yield Line(number, log, without_token(text) if self._is_first_token else text)

    def _fill(self, first: int) -> None:
        """Give each line of a log from `first` on a time, that has none."""
        known = next((at for at in islice(self.times, first, None) if not math.isnan(at)), None)
        for number in range(first, len(self.times)):
            if not math.isnan(self.times[number]):
                known = self.times[number]
            self.times[number] = number - first if known is None else known


def _texts(path: str) -> Iterator[bytes]:
    lines = Lines(LINE_MAX)
    try:
        if path == "-" or not stat.S_ISREG(os.stat(path).st_mode):
            raise AgentError(f"{path} is no file", remedy=REMEDY)
        with open(path, "rb", buffering=0) as file:
            while data := file.read(BLOCK):
                yield from lines.feed(data)
    except OSError as err:
        raise AgentError(f"{path}: {err.strerror or err}", remedy=REMEDY) from err
    yield from lines.eof()
