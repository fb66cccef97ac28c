"""A file monitor on a real directory and the kernel's inotify, with a clock of its own: no waiting, no threads."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

from inotify_simple import INotify

from agent.core.events import FileChanged, FileGap
from agent.files.disk import carry_out
from agent.files.looks import Drop, Look, Looked, Ready, Survey, Watch
from agent.files.watch import Monitor


class Eyes:
    """`events` has all that was told; `ready` the watches that are ready."""

    def __init__(self, *watches: Watch, allow: Sequence[str] = (), inotify: bool = True) -> None:
        self.monitor, self.now = Monitor(), 1000.0
        self.events: list[FileChanged | FileGap] = []
        self.ready: list[str] = []
        self._allow = allow
        self._notify = INotify(nonblocking=True) if inotify else None  # type: ignore[no-untyped-call]  # unannotated
        for watch in watches:
            self.monitor.watch(watch)
        self.settle()

    def __enter__(self) -> "Eyes":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, err: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._notify is not None:
            self._notify.close()

    def hear(self) -> bytes:
        """What inotify says now, fed to the monitor."""
        if self._notify is None:
            return b""
        try:
            data = os.read(self._notify.fileno(), 1 << 20)
        except BlockingIOError:
            return b""
        self.monitor.feed(data, self.now)
        return data

    def act(self, meanwhile: Callable[[], None] = lambda: None) -> bool:
        """One batch of acts; was there any? `meanwhile` is what happens before their results are there."""
        acts = self.monitor.acts(self.now)
        looks = [act for act in acts if isinstance(act, Survey | Look)]
        self.ready += [act.watch for act in acts if isinstance(act, Ready)]
        self.events += [act for act in acts if isinstance(act, FileChanged | FileGap)]
        for act in acts:
            if isinstance(act, Drop) and self._notify is not None:
                try:
                    self._notify.rm_watch(act.wd)  # type: ignore[no-untyped-call]  # unannotated
                except OSError:
                    assert self._notify is not None  # the directory is gone, and its watch with it
        meanwhile()
        for result in carry_out(looks, self._notify, self._allow):
            if isinstance(result, Looked):
                self.monitor.looked(result, self.now)
            else:
                self.monitor.surveyed(result, self.now)
        return bool(acts)

    def settle(self, seconds: float = 0.3) -> None:
        """Let time pass until everything has settled."""
        for _ in range(100):
            self.hear()
            self.now += seconds
            busy = False
            while self.act():
                busy = True
            if not busy and not self.hear():
                return
        raise AssertionError("it never settles")

    def told(self) -> list[str]:
        """What was told since the last time: "created /path", "moved /new from /old", "gap /path: why"."""
        events, self.events = self.events, []
        return [say(event) for event in events]


def say(event: FileChanged | FileGap) -> str:
    tag = f" [{event.run}]" if event.run else ""
    if isinstance(event, FileGap):
        return f"gap {event.path}: {event.why}{tag}"
    origin = f" from {event.from_}" if event.from_ else ""
    return f"{event.what} {event.path}{origin}{tag}"


def tree(root: Path) -> dict[str, bytes | None]:
    """Every path below, with the content of files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}
