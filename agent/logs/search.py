"""A regex over the history of a log: its file and the rotated ones beside it, block by block, back or forward.

History is one text. Positions in it count from the first byte of the path's own file, so that those in the files before
it are negative: -1 is the last byte of the newest of them. Compressed files (.gz, .xz) are unpacked into a file
without a name, the others are read where they are. Blocks: for a thread.

Source: protocols/logs.md 2.2 (`search_log`), 5 ("compressed siblings") and 7.
"""

import errno
import gzip
import lzma
import os
import stat
import struct
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, BinaryIO, NamedTuple

import msgspec

from agent.core.errors import ActionError
from agent.logs.context import Ask, Place, Size, look_back
from agent.logs.identity import is_copy, is_rotation
from agent.logs.matched import finish, shown, told, wants_context
from agent.logs.messages import Rule, Searched, SearchLog
from agent.logs.paths import COMPRESSED
from agent.logs.rules import CompiledRule, RuleErrors, from_tables
from agent.logs.scanner import LIMIT, LINE_MAX, End, Scanner, Worker

BLOCK = 1 << 18  # bytes that are read and matched at a time
ANSWER_MAX = 512 << 10  # bytes of the matches of one answer; a message has at most 1 MiB
UNPACKED_MAX = 256 << 20  # bytes of a compressed file
XZ_MEMORY = 24 << 20  # bytes that unpacking may take: levels up to 7
XZ_INDEX = 1 << 16  # bytes; a block takes a few
SHOWN = ("rule", "path", "offset", "length", "text", "captures", "flags", "context")

_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC | os.O_NOCTTY | os.O_NOFOLLOW


class _Piece:
    """One file of a history. `start` is the position of its first byte; `why` it cannot be read, if so."""

    def __init__(self, path: str, size: int, fd: int | None, why: str = "") -> None:
        self.path, self.size, self.fd, self.why = path, size, fd, why
        self.start = 0


class _OutOfTime(Exception):
    """The budget is used up."""


class _Unreadable(Exception):
    """A file of the history cannot be read; says which, and why."""


class _Found(NamedTuple):
    """A match in a piece, on the line at an offset; `text` is the line, or the window of it that matched."""

    offset: int
    flags: int
    text: bytes
    captures: dict[str, bytes | None]


def search(asked: SearchLog, path: str, rule: CompiledRule) -> Searched:
    """Search the history of a path for lines that the rule matches, until limit, budget or answer are full.

    Raises OSError where the path's own file cannot be read.
    """
    with _History(path, asked.rotated, time.monotonic() + asked.budget_s) as history:
        searching = _Searching(asked, history, rule)
        return searching.backward() if asked.direction == "backward" else searching.forward()


def rule_of(asked: SearchLog, known: Iterable[Rule]) -> CompiledRule:
    """What is asked for, as a rule; by its id one of those that are known. Raises ActionError."""
    context = {"before": asked.before, "after": asked.after, "until": asked.until, "same": asked.same}
    table: dict[str, Any] = {"id": "search_log", "regex": asked.regex, "context": context}
    if asked.rule is not None:
        spec = next((rule for rule in known if rule.id == asked.rule), None)
        if spec is None:
            raise ActionError("not_found", f"no rule of a watched log is called {asked.rule!r}")
        table = {key: value for key, value in msgspec.to_builtins(spec).items() if value is not None}
        table["context"] |= {key: value for key, value in context.items() if value}
    try:
        (rule,) = from_tables("search_log", [table]).rules
    except RuleErrors as err:
        raise ActionError("bad_payload", str(err).removesuffix(".")) from err
    return rule


