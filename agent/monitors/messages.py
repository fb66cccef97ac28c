"""What a monitor says and what it is told: the vocabulary of protocols/monitors.md, "The wire".

`parse` reads the body of a frame; `version`, `order` and `leave` are our words where the dialects differ. The results
of a run are events (core/events.py).

Source: seeds/orchestrator-monitor-protocol.md; protocols/monitors.md, "The wire", "Dialects".
"""

import math
import re
from typing import Literal, TypeAlias

import msgspec

Dialect = Literal["metrist", "seed"]
Level = Literal["debug", "info", "warning", "error"]


class Started(msgspec.Struct, frozen=True):
    """The first message. `version` is what stood behind the word, readable or not."""

    version: str


class Ready(msgspec.Struct, frozen=True):
    """It accepts our version, and waits for its configuration."""


class Configured(msgspec.Struct, frozen=True):
    """It has its configuration: the handshake is done."""


class StepOk(msgspec.Struct, frozen=True):
    """The step is done; the time is ours. `metadata` is the raw word behind it, "" for none."""

    metadata: str = ""


class StepTime(msgspec.Struct, frozen=True):
    """The step is done and timed itself. `time` is as it stood there: what cannot be read is a protocol error."""

    time: str
    metadata: str = ""


class StepError(msgspec.Struct, frozen=True):
    """The step failed."""

    text: str
    metadata: str = ""


class Log(msgspec.Struct, frozen=True):
    """A line for the log; a level that nobody knows stays in the text."""

    level: Level
    text: str


class WebhookWait(msgspec.Struct, frozen=True):
    """The step goes on when somebody has called a webhook with this uid."""

    uid: str


class Exit(msgspec.Struct, frozen=True):
    """Its answer to our Exit; it ends nothing."""


class Noise(msgspec.Struct, frozen=True):
    """A line, or a piece of one, that is no message. `dropped` bytes of it were too long to keep."""

    text: str
    dropped: int = 0


Message: TypeAlias = Started | Ready | Configured | StepOk | StepTime | StepError | Log | WebhookWait | Exit
Result: TypeAlias = StepOk | StepTime | StepError

_LEVELS: dict[str, Level] = {"Debug": "debug", "Info": "info", "Warning": "warning", "Error": "error"}
_META = re.compile(r"[A-Za-z0-9_.-]+=[^\s,=]*(?:,[A-Za-z0-9_.-]+=[^\s,=]*)*")
_TIME = re.compile(r"\d+(?:[.,]\d+)?(?:[eE][+-]?\d+)?", re.ASCII)
_NUMBER = re.compile(r"[+-]?\d+(?:\.\d+)?", re.ASCII)


def parse(body: bytes) -> Message | None:
    """Read the body of a frame; None when it only begins like a message.

    Bytes that are not UTF-8 are replaced. White space at the end goes, of logs and errors only line ends.
    """
    text = body.decode(errors="replace")
    said = text.rstrip()
    match said:
        case "Ready":
            return Ready()
        case "Configured":
            return Configured()
        case "Exit":
            return Exit()
        case _ if said.startswith("Started "):
            return Started(said.removeprefix("Started ").strip())
        case _ if said.startswith("Wait For Webhook "):
            return WebhookWait(said.removeprefix("Wait For Webhook ").strip())
        case _ if said.startswith("Step OK"):
            return StepOk(said.removeprefix("Step OK").strip())
        case _ if text.startswith("Step Time "):
            word, rest = _metadata(text.removeprefix("Step Time ").strip())
            return StepTime(rest, word)
        case _ if text.startswith("Step Error"):
            word, rest = _metadata(text.rstrip("\r\n").removeprefix("Step Error").removeprefix(" "))
            return StepError(rest, word)
        case _ if text.startswith("Log "):
            level, _, rest = text.rstrip("\r\n").removeprefix("Log ").partition(" ")
            return Log(_LEVELS[level], rest) if level in _LEVELS else Log("info", f"{level} {rest}".rstrip())
        case _:
            return None


def _metadata(text: str) -> tuple[str, str]:
    """The metadata in front, if there are any, and the rest."""
    first, _, rest = text.partition(" ")
    return (first, rest) if _META.fullmatch(first) else ("", text)


def metadata(word: str) -> dict[str, str | float]:
    """The pairs of `k=v,k2=v2`; a value is hex of printable UTF-8, else a number, else as it stands."""
    pairs = (pair.partition("=") for pair in word.split(",") if word)
    return {key: _value(value) for key, _, value in pairs}


def _value(text: str) -> str | float:
    try:
        decoded = bytes.fromhex(text).decode()
    except ValueError:
        decoded = ""
    if decoded.isprintable() and decoded:
        text = decoded
    number = float(text) if _NUMBER.fullmatch(text) else math.inf
    return number if math.isfinite(number) else text  # one of 400 digits is none that JSON can hold


def seconds(time: str, unit: Literal["ms", "s"]) -> float | None:
    """The time that a step gave itself, in seconds; None for what is not one (NaN, -3, "1 2 3", infinite)."""
    if not _TIME.fullmatch(time):
        return None
    value = float(time.replace(",", ".")) / (1000 if unit == "ms" else 1)
    return value if math.isfinite(value) else None


def version(dialect: Dialect, announced: str) -> str:
    """Our answer to Started."""
    if dialect == "metrist":
        return "Version 1.1"
    minor = announced.partition(".")[2]
    return f"Version 1.{min(int(minor), 1) if minor.isdecimal() else 1}"


def order(dialect: Dialect, step: str) -> str:
    """The order to run a step."""
    return f"Run {'Step' if dialect == 'metrist' else 'step'} {step}"


def leave(dialect: Dialect, cleanup: bool) -> str:
    """The word to end by. Where the dialect can say it, `cleanup` asks for the monitor's cleanup handler."""
    return "Exit" if dialect == "seed" else f"Exit {int(cleanup)}"
