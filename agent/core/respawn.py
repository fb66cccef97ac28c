"""A parent for inits that do not supervise: OpenRC and SysV start `agent run --respawn` in the background.

It speaks the same protocol with its child as systemd would: a notify socket, READY within START_S, a watchdog, and the
child's end is its restart, after 1 s, doubling to 60. It does the boot check before each start, drops privileges in the
child, and forwards TERM and HUP. A missed watchdog gets ABRT, so that the child says where it hangs, then KILL.

    starting --READY--> up --TERM to us--> ending --exit--> we end
        |                |                    | STOP_S or its EXTEND_TIMEOUT_USEC: KILL
        |  START_S       |  WATCHDOG_USEC
        +----------------+----> aborting (ABRT) --ABORT_S: KILL--> exit --> starting
        +--START_S, and a STATUS that says why--> ending

When our standard error is a file, the child's goes through us into that file, and we rotate it: the child may run as a
user who cannot. The service tool writes the pidfile. Imports no trio.

Source: protocols/packaging.md 4, "OpenRC, SysV"; sd_notify(3).
"""

import ctypes
import logging
import math
import os
import pwd
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from agent.core import bundle, notify
from agent.core.bundle import callers_environ
from agent.core.errors import AgentError
from agent.core.release import own_prefix

log = logging.getLogger(__name__)

State = Literal["starting", "up", "ending", "aborting"]

START_S = 60.0  # exec -> READY; the unit's TimeoutStartSec
STOP_S = 120.0  # TERM -> exit; the unit's TimeoutStopSec
ABORT_S = 10.0  # ABRT -> exit: it writes its stacks
WATCHDOG_S = 30.0  # the unit's WatchdogSec, unless our own environment says otherwise
LATE_S = 1.0  # who wakes up so late was stopped (Ctrl-Z, a frozen container), and so was the child
FIRST_BACKOFF_S, MAX_BACKOFF_S, GOOD_AFTER_S = 1.0, 60.0, 60.0
USAGE = 2  # the settings are broken: a restart does not help
LOG_MAX = 16 * 2**20  # bytes of the log file, and of each of its two predecessors
STATE = "/var/lib/agent"
CREDENTIALS = struct.Struct("iII")  # struct ucred: pid, uid, gid

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class CannotRespawn(AgentError):
    """This process cannot be the parent of a service."""


