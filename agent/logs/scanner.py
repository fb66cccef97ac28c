"""The face of the native scanner: bytes in, match records out. Only a match that is asked for becomes a Python object.

A Scanner holds what is compiled, and any number of threads may use it; each needs a Worker of its own.

Source: protocols/logs.md 3.
"""

import itertools
import struct
from array import array
from collections.abc import Iterator, Sequence
from enum import IntEnum
from typing import TYPE_CHECKING, NamedTuple

from agent._native import ffi, lib
from agent.core.engine import ENGINE, room
from agent.logs.literals import Clause, Frequencies, choose, native_literals
from agent.logs.regex import UNSET, Regex

if TYPE_CHECKING:
    from agent._native import CData

Bytes = bytes | bytearray | memoryview

LINE_MAX: int = lib.LINE_MAX_SIZE  # bytes; longer lines are matched by windows
WINDOW_STEP: int = lib.WINDOW_STEP
RECORDS = 4096  # matches returned by one call, where there are not more rules
PAIRS = 16_384  # captures in them
MEASURED = 64 << 20  # bytes scanned, before literals are chosen anew
PIECE, EVERY = 4096, 512  # bytes of one piece of the sample; one of so many bytes is in it

WINDOW, PARTIAL, LIMIT = 1, 2, 4  # flags of a match; native/native.h
_RECORD = struct.Struct("@IIIIHHI")
_BYTES = ffi.typeof("uint8_t[]")

# What choices are made by before any text was seen. The prefilter tells literals from text like this.
TYPICAL = b"""\
Jan  5 10:00:01 host12 sshd[2817]: Accepted publickey for root from 10.0.12.7 port 50122 ssh2: RSA SHA256:k3JqWn
Jan 17 23:59:58 host12 kernel: [12345.678901] usb 1-1.4: new high-speed USB device number 7 using xhci_hcd
Mar  9 04:12:33 lab-07 systemd[1]: Started Session 1294 of user root.
2026-01-05 08:00:00,123 INFO org.example.server.RequestHandler: Received request id=84217 from /10.251.31.5:42506
2026-01-05 08:00:00,457 WARN [main] com.example.net.Client - node-3:9092 could not be reached, retrying in 500 ms
2026-01-05T08:00:01.002Z DEBUG worker-4 job_1420 state changed from QUEUED to RUNNING in 0.031 s
I0105 08:00:02.417 1702 scheduler.go:214] bound pod "default/web-7d4b9c-x2x8p" to node "worker-2"
10.1.2.3 - - [05/Jan/2026:08:00:03 +0000] "GET /static/app.js?v=1842 HTTP/1.1" 200 18231 "-" "Mozilla/5.0 (X11; Linux)"
{"time":"2026-01-05T08:00:04Z","level":"info","msg":"block written","block":"0x00ff17e2a4","bytes":67108864}
1136073604 2026.01.05 R02-M1-N0-C:J12-U11 RAS KERNEL INFO CE sym 2, at 0x0b85eee0, mask 0x05
audit: type=1400 audit(1767600000.123:456): apparmor="ALLOWED" operation="open" pid=4122 comm="agent" uid=0
nova-compute.log 2026-01-05 08:00:05.185 2931 INFO nova.virt [req-3ea4052c-895d] [instance: b9000564] Took 20.58 seconds
    at com.example.Service$Worker.run(Service.java:431)
D/PowerManagerService( 1702): acquire lock=166121161, flags=0x1, tag="View Lock", name=com.android.systemui, uid=10037
"""


class End(IntEnum):
    """How a block's last line ends when it has no LF: as any line; it goes on beyond the block; not yet."""

    LINE = lib.END_LINE
    OPEN = lib.END_OPEN
    PARTIAL = lib.END_PARTIAL


class Match(NamedTuple):
    """A rule matched a line, or gave up on it (LIMIT). Offsets are in the block; the line is without LF and one CR.

    With WINDOW the line is longer than LINE_MAX and this is its `window`-th window, from 0. `rule` is an index.
    """

    line_at: int
    line_size: int
    rule: int
    captures_at: int
    captures: int
    flags: int
    window: int

    @property
    def window_at(self) -> int:
        """How many bytes into its line the window begins; 0 without one."""
        return self.window * WINDOW_STEP


class Scanner:
    """Rules compiled for one pass over all lines.

    `clauses` are those of each regex (literals.clauses). `sample` is text like that to be scanned: what to search for
    is chosen by it; and once more by the text itself, when choose_anew() is called. `slow` are the rules without a
    literal, whose regexes run on every line.
    """

    def __init__(
        self,
        regexes: Sequence[Regex],
        clauses: Sequence[Sequence[Clause]],
        sample: bytes = TYPICAL,
        engine: int = ENGINE,
    ) -> None:
        self.regexes, self._clauses, self._engine = tuple(regexes), tuple(clauses), engine
        self.slow = tuple(i for i, known in enumerate(self._clauses) if not known)
        self.handle = self._compile(sample)
        self.is_sampling = True  # what is scanned: see() is wanted
        self._seen = 0
        self._sample: bytearray | None = bytearray()  # None: chosen anew

    def see(self, block: Bytes) -> None:
        """Take some of what is scanned for a sample. Threads may be in each other's way: then some is missing."""
        if (sample := self._sample) is None:
            return
        self._seen += len(block)
        wanted = min(self._seen, MEASURED) // EVERY - len(sample)
        if wanted >= PIECE:
            sample += block[:wanted]
        self.is_sampling = self._seen < MEASURED

    @property
    def is_due(self) -> bool:
        """Is it time for choose_anew()? Once, when MEASURED bytes were seen."""
        return self._sample is not None and not self.is_sampling

    def choose_anew(self) -> None:
        """Choose the literals by the text that was seen; workers take them at their next scan.

        Takes 0.2 s for 1000 rules, so it is for threads. Raises MemoryError.
        """
        sample, self._sample, self.is_sampling = self._sample, None, False
        if sample is not None:
            self.handle = self._compile(bytes(sample))

    def _compile(self, sample: bytes) -> "CData":
        chosen = choose(self._clauses, Frequencies(sample))
        literals = list(dict.fromkeys(literal for clause in chosen for literal in clause))
        numbers = {literal: number for number, literal in enumerate(literals)}
        members = [numbers[literal] for clause in chosen for literal in clause]
        rows, _text = native_literals(literals)
        ends = list(itertools.accumulate(map(len, chosen), initial=0))
        handle = lib.scanner_new(
            ffi.new(
                "struct rule[]",
                [(r.handle, at, len(c)) for r, at, c in zip(self.regexes, ends, chosen, strict=False)],
            ),
            len(chosen),
            rows,
            len(literals),
            ffi.new("uint32_t[]", members),
            sample,
            len(sample),
            self._engine,
        )
        if not handle:
            raise MemoryError
        return ffi.gc(handle, lib.scanner_free)


