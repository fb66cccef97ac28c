"""Each requirement that is not met is a reason of `refused` with the sheet's word first."""

import pytest

from agent.suites.messages import Requires, Runner
from agent.suites.requirements import labels_of, satisfies, unmet

GiB = 1024**3
LABELS: dict[str, str | bool] = {"os": "rhel9", "gpu": True, "serial": False}


@pytest.mark.parametrize(
    ("requires", "runner", "free", "reason"),
    [
        (Requires(), "ava", 2 * GiB, None),
        (Requires(labels=("gpu", "os=rhel9", "os")), "tap", 2 * GiB, None),
        (Requires(labels=("serial",)), "tap", 2 * GiB, "labels: this machine has no serial"),
        (Requires(labels=("os=rhel8",)), "tap", 2 * GiB, "labels: this machine has no os=rhel8"),
        (Requires(), "pytest", 2 * GiB, "no_runner: pytest needs python3, which this machine has not"),
        (Requires(runners={"java": ">=17"}), "tap", 2 * GiB, "no_runner: this machine has no java"),
        (Requires(runners={"node": ">=22"}), "ava", 2 * GiB, "no_runner: node is 20.20.2, the suite requires >=22"),
        (Requires(runners={"node": ">=20"}), "tap", 2 * GiB, None),
        (Requires(runners={"ava": ">=6"}), "ava", 2 * GiB, None),
        (Requires(), "tap", GiB, None),
        (Requires(), "tap", GiB - 1, "space: 1023 MiB are free, 1024 MiB are needed"),
        (Requires(disk=5 * GiB), "tap", 2 * GiB, "space: 2048 MiB are free, 5120 MiB are needed"),
    ],
)
def test_what_is_not_met_is_said(requires: Requires, runner: Runner, free: int, reason: str | None) -> None:
    assert unmet(requires, runner, labels=LABELS, runners={"node": "20.20.2"}, free=free) == reason


@pytest.mark.parametrize(
    ("version", "bounds", "good"),
    [
        ("20.20.2", ">=20.19", True), ("v20.20.2", ">=20.19,<23", True), ("6.4.1", ">=6", True), ("6.4.1", "6", True),
        ("6.4.1", "==6.4", True), ("6.4.1", ">6.4.1", False), ("6.4.1", "<=6.4.1", True), ("10.0", ">=9.5", True),
        ("22.0.0-rc.1", ">=22", True), ("6.4.1", "<6.4.1", False), ("7", "6", False),
    ],
)  # fmt: skip
def test_versions_compare_as_numbers(version: str, bounds: str, good: bool) -> None:
    assert satisfies(version, bounds) is good


def test_bounds_that_cannot_be_read_are_named() -> None:
    with pytest.raises(ValueError, match=r"a version bound reads like >=6 or >=20\.19, not '~6'"):
        satisfies("6", "~6")


def test_labels_on_the_wire() -> None:
    assert labels_of(LABELS) == ["os=rhel9", "gpu"]
