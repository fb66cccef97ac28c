"""The supervisor's protocol (sd_notify): tell whoever started the service how it is.

A datagram of `KEY=value` lines to `$NOTIFY_SOCKET`; a leading `@` names an abstract socket. Without the variable nobody
listens, and nothing is sent.

Source: protocols/packaging.md 4, "Supervisor protocol"; sd_notify(3).
"""

import logging
import os
import socket
import time

log = logging.getLogger(__name__)


def ready(status: str) -> None:
    """The service is up, or has reloaded."""
    _send(f"READY=1\nSTATUS={status}")


def reloading() -> None:
    """The service reads its settings again; `ready` follows."""
    _send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")


def stopping(within_s: float) -> None:
    """The service ends; it may take so long."""
    _send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={round(within_s * 1e6)}")


def _send(message: str) -> None:
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as to:
            to.connect(address)
            to.send(message.encode())
    except OSError as err:
        log.warning("supervisor not told message=%s error=%s", message.partition("\n")[0], err)
