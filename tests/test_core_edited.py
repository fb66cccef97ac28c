"""That a settings file was changed is noticed, whichever way an editor does it."""

import os
import shutil
from pathlib import Path

import pytest
import trio

from agent.core import config, edited


class Told:
    """How often it was told; to be awaited by number."""

    def __init__(self) -> None:
        self.count = 0
        self._came = trio.Event()

    async def __call__(self) -> None:
        self.count += 1
        self._came.set()
        self._came = trio.Event()

    async def until(self, count: int) -> None:
        with trio.fail_after(60):
            while self.count < count:
                await self._came.wait()


@pytest.mark.parametrize("has_inotify", [True, False])
async def test_each_change_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery, has_inotify: bool
) -> None:
    monkeypatch.setattr(edited, "SETTLE_S", 0.05)
    monkeypatch.setattr(edited, "POLL_S", 0.05)
    if not has_inotify:
        monkeypatch.setattr("agent.core.inotify.INotify", no_instances)
    main, told = tmp_path / "agent.toml", Told()
    main.write_text("a = 1")
    nursery.start_soon(edited.follow, [main], told)
    await trio.testing.wait_all_tasks_blocked()

    main.write_text("a = 22")
    await told.until(1)
    (tmp_path / "new").write_text("a = 3")
    os.replace(tmp_path / "new", main)
    await told.until(2)
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d/10.toml").write_text("b = 1")
    await told.until(3)
    (tmp_path / "conf.d/20.toml").write_text("c = 1")
    await told.until(4)
    (tmp_path / "conf.d/10.toml").unlink()
    await told.until(5)
    (tmp_path / "unrelated").write_text("x")
    main.write_text("a = 4444")
    await told.until(6)
    assert told.count == 6
    nursery.cancel_scope.cancel()


async def test_the_first_files_of_a_machine_without_settings_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    monkeypatch.setattr(edited, "SETTLE_S", 0.05)
    folder, told = tmp_path / "agent", Told()
    monkeypatch.setattr(config, "MAIN_FILE", folder / "agent.toml")
    nursery.start_soon(edited.follow, (), told)
    await trio.testing.wait_all_tasks_blocked()

    (folder / "conf.d").mkdir(parents=True)
    (folder / "conf.d/10.toml").write_text("b = 1")
    await told.until(1)
    (folder / "agent.toml").write_text("a = 1")
    await told.until(2)
    shutil.rmtree(folder)
    await told.until(3)
    folder.mkdir()
    (folder / "agent.toml").write_text("a = 1")
    await told.until(4)
    nursery.cancel_scope.cancel()


def no_instances(**_: object) -> None:
    raise OSError(24, "Too many open files")
