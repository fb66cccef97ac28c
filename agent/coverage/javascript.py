"""JavaScript of the product: text in, its functions and the places where they are looked at (probes) out.

Not a parser: a tokenizer that knows as much grammar as it takes to tell a regular expression from a division, a block
from an object, and where each function begins and ends. It reads what Node runs (ES2025, scripts and modules); a text
it cannot follow is one method. Offsets are UTF-16 units, as V8 counts them, in the text without its byte order mark.

Source: drill sheet, "Probe sources", V8.
"""

import re
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import msgspec

from agent.coverage.catalog import Method, Unit

GLOBAL = "GLOBAL"  # the method that holds a file's top level
MOST_PARAM = 100  # characters of one parameter as it is announced: a destructuring may be a page long

_NEWLINES = "\n\r\u2028\u2029"
_TOKEN = re.compile(
    r"""
    (?P<space>[\s\ufeff]+ | //[^\n\r\u2028\u2029]* | /\*(?s:.*?)\*/)
  | (?P<name>\#?(?:[^\W\d]|[$\ud800-\udfff]|\\u)(?:[\w$\u200c\u200d\ud800-\udfff]|\\u|(?<=\\u)\{[0-9a-fA-F]+\})*+)
  | (?P<number>0[xXbBoO][\da-fA-F_]+n? | (?:\d[\d_]*\.?[\d_]* | \.\d[\d_]*)(?:[eE][+-]?\d[\d_]*)?n?)
  | (?P<string>"(?:[^"\\\n\r]|\\(?:\r\n|(?s:.)))*" | '(?:[^'\\\n\r]|\\(?:\r\n|(?s:.)))*')
  | (?P<mark>\.\.\.|=>|\?\.(?!\d)|\?\?=?|\+\+|--|=+|[-+*%&|^!~<>]=?|[/`{}()\[\];,:?.])
    """,
    re.VERBOSE,
)
_REGEX = re.compile(r"/(?:[^\\/\[\n\r\u2028\u2029]++|\\.|\[(?:[^\]\\\n\r\u2028\u2029]++|\\.)*+\])++/[\w$]*")
_TEMPLATE = re.compile(r"(?s:[^`\\$]++|\\.|\$(?!\{))*+(?P<end>`|\$\{)")
_HASHBANG = re.compile(r"#![^\n\r\u2028\u2029]*")
_ASTRAL = re.compile("[\U00010000-\U0010ffff]")

_CONTROL = frozenset(["if", "while", "for", "with", "switch", "catch"])  # a statement follows their parentheses
_STATEMENT = frozenset(["else", "do", "try", "finally"])  # a statement follows them
# An operand follows, so that `/` begins a regular expression and `{` an object.
_OPERATOR = frozenset(
    (
        *("return", "throw", "typeof", "void", "delete", "new", "in", "instanceof", "case", "await", "yield"),
        *("extends", "export", "import", "default", "const", "let", "var"),
    )
)
_MODIFIER = frozenset(["async", "get", "set", "static", "accessor"])
_OPENS, _CLOSES = frozenset(("(", "[", "{", "${")), {")": "(", "]": "[", "}": "{"}
_TEMPLATE_END = "`}"  # the token of a closing backtick: the opening one is code
# A line that has nothing else is no code line: nothing is done there that the lines around it do not tell.
_NO_CODE = frozenset([*"{}()[];,:", "${", _TEMPLATE_END, "else", "try", "finally", "do"])


class NotFollowed(Exception):
    """The text is no JavaScript, or some that the tokenizer does not know."""


class Function(msgspec.Struct):
    """One function as V8 reports it: `start` to `end`, exclusive. `entry` lies in it and in no function of its own."""

    name: str
    params: tuple[str, ...]
    start: int
    entry: int = 0
    end: int = 0


class Script(msgspec.Struct, frozen=True):
    """One file with its probes. `anchors` are (start, end, probe), by start: what V8 counts for that stretch.

    `length` is that of the text in UTF-16 units.
    """

    unit: Unit
    anchors: tuple[tuple[int, int, int], ...]
    length: int


