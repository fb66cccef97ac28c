"""Files are read each time, and taken apart when their text is another than before; what is kept is bounded."""

import os
import threading
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import trio

from agent.coverage.javascript import Script, script
from agent.coverage.sources import python, reading
from agent.coverage.sources.product import Chosen
from agent.coverage.sources.reading import MOST_KEPT, Product, Reading, text_of

TEXT = "exports.f = () => {\n\treturn 1;\n};\n"
ALL = Chosen((), ())


class Recorded:
    """A reading, and the paths of what it took apart. Where `goes_on` is clear, that hangs."""

    def __init__(self, folder: Path, *, most_bytes: int = 1000, most_kept: int = MOST_KEPT) -> None:
        self.folder = folder
        self.made: list[str] = []
        self.asked: list[str] = []
        self.hangs, self.goes_on = threading.Event(), threading.Event()
        self.goes_on.set()
        self.reading = Reading(self.make, (".js",), most_bytes, most_kept=most_kept)

    def make(self, text: bytes, path: str, file: str) -> Script:
        self.hangs.set()
        assert self.goes_on.wait(60)
        self.made.append(path)
        return script(text, path, file)

    def asking(self, path: str) -> AbstractContextManager[None]:
        self.asked.append(path)
        return nullcontext()

    async def read(self, *folders: Path) -> Product[Script]:
        return await self.reading.read(folders or [self.folder], ALL, self.asking)

    async def take(self, *names: str) -> list[str]:
        """One pass over these files; which of them were taken apart."""
        self.made.clear()
        product = await self.reading.read([self.folder], Chosen(names, ()), self.asking)
        assert [each.path for each in product.files] == [*names]
        for path, file, made, stamp, _ in product.files:
            assert made.unit.file == file == str(self.folder / path)
            assert stamp.inode == os.stat(file).st_ino
        return list(self.made)

    def write(self, *names: str) -> None:
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(f"{TEXT}// {name}")


async def test_a_text_is_taken_apart_once_wherever_its_root_is(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path / "one")
    recorded.write("a.js", "src/b.js")
    assert await recorded.take("a.js", "src/b.js") == ["a.js", "src/b.js"]
    assert await recorded.take("a.js", "src/b.js") == []
    recorded.folder = tmp_path / "two"
    recorded.write("a.js", "src/b.js")
    (tmp_path / "two/a.js").write_text(TEXT.replace("1", "2") + "// a.js")  # as long as before
    assert await recorded.take("a.js", "src/b.js") == ["a.js"]
    assert recorded.asked == [str(tmp_path / "one")] * 2 + [str(tmp_path / "two")]


async def test_the_same_text_at_another_place_is_another_class(tmp_path: Path) -> None:
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
    found = await python.reading().read([tmp_path], ALL, nullcontext)
    assert [each.made.unit.class_id for each in found.files] == ["./a.py", "./b.py"]


async def test_of_a_product_that_is_too_large_a_part_is_kept(tmp_path: Path) -> None:
    names = [f"{n}.js" for n in range(5)]
    recorded = Recorded(tmp_path, most_kept=3 * len(f"{TEXT}// 0.js"))
    recorded.write(*names)
    assert await recorded.take(*names) == names
    assert await recorded.take(*names) == await recorded.take(*names) == ["3.js", "4.js"]


async def test_what_is_wanted_no_more_makes_room(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, most_kept=2 * len(f"{TEXT}// 0.js"))
    recorded.write("0.js", "1.js", "2.js", "3.js")
    await recorded.take("0.js", "1.js")
    assert await recorded.take("2.js", "3.js") == ["2.js", "3.js"]  # two products by turns: the first stays
    assert await recorded.take("0.js", "1.js") == []
    for _ in range(2):
        await recorded.take("2.js", "3.js")
    assert await recorded.take("2.js", "3.js") == []


async def test_what_is_no_file_of_the_product_is_left_out_by_its_reason(tmp_path: Path) -> None:
    """A pipe that nobody writes into would be read for ever, and /dev/zero would never end."""
    recorded = Recorded(tmp_path, most_bytes=100)
    recorded.write("a.js")
    (tmp_path / "large.js").write_text("x" * 101)
    os.mkfifo(tmp_path / "pipe.js")
    (tmp_path / "zero.js").symlink_to("/dev/zero")
    (tmp_path / "gone.js").symlink_to("nowhere")
    found = await recorded.read()
    assert [each.path for each in found.files] == ["a.js"]
    assert found.left_out == {
        "more than 100 bytes": [f"{tmp_path}/large.js"],
        "no regular file": [f"{tmp_path}/pipe.js", f"{tmp_path}/zero.js"],
        "No such file or directory": [f"{tmp_path}/gone.js"],
    }


def test_a_file_that_tells_no_size_is_bounded_too() -> None:
    with pytest.raises(OSError, match="more than 2 bytes"):
        text_of("/proc/self/stat", 2)


async def test_a_root_in_another_adds_nothing(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    recorded.write("a.js", "src/b.js")
    (tmp_path / "link").symlink_to("src")
    found = await recorded.read(tmp_path, tmp_path / "src", tmp_path / "link")
    assert [each.path for each in found.files] == ["a.js", "src/b.js"]
    assert found.roots == [str(tmp_path), f"{tmp_path}/src"]


async def test_a_product_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_FILES", 2)
    recorded = Recorded(tmp_path)
    recorded.write("a.js", "b.js", "c.js", "d.js")
    found = await recorded.read()
    assert [each.path for each in found.files] == ["a.js", "b.js"]
    assert found.left_out == {"with all behind it, more than 2 files": [f"{tmp_path}/c.js"]}


async def test_a_disk_that_hangs_holds_up_nobody_who_gives_it_up(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path)
    recorded.write("a.js")
    recorded.goes_on.clear()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(recorded.read)
        assert await trio.to_thread.run_sync(recorded.hangs.wait, 60)
        nursery.cancel_scope.cancel()
    with trio.move_on_after(0.01):  # nor is a second thread lost
        await recorded.read()
    assert recorded.made == []
    recorded.goes_on.set()
    assert [each.path for each in (await recorded.read()).files] == ["a.js"]
    assert recorded.made == ["a.js"]
