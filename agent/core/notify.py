"""The supervisor's protocol (sd_notify): tell whoever started the service how it is.

A datagram of `KEY=value` lines to `$NOTIFY_SOCKET`; a leading `@` names an abstract socket. Without the variable nobody
listens, and nothing is sent.

Source: protocols/packaging.md 4, "Supervisor protocol"; sd_notify(3), sd_watchdog_enabled(3).
"""

import logging
import os
import socket
import time

log = logging.getLogger(__name__)


def starting(within_s: float) -> None:
    """The service still starts; it may take so long."""
    _send(f"EXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")


def ready(status: str) -> None:
    """The service is up, or has reloaded."""
    _send(f"READY=1\nSTATUS={status}")


def alive() -> None:
    """The service is well: the supervisor's watchdog begins anew."""
    _send("WATCHDOG=1")


def status(text: str) -> None:
    """One line for people."""
    _send(f"STATUS={text}")


def reloading() -> None:
    """The service reads its settings again; `ready` follows."""
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(within_s: float) -> None:
    """The service ends; it may take so long."""
    _send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")


def watchdog_s() -> float | None:
    """How long the supervisor goes without hearing `alive` from us; None: it does not watch, or not this process."""
    watched = os.environ.get("WATCHDOG_PID")
    limit = os.environ.get("WATCHDOG_USEC", "")
    if watched and watched != str(os.getpid()):
        return None
    if limit and not (limit.isascii() and limit.isdigit() and int(limit)):
        log.warning("no watchdog: WATCHDOG_USEC=%s is no number of microseconds", limit)
        return None
    return int(limit) / 1e6 if limit else None


def _send(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK) as to:
            to.connect(address)
            to.send(message.encode())
    except OSError as err:
        log.warning("supervisor not told message=%s error=%s", message.partition("\n")[0], err)
