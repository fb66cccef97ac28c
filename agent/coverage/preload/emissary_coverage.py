"""Tells the agent which lines of the product run, from inside the product. PYTEST_DONT_REWRITE

Loaded by sitecustomize.py, or by a .pth file in a product that the agent does not start. While the agent listens on the
socket that the file `where` names, lines are told once each second, before a fork and at the end, as one JSON object a
line:

    {"pid", "python", "why"}     first; `why` says why nothing can be told, "" is: all is well
    {"test", "file", "lines"}    hexadecimal; bit n is line n. `test` is pytest's test file, "" is: none known
    {"flushed": n}               the answer to {"flush": n}, once all before is told

The agent sends {"flush": n}, and {"restart": n} when lines that were told already are to be told again.

Python >= 3.12 tells lines by sys.monitoring; DISABLE makes each cost once only. Before, coverage.py of the product
collects them. Its own save() would lose what runs between its copy and its clear(): here the very lines that were
copied are taken out of its sets, which is one step for other threads.

All of it runs inside of other people's programs, from Python 3.8 on: it raises nothing, prints nothing, keeps no
process alive and waits for the agent only at the end, for END_S at most. Forking with a second thread would warn, so
ours ends before a fork and is started anew. Modules that take long to load (json, socket, threading, typing) are not
used.

Source: drill sheet, "Probe sources". Read by agent/coverage/sources/python.py.
"""

from __future__ import annotations

import atexit
import os
import sys
from _signal import SIG_BLOCK, SIG_SETMASK, pthread_sigmask, valid_signals  # type: ignore[import-not-found]
from _socket import AF_UNIX, MSG_NOSIGNAL, SO_SNDBUF, SOCK_STREAM, SOL_SOCKET, socket, socketpair
from _thread import allocate_lock, get_native_id, start_new_thread
from fcntl import F_DUPFD_CLOEXEC, fcntl
from select import POLLIN, POLLOUT, poll

try:
    from _json import encode_basestring_ascii as quoted
except ImportError:  # PyPy
    from json.encoder import encode_basestring_ascii as quoted

TYPE_CHECKING = False
if TYPE_CHECKING:
    from _thread import LockType
    from collections.abc import Callable, Iterator
    from types import CodeType, FrameType
    from typing import Any

PERIOD_MS = 1000
END_S = 3.0  # the agent reads every two seconds, if what is to be told is more than the kernel takes
LOCK_S = 1.0
GONE_MS = 500  # from a thread's last word to its end
ROOM = 1 << 20  # of the kernel for what the agent has not read yet; it gives less
LINE_MAX = 1_000_000
FRESH_MAX = 1000  # lines, where no thread sees to it
UNTOLD_MAX = 100_000  # files times tests: more is an agent that does not read
INSTALLED = ("/site-packages/", "/dist-packages/")
HIGH = 200
PATH_MAX = 107  # bytes of a socket's path: unix(7)

monitoring: Any = getattr(sys, "monitoring", None)


