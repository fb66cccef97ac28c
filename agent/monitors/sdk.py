"""Write a monitor in Python 3.7 or later: one file, standard library only. Copy it next to your program.

    import sdk

    def ping(config):                       # the orchestrator takes the time
        fetch(config["Url"])

    def login(config):                      # timed by itself: seconds
        session = prepare()
        began = time.monotonic()
        session.login(config["User"])
        return sdk.Timed(time.monotonic() - began, {"attempts": "1"})

    sdk.run({"Ping": ping, "Login": login}, cleanup=lambda config: None)

A step that raises has failed, and its text is told. What it prints is noise to the orchestrator and does no harm.
`log_info("text")` and its kin are the right way to say something; `wait_for_webhook(uid)` waits for an outside call.
`cleanup` is called with the configuration when the orchestrator asks for it (its setting `cleanup`).

Source: the orchestrator/monitor protocol, version 1.1 (seeds/orchestrator-monitor-protocol.md).
"""

from __future__ import annotations  # the machine's Python may be older than the agent's

import json
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

VERSION = "1.1"
MAX_BODY, MAX_WORD = 99_999, 8000  # bytes of a message, whose length has five digits; and of a word of metadata

_KEY = re.compile(r"[A-Za-z0-9._-]+")
_UTF8 = ("utf-8", "backslashreplace")  # the name of a file may hold what is no text

if TYPE_CHECKING:
    Step = Callable[[dict[str, Any]], "Timed | None"]


class Timed:
    """What a step returns that took its own time, and pairs of text about it."""

    def __init__(self, seconds: float, metadata: Mapping[str, object] | None = None) -> None:
        """Keys are made of A-Z a-z 0-9 . _ -, a value is what str() makes of it. Raises ValueError."""
        if not 0 <= seconds < math.inf:
            raise ValueError(f"{seconds!r} is no time in seconds")
        self.seconds, self.metadata = seconds, metadata or {}
        for key in self.metadata:
            if not _KEY.fullmatch(key):
                raise ValueError(f"{key!r} cannot be a key of metadata. Use A-Z a-z 0-9 . _ -")
        # In hex, so that nothing in a value is taken for something else.
        self.word = ",".join(f"{key}={str(value).encode(*_UTF8).hex()}" for key, value in self.metadata.items())
        if len(self.word) > MAX_WORD:
            raise ValueError(f"metadata of {len(self.word)} bytes, in hex; at most {MAX_WORD} fit")


class OrchestratorGone(Exception):
    """Our stdin has ended, or holds what is no message."""


_saying = threading.Lock()
_in, _out = sys.stdin.buffer, sys.stdout.buffer


def log_debug(text: str) -> None:
    """Say something for the log; so do log_info, log_warning and log_error."""
    _say(f"Log Debug {text}")


def log_info(text: str) -> None:
    _say(f"Log Info {text}")


def log_warning(text: str) -> None:
    _say(f"Log Warning {text}")


def log_error(text: str) -> None:
    _say(f"Log Error {text}")


def wait_for_webhook(uid: str) -> Any:
    """Wait until somebody has called the webhook with this uid; the call's JSON."""
    _say(f"Wait For Webhook {uid}")
    said = _hear()
    if not said.startswith("Webhook Wait Response "):
        raise OrchestratorGone(f"expected a webhook's response, not {said!r}")
    return json.loads(said[len("Webhook Wait Response ") :])


def run(steps: Mapping[str, Step], cleanup: Callable[[dict[str, Any]], object] | None = None) -> None:
    """Serve the orchestrator until it says Exit. `steps` maps names to functions of the configuration (a dict).

    From here on the process's standard input is empty: what a step starts cannot take the orchestrator's orders.
    """
    global _in
    _in = os.fdopen(os.dup(0), "rb")
    empty = os.open(os.devnull, os.O_RDONLY)
    os.dup2(empty, 0)
    os.close(empty)
    try:
        _serve(steps, cleanup)
    except OrchestratorGone as gone:
        sys.exit(str(gone))


def _serve(steps: Mapping[str, Step], cleanup: Callable[[dict[str, Any]], object] | None) -> None:
    _say(f"Started {VERSION}")
    said = _hear()
    if not said.startswith("Version 1."):
        sys.exit(f"this monitor speaks version 1, not {said!r}")
    _say("Ready")
    said = _hear()
    if not said.startswith("Config "):
        sys.exit(f"expected Config, not {said!r}")
    config = json.loads(said[len("Config ") :])
    _say("Configured")
    while True:
        said = _hear()
        if said.startswith(("Run Step ", "Run step ")):
            # Who spells it small, as the protocol's description does, takes times in seconds; all others in ms.
            _run_step(steps, said[len("Run Step ") :], config, 1000 if said.startswith("Run Step ") else 1)
        elif said in ("Exit", "Exit 0"):
            return
        elif said == "Exit 1":
            if cleanup:
                cleanup(config)
            return
        else:
            log_error(f"unexpected message {said!r}")


def _run_step(steps: Mapping[str, Step], name: str, config: dict[str, Any], in_a_second: int) -> None:
    try:
        if name not in steps:
            raise LookupError(f"there is no step {name!r}; there are {', '.join(sorted(steps))}")
        done = steps[name](config)
    except OrchestratorGone:
        raise
    except Exception as err:  # noqa: BLE001 - whatever it is, it is the step's failure
        _say(f"Step Error {type(err).__name__}: {err}")
        return
    if isinstance(done, Timed):
        _say(f"Step Time {done.word + ' ' if done.word else ''}{done.seconds * in_a_second!r}")
    else:
        _say("Step OK")


def _say(text: str) -> None:
    body = text.encode(*_UTF8)[:MAX_BODY]
    with _saying:  # a step may say something from its threads
        _out.write(b"%05d %b" % (len(body), body))
        _out.flush()


def _hear() -> str:
    """One message; blocks until it is there."""
    head = _in.read(6)
    if len(head) < 6 or not head[:5].isdigit():
        raise OrchestratorGone(f"stdin ended or is no message: {head!r}")
    body = _in.read(int(head[:5]))
    if len(body) < int(head[:5]):
        raise OrchestratorGone("stdin ended within a message")
    return body.decode()
