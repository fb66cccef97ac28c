"""The scanner against PCRE2 alone: random rules, lines, engines, samples and block sizes."""

import random

from hypothesis import given
from hypothesis import strategies as st

from agent.core.engine import available_engines
from agent.logs.literals import clauses
from agent.logs.regex import Matcher, Regex, RegexError
from agent.logs.scanner import LIMIT, End, Scanner, Worker
from tests.patterns import line, pattern

MATCHER = Matcher()
Row = tuple[int, int, tuple[bytes | None, ...]]


def scanned(scanning: Worker, block: bytes, step: int) -> list[Row]:
    """(offset of the line, rule, captures) of all matches, the block read in steps as from a file."""
    found: list[Row] = []
    at, size = 0, step
    while at < len(block):
        part = block[at : at + size]
        is_last = at + size >= len(block)
        result = scanning.scan(part, end=End.LINE if is_last else End.OPEN)
        for match in result:
            if not match.flags & LIMIT:
                text = part[match.line_at :]
                spans = result.spans(match)
                captures = tuple(None if span is None else text[span[0] : sum(span)] for span in spans)
                found.append((at + match.line_at, match.rule, captures))
        at += result.consumed
        size = step if result.consumed else size + step  # a line longer than the step
    return found


def expected(regexes: list[Regex], block: bytes) -> list[Row]:
    rows: list[Row] = []
    at = 0
    for text in split(block):
        for rule, regex in enumerate(regexes):
            captures = MATCHER.match(regex, text.removesuffix(b"\n").removesuffix(b"\r"))
            if captures is not None:
                rows.append((at, rule, tuple(captures.values())))
        at += len(text)
    return rows


def split(block: bytes) -> list[bytes]:
    """Lines with their LF; splitlines takes other characters for line ends too."""
    lines = block.split(b"\n")
    return [text + b"\n" for text in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


@given(
    rng=st.randoms(use_true_random=False),
    count=st.sampled_from([1, 2, 5, 40, 150]),
    engine=st.sampled_from(list(available_engines().values())),
    step=st.integers(1, 300),
)
def test_every_rule_on_every_line(rng: random.Random, count: int, engine: int, step: int) -> None:
    regexes, found, texts = [], [], []
    for _ in range(count):
        regex, text = pattern(rng)
        utf = rng.random() < 0.2
        try:
            regexes.append(Regex(regex, utf=utf, interpret=rng.random() < 0.1))
        except RegexError:
            continue
        found.append(clauses(regex, utf=utf))
        texts.append(text)
    block = b"\n".join(line(rng, texts) for _ in range(rng.randrange(20))) + rng.choice([b"", b"\n", b"\r\n"])
    scanning = Worker(Scanner(regexes, found, rng.choice([b"", block, b"error at rack\n" * 500]), engine))
    assert scanned(scanning, block, step) == expected(regexes, block)
