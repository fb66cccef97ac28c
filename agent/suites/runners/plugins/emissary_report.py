"""A pytest plugin that tells of each test as it happens: one JSON object a line, to the pipe whose number is in
EMISSARY_PIPE_EVENTS. It runs in the project's Python (3.8 and newer) and needs nothing but pytest.

    session      {pytest}                       pytest is up
    collected    {ids: [...]}                   what will run; in several lines where there are many
    ignored      {id, message}                  a file that was skipped as a whole
    uncollected  {id, message, text, at}        a file that could not be read
    start        {id}
    phase        {id, sub, when, outcome, xfail, duration, message, text, at, output, properties}
    finish       {id}
    end          {exitstatus, failfast}

With EMISSARY_ONLY, the name of a JSON file [[file, name or null], ...], all other tests are deselected. Workers of
pytest-xdist deselect too, and tell nothing: what they do, the controller hears. Nor does a child that a test forks.

Read by agent/suites/runners/pytest.py. Source: protocols/suites.md, "pytest, TAP, command".
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from typing import Any

import pytest

IDS_A_LINE = 200
MESSAGE_MAX = 1024  # characters; the agent cuts again, by bytes
TEXT_MAX = 65536
PROPERTIES_MAX = 64

# As they are now: a test's monkeypatch is still in force when its call is reported.
_encode, _write, _getpid, _isfinite = json.JSONEncoder(ensure_ascii=False).encode, os.write, os.getpid, math.isfinite


def pytest_configure(config: pytest.Config) -> None:
    only = os.environ.get("EMISSARY_ONLY")
    if only:
        with open(only, encoding="utf-8") as file:
            config.pluginmanager.register(_Selection(json.load(file)), "emissary-selection")
    pipe = os.environ.get("EMISSARY_PIPE_EVENTS")
    if pipe and not hasattr(config, "workerinput"):
        # A pytest that a test starts is not ours to tell of, and no child may keep the pipe open.
        del os.environ["EMISSARY_PIPE_EVENTS"]
        os.set_inheritable(int(pipe), False)
        output_max = int(os.environ.get("EMISSARY_OUTPUT_MAX", TEXT_MAX))
        config.pluginmanager.register(_Reporter(int(pipe), output_max), "emissary-reporter")


class _Selection:
    """Deselects all but the wanted tests. They come by file and name; a name of null is the whole file."""

    def __init__(self, wanted: list[list[str | None]]) -> None:
        self.wanted = {(file, name) for file, name in wanted}

    def wants(self, nodeid: str) -> bool:
        file, _, name = nodeid.partition("::")
        return (file, None) in self.wanted or (file, _as_recorded(name)) in self.wanted

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        others = [item for item in items if not self.wants(item.nodeid)]
        if others:
            config.hook.pytest_deselected(items=others)
            items[:] = [item for item in items if self.wants(item.nodeid)]


def _as_recorded(name: str) -> str:
    """A name as it stands in the agent's records: agent/suites/runners/driver.py, `title`."""
    name = " ".join(name.split())
    data = name.encode("utf-8", "replace")
    if len(data) <= 1024:
        return name
    mark = "\u2026 (cut)"
    return data[: 1024 - len(mark.encode())].decode("utf-8", "ignore") + mark


class _Reporter:
    def __init__(self, pipe: int, output_max: int) -> None:
        self.pipe: int | None = pipe
        self.pid = _getpid()
        self.output_max = output_max
        self.collected = False

    def tell(self, event: str, **facts: Any) -> None:
        if self.pipe is None or _getpid() != self.pid:  # a child that a test forked and let go on with the session
            return
        data = _encode({"event": event, **facts}).encode("utf-8", "replace") + b"\n"
        try:
            while data:
                data = data[_write(self.pipe, data) :]
        except OSError:
            self.pipe = None  # the agent is gone, or does not listen; the tests go on

    def tell_ids(self, ids: list[str]) -> None:
        for at in range(0, len(ids), IDS_A_LINE):
            self.tell("collected", ids=ids[at : at + IDS_A_LINE])

    @pytest.hookimpl(tryfirst=True)
    def pytest_sessionstart(self) -> None:
        self.tell("session", pytest=pytest.__version__)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        message, at = _said(report)
        if report.failed:
            self.tell("uncollected", id=report.nodeid, message=message, text=_cut(report.longreprtext), at=at)
        elif report.skipped:
            self.tell("ignored", id=report.nodeid, message=message)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self.tell_ids([item.nodeid for item in session.items])

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, ids: list[str]) -> None:
        if not self.collected:  # every worker says the same
            self.collected = True
            self.tell_ids(list(ids))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.tell("start", id=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        message, at = _said(report)
        duration = getattr(report, "duration", None)
        self.tell(
            "phase",
            id=report.nodeid,
            sub=_subtest(report),
            when=report.when,
            outcome=report.outcome,
            xfail=getattr(report, "wasxfail", None),
            duration=duration if isinstance(duration, (int, float)) and _isfinite(duration) else None,
            message=message,
            text=_cut(report.longreprtext),
            at=at,
            output=_cut("\n".join(text for _, text in report.sections), self.output_max),
            properties=dict(_properties(report)),
        )

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.tell("finish", id=nodeid)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        failures = session.config.getoption("maxfail", 0) or 0
        self.tell("end", exitstatus=int(exitstatus), failfast=0 < failures <= session.testsfailed)


def _said(report: pytest.CollectReport | pytest.TestReport) -> tuple[str | None, str | None]:
    """What went wrong in one line, and where."""
    longrepr = report.longrepr
    if isinstance(longrepr, tuple):  # a skip: file, line, reason
        path, line, reason = longrepr
        return reason[len("Skipped: ") :] if reason.startswith("Skipped: ") else reason, f"{path}:{line}"
    crash = getattr(longrepr, "reprcrash", None)
    if crash is not None:
        return _first_line(crash.message), f"{crash.path}:{crash.lineno}"
    lines = [line for line in report.longreprtext.strip().splitlines() if not line.startswith("[gw")]  # which worker
    if not lines:
        return None, None
    # A file that cannot be imported: the error stands behind the way to it, marked by pytest.
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return _first_line(errors[-1] if errors else lines[0]), None


def _first_line(text: str) -> str | None:
    return next((line.strip()[:MESSAGE_MAX] for line in text.splitlines() if line.strip()), None)


def _cut(text: str, most: int = TEXT_MAX) -> str:
    """The beginning and the end, where there is too much."""
    if len(text) <= most:
        return text
    return f"{text[: most // 2]}\n[{len(text) - most} characters cut here]\n{text[len(text) - most + most // 2 :]}"


def _subtest(report: pytest.TestReport) -> str | None:
    """What names a subtest among those of its test: its message and its parameters."""
    context = getattr(report, "context", None)
    if context is None:
        return None
    message = getattr(context, "msg", None)
    pairs = getattr(context, "kwargs", {})
    words = [f"[{message}]"] if message else []
    words += [f"({', '.join(f'{name}={value}' for name, value in pairs.items())})"] if pairs else []
    return " ".join(words) or "<subtest>"


def _properties(report: pytest.TestReport) -> Iterator[tuple[str, Any]]:
    """What the test said of itself with record_property."""
    for name, value in list(report.user_properties)[:PROPERTIES_MAX]:
        is_number = isinstance(value, int) and abs(value) < 1 << 53
        yield str(name)[:MESSAGE_MAX], value if is_number else str(value)[:MESSAGE_MAX]