class Found:
    """What one scan found. Valid until its worker scans again.

    `flags` are those of any match. `consumed` bytes of the block are done. `is_full`: there was room for no more, so go
    on there at once, with `before`; else what is left is a line that has not ended.
    """

    __slots__ = ("_worker", "before", "consumed", "count", "flags", "is_full")

    def __init__(self, worker: "Worker", count: int, flags: int, consumed: int, before: int, is_full: bool) -> None:
        self._worker, self.count, self.flags = worker, count, flags
        self.consumed, self.before, self.is_full = consumed, before, is_full

    @property
    def matches(self) -> "CData":
        """The native array, for native functions."""
        return self._worker.matches

    @property
    def captures(self) -> "CData":
        """That of the captures."""
        return self._worker.captures

    def __iter__(self) -> Iterator[Match]:
        """The matches by line, then by rule."""
        return map(Match._make, _RECORD.iter_unpack(self._worker.records[: self.count * _RECORD.size]))

    def rules(self) -> list[int]:
        """The rule of each match, without making matches."""
        records = self._worker.records[: self.count * _RECORD.size].cast("I")
        return records[2 :: _RECORD.size // 4].tolist() if self.count else []

    def count_by_rule(self, lines: "array[int]") -> None:
        """Add one for each match to that of its rule. `lines` are of type "Q", as many as there are rules."""
        lib.count_by_rule(self._worker.matches, self.count, ffi.from_buffer("uint64_t[]", lines))

    def spans(self, match: Match) -> list[tuple[int, int] | None]:
        """(start in the line, length) of each named capture; None: it took no part."""
        pairs = self._worker.pairs[2 * match.captures_at : 2 * (match.captures_at + match.captures)].tolist()
        return [None if start == UNSET else (start, size) for start, size in zip(pairs[::2], pairs[1::2], strict=True)]

    def captured(self, match: Match, text: bytes, names: Sequence[str]) -> dict[str, bytes | None]:
        """The named captures of a match in its line; None: the group took no part."""
        found: dict[str, bytes | None] = {}
        pairs, at = self._worker.pairs, 2 * match.captures_at
        for name in names:
            start = pairs[at]
            found[name] = None if start == UNSET else text[start : start + pairs[at + 1]]
            at += 2
        return found


class Worker:
    """One thread's means to scan: results of the last scan, the regexes' stack and limits."""

    def __init__(self, scanner: Scanner) -> None:
        self.scanner = scanner
        self._earlier = 0  # tries before the literals were chosen anew
        self._compiled, self._handle = self._renewed()
        capacity = max(RECORDS, len(scanner.regexes))
        pairs = max(PAIRS, sum(len(regex.groups) for regex in scanner.regexes))
        self.matches = room("struct match[]", capacity)
        self.captures = room("uint32_t[]", 2 * pairs)
        self.records = memoryview(ffi.buffer(self.matches))
        self.pairs = memoryview(ffi.buffer(self.captures)).cast("I")
        self._results = ffi.new(
            "struct results *",
            {
                "matches": self.matches,
                "capacity": capacity,
                "captures": self.captures,
                "captures_capacity": pairs,
            },
        )

    def _renewed(self) -> "tuple[CData, CData]":
        compiled = self.scanner.handle
        handle = ffi.gc(lib.worker_new(compiled), lib.worker_free)
        if not handle:
            raise MemoryError
        return compiled, handle

    @property
    def tries(self) -> int:
        """How often a regex ran."""
        return self._earlier + int(lib.worker_tries(self._handle))

    def scan(
        self,
        block: Bytes,
        *,
        before: int = 0,
        end: End = End.OPEN,
        suspended: bytes | bytearray | None = None,
    ) -> Found:
        """Match the lines of a block that begins at a line's start, or `before` bytes into a line of windows.

        `suspended`: a byte for each rule, not 0 for those to leave out. Runs without the GIL. A line longer than
        LINE_MAX gives a rule once per call: who continues in a line drops what that line gave already.
        """
        if self.scanner.is_sampling:
            self.scanner.see(block)
        if self._compiled is not self.scanner.handle:
            self._earlier = self.tries
            self._compiled, self._handle = self._renewed()
        results = self._results
        lib.scan(
            self._compiled,
            self._handle,
            ffi.from_buffer(_BYTES, block),
            len(block),
            before,
            end,
            ffi.NULL if suspended is None else ffi.from_buffer(_BYTES, suspended),
            results,
        )
        return Found(self, results.count, results.flags, results.consumed, results.before, bool(results.is_full))
