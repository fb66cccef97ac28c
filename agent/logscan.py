"""`agent logs scan`: files or standard input against rules; a JSON line for each match, in the order of the lines.

No rate limits. What comes before a match is looked for where it can be read again: in a file, and in the last
megabyte of what comes through a pipe. A match whose rule asks for what follows it is written when that has come.

Source: protocols/logs.md 2.4.
"""

import io
import os
import resource
import select
import stat
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import msgspec

from agent.core.config import ConfigErrors
from agent.core.engine import native_engine
from agent.core.errors import unwrap
from agent.logs import modelfile, regex
from agent.logs.classify import Classifier
from agent.logs.context import Ask, Size
from agent.logs.matched import finish
from agent.logs.rules import RuleErrors, RuleSet, read_files
from agent.logs.scanner import WINDOW, End, Match
from agent.logs.templates import Miner
from agent.logs.written import Log, Searches, Written
from agent.standard import STDIN, Output, fill, opened

BLOCK = 1 << 18  # bytes read at a time
PAST = 1 << 20  # bytes of a pipe that are remembered, where a rule wants them


def run(
    rule_files: Sequence[Path],
    paths: Sequence[str],
    *,
    follow: bool = False,
    count: bool = False,
    stats: bool = False,
    numbers: bool = False,
    model: Path | None = None,
    out: BinaryIO | None = None,
) -> bool:
    """Scan all paths ("-": standard input) and write what was found. False: one could not be read; it is told on
    standard error, and the others are scanned. With `follow` it ends at SIGINT or SIGTERM.

    `model`: what matched is told with its template, and with a guess of its class where the rule says none. Standard
    input cannot be followed. Raises ConfigErrors for what is wrong in the rules, ConfigError for the model,
    BrokenPipeError, and OutputFailed where nothing can be written for another reason.
    """
    scanning = _Scanning(rule_files, count, numbers, model, Output(out))
    is_good = scanning.follow(paths) if follow else all([scanning.path(path) for path in paths])
    scanning.end(stats)
    return is_good


class _Scanning:
    def __init__(self, rule_files: Sequence[Path], count: bool, numbers: bool, model: Path | None, out: Output) -> None:
        self._began = time.perf_counter()
        self._out = out
        try:
            self._rules: RuleSet = read_files(rule_files)
        except RuleErrors as err:
            raise ConfigErrors(list(err.errors)) from err
        known = _known(model) if model and not count else None
        self._written = Written(self._rules, out.write, counts=count, numbers=numbers, known=known)
        self._compile_s = time.perf_counter() - self._began
        self._bytes, self._scan_s = 0, 0.0

    def path(self, path: str) -> bool:
        """Scan a file, or standard input. False: it cannot be read, which is told."""
        try:
            with opened(path) as file:
                self._file(file, path, path if path == STDIN else str(Path(path).absolute()))
        except BrokenPipeError:
            raise
        except OSError as err:
            complain(path, err.strerror or str(err))
            return False
        return True

    def follow(self, paths: Sequence[str]) -> bool:
        """Scan files as they grow, until a signal comes."""
        import trio  # with what needs it: the scan of a small file takes less time than this

        from agent.logs.growing import follow

        def scanned(size: int, cpu_s: float) -> None:
            self._out.flush()
            self._bytes += size
            self._scan_s += cpu_s

        try:
            return trio.run(partial(follow, self._written, paths, tell=complain, scanned=scanned))
        except BaseExceptionGroup as group:
            raise unwrap(group) from None

    def _file(self, file: io.FileIO, path: str, absolute: str) -> None:
        found = os.fstat(file.fileno())
        is_regular = stat.S_ISREG(found.st_mode)
        log = Log(self._written, path, absolute)
        log.at((found.st_dev, found.st_ino), 1)
        past = _Past(file.fileno(), log, is_kept=not is_regular and self._written.needs_past)
        told = _Told()
        offset = file.tell() if is_regular else 0  # standard input may be a file that was read in part
        buffer = memoryview(bytearray(BLOCK))
        held = before = 0
        while True:
            if not is_regular:
                self._wait(file, log)
            got = fill(file, buffer[held:])
            held += got
            self._bytes += got
            if not held:
                break
            started = time.thread_time()
            data = buffer[:held]
            result = self._written.worker.scan(
                data, before=before, end=End.OPEN if got else End.LINE, suspended=log.mask
            )
            self._scan_s += time.thread_time() - started
            if self._written.worker.scanner.is_due:
                self._written.worker.scanner.choose_anew()
            past.now = data
            _drive(log.take(result, data, offset, told.is_new, time.monotonic(), is_last=not got), past)
            past.leave(result.consumed)
            before = result.before
            offset += result.consumed
            buffer[: held - result.consumed] = buffer[result.consumed : held]
            held -= result.consumed
        log.tick(float("inf"))

    def _wait(self, file: io.FileIO, log: Log) -> None:
        """Until a pipe has more, or is at its end. What waits for what follows waits no longer than its rule says."""
        self._out.flush()
        while (due := log.due()) < float("inf"):
            if select.select([file], [], [], max(0.0, due - time.monotonic()))[0]:
                return
            log.tick(time.monotonic())
            self._out.flush()

    def end(self, stats: bool) -> None:
        """Write what is known at the end."""
        rules, written = self._rules.rules, self._written
        if written.counts:
            for index, rule in enumerate(rules):
                self._out.write(msgspec.json.encode({"rule": rule.spec.id, "lines": written.lines[index]}) + b"\n")
        for index, lines in sorted(written.limits.items()):
            complain(f"rule {rules[index].spec.id}", f"gave up on {lines} lines")
        if stats:
            self._out.write(msgspec.json.encode({"stats": self._stats()}) + b"\n")
        self._out.flush()

    def _stats(self) -> dict[str, object]:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return {
            "bytes": self._bytes,
            "pairs": sum(self._written.lines),
            "candidates": self._written.worker.tries,
            "cpu_s": used.ru_utime + used.ru_stime,
            "scan_cpu_s": self._scan_s,
            "wall_s": time.perf_counter() - self._began,
            "compile_s": self._compile_s,
            "max_rss_kb": _peak_kb(),
            "engine": "avx2" if native_engine() == "avx512" else native_engine(),  # the sheet's word for both
            "lookup": native_engine(),
            "pcre2": regex.version(),
            "jit": all(rule.regex.jit for rule in self._rules.rules),
            "slow_rules": self._rules.slow,
        }


