"""Which strings must be in a line that a regex matches? Found by a conservative parser of PCRE2's syntax of our own.

A clause is a set of literals one of which stands in every line that the regex matches. What the parser does not know
yields none (look-around that denies, conditions, back-references, verbs, all that may be absent), so a clause may be
missing, but is never wrong. Of a regex's clauses the scanner searches for the one that costs least.

Source: protocols/logs.md 3, "Literals".
"""

import itertools
import re
from collections import Counter
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from agent._native import ffi, lib

if TYPE_CHECKING:
    from agent._native import CData

LITERAL_MIN, LITERAL_MAX = 2, 64  # bytes; native/native.h

MAX_STRINGS = 24  # alternatives that are written out; more cost the prefilter more than they tell
MAX_CLASS = 4  # members of a character class that are written out
MAX_DEPTH = 100  # parentheses in each other
MAX_TEXT = 256  # bytes that a repetition is written out to


class Literal(NamedTuple):
    """A string to search for; `caseless`: ASCII letters in either case, and then in lower case here."""

    text: bytes
    caseless: bool = False


Clause = tuple[Literal, ...]
Strings = tuple[Literal, ...]

_EMPTY: Strings = (Literal(b""),)


class _Part(NamedTuple):
    """What is known of a part of a regex.

    `exact`: all that it matches; None: not to be listed. Then `first` and `last` say what each match begins and ends
    with. `clauses` hold in any case. `is_void`: it matches nothing, for no line holds the LF that it wants.
    """

    exact: Strings | None
    first: Strings = _EMPTY
    last: Strings = _EMPTY
    clauses: tuple[Clause, ...] = ()
    is_void: bool = False

    @property
    def head(self) -> Strings:
        return self.first if self.exact is None else self.exact

    @property
    def tail(self) -> Strings:
        return self.last if self.exact is None else self.exact


_NOTHING_WIDE = _Part(_EMPTY)
_ANYTHING = _Part(None)
_VOID = _Part(None, is_void=True)


class _Unknown(Exception):
    """Syntax that may change the meaning of what stands around it."""


def clauses(pattern: str, *, utf: bool = False) -> list[Clause]:
    """The clauses of a regex that PCRE2 compiles. Each literal has LITERAL_MIN to LITERAL_MAX bytes and no LF."""
    part = _read(pattern, utf)
    whole = () if part.exact is None else (part.exact,)
    found = (_clause(strings) for strings in (*part.clauses, *whole))
    return list(dict.fromkeys(clause for clause in found if clause))


def may_match_a_line(pattern: str, *, utf: bool = False) -> bool:
    r"""May a regex that PCRE2 compiles match a text without LF? Not so of `a\nb`, where each match would hold one."""
    return not _LF.search(pattern) or not _read(pattern, utf).is_void


def _read(pattern: str, utf: bool) -> _Part:
    text = pattern if utf else pattern.encode().decode("latin-1")  # a character is what PCRE2 takes for one
    try:
        return _Parser(_unquoted(text), utf).run()
    except _Unknown:
        return _ANYTHING


def _clause(strings: Strings) -> Clause:
    """The strings as a clause; () where one is too short. What holds another of them is left out."""
    cut = [Literal(string.text[:LITERAL_MAX], string.caseless) for string in strings]
    literals = {Literal(literal.text.lower(), True) if literal.caseless else literal for literal in cut}
    if any(len(literal.text) < LITERAL_MIN for literal in literals):
        return ()
    by_size = sorted(literals, key=lambda literal: (len(literal.text), literal))
    kept: list[Literal] = []
    for literal in by_size:
        if not any(_holds(literal, other) for other in kept):
            kept.append(literal)
    return tuple(kept)


def _holds(literal: Literal, inner: Literal) -> bool:
    """Is `inner` found wherever `literal` is?"""
    if inner.caseless:
        return inner.text in literal.text.lower()
    return not literal.caseless and inner.text in literal.text


_QUOTED = re.compile(r"\\Q(.*?)(?:\\E|\Z)|\\E|(\\?.)", re.DOTALL)


def _unquoted(pattern: str) -> str:
    r"""The pattern with \Q...\E written as escapes."""
    if "\\E" not in pattern and "\\Q" not in pattern:
        return pattern
    if "#" in pattern:
        raise _Unknown  # a comment may hold half a quotation

    def escape(found: re.Match[str]) -> str:
        if found[2]:
            return found[2]
        return re.sub(r"([^A-Za-z0-9])", r"\\\1", found[1] or "")

    return _QUOTED.sub(escape, pattern)


