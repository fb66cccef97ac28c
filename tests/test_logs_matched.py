"""How a match is told: ids, text that is no UTF-8, flags."""

from agent.logs import rules
from agent.logs.classify import Guess
from agent.logs.matched import classed, identify, shown, told
from agent.logs.scanner import PARTIAL, WINDOW

(RULE,) = rules.from_tables("test", [{"id": "r", "regex": "(?<a>x)|(?<b>y)", "severity": "error"}]).rules


def test_an_id_tells_lines_files_generations_and_rules_apart() -> None:
    base = ((1, 2), 3, 4, "r")
    others = [((1, 9), 3, 4, "r"), ((1, 2), 9, 4, "r"), ((1, 2), 3, 9, "r"), ((1, 2), 3, 4, "s")]
    assert identify(*base) == identify(*base) == "lm-" + identify(*base)[3:]
    assert len({identify(*base), *(identify(*other) for other in others)}) == 5
    assert len(identify(*base)) == 19


def test_a_match_is_told_as_text() -> None:
    text = b"x\xff\0"
    event = told(RULE, "/l", (1, 2), 3, 4, text, {"a": text[:2], "b": None}, PARTIAL | WINDOW)
    assert (event.text, event.length, event.captures) == ("x\\xff\0", 3, {"a": "x\\xff", "b": None})
    assert event.flags == ("partial", "window", "nul", "invalid_utf8")
    assert (event.class_, event.class_by, event.context, event.suppressed) == (None, None, None, 0)
    assert shown("é".encode()) == "é"


def test_a_guess_is_told_where_the_rule_says_no_class() -> None:
    event = told(RULE, "/l", (1, 2), 3, 4, b"x", {}, 0)
    guessed = classed(event, Guess("disk", 0.912345, "model"))
    assert (guessed.class_, guessed.class_by, guessed.confidence) == ("disk", "model", 0.9123)
    normal = classed(event, Guess(None, 0.75, "template"))
    assert (normal.class_, normal.class_by, normal.confidence) == (None, "template", 0.75)
    assert classed(event, None) == event
    (named,) = rules.from_tables("test", [{"id": "r", "regex": "x", "class": "fan"}]).rules
    its = told(named, "/l", (1, 2), 3, 4, b"x", {}, 0)
    assert classed(its, Guess("disk", 0.9, "model")) == its