def _peak_kb() -> int:
    """The most memory that this process took. Where who started it took more, getrusage would tell that."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1])


def _known(path: Path) -> tuple[Miner, Classifier]:
    model = modelfile.named(path)
    return Miner.load(model.templates), Classifier.load(model.weights, model.classes)


class _Told:
    """Which rules were told of a line that is matched by windows: these overlap."""

    def __init__(self) -> None:
        self._line, self._rules = -1, set[int]()

    def is_new(self, line: int, match: Match) -> bool:
        """Did the rule not match the line before?"""
        if not match.flags & WINDOW:
            return True
        if line != self._line:
            self._line, self._rules = line, set()
        is_new = match.rule not in self._rules
        self._rules.add(match.rule)
        return is_new


class _Past:
    """What searches can read. `is_kept`: of a pipe, of which the last PAST bytes are remembered."""

    def __init__(self, fd: int, log: Log, *, is_kept: bool) -> None:
        self._fd, self._log, self._is_kept = fd, log, is_kept
        self._bytes = b""
        self.now = memoryview(b"")  # the block that is matched

    def leave(self, size: int) -> None:
        """So much of the block is done."""
        if self._is_kept:
            end = self._log.base + len(self._bytes) + size
            self._bytes = (self._bytes + bytes(self.now[:size]))[-PAST:]
            cut = self._bytes.find(b"\n") + 1 if end > len(self._bytes) else 0
            self._bytes = self._bytes[cut:]
            self._log.base = end - len(self._bytes)

    def answer(self, wish: Ask | Size) -> bytes | None:
        """What stands earlier; of a file before it nothing is known."""
        if isinstance(wish, Size):
            self._log.is_cut = self._log.base > 0
            return None
        if not self._is_kept:
            return os.pread(self._fd, wish.size, wish.start)
        known = self._bytes[wish.start : wish.start + wish.size]
        start, end = wish.start - len(self._bytes), wish.start + wish.size - len(self._bytes)
        return known + bytes(self.now[max(0, start) : max(0, end)])


def _drive(searches: Searches, past: _Past) -> None:
    """Give searches what they look for."""
    try:
        search = next(searches)
        while True:
            search = searches.send(finish(search, past.answer))
    except StopIteration:
        return


def complain(path: str, what: str) -> None:
    """One line on standard error."""
    print(f"agent logs scan: {path}: {what}", file=sys.stderr)