class _Frame:
    """What an open bracket, or an arrow without one, is about."""

    __slots__ = (
        "accessor",
        "after",
        "at",
        "classes",
        "function",
        "is_key",
        "kind",
        "member",
        "role",
        "since",
        "ternary",
    )

    def __init__(self, kind: str, at: int, role: str = "", function: Function | None = None, after: str = "") -> None:
        self.kind = kind  # block, object, class, paren, bracket, template, arrow
        self.at = at  # number of the token that opened it
        self.role = role  # of a paren: control, params; of a bracket: key
        self.function = function  # whose parameters or body this is
        self.after = after  # what is complete at its end: a statement, an operand, a member
        self.ternary = 0  # question marks whose colon is still to come
        self.classes: list[str] = []  # class heads whose body is still to come: what is complete after it
        self.is_key = kind in ("object", "class")  # does a member begin here?
        self.member: tuple[int, str] | None = None  # where a key began, and its name, until what follows tells its kind
        self.since = -1  # where modifiers of the member began
        self.accessor = ""  # "get " or "set ", when it is one of them


class _Reader:
    """Walks over the tokens once; `functions` are what it found, by start."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.functions: list[Function] = []
        self.tokens: list[tuple[str, int, int]] = []  # text, start, end
        self.frames = [_Frame("block", -1)]
        self.operand = False  # was the last token the end of an operand?
        self.fresh = True  # does a statement begin here?
        self.was_fresh = False  # did one begin at the last token?
        self.newline = False  # is there one between the last token and this?
        self.header: tuple[Function, str] | None = None  # a function's keyword or key was read, its `(` comes
        self.body: tuple[Function, str] | None = None  # its `)` was read, its `{` comes
        self.arrow: Function | None = None  # `=>` was read
        self.closed = -1  # number of the `(` that the last `)` closed

    def read(self) -> None:
        text, position, match = self.text, 0, _TOKEN.match
        if shebang := _HASHBANG.match(text):
            position = shebang.end()
        while position < len(text):
            found = match(text, position)
            if found is None:
                raise NotFollowed(f"offset {position}")
            kind, end = found.lastgroup, found.end()
            if kind == "space":
                self.newline = self.newline or any(mark in found[0] for mark in _NEWLINES)
                position = end
                continue
            token = found[0]
            if token == "/" and not self.operand:
                found = _REGEX.match(text, position)
                if found is None:
                    raise NotFollowed(f"offset {position}")
                kind, token, end = "string", found[0], found.end()
            position = self._take(kind, token, position, end)
            self.newline = False
        self._end_arrows()
        if len(self.frames) > 1 or self.header or self.body or self.arrow:
            raise NotFollowed("the end of the text")
        self.functions.sort(key=lambda function: (function.start, -function.end))

    def _take(self, kind: str | None, token: str, start: int, end: int) -> int:
        """One token; where to read on."""
        if self.body is not None and token != "{":
            raise NotFollowed(f"offset {start}")
        if self.arrow is not None and token != "{":
            self._push("arrow", function=self.arrow)
            self.arrow = None
        self._end_statements(kind, token)
        was_fresh, self.was_fresh = self.was_fresh, self._begins_statement()
        frame = self.frames[-1]
        if frame.is_key and token not in ("}", ",", ";") and not (token == "{" and self._last() == "static"):
            self._key(frame, kind, token, start, end)
        elif kind == "name" and self._last() not in (".", "?."):
            self._name(frame, token, start, was_fresh)
        elif kind != "mark":
            self._set(operand=True)
            frame.member = None
        else:
            position = self._mark(frame, token, start, end)
            if position is not None:
                return position
        self.tokens.append((token, start, end))
        return end

    def _last(self, back: int = 1) -> str:
        return self.tokens[-back][0] if len(self.tokens) >= back else ""

    def _set(self, *, operand: bool = False, fresh: bool = False) -> None:
        self.operand, self.fresh = operand, fresh

    def _begins_statement(self) -> bool:
        return self.fresh or (self.operand and self.newline and self.frames[-1].kind == "block")

    def _push(self, kind: str, *, role: str = "", function: Function | None = None, after: str = "") -> None:
        self.frames.append(_Frame(kind, len(self.tokens), role, function, after))

    # Ends that no bracket shows

    def _end_statements(self, kind: str | None, token: str) -> None:
        """End arrows, and fields of classes, that end before this token."""
        starts_anew = self.newline and self.operand and self._begins_operand(kind, token)
        while (frame := self.frames[-1]).kind == "arrow":
            ends = token in _CLOSES or token in (",", ";") or (token == ":" and not frame.ternary) or starts_anew
            if not ends:
                return
            self._end_arrow()
        if frame.kind == "class" and not frame.is_key:
            # A key alone on its line is a field: what cannot follow a key begins the next member.
            alone = frame.member is not None and self.newline and token in ("[", "*")
            if starts_anew or alone:
                frame.is_key, frame.member, frame.since = True, None, -1

    def _begins_operand(self, kind: str | None, token: str) -> bool:
        if kind == "mark":
            return token in ("{", "!", "~", "++", "--")
        return token not in ("in", "instanceof")

    def _end_arrow(self) -> None:
        function = self.frames.pop().function
        assert function is not None
        function.end = self.tokens[-1][2]
        self.functions.append(function)

    def _end_arrows(self) -> None:
        while self.frames[-1].kind == "arrow":
            self._end_arrow()

    # Members of objects and classes

    def _key(self, frame: _Frame, kind: str | None, token: str, start: int, end: int) -> None:
        """What stands where a member's name does."""
        if token == "...":
            frame.is_key, frame.since = False, -1
            self._set()
        elif token == "*":
            frame.since = start if frame.since < 0 else frame.since
        elif token == "[":
            frame.since = start if frame.since < 0 else frame.since
            self._push("bracket", role="key")
            self._set()
        elif kind == "mark":
            raise NotFollowed(f"offset {start}")
        elif token in _MODIFIER and self._is_modifier(token, end):
            frame.accessor = f"{token} " if token in ("get", "set") else ""
            if frame.since < 0 and token != "static":
                frame.since = start
        else:
            self._keyed(frame, start, token)

    def _is_modifier(self, token: str, end: int) -> bool:
        """Does a member's name follow, or is this the name?"""
        while (space := _TOKEN.match(self.text, end)) and space.lastgroup == "space":
            if token == "async" and any(mark in space[0] for mark in _NEWLINES):
                return False
            end = space.end()
        return self.text[end : end + 1] not in (*"(,:=};", "")

    def _keyed(self, frame: _Frame, start: int, name: str) -> None:
        frame.is_key = False
        frame.member = (start if frame.since < 0 else frame.since, frame.accessor + name.strip("\"'"))
        frame.since, frame.accessor = -1, ""
        self._set(operand=True)

    # Names

    def _name(self, frame: _Frame, token: str, start: int, was_fresh: bool) -> None:
        frame.member = None
        if token in ("function", "class"):
            is_async = token == "function" and self._last() == "async" and not self.newline
            fresh = was_fresh if is_async else self.was_fresh
            after = "statement" if fresh or self._last(2 if is_async else 1) in ("export", "default") else "operand"
            if token == "class":
                frame.classes.append(after)
            else:
                first = len(self.tokens) - is_async
                begins = self.tokens[first][1] if is_async else start
                self.header = (Function(self._given_name(first), (), begins), after)
            self._set()
        elif token in _STATEMENT:
            self._set(fresh=True)
        elif token in _CONTROL:
            self._set(fresh=token == "catch")
        elif token in _OPERATOR or (token == "of" and frame.role == "control" and self.operand):
            self._set()
        else:
            if self.header is not None:
                self.header[0].name = token
            self._set(operand=True)

    def _given_name(self, first: int) -> str:
        """The name an anonymous function gets from what it is assigned to; `first` is its first token."""
        if first >= 2 and self.tokens[first - 1][0] in ("=", ":"):
            name = self.tokens[first - 2][0].strip("\"'")
            if re.fullmatch(r"#?[\w$]+", name):
                return name
        return ""

    # Marks

    def _mark(self, frame: _Frame, token: str, start: int, end: int) -> int | None:
        if token == "(":
            self._open_paren(frame)
        elif token == "[":
            self._push("bracket")
            self._set()
        elif token == "{":
            self._open_brace(frame, start)
        elif token in _CLOSES:
            return self._close(token, start, end)
        elif token == "`":
            self.tokens.append((token, start, end))
            return self._template(end)
        elif token == "=>":
            self._arrow_read(start)
        elif token in ("++", "--"):
            self.operand = self.operand and not self.newline
        else:
            self._separator(frame, token)
        if token not in ("(", "{"):
            frame.member = None
        return None

    def _separator(self, frame: _Frame, token: str) -> None:
        fresh = False
        if token == ";":
            fresh = frame.kind == "block"
            frame.is_key = frame.kind == "class"
            frame.ternary = 0
        elif token == ",":
            frame.is_key = frame.kind == "object"
            frame.ternary = 0
        elif token == "?":
            frame.ternary += 1
        elif token == ":":
            fresh = frame.kind == "block" and not frame.ternary
            frame.ternary = max(0, frame.ternary - 1)
        if frame.is_key:
            frame.since = -1
        self._set(fresh=fresh)

    def _open_paren(self, frame: _Frame) -> None:
        if frame.member is not None:
            start, name = frame.member
            frame.member = None
            self._push("paren", role="params", function=Function(name, (), start), after="member")
        elif self.header is not None:
            function, after = self.header
            self.header = None
            self._push("paren", role="params", function=function, after=after)
        else:
            last = self._last(2) if self._last() == "await" else self._last()
            is_name = last in _CONTROL and self._last(2) in (".", "?.")
            self._push("paren", role="control" if last in _CONTROL and not is_name else "")
        self._set()

    def _open_brace(self, frame: _Frame, start: int) -> None:
        body = self.body or ((self.arrow, "operand") if self.arrow else None)
        if body is not None:
            self.body = self.arrow = None
            function, after = body
            function.entry = start
            self._push("block", function=function, after=after)
            self._set(fresh=True)
        elif frame.is_key:  # static {
            self._push("block", after="member")
            self._set(fresh=True)
        elif frame.classes and (self.operand or self._last() == "class"):
            self._push("class", after=frame.classes.pop())
            self._set()
        elif self.operand or self.fresh:
            self._push("block", after="statement")
            self._set(fresh=True)
        else:
            self._push("object", after="operand")
            self._set()

    def _close(self, token: str, start: int, end: int) -> int | None:
        frame = self.frames.pop()
        opened = {"paren": "(", "bracket": "["}.get(frame.kind, "{")
        if not self.frames or opened != _CLOSES[token] or self.header or self.arrow:
            raise NotFollowed(f"offset {start}")
        outer = self.frames[-1]
        if frame.kind == "template":
            self.tokens.append((token, start, end))
            return self._template(end)
        if frame.role == "key":
            self._keyed(outer, outer.since, self.text[self.tokens[frame.at][1] : end])
        elif frame.role == "params":
            assert frame.function is not None
            frame.function.params = self._params(frame.at + 1, len(self.tokens))
            self.body = (frame.function, frame.after)
        elif frame.kind == "paren":
            self.closed = frame.at
            self._set(operand=frame.role != "control", fresh=frame.role == "control")
        elif frame.kind == "bracket":
            self._set(operand=True)
        else:
            if frame.function is not None:
                frame.function.end = end
                self.functions.append(frame.function)
            outer.is_key = frame.after == "member" and outer.kind == "class"
            self._set(operand=frame.after != "statement" and not outer.is_key, fresh=frame.after == "statement")
        return None

    def _template(self, position: int) -> int:
        """The text of a template up to its end or to the next `${`."""
        found = _TEMPLATE.match(self.text, position)
        if found is None:
            raise NotFollowed(f"offset {position}")
        if found["end"] == "`":
            self._set(operand=True)
            self.tokens.append((_TEMPLATE_END, found.start("end"), found.end()))
        else:
            self._push("template")
            self._set()
            self.tokens.append(("${", found.start("end"), found.end()))
        return found.end()

    def _arrow_read(self, start: int) -> None:
        """`=>`: what stands before it are the parameters."""
        if not self.operand:
            raise NotFollowed(f"offset {start}")
        last = len(self.tokens) - 1
        if self.tokens[last][0] == ")":
            first = self.closed
            params = self._params(first + 1, last)
        else:
            first = last
            params = (self.tokens[last][0],)
        if first and self.tokens[first - 1][0] == "async" and self._last_but(first - 1) not in (".", "?."):
            first -= 1
        self.arrow = Function(self._given_name(first), params, self.tokens[first][1], entry=start)
        self._set()

    def _last_but(self, number: int) -> str:
        return self.tokens[number - 1][0] if number else ""

    def _params(self, first: int, last: int) -> tuple[str, ...]:
        """The parameters that tokens number `first` to `last`, exclusive, are: without what they are by default."""
        params, depth, begins, ends, is_default = [], 0, -1, -1, False
        for token, start, end in self.tokens[first:last]:
            if not depth and token == ",":
                params.append(self.text[begins:ends])
                begins, is_default = -1, False
                continue
            depth += (token in _OPENS) - (token in _CLOSES)
            is_default = is_default or (not depth and token == "=")
            if not is_default:
                begins, ends = (start if begins < 0 else begins), end
        if begins >= 0:
            params.append(self.text[begins:ends])
        return tuple(" ".join(param.split())[:MOST_PARAM] for param in params)