class Monitoring:
    """Lines by sys.monitoring: PY_START finds the product's code, which gets LINE events; each is wanted once."""

    disturbed = ""

    def __init__(self, path_of: Callable[[str], str | None], when_full: Callable[[], None] | None) -> None:
        self.path_of, self.when_full = path_of, when_full
        self.tool: int | None = None
        self.fresh: list[tuple[CodeType, int]] = []
        self.counts = self.is_late = False

    def has_tool(self) -> bool:
        for tool in (3, 4):
            if self.tool is None:
                try:
                    monitoring.use_tool_id(tool, "emissary")
                    self.tool = tool
                except ValueError:
                    pass
        return self.tool is not None

    def on(self, roots: tuple[str, ...]) -> str:
        """Begin; or say why not."""
        if not self.has_tool():
            return "the tool ids 3 and 4 of sys.monitoring are taken"
        events = monitoring.events
        monitoring.register_callback(self.tool, events.PY_START, self.see_code)
        monitoring.register_callback(self.tool, events.LINE, self.see_line)
        self.counts = True
        monitoring.set_events(self.tool, events.PY_START)
        for frame in frames() if self.is_late else [sys._getframe()]:
            for each in with_callers(frame):
                self.see_code(each.f_code, 0)
        self.restart()
        return ""

    def off(self) -> None:
        self.counts = False  # the lines that are left say so once each, and are silent then
        self.fresh.clear()
        if self.tool is not None:
            monitoring.set_events(self.tool, 0)

    def restart(self) -> None:
        monitoring.restart_events()

    def afterwards(self, act: Callable[[], None]) -> None:
        """Do it once the call is over that the product's own code is in, and some function returns."""
        if not self.has_tool():
            return
        caller = next((frame for frame in with_callers(sys._getframe()) if frame.f_code.co_filename != __file__), None)
        place = caller.f_lasti if caller is not None else -1
        events = monitoring.events

        def see_return(code: CodeType, offset: int, value: object) -> Any:
            if caller is not None and caller.f_lasti == place and code is not caller.f_code:
                return None  # of what is done in that call
            monitoring.set_events(self.tool, events.PY_START if self.counts else 0)
            act()
            return monitoring.DISABLE

        monitoring.register_callback(self.tool, events.PY_RETURN, see_return)
        monitoring.set_events(self.tool, events.PY_RETURN | (events.PY_START if self.counts else 0))

    def see_code(self, code: CodeType, offset: int) -> Any:
        try:
            if self.path_of(code.co_filename) is not None:
                monitoring.set_local_events(self.tool, code, monitoring.events.LINE)
        except Exception:  # noqa: BLE001  # of a folder that is gone, say: this code is not covered
            pass
        return monitoring.DISABLE

    def see_line(self, code: CodeType, line: int) -> Any:
        if self.counts:
            self.fresh.append((code, line))
            if self.when_full is not None and len(self.fresh) >= FRESH_MAX:
                self.when_full()
        return monitoring.DISABLE

    def take(self) -> list[tuple[str, int]]:
        """Path and line of what ran since the last call."""
        count = len(self.fresh)
        taken = self.fresh[:count]
        del self.fresh[:count]  # what others append meanwhile stays
        return [(self.path_of(code.co_filename) or "", line) for code, line in taken]


def frames() -> list[FrameType]:
    """Where each thread is now, if that can be told."""
    interpreters = __import__("_interpreters" if sys.version_info >= (3, 13) else "_xxsubinterpreters")
    # With a second interpreter, sys._current_frames makes objects for the one in the memory of the other: it crashes.
    return list(sys._current_frames().values()) if len(interpreters.list_all()) == 1 else [sys._getframe()]


