"""Which lines are alike but for their values: the face of the native template miner.

A template is the text that lines share, with <*> where they differ: `session opened for user <*>`. Ids rise from 1 and
are never used again, also after a restart; when templates turn out to be one, the younger join the oldest, and
resolve() tells which. Templates are bounded: the one seen longest ago is forgotten, and gets a new id should it return.

Source: protocols/logs.md 4, "Miner"; 2.4.
"""

import struct
from array import array
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec

from agent._native import ffi, lib
from agent.core.engine import room
from agent.logs.model import ModelDamaged

if TYPE_CHECKING:
    from agent._native import CData

LIMIT = 65_536
NONE: int = lib.TEMPLATE_NONE  # the id of a line that got none: there is no memory, or no id any more

_LINES = 16_384  # mined by one call
_VALUES: int = lib.VALUES_MAX
_VERSION = 1
_HEAD = struct.Struct("<QII")  # of a dumped template: count, id, size of its text
_BESIDE = 32  # bytes of a dump beside its three fields, at most


class Mined(NamedTuple):
    """The lines of a block. `ids[n]` is the template of the line that begins at `starts[n]`; behind the last line
    `starts` has the end of the block. Ids in `new` were given in this block; the templates in `joined` are others now.
    """

    ids: "array[int]"
    starts: "array[int]"
    new: range
    joined: list[tuple[int, int]]

    def having(self, templates: AbstractSet[int]) -> list[int]:
        """Which lines are of these templates."""
        return [n for n, id in enumerate(self.ids) if id in templates]


class _Dump(msgspec.Struct, frozen=True, array_like=True):
    """A miner as bytes. `templates` is for each its head and its text, the one seen longest ago first."""

    version: int
    next: Annotated[int, msgspec.Meta(ge=1, le=NONE)]
    templates: bytes
    joined: bytes
    varying: bytes


_decoder = msgspec.msgpack.Decoder(_Dump)


