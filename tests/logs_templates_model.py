"""The miner in plain Python, word for word as native/words.c and native/miner.c say it, and without their bounds.

It knows no hashes and no buckets: where these forget nothing, both must find the same templates and give the same ids.
"""

import re
from collections import defaultdict
from typing import NamedTuple

SIGNS = frozenset(b"=:,()[]{}\"'|;<>")
BLANKS = frozenset([*range(0x21), 0x7F])
STOPS = SIGNS | BLANKS
PATH_ENDS = STOPS - frozenset(b":=")
QUOTED_MAX, LONG, WORDS, BYTES = 256, 64, 128, 1024
COLUMNS, HEAD, MEMBERS, ENOUGH, NAMED_ENOUGH, SETS = 32, 16, 8, 5, 3, 6
LAST, MANY, ALIKE, SWEPT = 8, 16, 4, 256

DATES = frozenset(
    b"Mon Tue Wed Thu Fri Sat Sun Monday Tuesday Wednesday Thursday Friday Saturday Sunday "
    b"Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec January February March April June July August "
    b"September October November December AM PM UTC GMT EST EDT CST CDT MST MDT PST PDT CET CEST".split()
)
UNITS = frozenset(
    b"B KB MB GB TB kB KiB MiB GiB TiB kb mb gb ns us ms s sec secs min mins hrs am pm Hz kHz MHz GHz "
    b"% bps Kbps Mbps Gbps".split()
)
DOMAINS = frozenset(b"com net org edu gov mil int info biz io arpa local lan localdomain internal".split())
NAMED = frozenset(
    b"user username account host hostname client server node device interface name file class id session "
    b"service process thread task job module domain group owner by from for".split()
)

_LETTER = re.compile(rb"[A-Za-z\x80-\xff]")
_HEX = re.compile(rb"[0-9A-Fa-f]+")
_SCHEME = re.compile(rb"://")


class Word(NamedTuple):
    """`kind`: a word of letters, a sign or word without, a sign that may stand between values, a value."""

    kind: str  # literal sign joiner value
    text: bytes
    has_blank: bool


VALUE = Word("value", b"<*>", False)
Pattern = tuple[Word, ...]
Key = tuple[bytes, ...]


def key_of(pattern: Pattern) -> Key:
    """What makes patterns the same: their words, without blanks; a run of dots is a run of dots."""
    return tuple(b"<*>" if word.kind == "value" else b".." if word.text[:2] == b".." else word.text for word in pattern)


# ---- words -----------------------------------------------------------------------------------------------------------


def is_host(word: bytes) -> bool:
    labels = word.removesuffix(b".").split(b".")
    if not labels[0] or not labels[-1] or len(labels) < 2:
        return False
    if len(labels) > 2 and len(labels[-1]) == 2:
        return bool(re.fullmatch(rb"[a-z]{2}", labels[-1]))
    return labels[-1] in DOMAINS


def is_value(word: bytes) -> bool:
    if re.search(rb"[0-9\\]", word) or word.count(b"/") > 1 or len(word) > LONG:
        return True
    if (b"@" in word and len(word) > 2) or (len(word) >= 8 and _HEX.fullmatch(word)) or is_host(word):
        return True
    return not is_text(word)


def is_text(word: bytes) -> bool:
    """UTF-8, by its shape."""
    at = 0
    while at < len(word):
        first = word[at]
        at += 1
        more = 0 if first < 0x80 else 1 if 0xC2 <= first < 0xE0 else 2 if first & 0xF0 == 0xE0 else 3
        if (more == 3 and first & 0xF8 != 0xF0) or more > len(word) - at:
            return False
        if any(byte & 0xC0 != 0x80 for byte in word[at : at + more]):
            return False
        at += more
    return True


def path_end(line: bytes, at: int) -> int:
    end = at + 1
    if at and line[at - 1] in b"\"'":
        quote = line.find(line[at - 1], end, end + QUOTED_MAX)
        if quote >= 0:
            return quote
    while end < len(line) and line[end] not in PATH_ENDS:
        end += 1
    while end > at + 1 and line[end - 1] in b":=.":
        end -= 1
    return end


def begins_path(rest: bytes) -> bool:
    if rest[:1] == b"/":
        return len(rest) > 1 and rest[1] not in STOPS
    return rest[:2] in (b"~/", b"./") or rest[:3] == b"../"


def sign(byte: int, has_blank: bool) -> Word:
    return Word("joiner" if byte in b":," else "sign", bytes([byte]), has_blank)


