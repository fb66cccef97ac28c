"""The agent's own log: to standard error, to the journal with its priorities, or to a file that is rotated.

Source: protocols/settings.md, `[log]`; protocols/packaging.md 4; sd-daemon(3), systemd.exec(5).
"""

import logging
import os
import re
import sys

from agent.core.errors import ConfigError
from agent.settings import LogSettings

MAX_LINE = 16 * 1024  # characters: a peer's message may have 64 MiB

_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028\u2029]")


def log_to(settings: LogSettings) -> None:
    """Send the agent's own log where the settings say. Raises ConfigError: the file cannot be written."""
    handler: logging.Handler
    form = "%(asctime)s %(levelname)s %(name)s %(message)s"
    if settings.to != "auto":
        from logging.handlers import RotatingFileHandler

        try:
            handler = RotatingFileHandler(settings.to, maxBytes=settings.max, backupCount=2)
        except OSError as err:
            raise ConfigError(
                "settings", 0, "log.to", f"{settings.to}: {err.strerror}", remedy='Name a file to write, or "auto".'
            ) from err
    else:
        handler = logging.StreamHandler(sys.stderr)
        if _is_journal(sys.stderr.fileno()):  # it has its own clock, and reads the priority (sd-daemon(3))
            handler.addFilter(_set_priority)
            form = "<%(priority)d>%(name)s %(message)s"
    handler.addFilter(_keep_on_one_line)
    handler.setFormatter(logging.Formatter(form))
    logging.basicConfig(level=settings.level.upper(), handlers=[handler], force=True)
    logging.getLogger("trio-websocket").setLevel(logging.WARNING)
    logging.getLogger("httpx").setLevel(logging.WARNING)


def _keep_on_one_line(record: logging.LogRecord) -> bool:
    """What a peer said is in many messages: it shall not look like a line of ours, steer a terminal, or fill a file."""
    said = record.getMessage()
    if (size := len(said)) > MAX_LINE:
        said = f"{said[:MAX_LINE]}... ({size} characters)"
        record.msg, record.args = said, ()
    if _CONTROL.search(said):
        record.msg, record.args = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], said), ()
    return True


def _set_priority(record: logging.LogRecord) -> bool:
    """The level as syslog counts: 3 error, 4 warning, 6 information, 7 debug."""
    record.priority = {"DEBUG": 7, "INFO": 6, "WARNING": 4}.get(record.levelname, 3)
    return True


def _is_journal(fd: int) -> bool:
    """Is it the stream that systemd gave us (systemd.exec(5), JOURNAL_STREAM)? Others inherit the variable alone."""
    stat = os.fstat(fd)
    return os.environ.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"
