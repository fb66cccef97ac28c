"""What is wanted of logs: by the settings, by clients, by runs.

Source: protocols/logs.md 2.2; protocols/suites.md, "The suite document" (`watch`).
"""

import glob
import os
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from agent.logs import paths
from agent.logs.messages import WatchLog

MAX_OF_RUN = 64


class KeptWatches(msgspec.Struct, frozen=True, kw_only=True):
    """The clients' watches on disk, the number of the last one, and the watches that began once."""

    last: int = 0
    watches: dict[str, WatchLog] = {}
    begun: list[str] = []


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


def of_run(run: str, base: str, wanted: dict[str, Any]) -> tuple[list[Watch], list[str]]:
    """What a suite in the folder `base` asked for in its `watch`; and in sentences, what of that is not watched.

    To be asked for before its processes begin: what stands in the files now is not read.
    """
    watches, refused = [], []
    named = list(wanted["logs"])
    if len(named) > MAX_OF_RUN:
        refused.append(f"{len(named) - MAX_OF_RUN} logs are not watched: a run has {MAX_OF_RUN} at most")
    for number, path in enumerate(named[:MAX_OF_RUN]):
        if not paths.is_path(path):
            refused.append(f"{path!r:.200} is not watched: it is no path of 1 to {paths.MAX_PATH} characters")
            continue
        pattern = paths.joined(base, path)
        watch = Watch(
            id=f"{run}/{number}",
            pattern=pattern,
            is_glob=glob.has_magic(pattern),
            sets=wanted.get("rules", ()),
            start="start",
            sizes=paths.sizes(pattern),
            base=base,
            run=run,
        )
        watches.append(watch)
    return watches, refused
