"""Files are read each time, and taken apart when their text is another than before; what is kept is bounded."""

from pathlib import Path

import pytest

from agent.coverage.javascript import Script, script
from agent.coverage.python import read_module
from agent.coverage.sources import reading
from agent.coverage.sources.reading import Reading

TEXT = "exports.f = () => {\n\treturn 1;\n};\n"


class Recorded:
    """A reading, and the paths of what it took apart."""

    def __init__(self, folder: Path, most: int = reading.MOST_KEPT) -> None:
        self.folder = folder
        self.made: list[str] = []
        self.reading = Reading(self.make, most)

    def make(self, text: bytes, path: str, file: str) -> Script:
        self.made.append(path)
        return script(text, path, file)

    def take(self, *names: str) -> list[str]:
        """One pass over these files; which of them were taken apart."""
        self.made.clear()
        self.reading.begin()
        for name in names:
            found = self.reading.read(name, str(self.folder / name))
            assert found is not None
            assert found.made.unit.file == str(self.folder / name)
            assert found.stamp.inode == (self.folder / name).stat().st_ino
        return list(self.made)

    def write(self, *names: str) -> None:
        for name in names:
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).write_text(f"{TEXT}// {name}")


def test_a_text_is_taken_apart_once_wherever_its_root_is(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path / "one")
    recorded.write("a.js", "src/b.js")
    assert recorded.take("a.js", "src/b.js") == ["a.js", "src/b.js"]
    assert recorded.take("a.js", "src/b.js") == []
    recorded.folder = tmp_path / "two"
    recorded.write("a.js", "src/b.js")
    (tmp_path / "two/a.js").write_text(TEXT.replace("1", "2") + "// a.js")  # as long as before
    assert recorded.take("a.js", "src/b.js") == ["a.js"]


def test_the_same_text_at_another_place_is_another_class(tmp_path: Path) -> None:
    modules = Reading(read_module)
    for name in ("a.py", "b.py"):
        (tmp_path / name).write_text("x = 1\n")
        found = modules.read(name, str(tmp_path / name))
        assert found is not None
        assert found.made.unit.class_id == f"./{name}"


def test_of_a_product_that_is_too_large_a_part_is_kept(tmp_path: Path) -> None:
    names = [f"{n}.js" for n in range(5)]
    recorded = Recorded(tmp_path, most=3 * len(f"{TEXT}// 0.js"))
    recorded.write(*names)
    assert recorded.take(*names) == names
    assert recorded.take(*names) == recorded.take(*names) == ["3.js", "4.js"]


def test_what_is_wanted_no_more_makes_room(tmp_path: Path) -> None:
    recorded = Recorded(tmp_path, most=2 * len(f"{TEXT}// 0.js"))
    recorded.write("0.js", "1.js", "2.js", "3.js")
    recorded.take("0.js", "1.js")
    assert recorded.take("2.js", "3.js") == ["2.js", "3.js"]  # two products by turns: the first stays
    assert recorded.take("0.js", "1.js") == []
    for _ in range(2):
        recorded.take("2.js", "3.js")
    assert recorded.take("2.js", "3.js") == []


def test_a_large_file_is_none_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "MOST_BYTES", 10)
    recorded = Recorded(tmp_path)
    recorded.write("a.js")
    assert recorded.reading.read("a.js", str(tmp_path / "a.js")) is None
    assert recorded.made == []
