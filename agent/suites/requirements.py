"""What a suite requires of the machine, against what the machine has. Pure.

Source: protocols/suites.md, "The suite document" (`requires`); protocols/emissary.md, "Seneschal" (words of `refused`).
"""

import re
from collections.abc import Mapping

from agent.suites.messages import Requires, Runner

FREE_DISK = 1024**3  # bytes; protocols/suites.md, "A run": disk (1 GiB free)

# What must be on the machine before a runner can be started at all. AVA itself comes with the project.
NEEDS: dict[Runner, str | None] = {"ava": "node", "pytest": "python3", "tap": None, "command": None, "gator": None}

_WORD = re.compile(r"\d+")
_BOUND = re.compile(r"\s*(>=|<=|==|>|<)?\s*(\d+(?:\.\d+)*)\s*\Z")


def labels_of(labels: Mapping[str, str | bool]) -> list[str]:
    """A machine's labels on the wire: "name" for true, "name=value", nothing for false. Source: settings.md."""
    return [name if value is True else f"{name}={value}" for name, value in labels.items() if value is not False]


def unmet(
    requires: Requires, runner: Runner, *, labels: Mapping[str, str | bool], runners: Mapping[str, str], free: int
) -> str | None:
    """Why the machine cannot take the suite, as the `reason` of `refused`; None when it can.

    `runners` maps a program to its version, `free` is the free disk space in bytes. A version of AVA is not asked here:
    it is the project's, and known after its setup.
    """
    has = set(labels_of(labels)) | {name for name, value in labels.items() if value is not False}
    if missing := [label for label in requires.labels if label not in has]:
        return f"labels: this machine has no {', '.join(missing)}"
    program = NEEDS[runner]
    if program is not None and program not in runners:
        return f"no_runner: {runner} needs {program}, which this machine has not"
    for name, bound in requires.runners.items():
        if name == "ava":
            continue
        if name not in runners:
            return f"no_runner: this machine has no {name}"
        if not satisfies(runners[name], bound):
            return f"no_runner: {name} is {runners[name]}, the suite requires {bound}"
    needed = max(requires.disk, FREE_DISK)
    if free < needed:
        return f"space: {free // 2**20} MiB are free, {needed // 2**20} MiB are needed"
    return None


def satisfies(version: str, bounds: str) -> bool:
    """Whether a version such as "20.19.1" is within bounds such as ">=20.19, <23". Only numbers count.

    Raises ValueError for bounds that cannot be read.
    """
    return all(_satisfies(_numbers(version), bound) for bound in bounds.split(","))


def _satisfies(have: tuple[int, ...], bound: str) -> bool:
    read = _BOUND.match(bound)
    if read is None:
        raise ValueError(f"a version bound reads like >=6 or >=20.19, not {bound!r}")
    want = _numbers(read[2])
    width = max(len(have), len(want))
    a, b = have + (0,) * (width - len(have)), want + (0,) * (width - len(want))
    match read[1]:
        case ">=":
            return a >= b
        case "<=":
            return a <= b
        case ">":
            return a > b
        case "<":
            return a < b
        case _:
            return have[: len(want)] == want


def _numbers(version: str) -> tuple[int, ...]:
    release = re.split(r"[-+ ]", version.removeprefix("v"))[0]
    return tuple(int(word) for word in _WORD.findall(release))
