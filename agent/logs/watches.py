"""What is wanted of logs: by the settings, by clients, by runs.

Source: protocols/logs.md 2.2; protocols/suites.md, "The suite document" (`watch`).
"""

import os
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from agent.logs.messages import WatchLog
from agent.logs.settings import LogWatch

JOURNAL, KERNEL = "journal:", "kmsg:"  # in place of a path


class KeptWatches(msgspec.Struct, frozen=True, kw_only=True):
    """The clients' watches on disk, the number of the last one, and the watches that began once.

    Up to `seen`, epoch seconds, all was followed that globs found: then one of their files was forgotten.
    """

    last: int = 0
    watches: dict[str, WatchLog] = {}
    begun: list[str] = []
    seen: float = 0.0


class Watch(msgspec.Struct, kw_only=True):
    """What a `[[logs.watch]]`, a client or a suite wants followed. `sets` as in the settings, `tables` as in a file."""

    id: str
    pattern: str
    is_glob: bool = False
    sets: Sequence[str] = ()
    tables: list[dict[str, Any]] | None = None
    start: Literal["end", "start"] | int = "end"
    base: str = ""  # the folder of a suite, for its rule files
    run: str | None = None
    is_remote: bool = False
    sizes: dict[str, int] = {}  # of the files that are there already, and not read before that


def of_settings(asked: LogWatch) -> Watch:
    """What a `[[logs.watch]]` asks for."""
    pattern = asked.path or asked.glob or (JOURNAL if asked.journal else KERNEL)
    return Watch(id=f"s-{asked.name}", pattern=pattern, is_glob=bool(asked.glob), sets=asked.rules)


def of_client(id: str, asked: WatchLog) -> Watch:
    """What a client asked for. A path is that of the file now."""
    is_text = isinstance(asked.rules, str)
    return Watch(
        id=id,
        pattern=os.path.realpath(asked.path) if asked.path else asked.glob or "",
        is_glob=asked.path is None,
        sets=[asked.rules] if isinstance(asked.rules, str) else (),
        tables=None if is_text or not isinstance(asked.rules, list) else asked.rules,
        start=asked.from_,
        is_remote=True,
    )