class Miner:
    """Mines lines, one thread at a time. At most `limit` templates (16 to 1,048,576): less than 500 bytes for each."""

    def __init__(self, *, limit: int = LIMIT) -> None:
        miner = lib.miner_new(limit)
        if miner == ffi.NULL:
            raise MemoryError
        self._limit = limit
        self._miner = ffi.gc(miner, lib.miner_free)
        self._ids, self._starts = room("uint32_t[]", _LINES), room("uint32_t[]", _LINES)
        self._at = ffi.new("size_t *")

    def mine(self, block: bytes | memoryview, *, every: int = 1) -> Mined:
        """All lines of a block of less than 2 GiB, or every n-th; the last one may have no end. Releases the GIL."""
        ids, starts, first, joins = array("I"), array("I"), lib.miner_next(self._miner), lib.miner_joins(self._miner)
        data, size, at = ffi.from_buffer("uint8_t[]", block), len(block), self._at
        at[0] = 0
        while at[0] < size:
            count = lib.miner_mine(self._miner, data, size, at, every, self._ids, self._starts, _LINES)
            ids.frombytes(ffi.buffer(self._ids, 4 * count))
            starts.frombytes(ffi.buffer(self._starts, 4 * count))
        starts.append(size)
        joins = lib.miner_joins(self._miner) - joins
        return Mined(ids, starts, range(first, lib.miner_next(self._miner)), self._joined(joins) if joins else [])

    def mine_line(self, line: bytes) -> int:
        """The template of one line; it may have its end."""
        self._at[0] = 0
        lib.miner_mine(self._miner, line or b"\n", len(line) or 1, self._at, 1, self._ids, self._starts, 1)
        return int(self._ids[0])

    def find(self, line: bytes) -> int | None:
        """The template of a line, which is not counted; None: it would be a new one."""
        found = lib.miner_find(self._miner, line, len(line))
        return None if found == NONE else int(found)

    def resolve(self, template: int) -> int | None:
        """What the template has become, itself as a rule; None: it is forgotten."""
        now = lib.miner_resolve(self._miner, template)
        return None if now == NONE else now

    def text(self, template: int) -> str:
        """`session opened for user <*>`, of what the template has become. KeyError: it is forgotten."""
        return self._text(template).decode(errors="backslashreplace")

    def values(self, template: int, line: bytes) -> list[bytes]:
        """What a line of the template has where that has <*>: each word of it, in order, so a value as 10:31 is two.

        Of a template that is forgotten: what is a value by itself.
        """
        spans = ffi.new("uint32_t[]", 2 * _VALUES)
        count = lib.miner_values(self._miner, template, line, len(line), spans, _VALUES)
        numbers = ffi.unpack(spans, 2 * count)
        return [line[at : at + size] for at, size in zip(numbers[::2], numbers[1::2], strict=True)]

    def counts(self) -> Iterator[tuple[int, int]]:
        """Each template with the number of its lines, the one seen longest ago first."""
        size = lib.miner_count(self._miner)
        ids, counts = ffi.new("uint32_t[]", size), ffi.new("uint64_t[]", size)
        lib.miner_list(self._miner, ids, counts)
        return zip(ffi.unpack(ids, size), ffi.unpack(counts, size), strict=True)

    @property
    def next(self) -> int:
        """The id that the next new template gets."""
        return int(lib.miner_next(self._miner))

    def __len__(self) -> int:
        return int(lib.miner_count(self._miner))

    def dump(self, room: int | None = None) -> tuple[bytes, int]:
        """All that load() needs, in at most `room` bytes; how many templates, the rarest, were left out for that."""
        out = ffi.new("uint8_t[]", lib.miner_dump(self._miner, ffi.NULL))
        lib.miner_dump(self._miner, out)
        templates, left_out = bytes(ffi.buffer(out)), 0
        joined = array("I", [id for pair in self._joined(self._limit) for id in pair])
        numbers = ffi.new("uint64_t[]", lib.miner_varying(self._miner, ffi.NULL))
        lib.miner_varying(self._miner, numbers)
        rest = (joined.tobytes(), bytes(ffi.buffer(numbers)))
        if room is not None:
            if sum(map(len, rest)) > room // 4:
                rest = (b"", b"")  # what joined is only for those who have the old ids, and the rest is learned again
            templates, left_out = _most_frequent(templates, room - sum(map(len, rest)) - _BESIDE)
        return msgspec.msgpack.encode(_Dump(_VERSION, self.next, templates, *rest)), left_out

    @classmethod
    def load(cls, data: bytes, *, limit: int = LIMIT) -> "Miner":
        """The miner that was dumped, with the same ids. Raises ModelDamaged."""
        try:
            dumped = _decoder.decode(data)
        except msgspec.DecodeError as err:
            raise _damaged(str(err)) from err
        if dumped.version != _VERSION:
            raise _damaged(f"version {dumped.version} is not known")
        miner = cls(limit=limit)
        for count, id, text in _parts(dumped.templates):
            if not lib.miner_restore(miner._miner, id, count, text, len(text)):
                raise _damaged(f"template {id} cannot be")
        joined, varying = _numbers("uint32_t", dumped.joined, 8), _numbers("uint64_t", dumped.varying, 8)
        if not lib.miner_restore_joined(miner._miner, joined, len(joined) // 2):
            raise _damaged("what joined cannot be")
        if not lib.miner_restore_varying(miner._miner, varying, len(varying)):
            raise _damaged("what varies cannot be")
        if not lib.miner_restore_next(miner._miner, dumped.next):
            raise _damaged(f"the next id cannot be {dumped.next}")
        return miner

    def skip_ids(self, next: int) -> None:
        """Ids are given from `next` on, if they are not already beyond."""
        lib.miner_restore_next(self._miner, next)

    def _joined(self, last: int) -> list[tuple[int, int]]:
        count = min(last, self._limit)
        pairs = ffi.new("uint32_t[]", 2 * count)
        numbers = ffi.unpack(pairs, 2 * lib.miner_joined(self._miner, pairs, count))
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def _text(self, template: int) -> bytes:
        text = ffi.new("uint8_t[]", lib.TEMPLATE_TEXT_MAX)
        size = lib.miner_text(self._miner, template, text)
        if size == NONE:
            raise KeyError(template)
        return bytes(ffi.buffer(text, size))


def _parts(templates: bytes) -> Iterator[tuple[int, int, bytes]]:
    """The count, id and text of each. Raises ModelDamaged."""
    at = 0
    while at < len(templates):
        if len(templates) - at < _HEAD.size:
            raise _damaged("a template is not whole")
        count, id, size = _HEAD.unpack_from(templates, at)
        at += _HEAD.size + size
        if at > len(templates):
            raise _damaged("a template is not whole")
        yield count, id, templates[at - size : at]


def _most_frequent(templates: bytes, room: int) -> tuple[bytes, int]:
    """As many as have room, in their order, and how many have none; of equally frequent ones those seen later stay."""
    parts, kept = list(_parts(templates)), set()
    for n in sorted(range(len(parts)), key=lambda n: (parts[n][0], n), reverse=True):
        room -= _HEAD.size + len(parts[n][2])
        if room < 0:
            break
        kept.add(n)
    whole = [_HEAD.pack(count, id, len(text)) + text for n, (count, id, text) in enumerate(parts) if n in kept]
    return b"".join(whole), len(parts) - len(kept)


def _numbers(type: str, data: bytes, size: int) -> "CData":
    if len(data) % size:
        raise _damaged("it ends within a number")
    return ffi.from_buffer(f"{type}[]", data)


def _damaged(why: str) -> ModelDamaged:
    return ModelDamaged(f"the templates are damaged: {why}", remedy="They are learned anew.")
