"""The file monitor takes any bytes; and whatever is done to a tree, and whatever is lost, its end state is told."""

import hashlib
import itertools
import os
import shutil
import struct
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from agent.core.events import FileChanged
from agent.files.looks import Q_OVERFLOW, Watch
from tests.files_eyes import Eyes, tree

OVERFLOW = struct.pack("iIII", -1, Q_OVERFLOW, 0, 0)
TICKS = itertools.count(10**18, 10**9)
NAMES = st.sampled_from(["a", "b", "d", "d/a", "d/b", "d/e", "d/e/a"])
STEPS = st.one_of(
    st.tuples(st.just("write"), NAMES, st.binary(max_size=3)),
    st.tuples(st.just("mkdir"), NAMES, st.none()),
    st.tuples(st.just("remove"), NAMES, st.none()),
    st.tuples(st.just("rename"), NAMES, NAMES),
    st.tuples(st.just("hear"), st.none(), st.none()),
    st.tuples(st.just("lose"), st.none(), st.none()),
    st.tuples(st.just("wait"), st.none(), st.sampled_from([0.05, 0.1, 0.25, 3.0])),
)
EVENTS = st.lists(
    st.builds(
        lambda wd, mask, cookie, name: struct.pack("iIII", wd, mask, cookie, len(name)) + name,
        st.integers(-1, 8),
        st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0x40, 0x80, 0x100, 0x2, 0x8000])),
        st.integers(0, 3),
        st.sampled_from([b"", b"a\0\0", b"\xff\0", b"../x\0", b"d\0\0\0"]),
    ),
    max_size=20,
).map(b"".join)


def do(root: Path, what: str, name: str, value: Any) -> None:
    path = root / name
    if what == "write":
        path.write_bytes(value)
        # Two writes of one size within a tick of the file system's clock cannot be told apart by looking.
        os.utime(path, ns=(0, next(TICKS)))
    elif what == "mkdir":
        path.mkdir(parents=True)
    elif what == "rename":
        path.rename(root / value)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def replay(state: dict[str, str | None], eyes: Eyes) -> None:
    """What a reader knows who has only the events: the hash of each path."""
    for event in eyes.events:
        if not isinstance(event, FileChanged):
            continue
        if event.what == "deleted":
            assert event.path in state
            del state[event.path]
        else:
            if event.from_ is not None:
                moved = state.pop(event.from_)
                state[event.path] = event.sha256 or moved
            elif event.what != "attributes" or event.sha256:
                state[event.path] = event.sha256
    eyes.events.clear()


@given(st.lists(STEPS, max_size=30), st.booleans())
def test_the_end_state_is_told_whatever_happens(steps: list[tuple[str, Any, Any]], inotify: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "root"
        root.mkdir()
        (root / "d").mkdir()
        (root / "d/a").write_bytes(b"1")
        with Eyes(Watch(id="w", path=str(root), recursive=True), inotify=inotify) as eyes:
            eyes.events.clear()
            state = known(root)
            for what, name, value in steps:
                match what:
                    case "hear":
                        eyes.hear()
                    case "lose":
                        if eyes._notify is not None:
                            try:
                                os.read(eyes._notify.fileno(), 1 << 16)
                            except BlockingIOError:
                                continue
                            eyes.monitor.feed(OVERFLOW, eyes.now)
                    case "wait":
                        eyes.now += value
                        eyes.act()
                    case _:
                        try:
                            do(root, what, name, value)
                        except OSError:
                            continue
            for _ in range(2 if inotify else 5):  # polling finds one level at a time
                eyes.now += 5
                eyes.settle()
            replay(state, eyes)
            assert state == known(root)
            assert eyes.monitor.known == len(tree(Path(folder))) + len(Path(folder).parts) - 1
            eyes.monitor.unwatch("w")
            eyes.settle()
            assert (eyes.monitor.known, eyes.monitor.directories) == (0, 0)


def known(root: Path) -> dict[str, str | None]:
    files = {str(root): None} | tree(root)
    return {path: None if data is None else hashlib.sha256(data).hexdigest() for path, data in files.items()}


@given(st.one_of(st.binary(max_size=100), EVENTS))
def test_any_bytes(wire: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "d").mkdir()
        with Eyes(Watch(id="w", path=folder, recursive=True)) as eyes:
            eyes.monitor.feed(wire, eyes.now)
            eyes.settle()
            (Path(folder) / "a").write_bytes(b"1")
            eyes.settle()
            assert f"created {folder}/a" in eyes.told()
