"""Tokens and passwords in files: read when they are needed, refused when others may read them.

Source: protocols/emissary.md, "Auth, limits"; protocols/settings.md (`token_file`, `password_file`, `control.tokens`).
"""

import os
import secrets
import stat
from pathlib import Path

from agent.core import release
from agent.core.errors import AgentError

MAX_TOKEN = 4096  # bytes; more is a wrong file, not a token


class TokenUnusable(AgentError):
    """The file holds no token that may be used."""


def read_token(path: Path) -> str:
    """The one line of a token file, without white space around it.

    Raises TokenUnusable: the file cannot be read, is no regular file, may be read by others, or holds something else.
    """
    try:
        # Not blocking, so that a FIFO at the path cannot stop the agent.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except PermissionError as err:
        raise TokenUnusable(f"{path}: {err.strerror}", remedy="Let your user read it, or be root.") from err
    except OSError as err:
        raise TokenUnusable(
            f"{path}: {err.strerror}", remedy="Write the token into it, readable by the agent."
        ) from err
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            raise TokenUnusable(f"{path} is no regular file", remedy="Name a file with the token as its one line.")
        if mode & _readable_by_others(path):
            raise TokenUnusable(f"{path} may be read by others (mode {mode & 0o777:04o})", remedy=f"chmod 600 {path}")
        raw = os.read(fd, MAX_TOKEN + 1)
    finally:
        os.close(fd)
    text = raw.decode("ascii", "replace").strip()
    if len(raw) > MAX_TOKEN or not text or not text.isascii() or not text.isprintable() or " " in text:
        raise TokenUnusable(
            f"{path} holds no token: one line of 1 to {MAX_TOKEN} visible ASCII characters is expected",
            remedy="Write the token into it, and nothing else.",
        )
    return text


def own_token(path: Path) -> str:
    """The token that others show to us; made at the first start, 256 bits, readable by its user alone.

    Raises TokenUnusable, also when it cannot be written; there is none then.
    """
    if not os.path.lexists(path):
        try:  # whole and on the disk: one that lost its content with the power is refused for ever
            release.write(path, secrets.token_urlsafe(32).encode() + b"\n", 0o600)
        except OSError as err:
            raise _not_made(path, err) from err
    return read_token(path)


def _not_made(path: Path, err: OSError) -> TokenUnusable:
    return TokenUnusable(
        f"{path} cannot be made: {err.strerror}", remedy="Let the agent's user write there, or write a token into it."
    )


def _readable_by_others(path: Path) -> int:
    """The mode bits that refuse a file."""
    # systemd lets its user read a credential by an ACL, whose mask stat shows as group bits.
    credentials = os.environ.get("CREDENTIALS_DIRECTORY")
    return 0o007 if credentials and path.is_relative_to(credentials) else 0o077
