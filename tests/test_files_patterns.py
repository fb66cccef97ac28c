"""Which paths a watch means, and which directories lead to them."""

import pytest

from agent.files.patterns import NOWHERE, Pattern


@pytest.mark.parametrize(
    ("path", "recursive", "reported", "leading", "nothing"),
    [
        ("/etc/rhsm/rhsm.conf", False, ["/etc/rhsm/rhsm.conf"], ["/", "/etc", "/etc/rhsm"], ["/etc/x", "/var"]),
        ("/etc/rhsm", False, ["/etc/rhsm", "/etc/rhsm/a"], ["/", "/etc"], ["/etc/rhsm/a/b", "/etc/rhsm2"]),
        ("/etc/rhsm", True, ["/etc/rhsm", "/etc/rhsm/a", "/etc/rhsm/a/b/c"], ["/", "/etc"], ["/etc/rhsm2"]),
        ("/var/log/*.log", False, ["/var/log/a.log", "/var/log/.log"], ["/var/log"], ["/var/log/a.txt"]),
        ("/var/log/*.log", False, ["/var/log/dir.log/in"], [], ["/var/log/dir.log/in/deep", "/var/log/x/a.log"]),
        ("/srv/*/conf/[ab]?", False, ["/srv/x/conf/a1"], ["/srv/x", "/srv/x/conf"], ["/srv/x/conf/c1", "/srv/x/y"]),
        ("/srv/**/*.conf", False, ["/srv/a.conf", "/srv/x/y/a.conf"], ["/srv", "/srv/x/y"], ["/etc/a.conf"]),
        ("/srv/**", False, ["/srv", "/srv/x", "/srv/x/y"], ["/"], ["/etc"]),
        ("/", False, ["/", "/etc"], [], ["/etc/rhsm"]),
        ("/etc//rhsm/", False, ["/etc/rhsm", "/etc/rhsm/a"], ["/etc"], ["/etc/rhsm/a/b"]),
    ],
)
def test_what_is_reported_and_what_leads_there(
    path: str, recursive: bool, reported: list[str], leading: list[str], nothing: list[str]
) -> None:
    pattern = Pattern(path, recursive=recursive)
    assert [each for each in reported if not pattern.is_reported(pattern.walk(each))] == []
    assert [each for each in leading if not pattern.walk(each) or pattern.is_reported(pattern.walk(each))] == []
    assert [each for each in nothing if pattern.walk(each) != NOWHERE] == []


@pytest.mark.parametrize(
    ("path", "recursive", "directory", "names"),
    [
        ("/etc/rhsm", False, "/", {"etc"}),
        ("/etc/rhsm", False, "/etc", {"rhsm"}),
        ("/etc/rhsm", False, "/etc/rhsm", None),
        ("/etc/rhsm", False, "/etc/rhsm/a", set()),
        ("/etc/rhsm", True, "/etc/rhsm/a", None),
        ("/etc/*/a", False, "/etc", None),
        ("/etc/*/a", False, "/etc/x", {"a"}),
        ("/etc/**/a", False, "/etc", None),
    ],
)
def test_which_names_matter_in_a_directory(path: str, recursive: bool, directory: str, names: set[str] | None) -> None:
    pattern = Pattern(path, recursive=recursive)
    assert pattern.names(pattern.walk(directory)) == names


@pytest.mark.parametrize(
    ("path", "recursive", "directory", "may", "all_of_it"),
    [
        ("/etc/rhsm", False, "/", False, False),
        ("/etc/rhsm", False, "/etc", True, False),
        ("/etc/rhsm", False, "/etc/rhsm", True, True),
        ("/etc/rhsm", False, "/etc/rhsm/a", False, False),
        ("/etc/rhsm", True, "/etc/rhsm/a", True, True),
        ("/var/log/*.log", False, "/var/log", True, False),
        ("/srv/**/a", False, "/srv", True, False),
        ("/srv/**/a/b", False, "/srv", False, False),
    ],
)
def test_which_entries_of_a_directory_are_reported(
    path: str, recursive: bool, directory: str, may: bool, all_of_it: bool
) -> None:
    pattern = Pattern(path, recursive=recursive)
    places = pattern.walk(directory)
    assert (pattern.may_report(places), pattern.reports_all(places)) == (may, all_of_it)
