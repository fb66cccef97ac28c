"""The kernel's inotify: what it gives, what it refuses, the end of a watch."""

import errno
import os
from pathlib import Path

import pytest
from inotify_simple import flags

from agent.core import inotify
from agent.core.inotify import open_inotify, unwatch


def test_a_watch_tells_until_it_ends_and_may_end_twice(tmp_path: Path) -> None:
    with open_inotify() as notify:
        assert notify is not None
        wd = notify.add_watch(tmp_path, flags.CREATE)  # type: ignore[no-untyped-call]  # it has no annotations
        (tmp_path / "a").touch()
        (event,) = notify.read(timeout=0)  # type: ignore[no-untyped-call]
        assert (event.wd, event.name) == (wd, "a")
        unwatch(notify, wd)
        unwatch(notify, wd)
        (tmp_path / "b").touch()
        (event,) = notify.read(timeout=0)  # type: ignore[no-untyped-call]
        assert event.mask & flags.IGNORED
        fd = notify.fileno()
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSYS])
def test_where_the_kernel_gives_none_one_polls(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, number: int
) -> None:
    refuse(monkeypatch, number)
    with open_inotify() as notify:
        assert notify is None
    assert "no inotify instance, polling" in caplog.text


def test_another_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    refuse(monkeypatch, errno.ENFILE)
    with pytest.raises(OSError, match="Too many open files in system"), open_inotify():
        raise AssertionError("it opened")


def refuse(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def none_left(nonblocking: bool) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(inotify, "INotify", none_left)
