"""The commands that bring a suite's files from git, and what is looked at before they are checked out. Pure.

Source: protocols/suites.md, "Limits and security" (git only by https and ssh, no prompts; 4 GiB and 200,000 files).
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from agent.suites.messages import Source

MAX_BYTES: Final = 4 * 1024**3  # of all files of a source, unpacked
MAX_FILES: Final = 200_000

# What git takes from the service's environment beside what every command gets: the way out, and whom ssh shows.
GIT_ENV: Final = ("*_proxy", "*_PROXY", "SSH_AUTH_SOCK")

_CONFIG: Final = (
    # Neither another transport, nor a question to a terminal that nobody sits at, nor a hook of somebody's template.
    "protocol.allow=never",
    "protocol.https.allow=always",
    "protocol.ssh.allow=always",
    "core.sshCommand=ssh -oBatchMode=yes",
    "core.askPass=true",
    "credential.interactive=false",
    "core.hooksPath=/dev/null",
    "advice.detachedHead=false",
    "submodule.recurse=false",
    "fetch.unpackLimit=1",  # one file, whose size is limited
)


def git_commands(source: Source, target: Path, ca_file: Path | None = None) -> list[tuple[str, ...]]:
    """What to run, in order, so that `target` holds the commit of a checked git source. Each fails with a code.

    `ca_file` is whom it trusts in place of whom git does. Set GIT_TERMINAL_PROMPT=0 in the environment too, for gits
    that do not know credential.interactive.
    """
    git = _git([f"http.sslCAInfo={ca_file}"] if ca_file else [])
    fetch = ("fetch", "--quiet", "--no-tags", "--no-recurse-submodules", f"--depth={source.depth}", "--")
    return [
        (*git, "init", "--quiet", "--template=", str(target)),
        (*git, "-C", str(target), *fetch, str(source.git), source.ref or "HEAD"),
    ]


def git_list(target: Path) -> tuple[str, ...]:
    """Lists the files of what was fetched, for a Listing."""
    return (*_git(), "-C", str(target), "ls-tree", "-r", "-l", "-z", "--full-tree", "FETCH_HEAD")


def git_checkout(target: Path) -> tuple[str, ...]:
    """Makes the files of what was fetched."""
    return (*_git(), "-C", str(target), "checkout", "--quiet", "--detach", "FETCH_HEAD")


def _git(more: Iterable[str] = ()) -> tuple[str, ...]:
    return ("git", *(word for setting in (*_CONFIG, *more) for word in ("-c", setting)))


class Listing:
    """What `git_list` prints, counted: `files`, and `size` in bytes when they are checked out."""

    def __init__(self) -> None:
        self.files = self.size = 0
        self._rest = b""

    def feed(self, data: bytes) -> None:
        """Take what it printed, in any pieces."""
        *whole, rest = (self._rest + data).split(b"\0")
        self._rest = rest[:128]  # mode, kind, hash and size; what follows is the path, which may be long
        for entry in whole:
            size = entry.partition(b"\t")[0].split()[-1]
            self.files += 1
            self.size += int(size) if size.isdigit() else 0  # a submodule has "-"

    def fault(self) -> str | None:
        """Why it is not taken, or None."""
        if self.files > MAX_FILES:
            return f"holds more than {MAX_FILES} files"
        return f"is larger than {MAX_BYTES >> 30} GiB" if self.size > MAX_BYTES else None