class _History:
    """The files, oldest first. Use as a context, which closes them."""

    def __init__(self, path: str, rotated: bool, until: float) -> None:
        self._until = until
        fd = os.open(path, _FLAGS)
        self.pieces = [own := _Piece(path, os.fstat(fd).st_size, fd)]
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            if rotated:
                self.pieces = [*_rotations(own), own]
        except OSError:
            self.__exit__()
            raise
        start = 0
        for piece in reversed(self.pieces[:-1]):
            start -= piece.size
            piece.start = start

    def __enter__(self) -> "_History":
        return self

    def __exit__(self, *_: object) -> None:
        for piece in self.pieces:
            if piece.fd is not None:
                os.close(piece.fd)

    def check(self) -> None:
        """Raises _OutOfTime."""
        if time.monotonic() > self._until:
            raise _OutOfTime

    def read(self, number: int, at: int, size: int) -> bytes:
        """Bytes of a piece, fewer at its end. Raises _Unreadable; _OutOfTime, while it is unpacked."""
        piece = self.pieces[number]
        if piece.fd is None and not piece.why:
            piece.fd = self._unpack(piece)
        if piece.fd is None:
            raise _Unreadable(f"{piece.path} {piece.why}")
        return os.pread(piece.fd, min(size, max(0, piece.size - at)), at)

    def answer(self, wish: Ask | Size) -> bytes | int | None:
        """What a search back from a match asks for. Generations are the numbers of pieces, from 1 on."""
        number = wish.generation - 1
        if isinstance(wish, Size):
            return self.pieces[number].size if number >= 0 and not self.pieces[number].why else None
        try:
            return self.read(number, wish.start, wish.size)
        except _Unreadable:  # then the context ends here
            return b""

    def _unpack(self, piece: _Piece) -> int | None:
        try:
            with os.fdopen(os.open(piece.path, _FLAGS), "rb") as packed, tempfile.TemporaryFile() as file:
                for chunk in _xz(packed) if piece.path.endswith(".xz") else _gz(packed):
                    self.check()
                    file.write(chunk)
                    if file.tell() > piece.size:
                        break
                file.flush()
                if os.fstat(file.fileno()).st_size == piece.size:
                    return os.dup(file.fileno())
                piece.why = "is not as long as it says"
        except (EOFError, zlib.error, lzma.LZMAError) as err:
            piece.why = f"cannot be unpacked: {err}"
        except OSError as err:
            piece.why = f"cannot be unpacked: {err.strerror or err}"
        return None


def _rotations(own: _Piece) -> list[_Piece]:
    """The files that once were at the path, oldest first."""
    assert own.fd is not None
    folder, name = os.path.split(own.path)
    found: list[tuple[float, _Piece]] = []
    with os.scandir(folder) as entries:
        beside = {entry.name: entry for entry in entries if is_rotation(entry.name, name)}
    for other, entry in sorted(beside.items()):
        stem, ending = os.path.splitext(other)
        if ending in COMPRESSED and stem in beside:
            continue  # it is being compressed
        try:
            fd = os.open(entry.path, _FLAGS)
        except OSError as err:
            found.append((0.0, _Piece(entry.path, 0, None, f"cannot be read: {err.strerror}")))
            continue
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
        elif ending in COMPRESSED:
            found.append((status.st_mtime, _packed(entry.path, fd, status.st_size)))
            os.close(fd)
        elif is_copy(status.st_size, partial(_read, fd), own.size, partial(_read, own.fd)):
            os.close(fd)  # of a file that is not cut yet
        else:
            found.append((status.st_mtime, _Piece(entry.path, status.st_size, fd)))
    return [piece for _, piece in sorted(found, key=lambda one: one[0])]


def _read(fd: int, at: int, size: int) -> bytes:
    return os.pread(fd, size, at)


def _gz(packed: BinaryIO) -> Iterator[bytes]:
    with gzip.open(packed) as text:
        while chunk := text.read(BLOCK):
            yield chunk


def _xz(packed: BinaryIO) -> Iterator[bytes]:
    """Raises EOFError and LZMAError."""
    stream = lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY)
    while not stream.eof:
        data = packed.read(BLOCK) if stream.needs_input else b""
        if stream.needs_input and not data:
            raise EOFError("it ends too early")
        yield stream.decompress(data, BLOCK)


def _packed(path: str, fd: int, size: int) -> _Piece:
    if path.endswith(".gz"):
        unpacked = struct.unpack("<I", os.pread(fd, 4, size - 4))[0] if size >= 18 else None  # modulo 4 GiB
    elif path.endswith(".xz"):
        unpacked = _xz_size(fd, size)
    else:
        return _Piece(path, 0, None, "is not read: only .gz and .xz are")
    if unpacked is None:
        return _Piece(path, 0, None, f"is no {path[-3:]} file")
    if unpacked > UNPACKED_MAX or size > UNPACKED_MAX:
        return _Piece(path, 0, None, f"is not read: it holds more than {UNPACKED_MAX >> 20} MiB")
    return _Piece(path, unpacked, None)