def words_of(line: bytes) -> list[Word]:
    words: list[Word] = []
    at, size, has_blank = 0, 0, True
    while True:
        while at < len(line) and line[at] in BLANKS:
            at, has_blank = at + 1, True
        if at == len(line):
            return joined(words)
        if len(words) >= WORDS - 2 or size >= BYTES:
            words.append(Word("value", line[at:], has_blank))
            return joined(words)
        byte, start = line[at], at
        if byte in b"<>" and has_blank and line[at + 1 : at + 2].isdigit():
            at = start = at + 1
        elif line[at : at + 3] == b"<*>":
            words.append(Word("value", b"<*>", has_blank))
            at, has_blank, size = at + 3, False, size + 4
            continue
        elif byte in STOPS:
            words.append(sign(byte, has_blank))
            if line[at : at + 2] == b"()" and has_blank:
                words.append(Word("value", b"", False))
            at, has_blank, size = at + 1, False, size + 2
            continue
        if byte in b"/~." and begins_path(line[at:]):
            at = path_end(line, at)
            is_varying = True
        else:
            while at < len(line) and line[at] not in STOPS and line[at : at + 2] != b"..":
                at += 1
            if at == start:
                while at < len(line) and line[at] == ord("."):
                    at += 1
                words.append(Word("sign", b".." + line[start + 2 : at], has_blank))
                has_blank, size = False, size + min(LONG, at - start) + 1
                continue
            is_scheme = _SCHEME.match(line, at) or (line[at : at + 2] == b":\\" and at == start + 1)
            if is_scheme and _LETTER.search(line[start:at]):
                at = path_end(line, at)
                is_varying = True
            else:
                is_varying = is_value(line[start:at])
        text = line[start:at]
        kind = "value" if is_varying else "literal" if _LETTER.search(text) else "sign"
        words.append(Word(kind, text, has_blank))
        size += (3 if is_varying else len(text)) + 1
        has_blank = False


def is_pair(word: Word) -> bool:
    return word.kind == "value" or (len(word.text) in (2, 4) and bool(_HEX.fullmatch(word.text)))


def joined(words: list[Word]) -> list[Word]:
    """What stands beside values may belong to them."""
    end = Word("joiner", b"", False)
    words = [*words, end, end, end]
    for n in range(len(words) - 3):
        word, *range_of = words[n : n + 4]
        is_range = key_of(tuple(range_of)) == (b"[", b"<*>", b"]") and not range_of[0].has_blank
        if word.kind == "literal" and word.text[-1:] in (b"-", b"_") and is_range:
            words[n : n + 4] = [each._replace(kind="value") for each in words[n : n + 4]]
    for n in range(len(words) - 3):
        word, after, next = words[n : n + 3]
        if word.kind not in ("literal", "sign") or len(word.text) > 9:
            continue
        behind, before = n > 0 and words[n - 1].kind == "value", after.kind == "value"
        found = False
        if word.kind == "sign":
            is_one = len(word.text) == 1 and word.text[0] in STOPS
            found = behind and (before or word.text == b"%") and not is_one
        else:
            begins = after.kind == "literal" and len(after.text) <= 9 and next.kind == "value"
            if word.text in UNITS and behind:
                found = True
            if word.text in DATES and (behind or before or (begins and after.text in DATES)):
                found = True
            if not found and is_pair(word) and len(word.text) in (2, 4):
                is_behind = (
                    n > 1 and not word.has_blank and words[n - 1].kind == "joiner" and words[n - 2].kind == "value"
                )
                is_before = (
                    after.kind == "joiner"
                    and not after.has_blank
                    and not next.has_blank
                    and next.kind != "joiner"
                    and is_pair(next)
                )
                found = is_behind or is_before
        if found:
            words[n] = word._replace(kind="value")
    return words[:-3]


def folded(words: list[Word] | Pattern, wild: frozenset[int] = frozenset()) -> Pattern:
    out: list[Word] = []
    for n, word in enumerate(words):
        if n in wild:
            word = word._replace(kind="value")
        if word.kind == "value" and out:
            if out[-1].kind == "value":
                continue
            if len(out) > 1 and out[-1].kind == "joiner" and out[-2].kind == "value":
                out.pop()
                continue
        out.append(word)
    return tuple(out)


