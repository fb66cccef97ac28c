"""Who follows a log beside us: rsyslog, mtail and SEC of Debian, each with the same rules in its own words."""

import http.client
import re
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple


class Follower(NamedTuple):
    """A program that follows a log. `told` gives how many matches it has told so far."""

    name: str
    argv: Sequence[str | Path]
    told: Callable[[], int]


class Rules(NamedTuple):
    """The same rules: as our file, as regexes of Perl and RE2, and as POSIX has them."""

    toml: Path
    regexes: list[str]
    posix: list[str]


def ours(folder: Path, log: Path, rules: Rules) -> Follower:
    """`agent logs scan --follow`: each match with its captures, as JSON."""
    out = folder / "agent.out"
    command = 'exec "$0" -m agent logs scan --follow --rules "$1" "$2" >"$3"'
    argv: list[str | Path] = ["sh", "-c", command, sys.executable, rules.toml, log, out]
    return Follower("agent", argv, _Lines(out).count)


def rsyslog(folder: Path, log: Path, rules: Rules) -> Follower | None:
    """imfile, and a line of text for each match."""
    if not (program := shutil.which("rsyslogd", path="/usr/sbin:/usr/bin")):
        return None
    out, conf = folder / "rsyslog.out", folder / "rsyslog.conf"
    lines = [
        f'global(workDirectory="{folder}" maxMessageSize="64k")',
        'module(load="imfile")',
        'template(name="text" type="string" string="%msg%\\n")',
        f'ruleset(name="told") {{ action(type="omfile" file="{out}" template="text") }}',
        'ruleset(name="rules") {',
        *(f"if re_match($msg, '{_escaped(rule)}') then call told" for rule in rules.posix),
        "}",
        f'input(type="imfile" file="{log}" tag="log" ruleset="rules")',
    ]
    conf.write_text("\n".join(lines) + "\n")
    return Follower("rsyslog", [program, "-n", "-f", conf, "-i", folder / "rsyslog.pid"], _Lines(out).count)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace("'", "\\'")


def mtail(folder: Path, log: Path, rules: Rules) -> Follower | None:
    """It counts matches and tells no line."""
    if not (program := shutil.which("mtail")):
        return None
    programs, address = folder / "mtail", folder / "mtail.socket"
    programs.mkdir()
    regexes = [regex.replace("/", r"\/") for regex in rules.regexes]
    counting = "".join(f"/{regex}/ {{\n  matches++\n}}\n" for regex in regexes)
    (programs / "rules.mtail").write_text(f"counter matches\n{counting}")

    def told() -> int:
        connection = http.client.HTTPConnection("localhost")
        connection.sock = socket.socket(socket.AF_UNIX)
        try:
            connection.sock.connect(str(address))
            connection.request("GET", "/metrics")
            found = re.search(r"^matches\S* (\d+)", connection.getresponse().read().decode(), re.MULTILINE)
        except OSError:  # not up yet
            return 0
        finally:
            connection.close()
        return int(found[1]) if found else 0

    argv: list[str | Path] = [program, "--progs", programs, "--logs", log, "--unix_socket", address, "--logtostderr"]
    return Follower("mtail", argv, told)


def sec(folder: Path, log: Path, rules: Rules) -> Follower | None:
    """A line of text for each match."""
    if not (program := shutil.which("sec")):
        return None
    out, conf = folder / "sec.out", folder / "sec.conf"
    conf.write_text(
        "".join(
            f"type=Single\ncontinue=TakeNext\nptype=RegExp\npattern={regex}\ndesc=$0\naction=write {out} $0\n\n"
            for regex in rules.regexes
        )
    )
    argv = [program, f"--conf={conf}", f"--input={log}", "--fromstart", "--nodetach", "--keepopen"]
    return Follower("SEC", argv, _Lines(out).count)


class _Lines:
    """Counts the lines of a file that grows."""

    def __init__(self, path: Path) -> None:
        self._path, self._at, self._lines = path, 0, 0

    def count(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._at)
                while block := file.read(1 << 20):
                    self._lines += block.count(b"\n")
                    self._at += len(block)
        return self._lines
