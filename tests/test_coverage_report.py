"""agent/coverage/report.py: what the files say, line by line, and that no name breaks them."""

import xml.etree.ElementTree as ElementTree

from hypothesis import given
from hypothesis import strategies as st

from agent.coverage.catalog import Method, Unit
from agent.coverage.report import Totals, cobertura, lcov, totals


def method(name: str, *probes: int, params: tuple[str, ...] = (), returns: str = "") -> Method:
    return Method(name=name, params=params, return_type=returns, probes=probes, checksum="")


CALC = Unit(
    path="src",
    name="calc.py",
    methods=(method("<module>", 0, 1), method("add", 2, 3, params=("a", "b"), returns="int"), method("sub", 4)),
    lines=(1, 5, 2, 3, 6),
    file="/home/lab/src/calc.py",
)
ROOT = Unit(path=".", name="run.py", methods=(method("<module>", 0),), lines=(1,), file="/home/lab/run.py")
JAVA = Unit(path="com/acme", name="Valve", methods=(method("<class>", 0, 1, 2),), lines=(0, 0, 0))


def test_a_tracefile_has_a_record_for_each_file_and_test() -> None:
    covered = {"src/calc.py": {"tests/test_a.py": 0b00111, "": 0b01}}
    assert lcov([CALC, ROOT], covered).decode().splitlines() == [
        *("TN:", "SF:/home/lab/run.py", "FN:1,<module>", "FNDA:0,<module>", "FNF:1", "FNH:0"),
        *("DA:1,0", "LF:1", "LH:0", "end_of_record"),
        *("TN:", "SF:/home/lab/src/calc.py", "FN:1,<module>", "FN:2,add", "FN:6,sub"),
        *("FNDA:1,<module>", "FNDA:0,add", "FNDA:0,sub", "FNF:3", "FNH:1"),
        *("DA:1,1", "DA:2,0", "DA:3,0", "DA:5,0", "DA:6,0", "LF:5", "LH:1", "end_of_record"),
        *("TN:tests_test_a_py", "SF:/home/lab/src/calc.py", "FN:1,<module>", "FN:2,add", "FN:6,sub"),
        *("FNDA:1,<module>", "FNDA:1,add", "FNDA:0,sub", "FNF:3", "FNH:2"),
        *("DA:1,1", "DA:2,1", "DA:3,0", "DA:5,1", "DA:6,0", "LF:5", "LH:3", "end_of_record"),
    ]


def test_the_document_of_cobertura_has_each_line_and_its_rates() -> None:
    root = ElementTree.fromstring(
        cobertura([CALC, ROOT], {"src/calc.py": {"a": 0b1, "b": 0b100}}, at=1795294679.5, version="emissary 1")
    )
    assert root.attrib == {
        **{"line-rate": "0.3333", "branch-rate": "0", "complexity": "0", "lines-covered": "2", "lines-valid": "6"},
        **{"branches-covered": "0", "branches-valid": "0", "timestamp": "1795294679500", "version": "emissary 1"},
    }
    assert [source.text for source in root.iter("source")] == ["/home/lab"]
    assert [(each.get("name"), each.get("line-rate")) for each in root.iter("package")] == [
        (".", "0.0000"),
        ("src", "0.4000"),
    ]
    assert [(each.get("name"), each.get("filename")) for each in root.iter("class")] == [
        ("run.py", "run.py"),
        ("calc.py", "src/calc.py"),
    ]
    methods = {each.get("name"): each for each in root.iter("method")}
    assert methods["add"].attrib == {
        **{"name": "add", "signature": "(a, b)int"},
        **{"line-rate": "0.5000", "branch-rate": "0", "complexity": "0"},
    }
    (calc,) = root.iterfind("packages/package[@name='src']/classes/class")
    lines = [(line.get("number"), line.get("hits")) for line in calc.iterfind("lines/line")]
    assert lines == [("1", "1"), ("2", "1"), ("3", "0"), ("5", "0"), ("6", "0")]


def test_a_line_is_covered_when_any_of_its_probes_is() -> None:
    one_line = Unit(path=".", name="a.js", methods=(method("GLOBAL", 0), method("f", 1)), lines=(7, 7), file="/r/a.js")
    assert totals([one_line], {"./a.js": {"": 0b10}}) == Totals(files=1, lines=1, covered=1)
    assert "DA:7,1" in lcov([one_line], {"./a.js": {"": 0b10}}).decode().splitlines()


