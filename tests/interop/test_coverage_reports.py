"""What reads our reports: genhtml of LCOV, and pycobertura."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from agent.coverage.catalog import Unit
from agent.coverage.python import read_module
from agent.coverage.report import Totals, cobertura, lcov, totals

pytestmark = pytest.mark.interop

SOURCES = {
    "shop/prices.py": (
        "def price(name):\n    if name == 'tea':\n        return 3\n    return 4\n\n\n"
        "class A:\n    def b(self):\n        return 1\n"
    ),
    'shop/it\'s <odd> & "so"/mod.py': "x = 1\n",
    "run.py": "import shop\n",
}
SHOWN = """
import json, sys
import xml.etree.ElementTree as ElementTree
from pycobertura import Cobertura
from pycobertura.filesystem import filesystem_factory
source = ElementTree.parse(sys.argv[1]).find("sources/source").text
report = Cobertura(sys.argv[1], filesystem=filesystem_factory(source))
print(json.dumps({
    "files": {name: [report.total_statements(name), report.total_hits(name)] for name in report.files()},
    "total": [report.total_statements(), report.total_hits()],
    "rate": report.line_rate(),
    "lines": [[line.number, line.source, line.status] for line in report.file_source("shop/prices.py")],
}))
"""


@pytest.fixture
def units(tmp_path: Path) -> list[Unit]:
    found = []
    for name, text in SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
        found.append(read_module(text.encode(), name, str(tmp_path / name)).unit)
    return found


def covered_of(units: list[Unit]) -> dict[str, dict[str, int]]:
    prices = units[0]
    assert prices.lines == (1, 7, 8, 2, 3, 4, 9)
    return {prices.class_id: {"tests/test_a.py": 0b0000111, "tests/test-b.py": 0b0011001}, units[2].class_id: {"": 1}}


def test_genhtml_shows_each_line_function_and_test(
    units: list[Unit], peer_command: Callable[[str], Path], tmp_path: Path
) -> None:
    info, pages = tmp_path / "lcov.info", tmp_path / "pages"
    info.write_bytes(lcov(units, covered_of(units)))
    command = str(peer_command("genhtml"))
    argv = [command, "--show-details", "--function-coverage", "--legend", "-o", str(pages), str(info)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    assert totals(units, covered_of(units)) == Totals(files=3, lines=9, covered=6)
    assert re.search(r"lines\.+: \S+% \(6 of 9 lines\)", done.stdout), done.stdout
    assert re.search(r"functions\.+: \S+% \(3 of 5 functions\)", done.stdout), done.stdout
    (page,) = pages.rglob("prices.py.gcov.html")
    assert "return 4" in page.read_text()
    details = "".join(path.read_text() for path in pages.rglob("*.html"))
    assert "tests_test_a_py" in details
    assert "tests_test_b_py" in details


def test_pycobertura_reads_each_line(units: list[Unit], python_peer: Callable[..., Path], tmp_path: Path) -> None:
    python = python_peer("pycobertura==4.1.0")
    report = tmp_path / "cobertura.xml"
    report.write_bytes(cobertura(units, covered_of(units), at=1795294679.0, version="emissary"))
    done = subprocess.run([python, "-c", SHOWN, report], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert shown["files"] == {"run.py": [1, 1], 'shop/it\'s <odd> & "so"/mod.py': [1, 0], "shop/prices.py": [7, 5]}
    assert shown["total"] == [9, 6]
    assert shown["rate"] == pytest.approx(6 / 9, abs=1e-4)
    states = {1: "hit", 2: "hit", 3: "hit", 4: "miss", 7: "hit", 8: "hit", 9: "miss"}
    text = SOURCES["shop/prices.py"].splitlines(keepends=True)
    assert shown["lines"] == [[number, line, states.get(number)] for number, line in enumerate(text, 1)]
