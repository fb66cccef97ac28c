"""A match as it is told: its id, its text for people, what stands before it.

Source: protocols/logs.md 2.3.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Literal

from msgspec.structs import replace

from agent._native import lib
from agent.core.events import LogAnchor, LogAround, LogMatched, LogSuppressed
from agent.logs.classify import Guess
from agent.logs.context import Around, Ask, Captures, Search, Size, T
from agent.logs.limits import Suppressed
from agent.logs.rules import CompiledRule
from agent.logs.scanner import PARTIAL, WINDOW

Flag = Literal["partial", "window", "nul", "invalid_utf8"]
_WORDS: dict[int, tuple[Flag, ...]] = {
    0: (), PARTIAL: ("partial",), WINDOW: ("window",), PARTIAL | WINDOW: ("partial", "window")
}  # fmt: skip

Origin = tuple[int, int] | str


@lru_cache(10_000)
def rule_hash(rule: str) -> int:
    """64 bits that stand for a rule's id."""
    return int.from_bytes(hashlib.blake2b(rule.encode(), digest_size=8).digest(), "little")


def identify(origin: Origin, generation: int, offset: int, rule: str) -> str:
    """The id of a match of `rule` on the line at `offset`.

    `origin`: device and inode that the line was written to. Of a record it is the cursor, which is enough.
    """
    if isinstance(origin, str):
        return f"lm-{hashlib.blake2b(f'{origin} {rule}'.encode(), digest_size=8).hexdigest()}"
    return f"lm-{lib.match_id(lib.match_seed(*origin, generation), offset, rule_hash(rule)):016x}"


def suppressed(path: str, rules: Sequence[CompiledRule], dropped: Iterable[Suppressed]) -> Iterator[LogSuppressed]:
    """What the rates of rules dropped, as it is told."""
    for each in dropped:
        yield LogSuppressed(
            path=path,
            rule=rules[each.rule].spec.id,
            count=each.dropped,
            first_offset=each.first_offset,
            last_offset=each.last_offset,
        )


def shown(text: bytes) -> str:
    """Bytes of a log as text; what is not UTF-8 shows as \\xNN."""
    return text.decode(errors="backslashreplace")


def told(
    rule: CompiledRule,
    path: str,
    origin: Origin,
    generation: int,
    offset: int,
    text: bytes,
    captures: Captures,
    flags: int,
    *,
    line: int | None = None,
    count: int = 1,
    suppressed: int = 0,
    around: Around | None = None,
    is_cut: bool = False,
    run: str | None = None,
    test: str | None = None,
) -> LogMatched:
    """The event of a match on the line at `offset`. `text` is the line, or the window that matched.

    `is_cut`: what `around` was looked for in ended before the search did.
    """
    spec = rule.spec
    words = _WORDS[flags & (PARTIAL | WINDOW)]
    if b"\0" in text:
        words = (*words, "nul")
    try:
        readable = text.decode()
    except UnicodeDecodeError:
        readable, words = shown(text), (*words, "invalid_utf8")
    return LogMatched(
        id=identify(origin, generation, offset, spec.id),
        path=path,
        generation=generation,
        offset=offset,
        length=len(text),
        line=line,
        rule=spec.id,
        severity=spec.severity,
        class_=spec.class_,
        class_by="rule" if spec.class_ else None,
        confidence=1.0 if spec.class_ else None,
        text=readable,
        captures={name: None if value is None else shown(value) for name, value in captures.items()},
        count=count,
        suppressed=suppressed,
        flags=words,
        context=around and _around(around, is_cut),
        run=run,
        test=test,
    )


def classed(event: LogMatched, guess: Guess | None) -> LogMatched:
    """The event with the guess, to four digits, where its rule says no class.

    A line that is guessed to be normal has no class, and `class_by` and `confidence` say who thinks so.
    """
    if event.class_ is not None or guess is None:
        return event
    return replace(event, class_=guess.class_, class_by=guess.by, confidence=round(guess.confidence, 4))


def wants_context(rule: CompiledRule) -> bool:
    """Is something to be looked for before a match of it?"""
    return bool(rule.spec.context.before or rule.until)


def finish(search: Search[T], answer: Callable[[Ask | Size], bytes | int | None]) -> T:
    """Run a search to its end; `answer` has the bytes and the sizes that it asks for."""
    try:
        wish = next(search)
        while True:
            wish = search.send(answer(wish))
    except StopIteration as end:
        found: T = end.value
        return found


def _around(around: Around, is_cut: bool) -> LogAround:
    return LogAround(
        found=around.found,
        anchors=tuple(LogAnchor(anchor.place.offset, shown(anchor.text)) for anchor in around.anchors),
        before=tuple(map(shown, around.before)),
        elided=around.elided,
        looked=around.looked,
        limit_errors=around.limit_errors,
        cut=is_cut,
    )
