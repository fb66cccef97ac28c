"""Labels of log lines for `agent logs learn` and `agent logs evaluate`: from a file, or the first word of each line.

    {"line": 17, "class": "disk"}     a line of the file; null: a normal line; lines that are not named have no label

Source: protocols/logs.md 2.4, `--labels`.
"""

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec

from agent.core.errors import ConfigError
from agent.core.payload import UNREADABLE
from agent.logs.messages import ClassName
from agent.logs.model import MAX_CLASSES

FIRST_TOKEN: Literal["first-token"] = "first-token"
NORMAL_TOKEN = b"-"
NONE, NORMAL = 255, 0  # numbers of no label, and of a normal line; classes are from 1

_TOLD = 10  # contradictions


class _Label(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    line: Annotated[int, msgspec.Meta(ge=1)]
    class_: ClassName | None = msgspec.field(name="class")


_decoder = msgspec.json.Decoder(_Label)


class Labels:
    """The label of each line, in order, as a number: NONE, NORMAL, or 1 + its place in `classes`.

    `contradictions` tells the first lines that were labelled twice, and differently; the later label holds.
    """

    def __init__(self) -> None:
        self.classes: list[str] = []
        self.numbers = bytearray()
        self.contradictions: list[str] = []

    def class_of(self, number: int) -> str | None:
        """The class of a label that is not NONE; None: normal."""
        return self.classes[number - 1] if number else None

    def number(self, class_: str | None) -> int | None:
        """The label for a class, a new one where needed. None: there are too many."""
        if class_ is None:
            return NORMAL
        if class_ not in self.classes:
            if len(self.classes) >= MAX_CLASSES:
                return None
            self.classes.append(class_)
        return self.classes.index(class_) + 1

    def take_token(self, path: str, at: int, line: bytes) -> None:
        """Label the next line, which is line `at` of a log, by its first word. Raises ConfigError: too many classes."""
        token = line[: len(line) - len(without_token(line))].rstrip()
        if not token:
            self.numbers.append(NONE)
            return
        class_ = None if token == NORMAL_TOKEN else token.decode(errors="backslashreplace")[:128]
        number = self.number(class_)
        if number is None:
            raise ConfigError(
                path,
                at,
                "",
                f"{class_!r:.60} is the first word, and {MAX_CLASSES} others were before",
                remedy="With --labels first-token each line begins with its class, or with - when it is normal.",
            )
        self.numbers.append(number)

    def read(self, file: str, texts: Iterable[bytes], lines: int) -> None:
        """Take the labels of a file for so many lines. Raises ConfigError for what is none."""
        self.numbers = bytearray([NONE]) * lines
        for at, text in enumerate(texts, 1):
            if not text.strip():
                continue
            try:
                label = _decoder.decode(text)
            except UNREADABLE as err:
                raise _unfit(file, at, str(err)) from None
            if label.line > lines:
                raise _unfit(file, at, f"line {label.line} is labelled, and the logs have {lines}")
            number, old = self.number(label.class_), self.numbers[label.line - 1]
            if number is None:
                raise _unfit(file, at, f"{label.class_!r} is a new class, and {MAX_CLASSES} are there")
            if old not in (NONE, number) and len(self.contradictions) < _TOLD:
                is_, was = label.class_ or "normal", self.class_of(old) or "normal"
                self.contradictions.append(f"{file}:{at}: line {label.line} is {is_!r}, and {was!r} before")
            self.numbers[label.line - 1] = number


def without_token(line: bytes) -> bytes:
    """The line behind its first word and a blank. One that begins with a blank has no such word."""
    token, _, rest = line.partition(b" ")
    return rest if token else line


def _unfit(file: str, at: int, what: str) -> ConfigError:
    return ConfigError(file, at, "", what, remedy='Write {"line": 17, "class": "disk"} or {"line": 17, "class": null}.')
