"""Tells when somebody has changed one of the settings files, so that monitors follow without a signal.

Source: protocols/monitors.md, "Settings and schedule" (reload: file change, SIGHUP, `reload` action).
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import trio
from inotify_simple import INotify, flags

from agent.core.inotify import open_inotify

SETTLE_S = 1.0  # an editor writes in several steps
POLL_S = 10.0  # where there is no inotify
FLAGS = flags.CLOSE_WRITE | flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO

Look = dict[Path, tuple[int, int, int]]


async def follow(find: Callable[[], Sequence[Path]], tell: Callable[[], Awaitable[object]]) -> None:
    """Await `tell` each time that one of the files is another than before, is new or gone. Until cancelled.

    `find` gives the files there are now; they and their folders' conf.d are watched.
    """
    seen = _look(find())
    with open_inotify() as notify:
        while True:
            if notify is None:
                await trio.sleep(POLL_S)
            else:
                folders = {path.parent for path in find()}
                _watch(notify, folders | {folder / "conf.d" for folder in folders})
                if _look(find()) == seen:  # else it was changed before it was watched
                    await trio.lowlevel.wait_readable(notify.fileno())
                await trio.sleep(SETTLE_S)
                notify.read(timeout=0)  # type: ignore[no-untyped-call]
            now = _look(find())
            if now != seen:
                seen = now
                await tell()


def _watch(notify: INotify, folders: set[Path]) -> None:
    for folder in folders:
        with suppress(OSError):  # there is none: that it is made is seen in the folder above
            notify.add_watch(folder, FLAGS)  # type: ignore[no-untyped-call]  # it has no annotations


def _look(files: Sequence[Path]) -> Look:
    found: Look = {}
    for path in files:
        with suppress(OSError):
            stat = os.stat(path)
            found[path] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found
