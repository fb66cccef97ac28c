"""Random PCRE2 patterns, each with a text that it probably matches: for the tests of literals and scanner."""

import random
from collections.abc import Callable

WORDS = ["ab", "error", "Timeout", "rc=", "blk_", "x", "ABC", "é", "日本", "  ", "-", "skip", "0x"]
CLASSES = [
    *(
        ("[abc]", "b"),
        ("[a-c]", "c"),
        ("[^x]", "q"),
        (r"\d", "7"),
        (r"[\d_]", "_"),
        (r"\w", "w"),
        (".", "z"),
        ("[]a]", "]"),
    ),
    *(
        (r"[a\-c]", "-"),
        ("[a-]", "-"),
        ("[[:alpha:]x]", "k"),
        ("[eE]", "E"),
        ("[Tt]", "t"),
        (r"\S", "!"),
        (r"[\x41-\x43]", "B"),
    ),
]
ESCAPES = [
    (r"\.", "."),
    (r"\x41", "A"),
    (r"\x{42}", "B"),
    (r"\t", "\t"),
    (r"\Qa.b\E", "a.b"),
    (r"\103", "C"),
    (r"\[", "["),
]
EMPTY = ["^", "$", r"\b", r"\B", r"\A", r"\K", "(?#comment)", "(?i)", "(?-i)", "(?x)", "(?s)", ""]
ODD = [
    *(("(?=error)", ""), ("(?!ab)", ""), ("(?<=b)", ""), ("(?<!zz)", ""), (r"\1", ""), ("(?(1)ab|rc=)", "ab")),
    *(("(*ACCEPT)", ""), ("(?:(?1))?", ""), (r"\g{1}", ""), ("(*COMMIT)", ""), ("{,2}", "{,2}"), ("(?|ab|(x))", "ab")),
    *((r"(?x: a b # c" + "\n)", "ab"), ("(?^:ab)", "ab"), ("(?>ab|a)", "ab"), (r"\N", "n"), (r"\R?", "")),
]
REPEATS = [
    ("*", 0),
    ("+", 2),
    ("?", 1),
    ("{2}", 2),
    ("{1,3}", 2),
    ("{0,2}", 0),
    ("{2,}", 3),
    ("+?", 1),
    ("*?", 1),
    ("?+", 1),
]

Piece = tuple[str, str]


def pattern(rng: random.Random) -> Piece:
    """A pattern, which PCRE2 may refuse, and a text."""
    names = iter(range(1000))

    def sequence(depth: int) -> Piece:
        pieces = [piece(depth) for _ in range(rng.randint(1, 4))]
        return "".join(regex for regex, _ in pieces), "".join(text for _, text in pieces)

    def alternatives(depth: int) -> Piece:
        pieces = [sequence(depth) for _ in range(rng.choice([1, 1, 2, 3]))]
        return "|".join(regex for regex, _ in pieces), rng.choice(pieces)[1]

    def group(depth: int) -> Piece:
        regex, text = alternatives(depth - 1)
        opening = rng.choice(["(?:", "(", f"(?<g{next(names)}>", f"(?P<g{next(names)}>", "(?i:", "(?>", "(?|"])
        return f"{opening}{regex})", text.swapcase() if opening == "(?i:" and text.isascii() else text

    def piece(depth: int) -> Piece:
        kinds: list[Callable[[], Piece]] = [
            *[lambda: (word := rng.choice(WORDS), word)] * 4,
            *[lambda: rng.choice(CLASSES)] * 2,
            lambda: rng.choice(ESCAPES),
            lambda: (rng.choice(EMPTY), ""),
        ]
        if depth:
            kinds += [lambda: group(depth)] * 3
        if rng.random() < 0.1:
            kinds = [lambda: rng.choice(ODD)]
        regex, text = rng.choice(kinds)()
        if rng.random() < 0.25 and regex:
            sign, times = rng.choice(REPEATS)
            return f"(?:{regex}){sign}" if rng.random() < 0.5 else f"{regex}{sign}", text * times
        return regex, text

    return alternatives(2)


def line(rng: random.Random, texts: list[str]) -> bytes:
    """A line, without its end, that holds one of the texts, or a spoiled one, or none."""
    kept = rng.choice(["", "Jan  5 host app[7]: ", "é日"]).encode()
    text = rng.choice(texts).encode() if texts and rng.random() < 0.8 else b""
    if text and rng.random() < 0.3:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice([b"", b"\xff", b"\x00", b"e"]) + text[at + 1 :]
    if rng.random() < 0.1:
        text = text.swapcase()
    tail = rng.choice([b"", b" end", b"\r", b"\xc3", bytes(rng.randrange(256) for _ in range(rng.randrange(40)))])
    return (kept + text + tail).replace(b"\n", b"")
