"""`agent logs scan`: files or standard input against rules; a JSON line for each match, in the order of the lines.

No rate limits. What comes before a match is told where the file can be read again; what follows it stands in the
output anyway.

Source: protocols/logs.md 2.4.
"""

import io
import os
import resource
import stat
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.core.config import ConfigErrors
from agent.core.engine import native_engine
from agent.logs.context import Ask, Place, Size, look_back
from agent.logs.matched import captured, finish, told, wants_context
from agent.logs.rules import RuleErrors, RuleSet, read_files
from agent.logs.scanner import LIMIT, WINDOW, End, Found, Match, Scanner, Worker

BLOCK = 1 << 18  # bytes read at a time
STDIN = "-"


def run(
    rule_files: Sequence[Path],
    paths: Sequence[str],
    *,
    count: bool = False,
    stats: bool = False,
    numbers: bool = False,
    out: BinaryIO | None = None,
) -> bool:
    """Scan all paths ("-": standard input) and write what was found. False: one could not be read; it is told on
    standard error, and the others are scanned.

    Raises ConfigErrors for what is wrong in the rules, and BrokenPipeError.
    """
    try:
        rules = read_files(rule_files)
    except RuleErrors as err:
        raise ConfigErrors(list(err.errors)) from err
    scanning = _Scanning(rules, count, numbers, out or sys.stdout.buffer)
    is_good = True
    for path in paths:
        try:
            scanning.path(path)
        except BrokenPipeError:
            raise
        except OSError as err:
            print(f"agent logs scan: {path}: {err.strerror}", file=sys.stderr)
            is_good = False
    scanning.end(stats)
    return is_good


class _Scanning:
    def __init__(self, rules: RuleSet, count: bool, numbers: bool, out: BinaryIO) -> None:
        self._rules, self._count, self._numbers, self._out = rules, count, numbers, out
        self._began, began = time.perf_counter(), time.perf_counter()
        self._worker = Worker(Scanner([rule.regex for rule in rules.rules], [rule.clauses for rule in rules.rules]))
        self._compile_s = time.perf_counter() - began
        self._buffer = memoryview(bytearray(BLOCK))
        self._lines: Counter[int] = Counter()
        self._limits: Counter[int] = Counter()
        self._bytes, self._scan_s = 0, 0.0

    def path(self, path: str) -> None:
        """Scan a file, or standard input. Raises OSError."""
        if path == STDIN:
            with io.FileIO(sys.stdin.fileno(), closefd=False) as file:
                self._file(file, path)
        else:
            with io.FileIO(path) as file:
                self._file(file, path)

    def _file(self, file: io.FileIO, path: str) -> None:
        found = os.fstat(file.fileno())
        is_regular = stat.S_ISREG(found.st_mode)
        mask = self._rules.mask(path if path == STDIN else str(Path(path).absolute()))
        source = _Source(path, file.fileno() if is_regular else None, (found.st_dev, found.st_ino))
        if is_regular:
            source.offset = file.tell()  # standard input may be a file that was read in part
        held, before, buffer = 0, 0, self._buffer
        while True:
            if not is_regular:
                self._out.flush()  # reading may wait
            got = file.readinto(buffer[held:]) or 0
            held += got
            self._bytes += got
            if not held:
                return
            started = time.thread_time()
            result = self._worker.scan(buffer[:held], before=before, end=End.OPEN if got else End.LINE, suspended=mask)
            self._scan_s += time.thread_time() - started
            self._take(result, source)
            if self._numbers:
                source.number += bytes(buffer[: result.consumed]).count(b"\n")
            before = result.before
            source.offset += result.consumed
            buffer[: held - result.consumed] = buffer[result.consumed : held]
            held -= result.consumed

    def _take(self, found: Found, source: "_Source") -> None:
        if self._count and not any(found.flags()):
            self._lines.update(found.rules())
            return
        counted, lines = 0, 0
        for match in found:
            line = source.offset + match.line_at - match.window_at
            if not source.is_new(line, match):
                continue
            if match.flags & LIMIT:
                self._limits[match.rule] += 1
                continue
            self._lines[match.rule] += 1
            if self._count:
                continue
            if self._numbers:
                lines += bytes(self._buffer[counted : match.line_at]).count(b"\n")
                counted = match.line_at
            self._tell(found, match, source, line, source.number + lines if self._numbers else None)

    def _tell(self, found: Found, match: Match, source: "_Source", line: int, number: int | None) -> None:
        rule = self._rules.rules[match.rule]
        text = bytes(self._buffer[match.line_at : match.line_at + match.line_size])
        captures = captured(text, rule.regex.groups, found.spans(match))
        around = None
        if source.fd is not None and wants_context(rule):
            around = finish(look_back(rule, Place(1, line), captures), source.answer)
        event = told(rule, source.path, source.origin, 1, line, text, captures, match.flags, line=number, around=around)
        shown = msgspec.to_builtins(event)
        del shown["run"], shown["test"]  # of the service
        self._out.write(msgspec.json.encode(shown) + b"\n")

    def end(self, stats: bool) -> None:
        """Write what is known at the end."""
        rules = self._rules.rules
        if self._count:
            for index, rule in enumerate(rules):
                self._out.write(msgspec.json.encode({"rule": rule.spec.id, "lines": self._lines[index]}) + b"\n")
        for index, lines in sorted(self._limits.items()):
            print(f"agent logs scan: rule {rules[index].spec.id}: gave up on {lines} lines", file=sys.stderr)
        if stats:
            self._out.write(msgspec.json.encode({"stats": self._stats()}) + b"\n")
        self._out.flush()

    def _stats(self) -> dict[str, object]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "bytes": self._bytes,
            "pairs": self._lines.total(),
            "candidates": self._worker.tries,
            "cpu_s": used.ru_utime + used.ru_stime,
            "scan_cpu_s": self._scan_s,
            "wall_s": time.perf_counter() - self._began,
            "compile_s": self._compile_s,
            "max_rss_kb": used.ru_maxrss,
            "engine": native_engine(),
            "jit": all(rule.regex.jit for rule in self._rules.rules),
            "slow_rules": self._rules.slow,
        }


class _Source:
    """Where a scan is in one file. `fd` is None where what was read cannot be read again."""

    def __init__(self, path: str, fd: int | None, origin: tuple[int, int]) -> None:
        self.path, self.fd, self.origin = path, fd, origin
        self.offset = 0
        self.number = 1  # of the line at the offset
        self._long, self._seen = -1, set[int]()

    def is_new(self, line: int, match: Match) -> bool:
        """Did the rule not match the line before? The windows of a long line overlap."""
        if not match.flags & WINDOW:
            return True
        if line != self._long:
            self._long, self._seen = line, set()
        is_new = match.rule not in self._seen
        self._seen.add(match.rule)
        return is_new

    def answer(self, wish: Ask | Size) -> bytes | int | None:
        """What stands earlier in the file; of a file before it nothing is known."""
        if isinstance(wish, Size) or self.fd is None:
            return None
        return os.pread(self.fd, wish.size, wish.start)