def functions(text: str) -> list[Function]:
    """All functions of a text, by start. Raises NotFollowed. `text` is as `units_of` gives it."""
    reader = _Reader(text)
    reader.read()
    return reader.functions


def utf16(data: bytes) -> str:
    """A file's text as Node reads it, with one character for each UTF-16 unit."""
    text = data.decode("utf-8", "replace").removeprefix("\ufeff")
    if text.isascii():
        return text
    return _ASTRAL.sub(lambda found: "".join(map(chr, memoryview(found[0].encode("utf-16-le")).cast("H"))), text)


def script(data: bytes, path: str, file: str) -> Script:
    """One file's class: its top level and each function is a method. `path` is its place below the root, with slashes.

    A method's probes are its entry, then each line of code that lies wholly in it and in none of its own functions.
    A line is taken from its first column to its last, as c8 does: what V8 counts for a part of it says nothing of it.
    Source: drill sheet, "Probe sources", V8.
    """
    text = utf16(data)
    lines = _lines(text)
    whole = Function(GLOBAL, (), 0, end=len(text))
    try:
        reader = _Reader(text)
        reader.read()
    except NotFollowed:
        found = [whole]
        of_code = [number for number, (start, end) in enumerate(lines) if text[start:end].strip()]
    else:
        found = [whole, *reader.functions]
        of_code = _lines_of_code(reader.tokens, [start for start, _ in lines])
    inside = list(_innermost(found, [lines[number] for number in of_code]))
    entries = [-1, *(bisect_right(lines, (function.entry, len(text))) - 1 for function in found[1:])]
    places: list[list[tuple[int, int, int]]] = [[] for _ in found]  # start, end, line from 0
    for number, function in enumerate(found[1:], 1):
        places[number].append((function.entry, function.entry + 1, entries[number]))
    for line, owner in zip(of_code, inside, strict=True):
        if line != entries[owner]:
            places[owner].append((*lines[line], line))
    folder, _, name = path.rpartition("/")
    return _script(folder or ".", name, file, text, found, places)


