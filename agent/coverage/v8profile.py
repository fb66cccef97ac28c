"""What V8 counted: a profile's bytes in, the covered probes of the product's files out.

A profile is `{"result":[{"url","functions":[{"functionName","ranges":[{"startOffset","endOffset","count"}]}]}]}`, of
all that a process has loaded, most of it Node's own: functions are decoded only where the file is the product's. Each
is a delta: what it leaves out is no news, and an outer range of count 0 may hold an inner one that was run.

Source: drill sheet, "Probe sources", V8; "Actions in" (ADD_SESSION_DATA).
"""

import os
import re
from collections.abc import Sequence
from operator import itemgetter
from urllib.parse import unquote

import msgspec

from agent.core.errors import AgentError
from agent.core.payload import UNREADABLE
from agent.coverage.javascript import Script

# Where AVA, Node's own runner, Mocha and Jest look for tests when they are not told where.
_TEST_FOLDERS = frozenset(("test", "tests", "__tests__"))
_NO_TEST_FOLDERS = frozenset(("helper", "helpers", "fixture", "fixtures", "node_modules"))
_TEST_NAME = re.compile(r"tests?|test-.+|.+[-_.](?:tests?|spec)")


class NotAProfile(AgentError):
    """Bytes that are no V8 profile: half a file, or another thing."""

    def __init__(self, why: str) -> None:
        super().__init__(f"not a V8 profile: {why}", remedy='One is {"result":[{"url":..,"functions":[..]}]}.')


class Transformed(AgentError):
    """V8 counted in another text than the file's."""

    def __init__(self, file: str) -> None:
        super().__init__(
            f"{file}: what Node ran has another length: a loader translated it, or the file changed",
            remedy="Cover the files that Node runs as they are, such as those of a build.",
        )


class Range(msgspec.Struct, rename="camel", gc=False):
    """UTF-16 offsets, end exclusive."""

    start_offset: int
    end_offset: int
    count: int


class Function(msgspec.Struct, rename="camel", gc=False):
    """The first range is the whole function; the others lie in it, where the count is another."""

    function_name: str
    ranges: list[Range]


class Loaded(msgspec.Struct, gc=False):
    """One script a process has loaded, in their order; its functions are not yet decoded."""

    url: str
    functions: msgspec.Raw


class _Profile(msgspec.Struct, gc=False):
    result: list[Loaded]


class _SessionData(msgspec.Struct, rename="camel", gc=False):
    coverage: _Profile | str
    test_id: str | None = None


_PROFILE = msgspec.json.Decoder(_Profile)
_FUNCTIONS = msgspec.json.Decoder(list[Function])
_SESSION_DATA = msgspec.json.Decoder(_SessionData)


def loaded(data: bytes) -> list[Loaded]:
    """The scripts of a profile. Raises NotAProfile."""
    try:
        return _PROFILE.decode(data).result
    except UNREADABLE as error:
        raise NotAProfile(str(error)) from error


def session_data(data: str) -> tuple[str, list[Loaded]]:
    """ADD_SESSION_DATA's `data`: the test's name, "" without, and the scripts. Raises NotAProfile.

    Drill's js-auto-test-agent sends the profile as text, just as it came from the browser.
    """
    try:
        sent = _SESSION_DATA.decode(data)
        profile = _PROFILE.decode(sent.coverage) if isinstance(sent.coverage, str) else sent.coverage
    except UNREADABLE as error:
        raise NotAProfile(str(error)) from error
    return sent.test_id or "", profile.result


def covered(script: Loaded, of: Script) -> int:
    """Bit n of the answer: probe n was run. Raises NotAProfile, and Transformed when the offsets are another text's.

    A probe counts what the innermost range counts that its stretch lies wholly in; in no range: no news.
    """
    try:
        functions = _FUNCTIONS.decode(script.functions)
    except UNREADABLE as error:
        raise NotAProfile(str(error)) from error
    if any(not _fits(function, of.length) for function in functions):
        raise Transformed(of.unit.file or script.url)
    # By start, the outer first; of equal ones the last is the inner, for V8 tells functions and ranges in their order.
    ranges = [(each.start_offset, -each.end_offset, each.count) for function in functions for each in function.ranges]
    ranges.sort(key=itemgetter(0, 1))
    return _counted(ranges, of.anchors)


def _fits(function: Function, length: int) -> bool:
    """No range ends beyond the text, and the top level, which has no name and is told first, ends with it."""
    if not function.ranges:
        return True
    whole = function.ranges[0]
    is_top = not function.function_name and not whole.start_offset
    return whole.end_offset == length if is_top else 0 <= whole.start_offset <= whole.end_offset <= length


def _counted(ranges: Sequence[tuple[int, int, int]], anchors: Sequence[tuple[int, int, int]]) -> int:
    bits = following = 0
    open_ranges: list[tuple[int, int]] = []  # end, count
    for start, end, probe in anchors:
        while following < len(ranges) and ranges[following][0] <= start:
            _, minus_end, count = ranges[following]
            open_ranges.append((-minus_end, count))
            following += 1
        while open_ranges and open_ranges[-1][0] <= start:
            open_ranges.pop()
        if next((count for ends, count in reversed(open_ranges) if ends >= end), 0) > 0:
            bits |= 1 << probe
    return bits


def file_of(url: str) -> str | None:
    """The absolute path of a file: URL, without what an import adds to load it anew (`?v=2`); None for any other."""
    if not url.startswith("file:///"):
        return None
    path = unquote(url.removeprefix("file://").partition("?")[0].partition("#")[0])
    return None if "\0" in path else path


def is_test(path: str) -> bool:
    """Does a file hold tests, by its name and folders? `path` is relative to the product's folder."""
    *folders, name = path.split("/")
    if name.startswith("_") or not _NO_TEST_FOLDERS.isdisjoint(folder.strip("_") for folder in folders):
        return False
    return not _TEST_FOLDERS.isdisjoint(folders) or _TEST_NAME.fullmatch(os.path.splitext(name)[0]) is not None