_PLAIN = re.compile(r"[A-Za-z0-9 _/:;,=@%&'\"<>!-]+(?![*+?{]|\(\?#)")  # characters, none of them repeated
_REPEAT = re.compile(r"(?:[*+?]|\{(\d+)(,)?(\d*)\})[?+]?")
_ODD_REPEAT = re.compile(r"\{[\d\s,]*\}")  # a quantifier since PCRE2 10.43, text before
_RECURSION = re.compile(r"(?:R|[+-]?\d+|&\w+|P>\w+|P=\w+)\)")
_NAME = re.compile(r"P?<\w+>|'\w+'")
_FLAGS = re.compile(r"(\^?)([imsxnJUa]*)(?:-([imsxnJUa]*))?([:)])")
_ESCAPED = re.compile(
    r"""
      (?P<hex>x(?:\{[0-9a-fA-F]+\}|[0-9a-fA-F]{0,2}))
    | (?P<octal>o\{[0-7]+\}|0[0-7]{0,2})
    | c(?P<control>[ -~])
    | N\{U\+(?P<point>[0-9a-fA-F]+)\}
    | (?P<refer>[1-9]\d*|[gk](?:\{[^}]*\}|<[^>]*>|'[^']*'|[+-]?\d+))
    | (?P<kind>[pP](?:\{[^}]*\}|[A-Za-z])|[dDwWsShHvVNRXC])
    | (?P<nowhere>[bBAzZGK])
    | (?P<letter>[aefnrt])
    | (?P<other>[^A-Za-z0-9])
    """,
    re.VERBOSE | re.DOTALL,
)
_LF = re.compile(r"\n|\\[nxoc0N]")  # what may stand for it
_LETTERS = {"a": "\a", "e": "\x1b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
_POSIX = re.compile(r"\[:\^?\w+:\]")
_SPACE = " \t\n\v\f\r"
_UNICODE_SPACE = "\x85\u200e\u200f\u2028\u2029"  # ignored too by (?x), in UTF mode only


class _Parser:
    """Walks a pattern once and joins what is known of its parts on the way."""

    def __init__(self, pattern: str, utf: bool) -> None:
        self.text, self.utf = pattern, utf
        self.at, self.depth = 0, 0
        self.flags: frozenset[str] = frozenset()

    def run(self) -> _Part:
        part = self._alternatives()
        if self.at < len(self.text):
            raise _Unknown
        return part

    def _take(self, what: re.Pattern[str]) -> re.Match[str] | None:
        found = what.match(self.text, self.at)
        if found:
            self.at = found.end()
        return found

    def _accept(self, text: str) -> bool:
        if not self.text.startswith(text, self.at):
            return False
        self.at += len(text)
        return True

    def _peek(self) -> str:
        return self.text[self.at : self.at + 1]

    def _next(self) -> str:
        if self.at >= len(self.text):
            raise _Unknown
        self.at += 1
        return self.text[self.at - 1]

    def _skip(self) -> None:
        """What (?x) ignores, and comments: a quantifier behind them belongs to what is before."""
        while True:
            if self._accept("(?#"):
                end = self.text.find(")", self.at)
            elif "x" in self.flags and self._peek() and self._peek() in _SPACE:
                end = self.at
            elif "x" in self.flags and self.utf and self._peek() and self._peek() in _UNICODE_SPACE:
                raise _Unknown
            elif "x" in self.flags and self._peek() == "#":
                end = self.text.find("\n", self.at)
                end = len(self.text) - 1 if end < 0 else end
            else:
                return
            if end < 0:
                raise _Unknown
            self.at = end + 1

    def _alternatives(self) -> _Part:
        """Up to the end of the group. Flags set in one alternative hold in the next."""
        parts = [self._sequence()]
        while self._accept("|"):
            parts.append(self._sequence())
        return _either(parts)

    def _sequence(self) -> _Part:
        join = _Join()
        while True:
            self._skip()
            if not self._peek() or self._peek() in "|)":
                return join.end()
            if not self.flags & {"i", "x"} and (plain := self._take(_PLAIN)):
                join.add(_Part((Literal(plain[0].encode()),)))
                continue
            part = self._atom()
            self._skip()
            while True:
                if found := self._take(_REPEAT):
                    part = _repeat(part, *_bounds(found))
                elif self._take(_ODD_REPEAT):
                    part = _ANYTHING
                else:
                    break
                self._skip()
            join.add(part)

    def _atom(self) -> _Part:
        match char := self._next():
            case "(":
                return self._group()
            case "[":
                return self._class()
            case "\\":
                return self._escape()
            case ".":
                return _ANYTHING
            case "^" | "$":
                return _NOTHING_WIDE
            case "*" | "+" | "?":
                raise _Unknown  # follows nothing
            case _:
                return self._chars({char})

    def _group(self) -> _Part:
        self.depth += 1
        outer = self.flags
        if self.depth > MAX_DEPTH or self._peek() == "*":
            raise _Unknown
        if not self._accept("?"):
            part = self._alternatives()
        elif self._take(_RECURSION):
            self.depth -= 1
            return _ANYTHING
        elif self._accept("<=") or self._accept("="):
            inner = self._alternatives()
            ahead = (*inner.clauses, *(() if inner.exact is None else (inner.exact,)))
            part = _Part(None, clauses=ahead, is_void=inner.is_void)
        elif any(map(self._accept, ("<!", "!", "<*", "*"))):
            self._alternatives()
            part = _ANYTHING
        elif any(map(self._accept, (":", "|", ">"))) or self._take(_NAME):
            part = self._alternatives()
        elif self._accept("("):
            part = self._condition()
        elif found := self._take(_FLAGS):
            self.flags = frozenset() if found[1] else self.flags
            self.flags = (self.flags | set(found[2])) - set(found[3] or "")
            if found[4] == ")":  # for the rest of the group around
                self.depth -= 1
                return _NOTHING_WIDE
            part = self._alternatives()
        else:
            raise _Unknown
        if not self._accept(")"):
            raise _Unknown
        self.depth -= 1
        self.flags = outer
        return part

    def _condition(self) -> _Part:
        """(?(condition)yes|no): nothing is known of it, but where it ends."""
        if self._peek() in ("?", "*"):
            self._group()
        else:
            end = self.text.find(")", self.at)
            if end < 0:
                raise _Unknown
            self.at = end + 1
        self._alternatives()
        return _ANYTHING

    def _escape(self) -> _Part:
        char = self._escaped()
        return char if isinstance(char, _Part) else self._chars({char})

    def _escaped(self) -> str | _Part:
        """The character that an escape stands for, or what is known of it."""
        found = self._take(_ESCAPED)
        if not found:
            raise _Unknown
        match found.lastgroup:
            case "hex":
                return self._char(int(found["hex"][1:].strip("{}") or "0", 16))
            case "octal":
                return self._char(int(found["octal"].strip("o{}"), 8))
            case "control":
                return chr(ord(found["control"].upper()) ^ 64)
            case "point":
                return self._char(int(found["point"], 16))
            case "letter":
                return _LETTERS[found["letter"]]
            case "other":
                return found["other"]
            case "nowhere":
                return _NOTHING_WIDE
            case _:
                return _ANYTHING

    def _char(self, code: int) -> str:
        if code > (0x10FFFF if self.utf else 255) or 0xD800 <= code < 0xE000:
            raise _Unknown
        return chr(code)

    def _class(self) -> _Part:
        members: set[str] = set()
        is_wide = self._accept("^")
        previous = ""  # a range may begin with it
        is_first = True
        while is_first or self._peek() != "]":
            is_first = False
            if self._take(_POSIX):
                is_wide, previous = True, ""
                continue
            if previous and self._peek() == "-" and self.text[self.at + 1 : self.at + 2] not in ("]", "["):
                self.at += 1
                end = self._member()
                if isinstance(end, _Part) or not 0 <= ord(end) - ord(previous) < 2 * MAX_CLASS:
                    is_wide = True
                else:
                    members |= {chr(code) for code in range(ord(previous), ord(end) + 1)}
                previous = ""
                continue
            member = self._member()
            # (?xx) ignores blanks here too; a range up to "[" may be none
            if isinstance(member, _Part) or ("x" in self.flags and member in " \t") or member == "[":
                is_wide, previous = True, ""
            else:
                members.add(member)
                previous = member
        self.at += 1
        return _ANYTHING if is_wide or not members else self._chars(members)

    def _member(self) -> str | _Part:
        char = self._next()
        if char != "\\":
            return char
        return "\b" if self._accept("b") else self._escaped()

    def _chars(self, members: set[str]) -> _Part:
        """One character out of these."""
        strings: set[Literal] = set()
        for char in members:
            is_letter = char.isascii() and char.isalpha()
            if "i" in self.flags and self.utf and (not char.isascii() or char in "kKsS"):
                return _ANYTHING  # K and s have a third form each: the Kelvin sign, the long s
            if char == "\n":
                return _ANYTHING if len(members) > 1 else _VOID
            if is_letter and ("i" in self.flags or char.swapcase() in members):
                strings.add(Literal(char.lower().encode(), True))
            else:
                strings.add(Literal(char.encode("utf-8" if self.utf else "latin-1")))
        return _Part(tuple(sorted(strings))) if len(strings) <= MAX_CLASS else _ANYTHING


class _Join:
    """Joins the parts of a sequence.

    Two runs of strings that each match ends with so far: one multiplies by the alternatives it meets, one begins anew
    at each. What they were when they end are clauses: one long string for each combination, or few strings.
    """

    def __init__(self) -> None:
        self.wide: Strings = _EMPTY
        self.plain: Strings = _EMPTY
        self.is_exact = True
        self.is_void = False
        self.first: Strings | None = None
        self.found: list[Clause] = []

    def add(self, part: _Part) -> None:
        self.found += part.clauses
        self.is_void = self.is_void or part.is_void
        if part.exact is None:
            self._flush(_cross(self.wide, part.first), part.last)
            self._flush_plain(_cross(self.plain, part.first), part.last if len(part.last) == 1 else _EMPTY)
            return
        if len(part.exact) > 1:
            self.found.append(self.wide)
            self._flush_plain(self.plain, _EMPTY)
        else:
            self.plain = _cross(self.plain, part.exact) or part.exact
        longer = _cross(self.wide, part.exact)
        if longer:
            self.wide = longer
        else:
            self._flush(self.wide, part.exact)

    def _flush(self, clause: Strings | None, last: Strings) -> None:
        """The wide run ends here, and the next begins with `last`."""
        self.found.append(clause or self.wide)
        if self.is_exact:
            self.first, self.is_exact = clause or self.wide, False
        self.wide = last

    def _flush_plain(self, clause: Strings | None, last: Strings) -> None:
        self.found.append(clause or self.plain)
        self.plain = last

    def end(self) -> _Part:
        if self.is_exact:
            found = tuple(dict.fromkeys(filter(_is_useful, (*self.found, self.plain))))
            return _Part(self.wide, clauses=found)
        found = tuple(dict.fromkeys(filter(_is_useful, (*self.found, self.plain, self.wide))))
        return _Part(None, self.first or _EMPTY, self.wide, found, self.is_void)


def _is_useful(clause: Clause) -> bool:
    return all(len(literal.text) >= LITERAL_MIN for literal in clause)


def _cross(left: Strings, right: Strings) -> Strings | None:
    """Each of the left before each of the right; None: too many, or too long."""
    if len(left) * len(right) > MAX_STRINGS or len(left[0].text) + len(right[0].text) > 2 * MAX_TEXT:
        return None
    return tuple(Literal(a.text + b.text, a.caseless or b.caseless) for a, b in itertools.product(left, right))


def _either(parts: Sequence[_Part]) -> _Part:
    if len(parts) == 1:
        return parts[0]
    exact = {s for part in parts if part.exact is not None for s in part.exact}
    if len(exact) <= MAX_STRINGS and all(part.exact is not None for part in parts):
        return _Part(tuple(sorted(exact)))
    known = [(*part.clauses, *([part.exact] if part.exact else [])) for part in parts]
    best = [min(options, key=_rough_cost, default=()) for options in known]
    union: Clause = tuple(sorted({literal for clause in best for literal in clause}))
    is_known = all(clause and _is_useful(clause) for clause in best)
    heads = {s for part in parts for s in part.head}
    tails = {s for part in parts for s in part.tail}
    return _Part(
        None,
        tuple(sorted(heads)) if len(heads) <= MAX_STRINGS else _EMPTY,
        tuple(sorted(tails)) if len(tails) <= MAX_STRINGS else _EMPTY,
        (union,) if is_known and len(union) <= MAX_STRINGS else (),
        all(part.is_void for part in parts),
    )


def _rough_cost(clause: Clause) -> float:
    """Without knowing the text: few and long are good."""
    return sum(256.0 ** -min(len(literal.text), 8) for literal in clause) + 1e-9 * len(clause)


def _bounds(found: re.Match[str]) -> tuple[int, int | None]:
    """The least and the most of a quantifier; None: no bound."""
    if found[1] is None:
        return {"*": (0, None), "+": (1, None), "?": (0, 1)}[found[0][0]]
    low = int(found[1])
    return low, (None if found[2] and not found[3] else int(found[3] or low))


def _repeat(part: _Part, low: int, high: int | None) -> _Part:
    if low == 0:
        if high != 1 or part.exact is None or len(part.exact) >= MAX_STRINGS:
            return _ANYTHING
        return _Part(tuple(sorted({*part.exact, *_EMPTY})))
    if part.exact is None:
        return part if (low, high) == (1, 1) else _Part(None, part.first, part.last, part.clauses, part.is_void)
    whole: Strings = part.exact
    for _ in range(min(low, MAX_TEXT) - 1):
        longer = _cross(whole, part.exact)
        if not longer or len(longer[0].text) > MAX_TEXT:
            return _Part(None, whole, whole, (*part.clauses, whole))
        whole = longer
    if low == high:
        return _Part(whole, clauses=part.clauses)
    return _Part(None, whole, whole, (*part.clauses, whole))


# ------------------------------------------------------------------------------------------------- choosing


# Nanoseconds, measured on 2.6 GHz: what a literal costs for each byte searched, because the prefilter must tell it from
# the text; what it costs each time that it is found; what a rule's regex costs then.
FILTER_NS, FOUND_NS, CONFIRM_NS = 0.0007, 30.0, 150.0
SHORT = {2: 120.0, 3: 40.0, 4: 12.0, 5: 6.0}  # so much more does a literal of that size cost the prefilter
PASSES = 3
ONCE_IN = 1 << 16  # bytes: what no sample shows is taken for as rare as that
SAMPLE_MAX = 1 << 18  # bytes looked at


def native_literals(literals: Collection[Literal]) -> tuple["CData", "CData"]:
    """They as native functions take them, and their text, which is to be kept as long."""
    text = ffi.from_buffer("uint8_t[]", b"".join(literal.text for literal in literals))
    starts = itertools.accumulate((len(literal.text) for literal in literals), initial=0)
    rows = [(text + at, len(known.text), known.caseless) for at, known in zip(starts, literals, strict=False)]
    return ffi.new("struct literal[]", rows), text


class Frequencies:
    """How often literals stand in text like a sample, letters in either case."""

    def __init__(self, sample: bytes) -> None:
        self.sample = sample[:SAMPLE_MAX]

    def rates(self, literals: Collection[Literal]) -> dict[Literal, float]:
        """Occurrences in a byte of text. What the sample lacks is rarer the longer it is. Raises MemoryError."""
        rows, _text = native_literals(literals)
        counts = ffi.new("uint32_t[]", len(literals))
        if not lib.literal_counts(rows, len(literals), self.sample, len(self.sample), counts):
            raise MemoryError
        return {
            literal: (found + 1 / (4 + len(literal.text))) / (len(self.sample) + ONCE_IN)
            for literal, found in zip(literals, counts, strict=True)
        }


def choose(rules: Sequence[Sequence[Clause]], frequencies: Frequencies) -> list[Clause]:
    """For each rule, given by its clauses, what to search for. A rule without clauses gets (): it is slow.

    A literal that several rules can use costs the prefilter only once, so what rules share is preferred; what is found
    often costs each rule that uses it.
    """
    users = Counter(literal for clauses in rules for literal in {literal for clause in clauses for literal in clause})
    rates = frequencies.rates(users)

    def cost(clause: Clause, users: Counter[Literal]) -> float:
        total = 0.0
        for literal in clause:
            share = FILTER_NS * SHORT.get(len(literal.text), 1.0) / max(1, users[literal])
            total += share + rates[literal] * (FOUND_NS + CONFIRM_NS)
        return total

    chosen: list[Clause] = [()] * len(rules)
    for _ in range(PASSES):
        chosen = [min(clauses, key=lambda clause: cost(clause, users), default=()) for clauses in rules]
        users = Counter(literal for clause in chosen for literal in clause)
    return chosen