def _xz_size(fd: int, size: int) -> int | None:
    """What an .xz file of one stream holds, by its footer and index; None: it is none.

    Source: The .xz File Format, 1.2 (multibyte integers), 2.1.2 (stream footer) and 4 (index).
    """
    footer = os.pread(fd, 12, max(0, size - 12))
    if size < 32 or not footer.endswith(b"YZ"):
        return None
    index_size = 4 * (int.from_bytes(footer[4:8], "little") + 1)
    if index_size > min(XZ_INDEX, size - 12):
        return None
    index = iter(os.pread(fd, index_size, size - 12 - index_size))

    def number() -> int:
        value = 0
        for place, byte in enumerate(islice(index, 9)):
            value |= (byte & 0x7F) << 7 * place
            if byte < 0x80:
                return value
        raise EOFError

    try:
        number()  # the indicator, 0
        unpacked = 0
        for _ in range(number()):
            number()  # what the block takes packed
            unpacked += number()
    except EOFError:
        return None
    return unpacked


class _Searching:
    def __init__(self, asked: SearchLog, history: _History, rule: CompiledRule) -> None:
        self._asked, self._history, self._rule = asked, history, rule
        self._worker = Worker(Scanner([rule.regex], [rule.clauses]))
        self._matches: list[dict[str, Any]] = []
        self._scanned = self._limit_errors = self._size = self._at = 0

    def backward(self) -> Searched:
        """From `from` (lines that begin before it), or the end, back to the beginning."""
        pieces, start = self._history.pieces, self._asked.from_
        self._at = pieces[-1].size if start is None else start
        return self._run(self._back(number) for number in reversed(range(len(pieces))))

    def forward(self) -> Searched:
        """From the first line that begins at `from` or behind it, or the beginning, to the end."""
        pieces, start = self._history.pieces, self._asked.from_
        bad = [number for number, piece in enumerate(pieces) if piece.why] if start is None else []
        first = max(bad, default=-1) + 1  # what stands before a file that cannot be read is left out
        self._at = pieces[first].start if start is None else max(start, pieces[0].start)
        done = self._run(self._forth(number) for number in range(first, len(pieces)))
        if not bad or not done.complete:
            return done
        why = f"{pieces[first - 1].path} {pieces[first - 1].why}"
        return msgspec.structs.replace(done, complete=False, stopped=why)

    def _run(self, steps: Iterator[bool]) -> Searched:
        """Do step after step, until one says that the answer is full."""
        stopped: str | None = None
        try:
            is_done = all(steps)
        except _OutOfTime:
            is_done = False
        except _Unreadable as err:
            is_done, stopped = False, str(err)
        return Searched(
            matches=self._matches,
            scanned=self._scanned,
            complete=is_done,
            next=None if is_done or stopped else self._at,
            limit_errors=self._limit_errors,
            stopped=stopped,
        )

    def _back(self, number: int) -> bool:
        """The lines of a piece that begin before where we are, last first. False: the answer is full."""
        piece = self._history.pieces[number]
        end = min(piece.size, self._at - piece.start)
        if piece.why and self._at >= piece.start:
            raise _Unreadable(f"{piece.path} {piece.why}")
        if end > 0:
            end = self._end_of_line(number, end)
        while end > 0:
            self._history.check()
            begin = max(0, end - BLOCK)
            data = self._history.read(number, begin, end - begin)
            cut = data.find(b"\n") + 1 if begin else 0
            if 0 < cut < len(data):
                begin, data = begin + cut, data[cut:]  # else a part of a line longer than the block
            self._scanned += len(data)
            found, _, _ = self._lines(data, begin, 0, End.LINE)
            for one in reversed(found):
                if piece.start + one.offset < self._at:
                    if not self._take(number, one):
                        return False
                    self._at = piece.start + one.offset
            end, self._at = begin, min(self._at, piece.start + begin)
        return True

    def _forth(self, number: int) -> bool:
        """The lines of a piece that begin where we are or behind it. False: the answer is full."""
        piece, before = self._history.pieces[number], 0
        begin = max(0, self._at - piece.start)
        if piece.why and self._at <= piece.start:
            raise _Unreadable(f"{piece.path} {piece.why}")
        if 0 < begin < piece.size:
            begin = self._end_of_line(number, begin)
        while begin < piece.size:
            self._history.check()
            data = self._history.read(number, begin, BLOCK)
            is_last = begin + len(data) >= piece.size
            found, consumed, before = self._lines(data, begin, before, End.LINE if is_last else End.OPEN)
            for one in found:
                if piece.start + one.offset >= self._at:
                    if not self._take(number, one):
                        return False
                    self._at = piece.start + one.offset + 1
            if not consumed:
                break  # it was cut meanwhile
            self._scanned += consumed
            begin += consumed
            self._at = max(self._at, piece.start + begin - before)
        return True

    def _end_of_line(self, number: int, at: int) -> int:
        """Where the line ends that byte at - 1 belongs to, or a part of it as long as may be."""
        rest = self._history.read(number, at - 1, LINE_MAX)
        return at - 1 + (rest.find(b"\n") + 1 or len(rest))

    def _lines(self, data: bytes, at: int, before: int, end: End) -> tuple[list[_Found], int, int]:
        """The matches of a block, how much of it is done, and `before` there."""
        every: list[_Found] = []
        done, last = 0, -1
        while done < len(data):
            part = memoryview(data)[done:]
            found = self._worker.scan(part, before=before, end=end)
            for match in found:
                line = at + done + match.line_at - match.window_at
                if match.flags & LIMIT:
                    self._limit_errors += 1
                elif line != last:  # windows of a long line overlap
                    last = line
                    text = bytes(part[match.line_at : match.line_at + match.line_size])
                    captures = found.captured(match, text, self._rule.regex.groups)
                    every.append(_Found(line, match.flags, text, captures))
            done, before = done + found.consumed, found.before
            if not found.consumed:
                break
        return every, done, before

    def _take(self, number: int, found: _Found) -> bool:
        """Add a match to the answer, if there is room, and time for what stands around it: for one there always is."""
        if len(self._matches) == self._asked.limit:
            return False
        if self._matches:
            self._history.check()
        piece = self._history.pieces[number]
        around = None
        if wants_context(self._rule):
            search = look_back(self._rule, Place(number + 1, found.offset), found.captures)
            around = finish(search, self._history.answer)
        event = told(
            self._rule, piece.path, (0, 0), 1, found.offset, found.text, found.captures, found.flags,
            around=around,
        )  # fmt: skip
        tree = msgspec.to_builtins(event)
        match = {key: tree[key] for key in SHOWN} | {"position": piece.start + found.offset}
        if after := self._rule.spec.context.after:
            match["after"] = self._after(number, found.offset, after)
        size = len(msgspec.json.encode(match))
        if size > ANSWER_MAX:  # by itself
            match |= {"text": match["text"][: LINE_MAX // 4], "captures": {}, "context": None, "after": [], "cut": True}
            size = len(msgspec.json.encode(match))
        if self._matches and self._size + size > ANSWER_MAX:
            return False
        self._matches.append(match)
        self._size += size
        return True

    def _after(self, number: int, offset: int, count: int) -> list[str]:
        """The lines behind a line, over the end of its file."""
        lines: list[str] = []
        room = self._rule.spec.context.max_bytes
        at = self._end_of_line(number, offset + 1)
        while len(lines) < count and number < len(self._history.pieces):
            data = self._history.read(number, at, LINE_MAX)
            if not data:
                number, at = number + 1, 0
                continue
            data = data[: data.rfind(b"\n") + 1] or data  # else a part of a line, or the last one
            for line in data.removesuffix(b"\n").split(b"\n")[: count - len(lines)]:
                if len(line) > room:
                    return lines
                lines.append(shown(line.removesuffix(b"\r")))
                room -= len(line)
            at += len(data)
        return lines
