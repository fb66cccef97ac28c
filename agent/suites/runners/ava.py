"""AVA: how it is launched, with either driver. What it then says is read by ava_tap.py and ava_events.py.

Source: protocols/suites.md, "AVA, driver tap" (rows 15, 18, 20, 25 and the command line), "AVA, driver events".
"""

import json
import pkgutil
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from agent.core.errors import DocumentError
from agent.suites.messages import Suite
from agent.suites.requirements import satisfies
from agent.suites.runners.driver import CUT, CannotLaunch, Launch, Only

EVENTS: Final = "events"  # the pipe's name
OBSERVED: Final = ">=6.4, <9"  # versions of AVA that have the experiment
CONFIG: Final = "config.mjs"  # in the scratch folder
PLUGIN: Final = "plugins/emissary_ava.mjs"

_TIMEOUT_MAX_S: Final = 2_147_483  # what a timer of Node can hold
_TIMEOUT_SPARE_S: Final = 3600  # row 15: AVA's own timeout breaks its reporter, so ours must come first

# Row 20: with these AVA runs a part of the files only.
_PARALLEL: Final = (
    *("CI_NODE_INDEX", "CI_NODE_TOTAL", "CIRCLE_NODE_INDEX", "CIRCLE_NODE_TOTAL"),
    *("BITBUCKET_PARALLEL_STEP", "BITBUCKET_PARALLEL_STEP_COUNT"),
    *("BUILDKITE_PARALLEL_JOB", "BUILDKITE_PARALLEL_JOB_COUNT", "SEMAPHORE_CURRENT_JOB", "SEMAPHORE_JOB_COUNT"),
)
# AVA's own switches that would undo CI=1 or expect AVA's own tests around it, and what overrules NO_COLOR.
_OVERRULING: Final = ("AVA_FORCE_CI", "AVA_FAKE_SCM_ROOT", "TEST_AVA", "FORCE_COLOR")

_REFUSED: Final = {
    "--tap": "results are always read as TAP",
    "--no-tap": "results are always read as TAP",
    "--watch": "AVA refuses it with TAP",
    "--timeout": "AVA's reporter breaks on it; limits.stall and limits.run end a run",
}
_SHORT: Final = {"t": "--tap", "w": "--watch", "T": "--timeout"}
_MODES: Final = ("debug", "reset-cache")  # as first word they are commands of AVA


def launch(suite: Suite, project: Path, scratch: Path, run: str, *, only: Sequence[Only] = ()) -> Launch:
    """AVA of the project, or `command` in its place. Raises CannotLaunch, DocumentError.

    With driver `events` and an AVA that is older than 6.4 or newer than 8, there is no pipe: the results are TAP's.
    """
    check_args(suite.args)
    version, argv = _ava(project)
    if suite.command:
        argv = suite.command
    elif not argv:
        raise CannotLaunch(
            f"there is no AVA in {project}: no node_modules/ava there or above",
            remedy='Let `setup` install it, as setup = [["npm", "ci"]].',
        )
    if (bound := suite.requires.runners.get("ava")) and not (version and satisfies(version, bound)):
        raise CannotLaunch(
            f"AVA is {version or 'not in node_modules'}, the suite requires {bound}",
            remedy="Let `setup` install such a version.",
        )
    args, behind = _split(suite.args, "--")
    env = {"CI": "1", "NO_COLOR": "1", "EMISSARY_RUN": run, "EMISSARY_SUITE": suite.id}
    files: dict[str, bytes] = {}
    pipes: tuple[str, ...] = ()
    if suite.driver == "events" and (version is None or satisfies(version, OBSERVED)):
        args, config = _without_config(args)
        if config is not None:
            env["EMISSARY_AVA_CONFIG"] = config
        plugin = pkgutil.get_data("agent.suites.runners", PLUGIN)
        if plugin is None:
            raise CannotLaunch(f"{PLUGIN} is not part of this installation", remedy="Install the agent again.")
        files[CONFIG], pipes = plugin, (EVENTS,)
        args = (*args, "--config", str(scratch / CONFIG))
    seconds = suite.limits.run + _TIMEOUT_SPARE_S if suite.limits.run else _TIMEOUT_MAX_S
    # AVA runs what any of them fits: beside the names of tests that run again the suite's own would let others run.
    names = [pattern(one.name) for one in only if one.name is not None] or suite.match
    return Launch(
        argv=(
            *argv,
            "--tap",
            f"--timeout={min(int(seconds), _TIMEOUT_MAX_S)}s",
            *(f"--match={name}" for name in dict.fromkeys(names)),
            *args,
            *(dict.fromkeys(one.file for one in only if one.file) or suite.files),
            *(("--", *behind) if behind else ()),
        ),
        set_env=env,
        unset_env=(*_PARALLEL, *_OVERRULING),
        pipes=pipes,
        files=files,
    )


def check_args(args: Sequence[str]) -> None:
    """Refuse what would break the reading of results. Raises DocumentError that names the first such argument."""
    for _, what in refused(args):
        raise DocumentError("suite", 0, "args", what, remedy="Take it out.")


def refused(args: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Each argument that would break the reading of results: its index, and what is wrong with it."""
    own, _ = _split(args, "--")
    for i, arg in enumerate(own):
        name = arg.partition("=")[0]
        if re.match(r"-[A-Za-z]", arg):
            for letter in arg[1:]:
                if letter in "cm=":
                    break  # the rest is a value
                name = _SHORT.get(letter, name)
        if why := _REFUSED.get(name):
            yield i, f"{arg} cannot be given to AVA: {why}"
    if own and own[0] in _MODES:
        yield 0, f"{own[0]!r} is a command of AVA's, no test run"


def pattern(name: str) -> str:
    """A `--match` pattern for a test's name. What AVA would not take literally, or was cut, becomes a wildcard."""
    begun = f"{name.removesuffix(CUT)}*" if name.endswith(CUT) else name
    escaped = re.sub(r"[\\*]+", "*", begun)
    return f"*{escaped[1:]}" if escaped.startswith("!") else escaped


def _ava(project: Path) -> tuple[str | None, tuple[str, ...]]:
    """The version and the command of the AVA that Node would find from the project's folder."""
    for folder in (project, *project.parents):
        package = folder / "node_modules/ava/package.json"
        try:
            facts = json.loads(package.read_bytes())
            version, program = str(facts["version"]), str(facts["bin"]["ava"])
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CannotLaunch(
                f"{package} cannot be used: {error!r}", remedy="Install the project's packages again."
            ) from error
        return version, ("node", str(package.parent / program))
    return None, ()


def _split(args: Sequence[str], mark: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if mark not in args:
        return tuple(args), ()
    at = list(args).index(mark)
    return tuple(args[:at]), tuple(args[at + 1 :])


def _without_config(args: Sequence[str]) -> tuple[tuple[str, ...], str | None]:
    """`args` without `--config F` or `--config=F`, and F."""
    rest: list[str] = []
    config: str | None = None
    words = iter(args)
    for arg in words:
        if arg == "--config":
            config = next(words, None)
        elif arg.startswith("--config="):
            config = arg.removeprefix("--config=")
        else:
            rest.append(arg)
    return tuple(rest), config
