"""The private folder of each run: named before it is made, removed when the run is over.

Making and removing wait for the journal of the file system, for milliseconds and more while somebody writes: neither is
done on the loop. What starts the monitor makes its folder (core/process.py); here it is removed, in a thread.

Source: protocols/monitors.md, "Limits and security" (a private TMPDIR, always removed).
"""

import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

import trio

log = logging.getLogger(__name__)

PAUSE_S = 0.5  # folders of runs that end meanwhile are removed together


async def private_folder(mark: str, base: Path, user: str | None) -> tuple[Path, Path]:
    """What stands for a run's folder in `base`, where what a killed agent left is found, and the folder to be made.

    They are the same, but for another user: he cannot get below `base`. His folder is to be in the system's temporary
    folder, and a link to it stands in `base` already.
    """
    note = base / f"{mark}-{os.urandom(8).hex()}"
    if user is None or os.geteuid() != 0:
        return note, note
    folder = Path(tempfile.gettempdir(), note.name)
    await trio.to_thread.run_sync(note.symlink_to, folder)
    return note, folder


def remove(note: Path) -> None:
    """Remove a run's folder, and what stands for it. rmtree follows no link that somebody has put in its place."""
    with suppress(OSError):  # most leave nothing in it
        os.rmdir(note)
        return
    is_link = note.is_symlink()
    folder = note.readlink() if is_link else note
    for _ in range(3):  # a tree that outlived us may still write
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            break
    else:
        log.error("cannot remove a monitor's folder path=%s", folder)
    if is_link:
        note.unlink()


class Litter:
    """The folders of runs that are over."""

    def __init__(self) -> None:
        self._notes: list[Path] = []
        self._came = trio.Event()

    def add(self, note: Path) -> None:
        """It is to be removed, if it was made at all."""
        self._notes.append(note)
        self._came.set()

    async def keep_clear(self) -> None:
        """Remove what comes, soon after it came, until cancelled."""
        while True:
            await self._came.wait()
            await trio.sleep(PAUSE_S)
            await self.clear()

    async def clear(self) -> None:
        """Remove what has come so far, also when cancelled."""
        notes, self._notes, self._came = self._notes, [], trio.Event()
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(_remove_all, notes)


def _remove_all(notes: list[Path]) -> None:
    for note in notes:
        remove(note)
