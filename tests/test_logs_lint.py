"""The rules that settings name: every error in one go, what is slow, what it costs."""

import time
from pathlib import Path

import pytest

from agent.logs import lint, rules
from agent.logs.rules import RuleErrors
from agent.logs.settings import LogsSettings, LogWatch

GOOD = "version = 1\n[[rule]]\nid = 'good'\nregex = 'word'\n"
SLOW = "version = 1\n[[rule]]\nid = 'slow'\nregex = '\\d+'\n"
BAD = "version = 1\n[[rule]]\nid = 'bad'\nregex = '('\n"


def settings(folder: Path, *watched: str) -> LogsSettings:
    watch = tuple(LogWatch(name=f"w{number}", path="/l", rules=(name,)) for number, name in enumerate(watched))
    return LogsSettings(rules=(f"{folder}/*.toml",), watch=watch)


def test_every_rule_that_is_named_is_there_once(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(GOOD)
    (tmp_path / "b.toml").write_text(SLOW)
    (tmp_path / "more").mkdir()
    (tmp_path / "more/c.toml").write_text(GOOD)
    found = lint.check(settings(tmp_path, "a", f"{tmp_path}/more/*.toml", "b"))
    assert [(rule.spec.id, rule.origin) for rule in found] == [
        ("good", f"{tmp_path}/a.toml:2"),
        ("slow", f"{tmp_path}/b.toml:2"),
        ("good", f"{tmp_path}/more/c.toml:2"),
    ]
    assert [rule.spec.id for rule in lint.slow(found)] == ["slow"]


def test_all_that_is_wrong_is_told_once_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text(BAD)
    (tmp_path / "b.toml").write_text(BAD.replace("(", "["))
    missing = tmp_path / "missing.toml"
    with pytest.raises(RuleErrors) as wrong:
        lint.check(settings(tmp_path, "a", str(missing), "none"), {"logs.watch[w2].rules": "agent.toml:7"})
    lines = [str(error) for error in wrong.value.errors]
    assert len(lines) == len(set(lines))
    assert [line.split(": ")[0] for line in lines] == [
        "agent.toml:7", f"{tmp_path}/a.toml:4", f"{tmp_path}/b.toml:3", f"{tmp_path}/b.toml:4", str(missing),
    ]  # fmt: skip
    assert lines[0].startswith("agent.toml:7: logs.watch[w2].rules: no rule set is called 'none'. Name a file, or")


def test_a_file_that_is_named_must_be_there_and_a_pattern_may_be_empty(tmp_path: Path) -> None:
    assert lint.files_of([f"{tmp_path}/*.toml"]) == []
    assert lint.files_of(["a.toml"], str(tmp_path)) == [tmp_path / "a.toml"]
    assert lint.files_named("none", []) == []
    assert lint.files_named("kernel", [Path("/x/kernel.toml")]) == [Path("/x/kernel.toml")]


def test_rules_are_measured_those_without_a_literal_first() -> None:
    found = rules.from_tables("x", [{"id": "quick", "regex": "word"}, {"id": "slow", "regex": r"(\w+\W)+$"}])
    measured = lint.measure(found.rules, time.perf_counter)
    assert list(measured) == ["slow", "quick"]
    assert measured["slow"] > 0
    assert measured["quick"] > 0


def test_measuring_ends_with_its_budget() -> None:
    now = iter(range(100))
    found = rules.from_tables("x", [{"id": f"r{number}", "regex": "word"} for number in range(9)])
    assert len(lint.measure(found.rules, lambda: float(next(now)), budget_s=10)) == 2


def test_slow_rules_are_told_with_what_they_cost() -> None:
    now = iter(range(100))
    slow = rules.from_tables("x", [{"id": f"r{number}", "regex": r"\d"} for number in range(3)]).rules
    first, second, third = lint.told(slow, lambda: float(next(now)))
    assert first.startswith("x: rule[r0].regex: no literal, so it runs on every line (")
    assert second == third.replace("r2", "r1") == "x: rule[r1].regex: no literal, so it runs on every line"


def test_a_rule_file_is_known_by_its_rules(tmp_path: Path) -> None:
    for name, text in {"a": "version = 1\n[[rule]]\n", "b": "[logs]\nrules = []\n", "c": "rule = ["}.items():
        (tmp_path / name).write_text(text)
    assert [lint.holds_rules(tmp_path / name) for name in "abcd"] == [True, False, False, False]
