"""Which class is a line of? The rule says it; else what labels said of its template; else a linear model of its words.

The model is a softmax over the classes and "normal" on 4096 hashed tokens: words, pairs of neighbouring words, and the
template, which weighs as much as sixteen words; a guess also counts what few labels said of the template. It learns by
AdaGrad, one label at a time, and from labels alone: those of rules with a class, of `label_log`, of `agent logs learn`;
never from its own guesses. A line of which nothing is known is as likely of one class as of any other, so that no class
is guessed.

Contradictory labels end in doubt: they settle no template, for what its labels said is counted as a lower bound, and
the model gives each of them its share, which it tells, or abstains.

Source: protocols/logs.md 4, "Class".
"""

import math
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import msgspec

from agent._native import ffi, lib
from agent.core.errors import AgentError
from agent.logs.model import MAX_CLASSES, ModelDamaged

if TYPE_CHECKING:
    from agent._native import CData

THRESHOLD = 0.5  # a class that is more likely than all others together
WINDOW = 64  # results that drift is looked for in
CHANCE = 1e-6  # of a window as bad as this, if nothing had changed

_BY: dict[int, Literal["template", "model"]] = {lib.GUESS_TEMPLATE: "template", lib.GUESS_MODEL: "model"}


class TooManyClasses(AgentError):
    """A class that was not known, when there are MAX_CLASSES already. It was not learned."""


class Guess(NamedTuple):
    """`class_` None: the line is normal. `confidence` is its probability."""

    class_: str | None
    confidence: float
    by: Literal["rule", "template", "model"]


class Drift(msgspec.Struct, frozen=True):
    """Guesses were `wrong`, or `unknown`, far more often of late: shares of the last WINDOW and of those before."""

    what: Literal["wrong", "unknown"]
    before: float
    now: float
    window: int = WINDOW


class _Watch:
    """Has the share of bad results grown?

    Compares the last WINDOW results with all before them since the last drift: would WINDOW draws at the earlier share
    (of one more bad result than there was, so that none seen does not mean none possible) give so many bad ones with a
    probability above CHANCE? It is asked at each result, so a false alarm comes about once in a million results that do
    not depend on each other. After a drift the comparison begins anew.
    """

    def __init__(self, what: Literal["wrong", "unknown"]) -> None:
        self._what: Literal["wrong", "unknown"] = what
        self._last: deque[bool] = deque()
        self._recent = self._bad = self._total = 0

    def see(self, is_bad: bool) -> Drift | None:
        """Take a result."""
        self._last.append(is_bad)
        self._recent += is_bad
        if len(self._last) <= WINDOW:
            return None
        was_bad = self._last.popleft()
        self._recent -= was_bad
        self._bad += was_bad
        self._total += 1
        before = (self._bad + 1) / (self._total + 2)
        mean = before * WINDOW
        is_near = self._recent <= mean + 3 * math.sqrt(mean)  # where no sum is needed to know that it is no drift
        if self._total < WINDOW or is_near or tail(self._recent, before) > CHANCE:
            return None
        drift = Drift(self._what, self._bad / self._total, self._recent / WINDOW)
        self._last.clear()
        self._recent = self._bad = self._total = 0
        return drift


def tail(bad: int, share: float) -> float:
    """The probability that of WINDOW independent results at least `bad` are bad, when each is with `share`."""
    return math.fsum(math.comb(WINDOW, k) * share**k * (1 - share) ** (WINDOW - k) for k in range(bad, WINDOW + 1))