def test_a_probe_of_a_class_without_lines_stands_for_a_line() -> None:
    covered = {"com/acme/Valve": {"": 0b101}}
    assert totals([JAVA], covered) == Totals(files=1, lines=3, covered=2)
    text = lcov([JAVA], covered).decode()
    assert "SF:com/acme/Valve\n" in text
    assert "DA:1,1\nDA:2,0\nDA:3,1\n" in text
    document = ElementTree.fromstring(cobertura([JAVA], covered, at=0, version="1"))
    assert [each.get("filename") for each in document.iter("class")] == ["com/acme/Valve"]


def test_a_probe_whose_line_is_not_known_is_in_no_line_where_others_are_known() -> None:
    unit = Unit(path=".", name="a", methods=(method("f", 0, 1),), lines=(0, 4), file="/a")
    assert totals([unit], {"./a": {"": 0b01}}) == Totals(files=1, lines=1, covered=0)


def test_no_units_are_an_empty_report() -> None:
    assert totals([], {}) == Totals(0, 0, 0)
    assert lcov([], {}) == b""
    document = ElementTree.fromstring(cobertura([], {}, at=0, version="1"))
    assert (document.get("line-rate"), document.get("lines-valid")) == ("1", "0")


def test_tests_that_differ_in_signs_only_keep_records_of_their_own() -> None:
    text = lcov([ROOT], {"./run.py": {"a-b": 1, "a_b": 1, "a.b": 0}}).decode()
    assert [line for line in text.splitlines() if line.startswith("TN:")] == ["TN:a_b", "TN:a_b_2", "TN:a_b_3"]


def test_methods_of_one_name_are_told_apart_by_their_lines() -> None:
    unit = Unit(path=".", name="p.py", methods=(method("C.x", 0), method("C.x", 1)), lines=(3, 8), file="/p.py")
    assert (
        "FN:3,C.x\nFN:8,C.x (line 8)\nFNDA:0,C.x\nFNDA:1,C.x (line 8)\n" in lcov([unit], {"./p.py": {"": 2}}).decode()
    )


def test_a_file_name_that_is_no_utf8_stands_as_it_is_on_the_disk() -> None:
    unit = Unit(path=".", name="\udcff.py", methods=(), lines=(1,), file="/r/\udcff.py")
    assert b"SF:/r/\xff.py\n" in lcov([unit], {})


ANY = st.text(st.characters(), min_size=1)


@given(path=ANY, name=ANY, function=ANY, param=ANY, test=ANY, file=st.none() | ANY.map(lambda text: f"/r/{text}"))
def test_no_name_breaks_a_report(path: str, name: str, function: str, param: str, test: str, file: str | None) -> None:
    of_unit = (method(function, 0, params=(param,)), method("second", 1))
    unit = Unit(path=path, name=name, methods=of_unit, lines=(1, 2), file=file)
    covered = {unit.class_id: {test: 0b10}}
    document = ElementTree.fromstring(cobertura([unit], covered, at=1.0, version=name))
    assert [line.get("hits") for line in document.iterfind("packages/package/classes/class/lines/line")] == ["0", "1"]
    assert len(list(document.iter("method"))) == 2 - (function == "second")
    lines = lcov([unit], covered).decode("utf-8", "surrogateescape").split("\n")
    keys = ["TN", "SF", "FN", "FN", "FNDA", "FNDA", "FNF", "FNH", "DA", "DA", "LF", "LH", "end_of_record", ""]
    if function != "second":
        assert [line.partition(":")[0] for line in lines] == keys


NAMES = st.sampled_from(["a", "b", "<module>"])


@given(
    lines=st.lists(st.integers(0, 30), max_size=30),
    reached=st.dictionaries(NAMES, st.integers(0, 2**30 - 1), max_size=3),
)
def test_both_files_and_the_totals_agree(lines: list[int], reached: dict[str, int]) -> None:
    unit = Unit(path=".", name="a", methods=(method("f", *range(len(lines))),), lines=tuple(lines), file="/a")
    covered = {"./a": reached}
    total = totals([unit], covered)
    document = ElementTree.fromstring(cobertura([unit], covered, at=0, version="1"))
    assert (int(document.get("lines-valid", "")), int(document.get("lines-covered", ""))) == (
        total.lines,
        total.covered,
    )
    data = [line[3:].split(",") for line in lcov([unit], covered).decode().splitlines() if line.startswith("DA:")]
    assert len({number for number, _ in data}) == total.lines
    assert len({number for number, hits in data if hits == "1"}) == total.covered
