"""Runner `command`: one program is one test, judged by its exit code.

Source: protocols/suites.md, "pytest, TAP, command".
"""

import signal as signals
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from agent.core.errors import ProtocolMisuse
from agent.core.events import State, TestFinished, TestStarted
from agent.suites.messages import CodeState, Suite
from agent.suites.runners.driver import (
    MESSAGE_MAX,
    CannotLaunch,
    DriverEvent,
    LastEvent,
    Launch,
    Only,
    Stop,
    clip,
    plain,
    title,
)

CODES: Final[dict[int, CodeState]] = {0: "passed", 77: "skipped", 99: "blocked", 126: "blocked", 127: "blocked"}
_MEANINGS: Final = {126: "the command cannot be executed", 127: "the command was not found"}


def launch(suite: Suite, project: Path, scratch: Path, run: str, *, only: Sequence[Only] = ()) -> Launch:
    """Run `command`, then `args` and `files` as its arguments. Raises CannotLaunch."""
    if only:
        raise ProtocolMisuse("runner command has one test and cannot run a part", remedy="Nothing was started.")
    return Launch(argv=argv(suite, project), set_env={"EMISSARY_RUN": run, "EMISSARY_SUITE": suite.id})


def argv(suite: Suite, project: Path) -> tuple[str, ...]:
    """`command`, `args` and the files that `files` means. Raises CannotLaunch."""
    return (*suite.command, *suite.args, *expanded(suite.files, project))


def expanded(patterns: Sequence[str], project: Path) -> tuple[str, ...]:
    """The files below `project` that each pattern means, sorted, relative to it; CannotLaunch if it means none.

    None begins with a dash, as an option does.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        if not any(char in pattern for char in "*?["):
            files[pattern] = None
            continue
        found = sorted(str(path.relative_to(project)) for path in project.glob(pattern))
        if not found:
            raise CannotLaunch(f"no file matches {pattern!r} in {project}", remedy="Correct `files` or `cwd`.")
        files.update(dict.fromkeys(f"./{name}" if name.startswith("-") else name for name in found))
    return tuple(files)


class CommandDriver:
    """One run of a program, which is one test. `codes` says what exit codes mean, over CODES.

    The test begins with the first block fed, which may be empty. Of its output the last `output_max` bytes are kept.
    """

    def __init__(
        self,
        run: str,
        suite_id: str,
        name: str,
        *,
        codes: Mapping[int, CodeState] = CODES,
        grace_s: float = 10,
        output_max: int = 64 * 1024,
    ) -> None:
        self._run, self._suite, self._name = run, suite_id, title(name) or suite_id
        self._codes = {**CODES, **codes}
        self._grace_s, self._output_max = grace_s, output_max
        self._started: float | None = None
        self._output, self._dropped = bytearray(), 0

    def feed(self, stream: str, data: bytes, now: float) -> list[DriverEvent]:
        """Take what was read from stdout or stderr."""
        self._output += data
        if len(self._output) > 2 * self._output_max:
            self._cut()
        if self._started is not None:
            return []
        self._started = now
        name = self._name
        return [TestStarted(run=self._run, suite=self._suite, case=name, name=name, file=None, started=now)]

    def stop(self, reason: str) -> tuple[Stop, ...]:
        """SIGTERM, and `grace_s` to end."""
        return (Stop(signals.SIGTERM, self._grace_s),)

    def running(self) -> str | None:
        """The one test, once it began."""
        return None if self._started is None else self._name

    def finish(self, code: int | None, signal: str | None, reason: str | None, now: float) -> list[LastEvent]:
        """The one record."""
        state, message = self._judged(code, signal, reason)
        self._cut()
        output = plain(bytes(self._output))
        if self._dropped:
            output = f"[{self._dropped} bytes cut here]\n{output}"
        record = TestFinished(
            run=self._run,
            suite=self._suite,
            case=self._name,
            name=self._name,
            file=None,
            state=state,
            started=self._started,
            ended=now,
            message=message,
            output=output,
        )
        self._started = None
        return [record]

    def _judged(self, code: int | None, signal: str | None, reason: str | None) -> tuple[State, str | None]:
        if reason is not None:
            return "aborted", clip(f"aborted: {reason}", MESSAGE_MAX)
        if signal is not None:
            return "blocked", f"ended by {signal}"
        if code is None:
            return "lost", "lost: it ended, and nobody knows how"
        state = self._codes.get(code, "failed")
        said = _MEANINGS.get(code, f"exited with code {code}")
        return state, None if state == "passed" else said

    def _cut(self) -> None:
        excess = max(0, len(self._output) - self._output_max)
        self._dropped += excess
        del self._output[:excess]
