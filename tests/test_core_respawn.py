"""A parent and its child, as processes: restarts, the watchdog, signals, privileges and the log."""

import json
import os
import pwd
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import IO

import pytest

from agent.core.respawn import CannotRespawn, Parent

# The parent, with a child of our own and little patience; what the boot check gives is in the first argument.
PARENT = """
import logging, sys
from agent.core import respawn
respawn.FIRST_BACKOFF_S, respawn.MAX_BACKOFF_S = 0.05, 0.2
respawn.START_S, respawn.ABORT_S, respawn.STOP_S, respawn.LOG_MAX = {start}, {abort}, {stop}, {log_max}
respawn.LATE_S = {late}
respawn._program = lambda: [{program!r}, "-c", sys.argv[1]]
logging.basicConfig(level="INFO", format="%(message)s")
print("modules", *(name for name in ("trio", "msgspec") if name in sys.modules), file=sys.stderr)
sys.exit(respawn.Parent(sys.argv[2:], {user!r}, lambda: print("boot check", file=sys.stderr, flush=True)).run())
"""

# A child that says what it hears and feeds the watchdog; `says` sends a message to the parent.
CHILD = """
import json, os, signal, socket, sys, time
parent = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
parent.connect(os.environ["NOTIFY_SOCKET"].replace("@", "\\0", 1))
says = lambda text: parent.send(text.encode())
def ends(*_):
    print("got TERM", file=sys.stderr, flush=True)
    says("STOPPING=1\\nEXTEND_TIMEOUT_USEC=60000000")
    sys.exit(0)
signal.signal(signal.SIGTERM, ends)
signal.signal(signal.SIGHUP, lambda *_: print("got HUP", file=sys.stderr, flush=True))
def live():
    while True:
        says("WATCHDOG=1")
        time.sleep(0.05)
"""
STEADY = CHILD + 'says("READY=1\\nSTATUS=3 roles run"); live()'

Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a parent of such a child. `stderr` is a pipe unless given."""
    made: list[subprocess.Popen[str]] = []

    def started(
        child: str,
        *arguments: str,
        user: str | None = None,
        stderr: int | IO[bytes] = subprocess.PIPE,
        watchdog_s: float | str = 60,
        program: str = sys.executable,
        **limits: float,
    ) -> "subprocess.Popen[str]":
        script = PARENT.format(
            user=user, program=program, **({"start": 60, "abort": 60, "stop": 60, "late": 60, "log_max": 1000} | limits)
        )
        watchdog = watchdog_s if isinstance(watchdog_s, str) else str(round(watchdog_s * 1e6))
        environ = {**os.environ, "WATCHDOG_USEC": watchdog}
        argv = [sys.executable, "-c", script, child, *arguments]
        made.append(subprocess.Popen(argv, stderr=stderr, env=environ, text=True))
        return made[-1]

    yield started
    for process in made:
        process.kill()
        process.communicate()


def read_until(process: "subprocess.Popen[str]", text: str) -> str:
    """What it says, up to the line with this text."""
    assert process.stderr is not None
    said = ""
    for _ in range(100):  # one that only starts again and again would say more
        line = process.stderr.readline()
        said += line
        if text in line or not line:
            break
    assert text in said
    return said


def test_a_child_is_ready_is_told_of_hup_and_ended_by_term(start: Start) -> None:
    parent = start(STEADY)
    assert "boot check" in read_until(parent, "agent ready status=3 roles run")
    parent.send_signal(signal.SIGHUP)
    read_until(parent, "got HUP")
    parent.send_signal(signal.SIGTERM)
    read_until(parent, "got TERM")
    assert parent.wait(60) == 0


def test_hup_is_not_the_end_of_a_child_that_does_not_listen_yet(start: Start) -> None:
    parent = start("import os, signal; os.kill(os.getpid(), signal.SIGHUP)" + STEADY)
    assert "agent ended" not in read_until(parent, "agent ready status=3 roles run")
    parent.send_signal(signal.SIGHUP)
    read_until(parent, "got HUP")


def test_the_parent_loads_neither_trio_nor_the_roles(start: Start) -> None:
    assert "trio" not in read_until(start(STEADY), "modules")


def test_what_ends_is_started_again_with_backoff_after_another_boot_check(start: Start) -> None:
    said = read_until(start(CHILD + "sys.exit(1)"), "restart_in_s=0.2")
    assert re.findall(r"agent ended code=1 restart_in_s=(\S+)", said) == ["0.05", "0.1", "0.2"]
    assert said.count("boot check") == 3


def test_whatever_ends_it_it_is_started_again(start: Start) -> None:
    said = read_until(start(CHILD + "os.kill(os.getpid(), signal.SIGRTMIN + 3)"), "restart_in_s=0.1")
    assert f"agent ended signal={signal.SIGRTMIN + 3} restart_in_s=0.05" in said


def test_a_watchdog_that_is_no_time_is_as_the_units(start: Start) -> None:
    child = CHILD + 'says("READY=1\\nSTATUS=" + os.environ["WATCHDOG_USEC"]); live()'
    assert "status=30000000" in read_until(start(child, watchdog_s="soon"), "agent ready")


def test_an_exit_code_of_2_is_final(start: Start) -> None:
    parent = start(CHILD + "sys.exit(2)")
    assert "the settings are broken" in read_until(parent, "no restart")
    assert parent.wait(60) == 2


def test_a_program_that_is_not_there_is_tried_again(start: Start) -> None:
    parent = start(STEADY, program="/nonexistent/agent")
    assert "No such file or directory" in read_until(parent, "restart_in_s=0.1")
    parent.terminate()
    assert parent.wait(60) == 0


def test_a_missed_watchdog_is_aborted_and_restarted(start: Start) -> None:
    child = CHILD + 'import faulthandler; faulthandler.enable(); says("READY=1"); time.sleep(1000)'
    parent = start(child, watchdog_s=0.3)
    said = read_until(parent, "signal=SIGABRT")
    assert "watchdog missed, aborting" in said
    assert 'File "<string>"' in said
    read_until(parent, "agent started")


def test_who_was_stopped_with_its_parent_has_missed_nothing(start: Start) -> None:
    goes_on = 'signal.signal(signal.SIGCONT, lambda *_: print("signal=SIGCONT", file=sys.stderr, flush=True))\n'
    parent = start(CHILD + goes_on + 'says("READY=1"); live()', watchdog_s=1, late=0.1)
    (pid,) = re.findall(r"agent started pid=(\d+)", read_until(parent, "agent ready"))
    for each in (int(pid), parent.pid):
        os.kill(each, signal.SIGSTOP)
    with pytest.raises(subprocess.TimeoutExpired):
        parent.wait(1.5)
    for each in (parent.pid, int(pid)):
        os.kill(each, signal.SIGCONT)
    assert "signal=SIGCONT" in read_until(parent, "signal=SIG")  # and not aborted


def test_who_ignores_abort_is_killed(start: Start) -> None:
    child = CHILD + 'signal.signal(signal.SIGABRT, signal.SIG_IGN); says("READY=1"); time.sleep(1000)'
    said = read_until(start(child, watchdog_s=0.3, abort=0.1), "signal=SIGKILL")
    assert "still there, killing" in said


def test_who_is_not_ready_in_time_is_aborted_unless_it_asks_for_more(start: Start) -> None:
    assert "not ready in time" in read_until(start(CHILD + "live()", start=0.3), "signal=SIGABRT")
    asks = 'says("EXTEND_TIMEOUT_USEC=60000000"); print("asked", file=sys.stderr, flush=True); time.sleep(3.2)'
    child = f'{CHILD}{asks}; says("READY=1\\nSTATUS=late"); live()'
    said = read_until(start(child, start=3), "status=late")  # s that it has to begin, or else it is started again
    assert "aborting" not in said.rpartition("asked\n")[2]


def test_who_says_why_it_is_not_ready_is_ended_and_tried_again(start: Start) -> None:
    parent = start(CHILD + 'says("STATUS=not ready: the port is taken"); live()', start=1)
    read_until(parent, "status=not ready: the port is taken")
    read_until(parent, "got TERM")
    read_until(parent, "agent ended code=0 restart_in_s=")
    read_until(parent, "agent started")


def test_who_does_not_end_in_time_is_killed(start: Start) -> None:
    parent = start(CHILD + 'signal.signal(signal.SIGTERM, signal.SIG_IGN); says("READY=1"); live()', stop=0.2)
    read_until(parent, "agent ready")
    parent.terminate()
    read_until(parent, "still there, killing")
    assert parent.wait(60) == 0


def test_messages_of_others_are_left(start: Start) -> None:
    forged = (
        'import subprocess; subprocess.run([sys.executable, "-c", sys.argv[1]]); says("READY=1\\nSTATUS=own"); live()'
    )
    other = CHILD + 'says("READY=1\\nSTATUS=forged")'
    said = read_until(start(CHILD + forged, other), "agent ready")
    assert "forged" not in said
    assert "status=own" in said


def test_the_child_ends_with_its_parent(start: Start) -> None:
    parent = start(CHILD + 'says("READY=1"); time.sleep(1000)')
    read_until(parent, "agent ready")
    parent.kill()
    read_until(parent, "got TERM")


@pytest.mark.skipif(
    os.geteuid() != 0 or not os.path.exists("/usr/bin/python3"), reason="only root can become somebody else"
)
def test_the_child_is_somebody_else_with_a_state_directory(start: Start) -> None:
    child = (
        CHILD
        + "print(json.dumps([os.getuid(), os.getgroups(), dict(os.environ)]), file=sys.stderr, flush=True); live()"
    )
    parent = start(child, user="nobody", program="/usr/bin/python3")  # ours may be where nobody may look
    said = read_until(parent, "NOTIFY_SOCKET").splitlines()[-1]
    uid, groups, environ = json.loads(said)
    assert uid == pwd.getpwnam("nobody").pw_uid
    assert 0 not in groups
    assert (environ["STATE_DIRECTORY"], environ["USER"]) == ("/var/lib/agent", "nobody")
    assert "WATCHDOG_PID" not in environ


def test_an_unknown_user_is_refused() -> None:
    with pytest.raises(CannotRespawn, match="there is no user 'nobody-there'"):
        Parent([], "nobody-there", lambda: None)


def test_into_a_file_the_childs_output_goes_through_the_parent_and_is_rotated(start: Start, tmp_path: Path) -> None:
    child = f"""{CHILD}
says("READY=1\\nSTATUS=up")
for n in range(100):
    os.write(2, b"line %03d\\n" % n)
os.write(2, b"end\\n")
live()
"""
    log = tmp_path / "agent.log"
    with log.open("ab") as file:
        parent = start(child, stderr=file, log_max=300)
    for _ in range(1200):
        if "end\n" in log.read_text():
            break
        with suppress(subprocess.TimeoutExpired):
            parent.wait(0.05)
    parent.terminate()
    assert parent.wait(60) == 0
    files = sorted(tmp_path.iterdir(), reverse=True)
    assert 2 <= len(files) <= 3  # how much goes at once is chance
    kept = "".join(path.read_text() for path in files)
    numbers = [int(number) for number in re.findall(r"line (\d+)", kept)]
    assert numbers == list(range(numbers[0], 100))
