"""`agent logs templates`: which lines of logs are alike but for their values; a JSON line for each template, or line.

Lines are numbered through all logs, in the order in which these are named. A line's template is what it has become when
all lines were read.

Source: protocols/logs.md 2.4.
"""

import io
import sys
from array import array
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import msgspec

from agent.logs.templates import Miner
from agent.standard import Output, fill, opened

BLOCK = 1 << 20  # bytes read at a time
LINE_MAX = 1 << 22  # bytes of a line that are looked at

_PIECE = 10_000  # lines written at a time


def run(paths: Sequence[str], *, assign: bool = False, out: BinaryIO | None = None) -> bool:
    """Read all paths ("-": standard input) and write the templates, the most frequent first; with `assign` each line's.

    False: one could not be read to its end; it is told on standard error, and the others are read.
    Raises BrokenPipeError, and OutputFailed where nothing can be written for another reason.
    """
    output = Output(out)
    miner, assigned, is_good = Miner(), array("I"), True
    for path in paths:
        try:
            with opened(path) as file:
                for block in blocks(file):
                    mined = miner.mine(block)
                    if assign:
                        assigned += mined.ids
        except OSError as err:
            print(f"agent logs templates: {path}: {err.strerror or err}", file=sys.stderr)
            is_good = False
    if assign:
        _write_lines(miner, assigned, output)
    else:
        for template, count in sorted(miner.counts(), key=lambda each: (-each[1], each[0])):
            shown = {"template": template, "count": count, "text": miner.text(template)}
            output.write(msgspec.json.encode(shown) + b"\n")
    output.flush()
    return is_good


def blocks(file: io.RawIOBase | io.BytesIO) -> Iterator[bytes]:
    """The file as blocks of whole lines; the last one may have no end. Of a line only LINE_MAX bytes are kept."""
    held, room = b"", memoryview(bytearray(BLOCK))
    is_cut = False  # the line that is held has more, which is skipped
    while got := fill(file, room):
        data = bytes(room[:got])
        if is_cut:
            end = data.find(b"\n")
            if end < 0:
                continue
            data, is_cut = data[end:], False
        held += data
        end = held.rfind(b"\n") + 1
        if end:
            yield held[:end]
            held = held[end:]
        if len(held) > LINE_MAX:
            held, is_cut = held[:LINE_MAX], True
    if held:
        yield held


def _write_lines(miner: Miner, assigned: "array[int]", out: Output) -> None:
    became: dict[int, int] = {}
    for first in range(0, len(assigned), _PIECE):
        pieces = []
        for number, id in enumerate(assigned[first : first + _PIECE], first + 1):
            if id not in became:
                now = miner.resolve(id)
                became[id] = id if now is None else now  # one that is forgotten still is what it was
            pieces.append(b'{"line":%d,"template":%d}\n' % (number, became[id]))
        out.write(b"".join(pieces))