class Parent:
    """Starts `agent` with these arguments, again and again, as `user` (None: as ourselves), until TERM.

    `boot_check` is called before each start; a version from it means that another release starts from now on.
    """

    def __init__(self, arguments: Sequence[str], user: str | None, boot_check: Callable[[], str | None]) -> None:
        if (folder := bundle.release()) and bundle.is_unpacked(folder):
            raise CannotRespawn(
                "the single file is no service: it is unpacked anew for each start", remedy="Run its `agent install`."
            )
        self._arguments, self._account, self._boot_check = arguments, _account(user), boot_check
        self._child: subprocess.Popen[bytes] | None = None
        self._state: State = "starting"
        self._status = ""  # what the child said last
        self._until = self._patience_s = 0.0  # monotonic: when the state's patience ends; and how long it is
        self._asked_to_end = False
        self._watchdog_s = notify.watchdog_s() or WATCHDOG_S
        self._notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC)
        self._notify.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._notify.bind("")  # an abstract name that the kernel chooses
        self._signals, told = socket.socketpair()
        for end in (self._signals, told):
            end.setblocking(False)
        self._told = told  # kept open
        self._log = LogFile() if stat.S_ISREG(os.fstat(2).st_mode) else None

    def run(self) -> int:
        """Until TERM or INT; the exit code. Nothing of it returns before the child has ended."""
        signal.set_wakeup_fd(self._told.fileno())
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, lambda *_: None)  # the wakeup descriptor tells
        backoff_s = FIRST_BACKOFF_S
        while True:
            began = time.monotonic()
            code = self._live_once()
            if self._asked_to_end:
                return max(code, 0)
            if code == USAGE:
                log.error("the settings are broken, no restart: correct them and start the service again")
                return USAGE
            if time.monotonic() - began >= GOOD_AFTER_S:
                backoff_s = FIRST_BACKOFF_S
            log.error("agent ended %s restart_in_s=%g", _how(code), backoff_s)
            if self._wait(None, time.monotonic() + backoff_s):
                return 0
            backoff_s = min(2 * backoff_s, MAX_BACKOFF_S)

    # ---- one life of the child -------------------------------------------------------------------------------------

    def _live_once(self) -> int:
        """From the boot check to the child's exit; its code, negative: the signal that ended it."""
        try:
            version = self._boot_check()
        except OSError as err:
            log.error("boot check failed error=%s", err)  # noqa: TRY400 - the path says it
            version = None
        if version is not None:
            self._become_current()
        reading, writing = os.pipe() if self._log else (None, None)
        try:
            self._child = self._start(writing)
        except OSError as err:
            log.error("cannot start error=%s", err)  # noqa: TRY400 - the path says it
            if reading is not None:
                os.close(reading)
            return 1
        finally:
            if writing is not None:
                os.close(writing)
        self._status = ""
        self._become("starting", START_S)
        log.info("agent started pid=%d", self._child.pid)
        handle = os.pidfd_open(self._child.pid)
        try:
            if reading is not None:
                os.set_blocking(reading, False)
            while not self._wait(reading, self._until, handle):
                if time.monotonic() - self._until > LATE_S:
                    self._become(self._state, self._patience_s)
                else:
                    self._lose_patience()
            return self._child.wait()
        finally:
            os.close(handle)
            if reading is not None:
                self._copy_log(reading)
                os.close(reading)
            self._child = None

    def _start(self, log_to: int | None) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        libc = ctypes.CDLL(None)

        def in_the_child() -> None:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)  # until it listens: it reads its settings anyway
            # Not before the change of user, which would undo it.
            libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                os.kill(os.getpid(), signal.SIGTERM)

        account = self._account
        return subprocess.Popen(
            [*_program(), *self._arguments],
            env=self._environ(),
            stdin=subprocess.DEVNULL,
            stdout=log_to,
            stderr=log_to,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=os.getgrouplist(account.pw_name, account.pw_gid) if account else None,
            preexec_fn=in_the_child,
        )

    def _environ(self) -> dict[str, str]:
        address = "@" + os.fsdecode(self._notify.getsockname()).removeprefix("\0")
        ours = {"NOTIFY_SOCKET": address, "WATCHDOG_USEC": str(round(self._watchdog_s * 1e6))}
        if self._account:
            ours |= {"HOME": STATE, "USER": self._account.pw_name, "STATE_DIRECTORY": STATE}
        given = callers_environ(os.environ)
        given.pop("WATCHDOG_PID", None)
        return given | ours

    def _become_current(self) -> None:
        """Go on as the release that `current` is now; the pidfile stays right."""
        program = _program()
        log.warning("going on as %s", program[0])
        os.execve(program[0], [*program, *sys.argv[1:]], callers_environ(os.environ))

    def _wait(self, logged: int | None, until: float, child: int | None = None) -> bool:
        """Serve what comes until then; True as soon as the child has ended or, with none, we are asked to end."""
        poll = select.poll()
        for fd in (self._signals.fileno(), self._notify.fileno(), logged, child):
            if fd is not None:
                poll.register(fd, select.POLLIN)
        while (left_s := until - time.monotonic()) > 0:
            ready = {fd for fd, _ in poll.poll(None if left_s == math.inf else left_s * 1000 + 1)}
            if logged in ready and logged is not None and not self._copy_log(logged):
                poll.unregister(logged)
            if self._notify.fileno() in ready:
                self._hear()
            if self._signals.fileno() in ready:
                self._forward()
            if child in ready or (child is None and self._asked_to_end):
                return True
            if child is not None:
                until = self._until
        return False

    def _become(self, state: State, patience_s: float) -> None:
        self._state, self._until, self._patience_s = state, time.monotonic() + patience_s, patience_s

    def _lose_patience(self) -> None:
        """The state's time is over."""
        child = self._child
        if child is None:
            return
        match self._state:
            case "starting" if self._status:  # it lives, and says why
                log.error("not ready in time, ending pid=%d status=%s", child.pid, self._status)
                child.send_signal(signal.SIGTERM)
                self._become("ending", ABORT_S)
            case "starting" | "up":
                why = "not ready in time" if self._state == "starting" else "watchdog missed"
                log.error("%s, aborting pid=%d status=%s", why, child.pid, self._status)
                child.send_signal(signal.SIGABRT)
                self._become("aborting", ABORT_S)
            case "ending" | "aborting":
                log.error("still there, killing pid=%d state=%s", child.pid, self._state)
                child.kill()
                self._until = math.inf

    # ---- what comes in ---------------------------------------------------------------------------------------------

    def _hear(self) -> None:
        """Messages of the child; those of others are left."""
        while True:
            try:
                data, ancillary, _, _ = self._notify.recvmsg(4096, socket.CMSG_SPACE(CREDENTIALS.size))
            except BlockingIOError:
                return
            senders = [CREDENTIALS.unpack(value)[0] for _, kind, value in ancillary if kind == socket.SCM_CREDENTIALS]
            if self._child is None or senders != [self._child.pid]:
                continue
            fields = dict(line.partition("=")[::2] for line in data.decode("utf-8", "replace").splitlines())
            self._take(fields)

    def _take(self, fields: Mapping[str, str]) -> None:
        self._status = fields.get("STATUS", self._status)
        extended = fields.get("EXTEND_TIMEOUT_USEC", "")
        extend_s = int(extended) / 1e6 if extended.isascii() and extended.isdigit() else None
        if "STOPPING" in fields and self._state in ("starting", "up"):
            self._become("ending", extend_s or STOP_S)
        elif extend_s is not None and self._state in ("starting", "ending"):
            self._become(self._state, max(self._until - time.monotonic(), extend_s))
        if self._state == "starting" and "READY" in fields:
            log.info("agent ready status=%s", fields.get("STATUS", ""))
            self._become("up", self._watchdog_s)
        elif self._state == "up" and ("WATCHDOG" in fields or "READY" in fields):
            self._become("up", self._watchdog_s)

    def _forward(self) -> None:
        """TERM and INT end the child and us, HUP is the child's."""
        for number in self._signals.recv(64):
            if number in (signal.SIGTERM, signal.SIGINT):
                self._asked_to_end = True
                if self._child and self._state != "aborting":
                    self._become("ending", STOP_S)
                number = signal.SIGTERM
            if self._child and number in (signal.SIGTERM, signal.SIGHUP):
                self._child.send_signal(number)

    def _copy_log(self, fd: int) -> bool:
        """Copy what the child wrote; False at its end."""
        while True:
            try:
                data = os.read(fd, 65_536)
            except BlockingIOError:
                return True
            if not data:
                return False
            if self._log:
                self._log.write(data)


