"""What sessions reached, as documents: what is taken stays as it was, and what is no class any more is left out."""

import xml.etree.ElementTree as ET

from agent.lab.coverage import cobertura, lcov, probes, take
from agent.lab.drillwire import AstEntity, CoverageDataPart, ExecClassData, Init, InitDataPart, Initialized, Method
from agent.lab.drillwire import read_action as action
from agent.lab.test2code import Plugin


def heard() -> Plugin:
    """Two classes; two sessions, of which each reached one probe of the first class by a test of the same name."""
    plugin = Plugin("1")
    method = Method("f", ("a",), "int", (0, 1), 2, "c")
    for message in (
        Init(2, "", True),
        InitDataPart(tuple(AstEntity("src", name, (method,)) for name in ("a.js", "b.js"))),
        Initialized(""),
    ):
        plugin.hear(message, 0.0)
    for session, flags in (("s1", [True, False]), ("s2", [False, True])):
        plugin.carry_out(action(b'{"type":"START","payload":{"sessionId":"%s"}}' % session.encode()))
        plugin.hear(CoverageDataPart(session, [ExecClassData("src/a.js", flags, "t")]), 0.0)
    return plugin


def test_the_probes_of_each_session_are_told_by_class_and_test() -> None:
    plugin = heard()
    assert probes(take(plugin, plugin.sessions.values())) == [
        {"className": "src/a.js", "testName": "t", "probes": [True, False]},
        {"className": "src/a.js", "testName": "t", "probes": [False, True]},
    ]
    assert probes(take(plugin, [plugin.sessions["s2"]]))[0]["probes"] == [False, True]


def test_in_files_the_sessions_are_one_and_probes_are_lines() -> None:
    plugin = heard()
    taken = take(plugin, plugin.sessions.values())
    assert lcov(taken).decode().splitlines()[:9] == [
        *("TN:t", "SF:src/a.js", "FN:1,f", "FNDA:1,f", "FNF:1", "FNH:1", "DA:1,1", "DA:2,1", "LF:2"),
    ]
    root = ET.fromstring(cobertura(taken, 12.5))
    assert (root.get("lines-covered"), root.get("lines-valid"), root.get("timestamp")) == ("2", "4", "12500")


def test_what_was_taken_stays_as_it_was() -> None:
    plugin = heard()
    taken = take(plugin, plugin.sessions.values())
    before = probes(taken), lcov(taken)
    plugin.hear(CoverageDataPart("s1", [ExecClassData("src/b.js", [True, True], "t")]), 0.0)
    plugin.hear(Init(0, "", True), 0.0)
    assert (probes(taken), lcov(taken)) == before


def test_what_is_no_class_any_more_is_left_out() -> None:
    plugin = heard()
    plugin.hear(Init(0, "", True), 0.0)
    taken = take(plugin, plugin.sessions.values())
    assert (probes(taken), lcov(taken)) == ([], b"")
