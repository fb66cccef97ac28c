"""Tells when somebody has changed one of the settings files, so that monitors follow without a signal.

Source: protocols/monitors.md, "Settings and schedule" (reload: file change, SIGHUP, `reload` action).
"""

import os
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from pathlib import Path

import trio
from inotify_simple import INotify, flags

from agent.core.config import default_files, folders_of
from agent.core.inotify import open_inotify

SETTLE_S = 1.0  # an editor writes in several steps
POLL_S = 10.0  # where there is no inotify
FLAGS = flags.CLOSE_WRITE | flags.CREATE | flags.DELETE | flags.MOVED_FROM | flags.MOVED_TO

Look = dict[Path, tuple[int, int, int]]


async def follow(config: Sequence[Path], tell: Callable[[], Awaitable[object]]) -> None:
    """Await `tell` each time that one of the files to load is another than before, is new or gone. Until cancelled.

    `config` is each `--config`. Their folders are watched, or the machine's, which may be empty, or not be there yet.
    """
    seen = _look(default_files(config))
    with open_inotify() as notify:
        while True:
            if notify is None:
                await trio.sleep(POLL_S)
            else:
                for folder in dict.fromkeys(folders_of(config)):
                    _watch(notify, folder)
                if _look(default_files(config)) == seen:  # else it was changed before it was watched
                    await trio.lowlevel.wait_readable(notify.fileno())
                await trio.sleep(SETTLE_S)
                notify.read(timeout=0)  # type: ignore[no-untyped-call]
            now = _look(default_files(config))
            if now != seen:
                seen = now
                await tell()


def _watch(notify: INotify, folder: Path) -> None:
    """The folder and its conf.d. That one of them is made is seen in the folder above, which is watched before."""
    if not _is_watched(notify, folder):
        _is_watched(notify, folder.parent)
        _is_watched(notify, folder)
    _is_watched(notify, folder / "conf.d")


def _is_watched(notify: INotify, folder: Path) -> bool:
    with suppress(OSError):
        notify.add_watch(folder, FLAGS)  # type: ignore[no-untyped-call]  # it has no annotations
        return True
    return False


def _look(files: Sequence[Path]) -> Look:
    found: Look = {}
    for path in files:
        with suppress(OSError):
            stat = os.stat(path)
            found[path] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found