def text_of(pattern: Pattern) -> bytes:
    text = b""
    for n, word in enumerate(pattern):
        text += b" " if n and word.has_blank else b""
        text += b"<*>" if word.kind == "value" else word.text[:LONG]
    return text


# ---- mining ----------------------------------------------------------------------------------------------------------


class _Kind:
    """Lines of one length and first word."""

    def __init__(self) -> None:
        self.sets: list[frozenset[int]] = []
        self.stored = 0
        self.made: list[int] = []


class Model:
    """Mines lines, one by one."""

    def __init__(self) -> None:
        self.patterns: dict[int, Pattern] = {}  # by id, the least recently seen first
        self.counts: dict[int, int] = {}
        self.became: dict[int, int] = {}
        self._next = 1
        self._by_key: dict[Key, int] = {}
        self._known: dict[Key, int] = {}
        self._notes: defaultdict[Key, list[tuple[bytes, int]]] = defaultdict(list)
        self._kinds: defaultdict[tuple[int, bytes], _Kind] = defaultdict(_Kind)

    def mine(self, line: bytes) -> int:
        pattern = folded(words_of(line))
        id = self._find(pattern)
        if id is None:
            id = self._next
            self._next += 1
            self._put(id, pattern)
            self.counts[id] = 0
            id = self._learn(id, pattern)
        self._known[key_of(pattern)] = id
        self.counts[id] += 1
        self.patterns[id] = self.patterns.pop(id)
        return id

    def resolve(self, id: int) -> int:
        while id in self.became:
            id = self.became[id]
        return id

    def text(self, id: int) -> bytes:
        return text_of(self.patterns[self.resolve(id)])

    def _find(self, pattern: Pattern) -> int | None:
        key = key_of(pattern)
        known = self._known.get(key)
        if known is not None and known not in self.became:
            return known
        if key in self._by_key:
            return self._by_key[key]
        for wild in self._kinds[kind_of(pattern)].sets:
            if (found := self._by_key.get(key_of(folded(pattern, wild)))) is not None:
                return found
        return None

    def _put(self, id: int, pattern: Pattern) -> None:
        self.patterns[id] = pattern
        self._by_key[key_of(pattern)] = id

    def _learn(self, id: int, pattern: Pattern) -> int:
        kind: _Kind | None = self._kinds[kind_of(pattern)]
        key = key_of(pattern)
        noted = [self.resolve(member) for _, member in self._notes[key]]
        if fitting := [other for other in noted if other != id and self._may_be(other, key)]:
            id = self._join(pattern, fitting, id)
        while True:
            best: list[tuple[bytes, int]] = []
            wild: frozenset[int] = frozenset()
            for columns, word, enough in to_note(pattern):
                key = key_of(folded(pattern, columns))
                beside = self._by_key.get(key)
                if not best and beside not in (None, id) and enough < MEMBERS:
                    best, wild = [(b"", beside)], columns
                notes = self._note(key, word, id)
                if len(notes) >= enough and len(notes) > len(best):
                    best, wild = notes, columns
            is_alike = False
            members = [member for _, member in best]
            if kind:
                if not best and len(kind.made) >= MANY:
                    members, wild = self._alike(pattern, kind, id)
                    is_alike = bool(members)
                kind.made.append(id)
                kind = None
            if not members:
                return id
            here = self._kinds[kind_of(pattern)]
            if wild not in here.sets:
                here.sets = [*here.sets[: here.stored % SETS], wild, *here.sets[here.stored % SETS + 1 :]]
                here.stored += 1
            joint = folded(pattern, wild)
            if is_alike:
                self.patterns[id] = self.patterns.pop(id)
                id = self._join(joint, members, min(self._swept(pattern, wild)))
                for other in self._swept(pattern, wild):
                    if other != id:
                        self._absorb(id, other)
            else:
                id = self._join(joint, members, id)
                best.clear()
            pattern = joint

    def _may_be(self, id: int, key: Key) -> bool:
        its = self.patterns[id]
        return any(enough < MEMBERS and key_of(folded(its, columns)) == key for columns, _, enough in to_note(its))

    def _note(self, key: Key, word: bytes, id: int) -> list[tuple[bytes, int]]:
        """What was noted for it; nothing, where the word is one that is known there."""
        notes = self._notes[key]
        if any(word == noted for noted, _ in notes):
            return []
        if len(notes) < MEMBERS:
            notes.append((word, id))
        return notes

    def _alike(self, pattern: Pattern, kind: _Kind, id: int) -> tuple[list[int], frozenset[int]]:
        first, message = head_of(pattern)
        literals = sum(word.kind == "literal" for word in pattern)
        members: list[int] = []
        differing: set[int] = set()
        for made in kind.made[-LAST:]:
            other = self.patterns[self.resolve(made)]
            if self.resolve(made) == id or len(other) != len(pattern):
                continue
            theirs = {n for n, (a, b) in enumerate(zip(key_of(pattern), key_of(other), strict=True)) if a != b}
            fits = all(
                n not in (first, message) and pattern[n].kind == "literal" and other[n].kind in ("literal", "value")
                for n in theirs
            )
            same = sum(word.kind == "literal" for n, word in enumerate(other) if n not in theirs)
            if fits and 5 * same >= 3 * literals:
                members.append(made)
                differing |= theirs
        if len(members) < ALIKE or 2 * len(differing) > literals:
            return [], frozenset()
        return members, frozenset(differing)

    def _swept(self, pattern: Pattern, wild: frozenset[int]) -> list[int]:
        key = key_of(folded(pattern, wild))
        return [
            id
            for id, other in list(reversed(self.patterns.items()))[:SWEPT]
            if len(other) == len(pattern) and key_of(folded(other, wild)) == key
        ]

    def _join(self, joint: Pattern, members: list[int], id: int) -> int:
        all_of = {id, *(self.resolve(member) for member in members)}
        if (same := self._by_key.get(key_of(joint))) is not None:
            all_of.add(same)
        oldest = min(all_of)
        for other in all_of - {oldest}:
            self._absorb(oldest, other)
        was = key_of(self.patterns[oldest])
        del self._by_key[was]
        self._known[was] = oldest
        self.patterns[oldest] = joint
        self._by_key[key_of(joint)] = oldest
        return oldest

    def _absorb(self, id: int, other: int) -> None:
        self.counts[id] += self.counts.pop(other)
        self.became[other] = id
        key = key_of(self.patterns.pop(other))
        del self._by_key[key]
        self._known[key] = id


