"""The folder that Node writes into, with recorded reports. With real Nodes: tests/interop/test_coverage_v8.py."""

import json
import os
import shlex
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent.coverage.catalog import Catalog, Delta
from agent.coverage.javascript import Script, script
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources import Lost, Warned, v8
from agent.coverage.sources.reading import Reading
from agent.coverage.sources.v8 import HOOK, V8
from agent.coverage.v8profile import NotAProfile

DATA = Path(__file__).parent / "data/coverage/v8"
DEAD = 2**31 - 1  # more than any kernel gives
FUTURE_MS = 10 * time.time_ns() // 1_000_000
ALIVE = os.getpid()


class House:
    """A product of one file, its source, and the folder that its Nodes would write into."""

    def __init__(self, tmp_path: Path, **settings: Any) -> None:
        self.product = tmp_path / "product"
        self.product.mkdir()
        (self.product / "queue.mjs").write_bytes((DATA / "queue.mjs").read_bytes())
        self.catalog = Catalog()
        self.source = V8(CoverageSettings(**settings), self.catalog, tmp_path / "run", nullcontext, v8.reading())
        self.folder = tmp_path / "run/v8"

    async def start(self) -> None:
        await self.source.prepare([self.product])
        await self.source.start()

    def report(self, number: int, *also: str) -> bytes:
        """A recorded report; the process loaded the files `also`, of the product's folder, before."""
        text = (DATA / f"report{number}.json").read_text().replace("file:///product", self.product.as_uri())
        report = json.loads(text)
        report["result"] = [
            {"url": Path(os.path.normpath(self.product / name)).as_uri(), "functions": []} for name in also
        ] + report["result"]
        return json.dumps(report).encode()

    def write(self, data: bytes, *, pid: int = DEAD, ms: int = FUTURE_MS, thread: int = 0) -> Path:
        path = self.folder / f"coverage-{pid}-{ms}-{thread}.json"
        path.write_bytes(data)
        os.utime(path, (path.stat().st_atime, time.time() + 3600))  # new, however long it is until somebody looks
        return path

    def begin(self, pid: int, thread: int = 0, parent: str = "0-0") -> None:
        (self.folder / f"begun-{pid}-{thread}-{parent}").touch()

    def left(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    def texts(self) -> list[str]:
        return [each.text for each in self.source.told() if isinstance(each, Warned)]


@pytest.fixture
async def house(tmp_path: Path) -> House:
    house = House(tmp_path)
    await house.start()
    return house


def whose(deltas: list[Delta]) -> list[str]:
    return [delta.test for delta in deltas]


async def test_reports_become_deltas_and_are_deleted(house: House) -> None:
    house.write(house.report(1))
    (delta,) = await house.source.collect()
    unit = house.catalog.units["./queue.mjs"]
    assert (delta.class_id, delta.test) == ("./queue.mjs", "")
    assert {m.name for m in unit.methods if any(delta.probes >> probe & 1 for probe in m.probes)} == {
        *("GLOBAL", "push", "drain", "shout")
    }
    house.write(house.report(2), ms=FUTURE_MS + 1)
    (second,) = await house.source.collect()
    assert second.probes & ~delta.probes  # the loop went on
    assert house.left() == []
    assert await house.source.collect() == []
    assert house.source.told() == []
    assert house.source.why_empty() == ""


async def test_a_thread_belongs_to_the_first_test_file_it_names(house: House) -> None:
    house.write(house.report(1, "test/helpers/a.js", "test/a.test.js", "test/b.test.js"), thread=1)
    house.write(house.report(1, "test/b.test.js"), thread=2)
    house.write(house.report(2), ms=FUTURE_MS + 1, thread=1)  # names none any more
    house.write(house.report(1), thread=3)
    deltas = {delta.test: delta.probes for delta in await house.source.collect()}
    assert set(deltas) == {"test/a.test.js", "test/b.test.js", ""}
    assert deltas["test/a.test.js"] > deltas["test/b.test.js"] == deltas[""]
    house.write(house.report(2, "test/c.test.js"), ms=FUTURE_MS + 2, thread=1)
    assert whose(await house.source.collect()) == ["test/a.test.js"]


async def test_what_a_runner_tells_to_be_a_test_file_is_one(house: House) -> None:
    house.source.has_tests(house.product / "checks/a.js")
    house.write(house.report(1, "queue.mjs", "checks/a.js"))
    assert whose(await house.source.collect()) == ["checks/a.js"]


async def test_a_child_belongs_to_its_parents_test(house: House) -> None:
    house.begin(DEAD, 3)
    house.begin(DEAD - 1, 0, parent=f"{DEAD}-3")
    house.begin(DEAD - 2, 0, parent=f"{DEAD - 1}-0")
    house.write(house.report(1), pid=DEAD - 2)
    house.write(house.report(2, "a.test.js"), ms=FUTURE_MS + 1, thread=3)
    assert whose(await house.source.collect()) == ["a.test.js"]
    assert house.left() == []


async def test_a_child_waits_until_its_parent_has_told_its_test(house: House) -> None:
    house.begin(ALIVE)
    house.begin(DEAD, parent=f"{ALIVE}-0")
    house.write(house.report(1))
    assert await house.source.collect() == []
    house.write(house.report(2, "a.test.js"), pid=ALIVE, ms=FUTURE_MS + 1)
    assert whose(await house.source.collect()) == ["a.test.js"]


async def test_at_the_end_nothing_waits(house: House) -> None:
    house.begin(ALIVE)
    house.begin(DEAD, parent=f"{ALIVE}-0")
    house.write(house.report(1))
    assert whose(await house.source.collect(final=True)) == [""]


async def test_parents_in_a_ring_end_the_search(house: House) -> None:
    house.begin(DEAD, parent=f"{DEAD - 1}-0")
    house.begin(DEAD - 1, parent=f"{DEAD}-0")
    house.write(house.report(1))
    assert whose(await house.source.collect()) == [""]


async def test_reports_from_before_the_start_do_not_count_whatever_the_date(house: House) -> None:
    house.write(house.report(1, "a.test.js"), thread=1)
    await house.source.start()
    assert await house.source.collect() == []
    house.write(house.report(2), ms=FUTURE_MS // 100, thread=1)  # whose it is was known before
    assert whose(await house.source.collect()) == ["a.test.js"]
    await house.source.stop()
    house.write(house.report(1))
    assert await house.source.collect(final=True) == []
    assert house.left() == []


async def test_half_a_report_is_read_when_it_is_whole(house: House) -> None:
    whole = house.report(1)
    path = house.write(whole[:300], pid=ALIVE)
    assert await house.source.collect() == []
    assert house.source.told() == []
    path.write_bytes(whole)
    assert len(await house.source.collect()) == 1


@pytest.mark.parametrize("data", [b"", b'{"result":[', b"\xff", b'{"result":[{"url":1}]}', b"[]"])
async def test_what_stays_half_is_dropped_and_told(house: House, data: bytes) -> None:
    path = house.write(data)
    old = time.time() - 60
    os.utime(path, (old, old))
    house.write(house.report(1), thread=1)
    assert len(await house.source.collect()) == 1
    assert house.left() == []
    (text,) = house.texts()
    assert text.startswith(f"A report of Node was dropped: {path.name}, {len(data)} bytes: not a V8 profile: ")


async def test_many_that_stay_half_are_told_together(house: House) -> None:
    old = time.time() - 60
    for thread in range(7):
        os.utime(house.write(b"", thread=thread), (old, old))
    assert await house.source.collect() == []
    assert house.left() == []
    (text,) = house.texts()
    assert text.startswith("7 reports of Node were dropped: ")
    assert text.endswith(" and 2 more")


async def test_the_end_waits_for_what_is_being_written(house: House, autojump_clock: MockClock) -> None:
    whole = house.report(1)
    path = house.write(whole[:300], pid=ALIVE)

    async def write_on() -> None:
        await trio.sleep(v8.LOOK_S * 3.5)
        path.write_bytes(whole)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(write_on)
        assert len(await house.source.collect(final=True)) == 1
    assert house.source.told() == []


async def test_the_end_does_not_wait_for_ever(house: House, autojump_clock: MockClock) -> None:
    house.write(house.report(1)[:300], pid=ALIVE)
    assert await house.source.collect(final=True) == []
    assert house.texts() == ["1 reports of Node were still being written when the session ended"]
    assert trio.current_time() < 2


async def test_a_cancelled_end_loses_nothing(house: House, autojump_clock: MockClock) -> None:
    house.write(house.report(1))
    house.write(house.report(2)[:300], pid=ALIVE)
    with trio.move_on_after(v8.LOOK_S / 2) as scope:
        await house.source.collect(final=True)
    assert scope.cancelled_caught
    assert len(await house.source.collect()) == 1


async def test_the_folder_is_bounded(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    report = house.report(1)
    for number in range(4):
        house.write(report, ms=FUTURE_MS + number, thread=number)
    house.write(b" " * (3 * len(report)), thread=9)
    monkeypatch.setattr(v8, "FOLDER_LIMIT", 2 * len(report))
    monkeypatch.setattr(v8, "REPORT_LIMIT", 2 * len(report))
    await house.source.collect()
    assert house.left() == []
    (lost,) = house.source.told()
    assert isinstance(lost, Lost)
    assert (lost.classes, lost.why.split(":")[0]) == (1, "3 reports of Node were dropped")


async def test_what_is_no_report_is_let_alone(house: House) -> None:
    (house.folder / "notes.txt").write_text("mine")
    (house.folder / f"coverage-1-{FUTURE_MS}-0.json").mkdir()
    (house.folder / f"coverage-2-{FUTURE_MS}-0.json").symlink_to("/dev/zero")
    os.mkfifo(house.folder / f"coverage-3-{FUTURE_MS}-0.json")  # to open it would wait for ever
    os.mkfifo(house.folder / "begun-1-0-0-0")
    assert await house.source.collect(final=True) == []
    assert len(house.left()) == 5


async def test_a_folder_that_is_gone_has_nothing(house: House) -> None:
    house.folder.rmdir()
    assert await house.source.collect() == []


async def test_a_changed_file_is_dropped_and_told_once(house: House) -> None:
    file = house.product / "queue.mjs"
    file.write_text(file.read_text().replace("'never'", "'ever'"))
    for number in (1, 2):
        house.write(house.report(number), thread=number)
        assert await house.source.collect() == []
    assert house.texts() == ["queue.mjs: changed on disk since the classes were read: that coverage is dropped"]
    assert house.source.why_empty() == "What Node ran of the product is not what was read: queue.mjs."
    await house.source.prepare([house.product])
    await house.source.start()
    house.write(house.report(1))  # of a process that still runs the old text
    assert await house.source.collect() == []
    (text,) = house.texts()
    assert "what Node ran has another length" in text


async def test_what_is_no_javascript_is_told_once(house: House) -> None:
    await house.start()
    for _ in range(2):
        report = {"result": [{"url": (house.product / name).as_uri(), "functions": []} for name in ("b.ts", "c/a.tsx")]}
        report["result"].append({"url": "file:///elsewhere/d.ts", "functions": []})
        report["result"].append({"url": (house.product / "node_modules/e/f.ts").as_uri(), "functions": []})
        house.write(json.dumps(report).encode())
        assert await house.source.collect() == []
    assert house.texts() == ["b.ts, c/a.tsx: not covered, as it is no JavaScript. Run what it is compiled to."]
    assert house.source.why_empty() == "What Node ran of the product is no JavaScript: b.ts, c/a.tsx."


async def test_a_touched_file_is_the_same(house: House) -> None:
    os.utime(house.product / "queue.mjs", (1, 1))
    house.write(house.report(1))
    assert len(await house.source.collect()) == 1


async def test_what_a_source_before_it_has_read_is_not_taken_apart_again(house: House, tmp_path: Path) -> None:
    read: list[str] = []

    def recorded(text: bytes, path: str, file: str) -> Script:
        read.append(path)
        return script(text, path, file)

    scripts, catalog = Reading(recorded, v8.SUFFIXES, v8.MOST_BYTES), Catalog()
    for run in ("r-1", "r-2"):
        await V8(CoverageSettings(), catalog, tmp_path / run, nullcontext, scripts).prepare([house.product])
        (house.product / "src").mkdir(exist_ok=True)
        (house.product / "src/new.cjs").write_text("f()")
    assert read == ["queue.mjs", "src/new.cjs"]
    assert set(catalog.units) == {"./queue.mjs", "src/new.cjs"}


async def test_the_first_of_two_roots_with_one_file_counts(tmp_path: Path) -> None:
    house = House(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/queue.mjs").write_text("other()")
    await house.source.prepare([house.product, tmp_path / "other"])
    assert house.texts() == [f"{tmp_path}/other/queue.mjs: not covered, another root has a file of that name"]
    assert house.catalog.units["./queue.mjs"].file == str(house.product / "queue.mjs")


async def test_large_and_unreadable_files_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    house = House(tmp_path)
    (house.product / "none.js").symlink_to("nowhere")
    monkeypatch.setattr(v8, "MOST_BYTES", 100)
    house.source = V8(CoverageSettings(), house.catalog, tmp_path / "run", nullcontext, v8.reading())
    await house.start()
    assert house.texts() == [
        f"{house.product}/none.js: not covered, No such file or directory",
        f"{house.product}/queue.mjs: not covered, more than 100 bytes",
    ]
    assert house.catalog.units == {}


async def test_a_root_may_be_a_link(tmp_path: Path) -> None:
    house = House(tmp_path)
    (tmp_path / "link").symlink_to(house.product)
    await house.source.prepare([tmp_path / "link"])
    await house.source.start()
    house.write(house.report(1))
    assert len(await house.source.collect()) == 1


async def test_tests_beside_the_root_are_named_from_where_both_are(tmp_path: Path) -> None:
    house = House(tmp_path)
    (tmp_path / "tests").mkdir()
    await house.start()
    house.write(house.report(1, "../tests/a.js"), thread=1)
    house.write(house.report(1, "../node_modules/ava/test/b.js"), thread=2)
    assert sorted(whose(await house.source.collect())) == ["", "tests/a.js"]


async def test_why_nothing_was_collected(house: House) -> None:
    assert house.source.why_empty().startswith("No Node process that was started with")
    house.write(b'{"result":[{"url":"node:fs","functions":[]}]}')
    assert await house.source.collect() == []
    assert house.source.why_empty().startswith("1 reports of Node named none of the 1 files that were read.")


async def test_alive_is_who_began_or_reported(house: House) -> None:
    assert not house.source.alive()
    house.begin(DEAD)
    await house.source.collect()
    assert not house.source.alive()
    house.write(house.report(1), pid=ALIVE)
    await house.source.collect()
    assert house.source.alive()


async def test_the_oldest_processes_are_forgotten_first(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(v8, "MOST_WORKERS", 2)
    for thread in (1, 2, 3):
        house.write(house.report(1, f"{thread}.test.js"), thread=thread)
        await house.source.collect()
    for thread in (3, 1):
        house.write(house.report(2), thread=thread)
    assert sorted(whose(await house.source.collect())) == ["", "3.test.js"]


def test_the_environment_names_the_folder_and_the_hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = House(tmp_path, hook_s=0.5).source.env()
    assert env["NODE_V8_COVERAGE"] == env["EMISSARY_V8"] == str(tmp_path / "run/v8")
    assert env["EMISSARY_V8_MS"] == "500"
    assert shlex.split(env["NODE_OPTIONS"]) == ["--require", str(HOOK)]
    assert HOOK.name == "hook.cjs"
    assert HOOK.is_file()
    assert (tmp_path / "run/v8").stat().st_mode & 0o777 == 0o700


async def test_session_data_of_a_browser_and_of_a_process(house: House) -> None:
    def data(url: str) -> str:
        report = json.loads(house.report(1))
        for each in report["result"]:
            each["url"] = each["url"].replace((house.product / "queue.mjs").as_uri(), url)
        return json.dumps({"testId": "t 1", "coverage": report, "scripts": []})

    house.write(house.report(1))
    (own,) = await house.source.collect()
    for url in ((house.product / "queue.mjs").as_uri(), "http://localhost:3000/queue.mjs?v=3"):
        assert house.source.of_session_data(data(url)) == [Delta("./queue.mjs", own.probes, "t 1")]
    for url in ("http://localhost:3000/other.js", "http://[", "webpack://queue.mjs"):
        assert house.source.of_session_data(data(url)) == []
    with pytest.raises(NotAProfile):
        house.source.of_session_data("{}")
