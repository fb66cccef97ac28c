"""What every check of `agent --selftest` takes and returns.

A check opens no port and changes nothing. What it raises, and how long it may take, is selftest.py's to judge.

Source: protocols/packaging.md 7.
"""

import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from agent.core.config import Effective
from agent.core.profile import Report
from agent.settings import Settings, state_dir

Status = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """What a check found, and what to do about it."""

    status: Status
    detail: str
    remedy: str = ""
    data: dict[str, Any] = {}  # noqa: RUF012 - of a NamedTuple, and never changed


class Subject(msgspec.Struct, frozen=True, kw_only=True):
    """What is checked: the settings (the defaults where `errors` says why they cannot be used), and the machine.

    `root` is where the machine's files are.
    """

    settings: Settings
    effective: Effective[Settings] | None = None
    report: Report | None = None
    errors: tuple[str, ...] = ()
    root: Path = Path("/")

    @property
    def origins(self) -> dict[str, str]:
        """Where each setting comes from, by its dotted key."""
        return {key: origin.text for key, origin in self.effective.origins.items()} if self.effective else {}

    @property
    def folder(self) -> Path:
        """The state directory."""
        return state_dir(self.settings)


NOT_USED = Finding("ok", "not used")


def text_of(path: Path) -> str | None:
    """What a small file says; None when it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return None


def date_of(at: float) -> str:
    """Epoch seconds for people, UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at))
