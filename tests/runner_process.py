"""Starts a runner as suites/role.py does, without its limits, and gives what its driver said."""

import os
import selectors
import signal as signals
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from agent.core.events import TestFinished
from agent.suites.runners.driver import Driver, DriverEvent, Launch

LIMIT_S = 120


def run(
    launch: Launch,
    driver: Driver,
    project: Path,
    scratch: Path,
    *,
    env: dict[str, str] | None = None,
    stop_when: Callable[[list[DriverEvent]], bool] | None = None,
) -> list[DriverEvent]:
    """All events of one run. When `stop_when` says so of the events so far, the driver's first signal is sent."""
    for name, content in launch.files.items():
        (scratch / name).write_bytes(content)
    environment = {"PATH": os.environ["PATH"], "HOME": str(scratch)} | (env or {}) | launch.set_env
    ours: dict[int, str] = {}
    theirs: list[int] = []
    for name in launch.pipes:
        reader, writer = os.pipe()
        ours[reader] = name
        theirs.append(writer)
        environment[f"EMISSARY_PIPE_{name.upper()}"] = str(writer)
    process = subprocess.Popen(
        launch.argv,
        cwd=project,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        pass_fds=theirs,
        start_new_session=True,
    )
    for writer in theirs:
        os.close(writer)
    assert process.stdout is not None
    assert process.stderr is not None
    ours |= {process.stdout.fileno(): "stdout", process.stderr.fileno(): "stderr"}
    events: list[DriverEvent] = []
    reason: str | None = None
    end = time.monotonic() + LIMIT_S
    with selectors.DefaultSelector() as selector:
        for fd, name in ours.items():
            selector.register(fd, selectors.EVENT_READ, name)
        while selector.get_map():
            ready = selector.select(end - time.monotonic())
            if not ready:
                os.killpg(process.pid, 9)
                raise TimeoutError(f"{launch.argv} was not over after {LIMIT_S} s; so far {events}")
            for key, _ in ready:
                data = os.read(key.fd, 65_536)
                if not data:
                    selector.unregister(key.fd)
                events += driver.feed(key.data, data, time.time())
            if stop_when is not None and reason is None and stop_when(events):
                reason = "stopped by the test"
                process.send_signal(driver.stop(reason)[0].signal)
    code = process.wait()
    process.stdout.close()
    process.stderr.close()
    for fd, name in ours.items():
        if name in launch.pipes:
            os.close(fd)
    signal = signals.Signals(-code).name if code < 0 else None
    return [*events, *driver.finish(None if code < 0 else code, signal, reason, time.time())]


def states(events: list[DriverEvent]) -> dict[str, str]:
    """Case to state; of a corrected record the last. What is no test has its kind before the state."""
    return {
        event.case: event.state if event.kind == "test" else f"{event.kind} {event.state}"
        for event in events
        if isinstance(event, TestFinished)
    }