class Classifier:
    """Guesses and learns classes. For one thread at a time. A `template` is an id of the miner's, or templates.NONE.

    `classes` are those it knows, without "normal". `threshold`: what is not more probable is not guessed.
    """

    def __init__(self, threshold: float = THRESHOLD) -> None:
        self.classes: list[str] = []
        self._threshold = threshold
        self._numbers: dict[str | None, int] = {None: 0}
        self._model = _owned(lib.model_new())
        self._wrong, self._unknown = _Watch("wrong"), _Watch("unknown")
        self._asked: int | None = None  # the template that was asked for last

    def guess(self, template: int, line: bytes) -> Guess | None:
        """The class of a line without one; None: it abstains."""
        if not self.classes:  # nothing can be guessed
            return None
        found = lib.model_guess(self._model, line, len(line), template, len(self._numbers))
        return self._told(found.best, found.confidence, found.by)

    def ask(self, template: int, line: bytes) -> tuple[Guess | None, Drift | None]:
        """The same for lines as they come, where abstaining more and more is noticed once there is a class.

        Lines of one template in a row count once: a flood of one new message is not a change of them all.
        """
        guess = self.guess(template, line)
        if not self.classes or template == self._asked:
            return guess, None
        self._asked = template
        return guess, self._unknown.see(guess is None)

    def guess_all(self, block: bytes | memoryview, starts: "array[int]", templates: "array[int]") -> "Guesses":
        """The classes of many lines: line i is block[starts[i]:starts[i + 1]]. The GIL is not held."""
        guesses = ffi.new("struct guess[]", len(templates))
        if not self.classes:  # nothing can be guessed
            return Guesses(guesses, self._told)
        lib.model_guess_all(
            self._model,
            ffi.from_buffer("uint8_t[]", block),
            ffi.from_buffer("uint32_t[]", memoryview(starts)),
            ffi.from_buffer("uint32_t[]", memoryview(templates)),
            len(templates),
            len(self._numbers),
            guesses,
        )
        return Guesses(guesses, self._told)

    def learn(self, template: int, line: bytes, class_: str | None) -> Drift | None:
        """The line is of this class; None: it is normal. Says when its guesses have become wrong, before this label.

        Raises TooManyClasses.
        """
        guess, could_know = self.guess(template, line), bool(self.classes) and class_ in self._numbers
        if class_ not in self._numbers:
            self._add(class_)
        lib.model_learn(self._model, line, len(line), template, len(self._numbers), self._numbers[class_])
        return self._wrong.see(guess is None or guess.class_ != class_) if could_know else None

    def join(self, joined: Iterable[tuple[int, int]]) -> None:
        """Templates that became others (Mined.joined): what labels said of the one counts for the other."""
        for template, into in joined:
            lib.model_join(self._model, template, into)

    def dump(self) -> bytes:
        """What was learned, for load()."""
        size = lib.model_dump(self._model, len(self._numbers), ffi.NULL, 0)
        out = ffi.new("uint8_t[]", size)
        lib.model_dump(self._model, len(self._numbers), out, size)
        return bytes(ffi.buffer(out))

    @classmethod
    def load(cls, data: bytes, classes: tuple[str, ...], threshold: float = THRESHOLD) -> "Classifier":
        """What dump() gave, when these were the classes. Raises ModelDamaged."""
        known = cls(threshold)
        known.classes = list(classes)
        known._numbers = {None: 0} | {name: number for number, name in enumerate(classes, 1)}
        model = lib.model_load(data, len(data), len(known._numbers)) if len(classes) <= MAX_CLASSES else ffi.NULL
        if not model:
            raise ModelDamaged("the model's weights make no sense", remedy="Learning begins anew.")
        known._model = _owned(model)
        return known

    def _add(self, class_: str | None) -> None:
        if class_ is None or len(self.classes) >= MAX_CLASSES:
            raise TooManyClasses(
                f"there are {MAX_CLASSES} classes already, and {class_!r:.200} is none of them",
                remedy="Use one of those that `agent logs learn` or the labels have named.",
            )
        self.classes.append(class_)
        self._numbers[class_] = len(self.classes)

    def _told(self, best: int, confidence: float, by: int) -> Guess | None:
        if not self.classes or confidence <= self._threshold:
            return None
        return Guess(self.classes[best - 1] if best else None, confidence, _BY[by])


class Guesses:
    """Guesses of many lines, each made into an object when it is asked for."""

    def __init__(self, guesses: "CData", told: Callable[[int, float, int], Guess | None]) -> None:
        self._guesses, self._told = guesses, told

    def __len__(self) -> int:
        return len(self._guesses)

    def __getitem__(self, line: int) -> Guess | None:
        """None: it abstains."""
        guess = self._guesses[line]
        return self._told(guess.best, guess.confidence, guess.by)


def _owned(model: "CData") -> "CData":
    if not model:
        raise MemoryError
    return ffi.gc(model, lib.model_free)
