"""The private folders of runs: named, and removed whatever stands in them."""

import os
import stat
import tempfile
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from agent.monitors.folders import PAUSE_S, Litter, private_folder, remove


async def test_a_folder_is_named_after_its_run_and_not_made(tmp_path: Path) -> None:
    note, folder = await private_folder("monitor-web-000001", tmp_path, None)
    assert note == folder
    assert note.name.rpartition("-")[0] == "monitor-web-000001"
    assert (await private_folder("monitor-web-000001", tmp_path, None))[0] != note
    assert os.listdir(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs a monitor as another user")
async def test_another_user_s_is_where_he_can_reach_it_and_a_link_tells_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    note, folder = await private_folder("monitor-web-000001", tmp_path, "nobody")
    assert (note.parent, folder.parent, note.readlink()) == (tmp_path, tmp_path / "tmp", folder)
    assert not folder.exists()


def test_whatever_stands_in_it_goes_and_nothing_else(tmp_path: Path) -> None:
    kept, note = tmp_path / "kept", tmp_path / "note"
    kept.mkdir()
    (kept / "file").touch()
    (note / "deep/er").mkdir(parents=True)
    (note / "deep/link").symlink_to(kept)
    (note / "deep/file").write_text("x")
    (note / "deep/er").chmod(stat.S_IRUSR)
    remove(note)
    remove(tmp_path / "never-made")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    assert (kept / "file").exists()


async def test_litter_goes_soon_and_at_the_end_also_when_cancelled(tmp_path: Path, autojump_clock: MockClock) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    for folder in folders:
        folder.mkdir()
    litter = Litter()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(litter.keep_clear)
        litter.add(folders[0])
        litter.add(folders[1])
        await trio.sleep(PAUSE_S / 2)
        assert len(os.listdir(tmp_path)) == 3
        await trio.sleep(PAUSE_S)
        while len(os.listdir(tmp_path)) > 1:  # noqa: ASYNC110  # the thread's time is not the clock's
            await trio.sleep(PAUSE_S)
        nursery.cancel_scope.cancel()
    assert os.listdir(tmp_path) == ["three"]
    with trio.CancelScope() as scope:
        scope.cancel()
        litter.add(folders[2])
        await litter.clear()
    assert os.listdir(tmp_path) == []