class LogFile:
    """Standard error, which is a file that was opened by the init script: rotated as root, whoever the child is."""

    def __init__(self) -> None:
        self._path = os.readlink("/proc/self/fd/2")
        self._lost = 0

    def write(self, data: bytes) -> None:
        """Append; what a full disk does not take is counted, and said when there is room again."""
        try:
            if os.fstat(2).st_size >= LOG_MAX:
                self._rotate()
            if self._lost:
                os.write(2, b"lost: %d bytes of the log, the disk was full\n" % self._lost)
                self._lost = 0
            while data:
                data = data[os.write(2, data) :]
        except OSError:
            self._lost += len(data)

    def _rotate(self) -> None:
        for older, old in ((2, 1), (1, 0)):
            if os.path.exists(name := f"{self._path}.{old}" if old else self._path):
                os.replace(name, f"{self._path}.{older}")
        fd = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        os.dup2(fd, 2)
        os.close(fd)


def _program() -> list[str]:
    """What starts: the release that is current now, which may be another one than ours."""
    if prefix := own_prefix():
        return [str(prefix / "current/agent")]
    return [sys.executable] if getattr(sys, "frozen", False) else [sys.executable, "-m", "agent"]


def _account(user: str | None) -> pwd.struct_passwd | None:
    """Whom the child is to be, None: who we are."""
    if user is None:
        return None
    try:
        account = pwd.getpwnam(user)
    except KeyError:
        raise CannotRespawn(f"there is no user {user!r}", remedy="Create it, or name another.") from None
    if account.pw_uid == os.geteuid():
        return None
    if os.geteuid() != 0:
        raise CannotRespawn(f"only root can start it as {user!r}", remedy="Start it as root, or name no user.")
    return account


def _how(code: int) -> str:
    if code >= 0:
        return f"code={code}"
    try:
        return f"signal={signal.Signals(-code).name}"
    except ValueError:  # most real-time signals have no name
        return f"signal={-code}"
