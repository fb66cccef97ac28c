"""The errors raised on purpose, each with a cause and a remedy.

    AgentError
    ├── ConfigError             a setting cannot be used (exit code 2)
    ├── DocumentError           a suite document, spec or rule file cannot be used
    ├── PeerError               the other side of a link failed us
    │   ├── PeerUnreachable     no answer in time (exit code 3)
    │   ├── PeerRefused         it answered and said no
    │   └── PeerBrokeProtocol   it sent what its protocol forbids
    ├── ProtocolMisuse          we were about to send what the state forbids: a bug of ours
    ├── ActionError             an action cannot be carried out; `code` goes to the one who asked
    └── StoreError              the event store cannot be used

Source: STYLE.md, "Errors: a cause and a remedy"; protocols/emissary.md, "The envelope" (the codes of ActionError).
"""

import re
from pathlib import Path
from typing import ClassVar

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class AgentError(Exception):
    """Base of every error raised on purpose. `remedy` is one sentence for the person who reads it.

    `exit_code` is that of a command which it ends.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, remedy: str) -> None:
        what = printable(what)
        super().__init__(f"{what}{'' if what.endswith(('.', '?')) else '.'} {remedy}")
        self.what, self.remedy = what, remedy


class ConfigError(AgentError):
    """A setting cannot be used.

    `file` is the variable or flag where the value came from one; `line` is 0 there, and for a file that cannot be read.
    """

    exit_code = 2

    def __init__(self, file: Path | str, line: int, key: str, what: str, *, remedy: str) -> None:
        where = f"{file}:{line}" if line else str(file)
        super().__init__(f"{where}: {key}: {what}" if key else f"{where}: {what}", remedy=remedy)
        self.file, self.line, self.key = file, line, key


class DocumentError(AgentError):
    """A document (suite, spec, rules) cannot be used; `file` is its name or "suite" when it came over a link.

    `line` is 0 where the document has no lines (JSON that came over a link).
    """

    def __init__(self, file: Path | str, line: int, key: str, what: str, *, remedy: str) -> None:
        where = f"{file}:{line}" if line else str(file)
        super().__init__(f"{where}: {key}: {what}" if key else f"{where}: {what}", remedy=remedy)
        self.file, self.line, self.key = file, line, key


class PeerError(AgentError):
    """The other side of a link failed us; a retry may help unless the subclass says otherwise."""


class PeerUnreachable(PeerError):
    """No answer in time: name not resolved, connection refused, deadline passed."""

    exit_code = 3


class PeerRefused(PeerError):
    """It answered and said no (token, version, certificate). Retrying unchanged is useless."""


class PeerBrokeProtocol(PeerError):
    """It sent what its protocol forbids. The link is closed; the offending bytes are in the log."""


class ProtocolMisuse(AgentError):
    """We were about to send what the state forbids: a bug of ours, never the peer's."""


class ActionError(AgentError):
    """An action cannot be carried out. Travels to the one who asked as `reason`, "code: text"."""

    def __init__(self, code: str, what: str, *, remedy: str = "Nothing was changed.") -> None:
        super().__init__(what, remedy=remedy)
        self.code = code

    @property
    def reason(self) -> str:
        """The `reason` of an error answer (protocols/emissary.md, "The envelope"); in Gator there are no codes."""
        return f"{self.code}: {self.what}" if self.code else self.what


class StoreError(AgentError):
    """The event store cannot be opened or written."""


def unwrap(err: BaseException) -> BaseException:
    """The one error inside of nested groups, or the group itself where there are several."""
    while isinstance(err, BaseExceptionGroup) and len(err.exceptions) == 1:
        err = err.exceptions[0]
    return err


def told(err: BaseException) -> str:
    """What an event may tell of an error: its own sentence where it was raised on purpose, or by the system.

    Of any other only its type: the text is a library's, and may hold what was sent, a token among it, or say nothing
    ("'run'"). The log has it, with its traceback.
    """
    if isinstance(err, AgentError | OSError) and str(err):
        return str(err)
    return f"{type(err).__name__}; the log says where"


def printable(text: str) -> str:
    """Without control characters but tab and line feed: much of what is said quotes a peer, and ends on a terminal."""
    return _CONTROL.sub(lambda found: ascii(found[0])[1:-1], text)


def shown(path: str) -> str:
    """A path as text: bytes that are no UTF-8 become `\\xff`."""
    return path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