def _script(
    path: str, name: str, file: str, text: str, found: Sequence[Function], places: list[list[tuple[int, int, int]]]
) -> Script:
    anchors: list[tuple[int, int, int]] = []
    source_lines: list[int] = []
    methods: list[Method] = []
    seen: dict[str, int] = {}
    for function, own, checksum in zip(found, places, _checksums(text, found), strict=True):
        if not own:
            continue  # the top level of a file without code
        first = len(source_lines)
        source_lines += (line + 1 for _, _, line in own)
        anchors += ((start, end, first + number) for number, (start, end, _) in enumerate(own))
        shown = _joined(function.name) or "<anonymous>"
        seen[shown] = seen.get(shown, 0) + 1
        methods.append(
            Method(
                name=shown if seen[shown] == 1 else f"{shown}#{seen[shown]}",
                params=tuple(map(_joined, function.params)),
                return_type="",
                probes=tuple(range(first, len(source_lines))),
                checksum=checksum,
            )
        )
    unit = Unit(path=path, name=name, methods=tuple(methods), lines=tuple(source_lines), file=file)
    return Script(unit=unit, anchors=tuple(sorted(anchors)), length=len(text))


def _joined(text: str) -> str:
    """Surrogates as the characters they stand for."""
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _lines(text: str) -> list[tuple[int, int]]:
    """Start and end of each line, without what ends it."""
    lines, start = [], 0
    for line in text.split("\n"):
        lines.append((start, start + len(line) - line.endswith("\r")))
        start += len(line) + 1
    return lines


