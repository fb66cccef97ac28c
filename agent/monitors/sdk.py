"""Write a monitor in Python: one file, standard library only. Copy it next to your program.

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

import json
import sys
import threading
from collections.abc import Callable, Mapping
from typing import Any

VERSION = "1.1"


Step = Callable[[dict[str, Any]], "Timed | None"]


class Timed:
    """What a step returns that took its own time: seconds, and pairs of text about it (no space, comma or '=')."""

    def __init__(self, seconds: float, metadata: Mapping[str, object] | None = None) -> None:
        self.seconds = seconds
        self.metadata = metadata or {}


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
    """Serve the orchestrator until it says Exit. `steps` maps names to functions of the configuration (a dict)."""
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
            _run_step(steps, said[len("Run Step ") :], config)
        elif said in ("Exit", "Exit 0"):
            return
        elif said == "Exit 1":
            if cleanup:
                cleanup(config)
            return
        else:
            log_error(f"unexpected message {said!r}")


def _run_step(steps: Mapping[str, Step], name: str, config: dict[str, Any]) -> None:
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
        pairs = ",".join(f"{key}={str(value).encode().hex()}" for key, value in done.metadata.items())
        _say(f"Step Time {pairs + ' ' if pairs else ''}{done.seconds * 1000!r}")
    else:
        _say("Step OK")


def _say(text: str) -> None:
    body = text.encode()
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
