"""What is covered together: one folder, one catalog, and a report that is bounded like the sessions are."""

import errno
import logging
import os
import socket
from contextlib import nullcontext
from pathlib import Path

import pytest
from trio.testing import MockClock

from agent.core import release
from agent.coverage.catalog import Catalog, Delta
from agent.coverage.merged import UNSPECIFIED
from agent.coverage.settings import CoverageSettings, SourceName
from agent.coverage.sources import Asking, Lost, Source
from agent.coverage.sources.python import Python, reading
from agent.coverage.watched import Watched
from tests.coverage_house import Product


async def watched(folder: Path, product: Product, *, report: bool = True, mib: int = 64) -> Watched:
    settings = CoverageSettings(max_pending_mib=mib)
    made = Watched(settings, ["v8"], folder / "runs" / "r-1", product.make, nullcontext, report=report)
    await made.prepare([folder])
    await made.let_count(True)
    return made


async def collected(run: Watched) -> list[Delta]:
    taken: list[Delta] = []
    await run.collect(taken.extend)
    return taken


async def test_what_counts_is_taken_for_the_report_by_test(tmp_path: Path) -> None:
    product = Product("./a.js")
    run = await watched(tmp_path, product)
    product.reach("./a.js", "1", "t1")
    product.reach("./a.js", "01", "t1")
    product.reach("./gone.js", "1", "t1")
    assert await collected(run) == [Delta("./a.js", 1, "t1"), Delta("./a.js", 2, "t1"), Delta("./gone.js", 1, "t1")]
    assert run.covered(run.units()) == {"./a.js": {"t1": 3}}
    assert run.why_empty() == ""


async def test_a_report_lists_what_has_a_source_that_saw_anything(tmp_path: Path) -> None:
    script, module = Product("./a.js"), Product("./a.py")

    def make(name: SourceName, settings: CoverageSettings, catalog: Catalog, folder: Path, asking: Asking) -> Source:
        return (script if name == "v8" else module).make(name, settings, catalog, folder, asking)

    run = Watched(CoverageSettings(), ["v8", "python"], tmp_path / "runs" / "r-1", make, nullcontext, report=True)
    await run.prepare([tmp_path])
    await run.let_count(True)
    assert run.units().keys() == run.reported().keys() == {"./a.js", "./a.py"}
    module.reach("./a.py", "1")
    await collected(run)
    assert run.reported().keys() == {"./a.py"}


async def test_nothing_counts_once_it_is_stopped_and_its_folder_goes(tmp_path: Path) -> None:
    product = Product("./a.js")
    run = await watched(tmp_path, product, report=False)
    await run.let_count(True)  # said twice, started once
    product.reach("./a.js", "1")
    assert len(await collected(run)) == 1
    await run.remove()
    product.reach("./a.js", "1")
    assert await collected(run) == []
    assert run.covered(run.units()) == {}
    assert not (tmp_path / "runs" / "r-1").exists()


async def test_a_former_runs_files_are_gone_before_it_begins(tmp_path: Path) -> None:
    old = tmp_path / "runs" / "r-1" / "v8"
    old.mkdir(parents=True)
    await watched(tmp_path, Product("./a.js"))
    assert not old.exists()


async def test_a_report_without_room_gives_up_tests_and_then_classes(tmp_path: Path) -> None:
    run = await watched(tmp_path, Product(), mib=1)
    run.see(Delta(f"./{n}.js", 1, test) for n in range(2000) for test in ("t1", "t2"))
    assert run.seen is not None
    assert run.told() == []
    assert {test for _, test, _ in run.seen.entries()} == {UNSPECIFIED}
    run.see(Delta(f"./{n}.js", 1, "t1") for n in range(10_000))
    (lost,) = run.told()
    assert isinstance(lost, Lost)
    assert 0 < lost.classes == 10_000 - len(run.seen)
    assert run.told() == []


class Disk:
    """What is written by way of release.write, but for the first tries, for which there is no room."""

    def __init__(self, patch: pytest.MonkeyPatch, *failures: int) -> None:
        self._write, self._failures = release.write, list(failures)
        patch.setattr(release, "write", self.write)

    def write(self, path: Path, data: bytes, mode: int = 0o644) -> None:
        if self._failures:
            raise OSError(number := self._failures.pop(0), os.strerror(number))
        self._write(path, data, mode)


async def test_a_report_waits_for_room_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: MockClock
) -> None:
    run = await watched(tmp_path, Product("./a.js"))
    run.see([Delta("./a.js", 1, "t1")])
    Disk(monkeypatch, errno.ENOSPC, errno.EDQUOT)
    totals = await run.write(tmp_path, run.units(), at=0.0)
    assert totals.files == 1
    assert {"cobertura.xml", "lcov.info"} <= set(os.listdir(tmp_path))


async def test_a_report_that_can_never_be_written_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = await watched(tmp_path, Product("./a.js"))
    Disk(monkeypatch, errno.EROFS)
    with pytest.raises(OSError, match="Read-only"):
        await run.write(tmp_path, run.units(), at=0.0)


async def test_what_could_not_be_kept_is_kept_later_and_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    kept, product = tmp_path / "coverage.json", Product("./a.js")
    run = Watched(
        CoverageSettings(),
        ["v8"],
        tmp_path / "runs",
        product.make,
        nullcontext,
        project=tmp_path,
        kept=kept,
        report=True,
    )
    await run.prepare([tmp_path])
    run.see([Delta("./a.js", 1, "t1")])
    Disk(monkeypatch, errno.ENOSPC, errno.ENOSPC)
    for _ in range(2):
        await run.keep()
        assert not kept.exists()
    await run.keep()
    assert b"./a.js" in kept.read_bytes()
    assert [record.message.split(" file=")[0] for record in caplog.records if record.levelno > logging.INFO] == [
        "coverage cannot be kept"
    ]


async def test_a_session_beside_others_has_lines_told_anew(tmp_path: Path) -> None:
    (tmp_path / "product").mkdir()
    (tmp_path / "product/a.py").write_text("x = 1\n")
    folders: list[Path] = []

    def make(name: SourceName, settings: CoverageSettings, catalog: Catalog, folder: Path, asking: Asking) -> Source:
        folders.append(folder)
        return Python(settings, catalog, folder, asking, reading())

    run = Watched(CoverageSettings(), ["python"], tmp_path / "runs", make, nullcontext)
    await run.prepare([tmp_path / "product"])
    await run.count_anew()
    await run.let_count(True)
    with socket.socket(socket.AF_UNIX) as process:
        process.settimeout(10)
        process.connect(str(folders[0] / "python.sock"))
        await collected(run)
        await run.count_anew()
        assert process.recv(100) == b'{"restart":1}\n'
    await run.remove()
