"""Files of settings, rules and hardware profiles: all that is wrong in any of them is told in one go, at its line."""

from pathlib import Path

import pytest

from agent.checks.files import check
from agent.core.config import ConfigErrors
from agent.core.profile import BUNDLED

PROFILE = """\
name = "board"
extends = "generic-x86_64"
[match]
dmi.board_name = "B-*"
[[settings.logs.watch]]
name = "kernel"
rules = ["kernel", "edac"]
"""


def wrong(*files: Path) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        check(files)
    return [": ".join(str(error).split(": ")[:2]) for error in caught.value.errors]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_all_files_of_the_agent_are_good() -> None:
    assert check([*BUNDLED.glob("*.toml"), *BUNDLED.glob("rules/*.toml")]) == []


def test_what_is_wrong_in_files_of_all_kinds_is_told_in_one_go(tmp_path: Path) -> None:
    settings = write(tmp_path / "agent.toml", "suites.slots = 0\n")
    rules = write(tmp_path / "rules.toml", "version = 1\n[[rule]]\nid = 'x'\nregex = '('\n")
    board = write(tmp_path / "board.toml", f"{PROFILE}[settings]\nsuites.slots = 0\nmimir.url = 'ws://x/mimir'\n")
    absent = tmp_path / "absent.toml"
    assert wrong(rules, board, settings, absent) == [
        f"{settings}:1: suites.slots",
        f"{absent}: there is no such file. Create it, or name the right one.",
        f"{rules}:4: rule[x].regex",
        f"{board}:9: suites.slots",
        f"{board}:10: mimir",
    ]


def test_a_user_that_this_machine_does_not_have_is_a_warning(tmp_path: Path) -> None:
    text = '[[monitors.monitor]]\nid = "web"\ncommand = ["true"]\nsteps = ["A"]\nuser = "{}"\n'
    assert check([write(tmp_path / "agent.toml", text.format("root"))]) == []
    settings = write(tmp_path / "agent.toml", text.format("nn"))
    (told,) = check([settings])
    assert told == (
        f"{settings}:5: monitors.monitor[web].user: there is no user 'nn' on this machine."
        " Where it is to run, create it, or name another."
    )


def test_a_profile_is_checked_with_those_that_it_extends(tmp_path: Path) -> None:
    board = write(tmp_path / "board.toml", PROFILE)
    assert check([board]) == []
    write(board, PROFILE.replace("generic-x86_64", "lab") + 'path = "/var/log/kern.log"\n')
    assert wrong(board) == [f"{board}:2: extends"]
    lab = write(tmp_path / "lab.toml", 'name = "lab"\n[settings]\ntimeout_factor = 2\n')
    assert check([board, lab]) == []
    write(lab, 'name = "lab"\n[settings]\ntimeout_factor = 0\n')
    assert wrong(board, lab) == [f"{lab}:3: timeout_factor"]


@pytest.mark.parametrize(
    ("line", "key"),
    [
        ('match.arhc = "x"', "match.arhc"),
        ('name = "other"\nextends = ""', "name"),
        ("match = 7", "match"),
        ("extends = 7", "extends"),
        ('[[when]]\nmatch.pci = "10de:*"\nsettings.labels.gpu = 7', "labels.gpu"),
    ],
)
def test_a_broken_profile_is_told_as_one(tmp_path: Path, line: str, key: str) -> None:
    text = line if line.startswith("name") else f'name = "board"\n{line}'
    (told,) = wrong(write(tmp_path / "board.toml", f"{text}\n"))[-1:]
    assert told.startswith(f"{tmp_path}/board.toml:")
    assert told.endswith(f": {key}")


def test_the_rule_sets_that_a_profile_names_are_looked_for(tmp_path: Path) -> None:
    board = write(tmp_path / "board.toml", PROFILE.replace("edac", "edak"))
    assert wrong(board) == [f"{board}:7: logs.watch[kernel].rules"]


def test_the_profile_that_settings_ask_for_is_looked_for(tmp_path: Path) -> None:
    settings, board = write(tmp_path / "agent.toml", 'profile = "board"\n'), write(tmp_path / "board.toml", PROFILE)
    assert wrong(settings) == [f"{settings}:1: profile"]
    assert check([settings, board]) == []