def with_callers(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        yield frame
        frame = frame.f_back


class Tracing:
    """Lines by the product's coverage.py. Once begun it goes on: only a thread itself can end its tracing."""

    def __init__(self, path_of: Callable[[str], str | None]) -> None:
        self.path_of = path_of
        self.coverage: Any = None
        self.counts = self.is_late = False
        self.why = self.disturbed = ""

    def begin(self, roots: tuple[str, ...]) -> None:
        """Trace this thread, and those it starts."""
        version = ".".join(map(str, sys.version_info[:2]))
        try:
            import coverage  # type: ignore[import-not-found]
        except ImportError:
            self.why = f"Python {version} needs coverage.py in the product's environment, where it is not installed"
            return
        if coverage.version_info < (5,):
            self.why = f"Python {version} needs coverage.py 5 or newer in the product's environment"
            return
        below = [root.replace("[", "[[]").replace("*", "[*]").replace("?", "[?]") + "*" for root in roots]
        self.coverage = coverage.Coverage(data_file=None, config_file=False, include=below, branch=False)
        self.coverage._warn = lambda *args, **options: None
        self.coverage.start()
        atexit.unregister(self.coverage._atexit)
        collector = self.coverage._collector
        self.pause, collector.pause = collector.pause, self.paused

    def paused(self) -> None:
        self.disturbed = "the product measures itself with coverage.py, and on Python < 3.12 only one can"
        self.pause()

    def on(self, roots: tuple[str, ...]) -> str:
        """Begin; or say why not."""
        if self.coverage is None and not self.why:
            if self.is_late:
                return 'before Python 3.12 only what starts in a session is covered, or all with arm = "always"'
            self.begin(roots)
        self.take()
        self.counts = not self.why
        return self.why

    def off(self) -> None:
        self.counts = False

    def restart(self) -> None:
        pass  # lines come again each time they run

    def afterwards(self, act: Callable[[], None]) -> None:
        act()

    def take(self) -> list[tuple[str, int]]:
        """Path and line of what ran since the last call."""
        if self.coverage is None:
            return []
        found = []
        for file, lines in self.coverage._collector.data.copy().items():
            taken = lines.copy()
            lines.difference_update(taken)
            path = self.path_of(file)
            if path is not None:
                found += [(path, line) for line in taken]
        return found


class Wire:
    """A socket whose number somebody else may have closed, and given to another file: it is looked at before use.

    It has a high number: some programs close the first three, and count on getting them back.
    """

    def __init__(self, opened: socket) -> None:
        try:
            number = fcntl(opened.fileno(), F_DUPFD_CLOEXEC, HIGH)
        except OSError:  # there are not as many
            number = opened.detach()
        else:
            opened.close()
        self.socket = socket(AF_UNIX, SOCK_STREAM, 0, number)
        self.socket.setblocking(False)
        self.number = number
        self.identity = self.look()

    def look(self) -> tuple[int, int] | None:
        try:
            seen = os.fstat(self.number)
        except OSError:
            return None
        return seen.st_dev, seen.st_ino

    def is_ours(self) -> bool:
        return self.look() == self.identity

    def close(self) -> None:
        if self.is_ours():
            self.socket.close()
        else:
            self.socket.detach()


def wait_for(milliseconds: int, *wanted: tuple[Wire, int]) -> bool:
    """Is one of them ready within the time?"""
    poller = poll()
    for wire, what in wanted:
        poller.register(wire.number, what)
    return bool(poller.poll(milliseconds))


def harmless(does: Callable[..., None]) -> Callable[..., None]:
    """What must not disturb the product: after an error of any kind nothing more is told."""

    def does_or_gives_up(self: Reporter, *args: Any) -> None:
        try:
            does(self, *args)
        except Exception:  # noqa: BLE001
            self.give_up()

    return does_or_gives_up


class Reporter:
    """The connection, what is to be told on it, and the thread that does. `lock` is for all but what tracers take."""

    def __init__(self, where: str, *, has_thread: bool) -> None:
        self.where, self.has_thread = where, has_thread
        self.tracer: Any = Tracing(self.path_of)
        if monitoring is not None:
            self.tracer = Monitoring(self.path_of, None if has_thread else self.flush)
        self.roots: tuple[str, ...] = ()
        self.paths: dict[str, str | None] = {}
        self.lock = allocate_lock()
        self.test = os.environ.get("PYTEST_CURRENT_TEST", "").partition("::")[0]
        self.wire: Wire | None = None
        self.untold: dict[tuple[str, str], int] = {}
        self.out = b""
        self.asked = b""
        self.why = ""
        self.is_wrapped = False
        self.running = allocate_lock()  # held by the thread
        self.task = 0  # its number in /proc
        self.is_ending = False
        self.wake: tuple[Wire, Wire] | None = None

    def path_of(self, filename: str) -> str | None:
        """The absolute path of a file of the product; None of all else."""
        try:
            return self.paths[filename]
        except KeyError:
            pass
        found = None
        if not filename.startswith("<"):
            path = os.path.realpath(filename)
            if path.startswith(self.roots) and not any(folder in path for folder in INSTALLED) and is_utf8(path):
                found = path
        self.paths[filename] = found
        return found

    # ---- the connection: the lock is held ----

    def connect(self) -> None:
        """Begin to tell, if the agent listens."""
        try:
            with open(self.where, "rb") as file:
                path, arm, *folders = os.fsdecode(file.read()).split("\0")
        except OSError:
            return
        roots = tuple(folders)
        if roots != self.roots:
            self.roots = roots
            self.paths.clear()
        try:
            opened = socket(AF_UNIX, SOCK_STREAM)
            try:
                opened.setsockopt(SOL_SOCKET, SO_SNDBUF, ROOM)
                opened.setblocking(False)
                dial(opened, path)
            except BaseException:
                opened.close()
                raise
        except OSError:  # nobody listens, or too many wait already
            if arm == "always" and not self.tracer.counts and monitoring is None:
                self.tracer.on(roots)
                self.tracer.off()
            return
        self.wire = Wire(opened)
        self.asked = b""
        self.why = "" if self.tracer.counts else self.tracer.on(roots)
        self.out = self.hello()
        self.wrap_ends()
        self.send()

    def hello(self) -> bytes:
        version = ".".join(map(str, sys.version_info[:3]))
        return f'{{"pid":{os.getpid()},"python":"{version}","why":{quoted(self.why)}}}\n'.encode()

    def lose(self) -> None:
        """The agent is gone, or has heard enough."""
        if self.wire is not None:
            self.wire.close()
            self.wire = None
        self.tracer.off()
        self.untold.clear()
        self.out = b""

    def connect_again(self) -> None:
        """The product has closed the connection, as daemons close all files: what it ran meanwhile is still told."""
        if self.wire is not None:
            self.wire.close()
            self.wire = None
        self.connect()
        if self.wire is None:
            self.lose()

    def gather(self) -> None:
        """Take what the tracer has."""
        for path, line in self.tracer.take():
            if 0 < line < LINE_MAX:
                key = self.test, path
                self.untold[key] = self.untold.get(key, 0) | 1 << line
        if not self.why and self.tracer.disturbed:
            self.why = self.tracer.disturbed
            self.out += self.hello()

    def write(self) -> None:
        """Put into words what was gathered."""
        untold, self.untold = self.untold, {}
        self.out += b"".join(
            f'{{"test":{quoted(test)},"file":{quoted(path)},"lines":"{lines:x}"}}\n'.encode()
            for (test, path), lines in untold.items()
        )

    def send(self, wait_s: float = 0.0) -> None:
        """Tell what is new; at the end wait for the agent, and for no longer than `wait_s` without any progress."""
        if self.wire is None:
            return
        self.gather()
        if len(self.untold) > UNTOLD_MAX:
            return self.lose()
        while True:
            if not self.out:
                if not self.untold:
                    return
                self.write()
            if not self.wire.is_ours():
                return self.connect_again()
            try:
                self.out = self.out[self.wire.socket.send(self.out, MSG_NOSIGNAL) :]
            except BlockingIOError:
                if not wait_s or not wait_for(int(wait_s * 1000), (self.wire, POLLOUT)):
                    return
            except OSError:
                return self.lose()

    def hear(self) -> None:
        """Do what the agent asks for."""
        if self.wire is None:
            return
        if not self.wire.is_ours():
            return self.connect_again()
        try:
            data = self.wire.socket.recv(4096)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            return self.lose()
        *lines, self.asked = (self.asked + data).split(b"\n")
        for line in lines:
            word, _, number = line.partition(b":")
            if word == b'{"flush"':
                self.gather()
                self.write()
                self.out += b'{"flushed":%d}\n' % int(number.rstrip(b"}"))
            elif word == b'{"restart"':
                self.gather()
                self.tracer.restart()

    # ---- for others ----

    @harmless
    def flush(self, wait_s: float = 0.0) -> None:
        """Tell what is new now."""
        if self.wire is not None and self.lock.acquire(True, LOCK_S):
            try:
                self.send(wait_s)
            finally:
                self.lock.release()

    @harmless
    def begin_test(self, file: str) -> None:
        """What runs from now on is of this test file, though it ran before."""
        if self.wire is not None and self.lock.acquire(True, LOCK_S):
            try:
                self.gather()
                self.tracer.restart()
            finally:
                self.lock.release()
        self.test = file

    def give_up(self) -> None:
        self.is_ending = True
        try:
            self.lose()
        except Exception:  # noqa: BLE001  # not even that: but for its silence nothing is left
            self.wire = None

    def wrap_ends(self) -> None:
        """Tell before this process becomes another program, or ends without Python's own ends."""
        if self.is_wrapped:
            return
        self.is_wrapped = True
        for name in ("_exit", "execv", "execve"):
            setattr(os, name, self.wrapped(getattr(os, name), name))

    def wrapped(self, call: Callable[..., Any], name: str) -> Callable[..., Any]:
        def end(*args: Any, **options: Any) -> Any:
            self.flush(END_S)
            return call(*args, **options)

        end.__name__ = end.__qualname__ = name
        end.__module__ = "os"
        end.__doc__ = call.__doc__
        end.__wrapped__ = call  # type: ignore[attr-defined]
        return end

    # ---- the thread ----

    def begin(self) -> None:
        """Start the thread, and see it begun. It takes no signal: one that the product waits for would be lost in it.

        Python's start, which goes on behind this, changes its allocator for a moment, and with `-X dev` what a thread
        frees in that moment aborts the process (python/cpython#111924). A thread frees as it begins.
        """
        if not self.has_thread or not self.running.acquire(False):
            return
        self.is_ending = False
        begun = allocate_lock()
        begun.acquire()
        try:
            if self.wake is None:
                self.wake = wake_up_call()
            blocked = pthread_sigmask(SIG_BLOCK, valid_signals())
            try:
                start_new_thread(self.run, (begun,))
            finally:
                pthread_sigmask(SIG_SETMASK, blocked)
        except BaseException:
            self.running.release()
            raise
        begun.acquire(True, LOCK_S)

    def run(self, begun: LockType) -> None:
        begun.release()
        try:
            self.task = get_native_id()
            self.repeat()
        finally:
            self.running.release()

    @harmless
    def repeat(self) -> None:
        while self.rests():
            with self.lock:
                if self.wire is None:
                    self.connect()
                self.hear()
                self.send()

    def rests(self) -> bool:
        """Wait a period, or until the agent asks. False: the thread is to end."""
        if self.wake is None or not self.wake[0].is_ours():
            for wire in self.wake or ():
                wire.close()
            self.wake = wake_up_call()  # a daemon closes all files it began with
        wanted = [(wire, POLLIN) for wire in (self.wake[0], self.wire) if wire is not None]
        if not self.is_ending:
            wait_for(PERIOD_MS, *wanted)
        return not self.is_ending

    def end(self) -> None:
        """End the thread, and see it gone: a fork would warn of it."""
        if not self.running.locked():
            return
        self.is_ending = True
        wake = self.wake
        if wake is not None and wake[1].is_ours():
            wake[1].socket.send(b".", MSG_NOSIGNAL)
        if not self.running.acquire(True, LOCK_S):
            return
        for _ in range(GONE_MS):
            if not os.path.exists(f"/proc/self/task/{self.task}"):
                break
            wait_for(1)
        if wake is not None and wake[0].is_ours():
            wake[0].socket.recv(16)
        self.running.release()

    # ---- what becomes of the process ----

    @harmless
    def start(self) -> None:
        with self.lock:
            self.connect()
        self.tracer.is_late = True
        atexit.register(self.finish)
        if self.has_thread:
            os.register_at_fork(before=self.before_fork, after_in_child=self.forked, after_in_parent=self.go_on)
            self.begin()

    @harmless
    def before_fork(self) -> None:
        self.end()
        self.flush()

    @harmless
    def go_on(self) -> None:
        self.tracer.afterwards(self.resume)  # Python 3.13 looks for threads after this, within the call

    @harmless
    def resume(self) -> None:
        self.begin()

    @harmless
    def forked(self) -> None:
        """A process of its own: what its parent has not told yet, the parent tells."""
        self.lock, self.running = allocate_lock(), allocate_lock()
        for wire in (self.wire, *(self.wake or ())):
            if wire is not None:
                wire.close()
        self.wire = self.wake = None
        self.untold.clear()
        self.tracer.take()
        self.connect_again()
        self.begin()

    @harmless
    def finish(self) -> None:
        """The interpreter ends; other things that wait for its end have been done."""
        self.end()
        self.flush(END_S)
        if self.lock.acquire(True, LOCK_S):
            self.lose()
        for wire in self.wake or ():
            wire.close()


def is_utf8(path: str) -> bool:
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def wake_up_call() -> tuple[Wire, Wire]:
    here, there = socketpair()
    return Wire(here), Wire(there)


def dial(opened: socket, path: str) -> None:
    """Connect, however long the path is."""
    if len(os.fsencode(path)) <= PATH_MAX:
        return opened.connect(path)
    folder, name = os.path.split(path)
    number = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        opened.connect(f"/proc/self/fd/{number}/{name}")
    finally:
        os.close(number)


def is_main_interpreter() -> bool:
    try:
        from _thread import _is_main_interpreter  # type: ignore[attr-defined]
    except ImportError:  # before 3.12 there is no telling
        return True
    return bool(_is_main_interpreter())


# A thread in another interpreter would have to end before that does, and some allow none.
reporter = Reporter(os.path.join(os.path.dirname(os.path.abspath(__file__)), "where"), has_thread=is_main_interpreter())
reporter.start()

# ---- hooks of pytest, which finds them by the entry point of emissary_coverage_pytest.py ----

follows_tests = True


def pytest_configure(config: Any) -> None:
    global follows_tests
    is_worker = hasattr(config, "workerinput")
    # Workers of pytest-xdist run the tests, and the controller only hears of them.
    follows_tests = is_worker or getattr(config.option, "dist", "no") == "no"


def pytest_runtest_logstart(nodeid: str) -> None:
    file = nodeid.partition("::")[0]
    if follows_tests and file != reporter.test:
        reporter.begin_test(file)


def pytest_sessionfinish() -> None:
    reporter.flush()