def _lines_of_code(tokens: Sequence[tuple[str, int, int]], starts: Sequence[int]) -> list[int]:
    """Numbers from 0 of the lines on which a token begins that does something."""
    return sorted({bisect_right(starts, start) - 1 for token, start, _ in tokens if token not in _NO_CODE})


def _innermost(found: Sequence[Function], stretches: Sequence[tuple[int, int]]) -> Iterator[int]:
    """For each stretch, both by start, the number of the innermost function that it lies wholly in."""
    opened: list[int] = []
    following = 0
    for start, end in stretches:
        while following < len(found) and found[following].start <= start:
            opened.append(following)
            following += 1
        while len(opened) > 1 and found[opened[-1]].end <= start:
            opened.pop()
        yield next(number for number in reversed(opened) if found[number].end >= end)


def _checksums(text: str, found: Sequence[Function]) -> Iterator[str]:
    """A checksum of each function's own text: that of the functions in it is theirs."""
    own: list[list[str]] = [[] for _ in found]
    reached = [function.start for function in found]
    opened: list[int] = []

    def close() -> None:
        number = opened.pop()
        own[number].append(text[reached[number] : found[number].end])

    for number, function in enumerate(found):
        while opened and found[opened[-1]].end <= function.start:
            close()
        if opened:
            outer = opened[-1]
            own[outer].append(text[reached[outer] : function.start])
            reached[outer] = function.end
        opened.append(number)
    while opened:
        close()
    for parts in own:
        yield blake2b("\0".join(parts).encode("utf-16-le", "surrogatepass"), digest_size=8).hexdigest()