def kind_of(pattern: Pattern) -> tuple[int, bytes]:
    return len(pattern), next((word.text for word in pattern if word.kind == "literal"), b"")


def head_of(pattern: Pattern) -> tuple[int, int]:
    """The first word, and the first of the message behind a stamp."""
    literals = [n for n, word in enumerate(pattern) if word.kind == "literal"]
    first = message = next(iter(literals), len(pattern))
    if any(word.kind == "value" for word in pattern[:2]):
        for n in range(1, min(len(pattern) - 1, HEAD)):
            word = pattern[n]
            if word.kind == "value" or len(word.text) != 1 or not pattern[n + 1].has_blank:
                continue
            if word.text == b":" or (word.text == b"-" and word.has_blank):
                message = next((at for at in literals if at > n), message)
                break
    return first, message


def is_qualified(word: Word) -> bool:
    return word.kind == "literal" and sum(byte in b"./" for byte in word.text[:-1]) >= 2


def is_assigned(pattern: Pattern, n: int) -> bool:
    word = pattern[n]
    at = n - (n > 1 and not word.has_blank and pattern[n - 1].text[:1] == b'"' and pattern[n - 1].kind != "value")
    return at > 0 and not word.has_blank and not pattern[at].has_blank and pattern[at - 1].text[:1] == b"="


def to_note(pattern: Pattern) -> list[tuple[frozenset[int], bytes, int]]:
    """Sets of words, what stands there, and how many different ones are enough."""
    first, message = head_of(pattern)
    literals = [n for n, word in enumerate(pattern) if word.kind == "literal"]
    counted = sum(n >= message for n in literals)
    if counted < 2:
        return []
    noted = []
    for n in [n for n in literals if n not in (first, message)][:COLUMNS]:
        before = pattern[n - 1]
        is_named = before.kind == "literal" and before.text.lower() in NAMED
        enough = NAMED_ENOUGH if is_named or is_qualified(pattern[n]) else ENOUGH if counted > 2 else MEMBERS
        noted.append((frozenset([n]), pattern[n].text, enough))
    for wanted, enough in ((False, NAMED_ENOUGH), (True, ENOUGH)):
        columns = [
            n
            for n in literals
            if n not in (first, message) and (is_assigned(pattern, n) if wanted else is_qualified(pattern[n]))
        ]
        if len(columns) > 1:
            noted.append((frozenset(columns), b"\0".join(pattern[n].text for n in columns), enough))
    return noted
