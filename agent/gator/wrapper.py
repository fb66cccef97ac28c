"""A wrapper: one job, its output as messages, its metrics, its processes, its end.

    registered -> the task runs -> its end, whoever causes it -> complete

Code: the task's exit status, -N by signal N, 255 stopped, 124 timeout, 127 not startable.

Source: protocols/gator.md, "Task", "State machine", "Decisions"; seeds/gator-websocket-api.md, "Wrapper Actions".
"""

import logging
import os
import signal
from collections import deque
from collections.abc import Callable, Mapping
from io import BufferedWriter
from pathlib import Path
from typing import Any, Final

import trio
from trio_websocket import WebSocketConnection

from agent.core.channel import Channel
from agent.core.envelope import Request
from agent.core.lines import CutLine, Lines
from agent.core.process import UNLIMITED, Child, ChildFailedToStart, Exit, Limits, Pipe, Spec, Step, open_child
from agent.core.processtree import Stat, TreeSurvived
from agent.gator import messages, port
from agent.gator import spec as specs
from agent.gator.answers import asker_dialect, told_layer, told_messages
from agent.gator.dialects import is_reserved, read, wrong
from agent.gator.journal import FLUSH_S, MAX_WAITING, Journal
from agent.gator.layer import Above, Place, Shared, severity_of
from agent.gator.layerdb import OWN
from agent.gator.messages import RESULTS, STATES, ApiJob, Number, Result, Severity
from agent.gator.orphans import task_mark
from agent.gator.pool import Grant
from agent.gator.spec import Job
from agent.gator.summary import Summary, job_summary
from agent.gator.tree import STOPPED_CODE, TIMEOUT_CODE

log = logging.getLogger(__name__)

NOT_STARTABLE: Final = 127
GRACE_S: Final = 5.0  # from TERM to KILL
MAX_LINE: Final = 64 * 1024  # bytes of one line that become a message
MAX_RAW: Final = 64 * 1024 * 1024  # bytes of output that are kept as they came
MAX_TAIL: Final = 64 * 1024  # characters of output that are told with the end
SAMPLE_S: Final = 1.0  # between two looks at the memory of a task that may not have more
_TICKS = os.sysconf("SC_CLK_TCK")
_PAGE = os.sysconf("SC_PAGE_SIZE")
STREAMS: Final[dict[str, Severity]] = {"stdout": "INFO", "stderr": "ERROR"}


class Wrapper:
    """One job. `run` once; `stop` at any time.

    `grant` is what the scheduler gave; `release` is called when the task has ended with all its tree, and this is free.
    `is_many`: one of an array. `ports` are those of the process; without them it keeps its own.
    """

    def __init__(
        self,
        job: Job,
        folder: Path,
        above: Above,
        shared: Shared,
        grant: Grant,
        *,
        forward: bool,
        is_many: bool,
        release: Callable[[], None] = lambda: None,
        ports: port.Ports | None = None,
    ) -> None:
        self.ident = job.ident
        self.code = 0
        self.result: Result = "UNKNOWN"
        self._job, self._folder, self._above, self._shared, self._grant = job, folder, above, shared, grant
        self._journal = Journal(folder, shared, above, is_tier=False, is_many=is_many, forward=forward)
        self._release, self._ports = release, ports
        self._metrics: dict[str, Number] = {}
        self._place = Place()
        self._address = ""
        self._state: messages.State = "LAUNCHED"
        self._started: float | None = None
        self._stopped: float | None = None
        self._running = trio.CancelScope()  # the wait for the task's own end
        self._why: str | None = None  # we end it: "stopped", "timeout", "memory"
        self._has_ended = False
        self._raw: BufferedWriter | None = None
        self._raw_size = 0
        self._tail = deque[str]()  # the last lines of its output
        self._tail_size = 0
        self._child: Child | None = None
        self._ticks = 0.0, 0  # at the last look: when, CPU ticks of the tree

    async def run(self) -> None:
        """Run it and tell it above. Raises OSError and sqlite3.Error when its folder cannot be made."""
        await self._journal.open(specs.dump(self._job))
        try:
            async with trio.open_nursery() as nursery:
                ports = self._ports or port.keep(nursery, self._shared.settings, self._shared.metrics)
                with await ports.open(self._opened) as listening:
                    self._address = listening.address
                    await self._run(nursery)
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._close()

    async def _run(self, nursery: trio.Nursery) -> None:
        self._place = await self._above.register(self._address)
        self._started = self._shared.clock()
        self._state = "STARTED"
        self._above.update(self.summary(), "UNKNOWN")
        await self._run_task(nursery)
        self._release()
        self._stopped = self._shared.clock()
        self._state = "COMPLETE"
        self._write_end()
        if self._tail:
            path, text = list(self._place.path), "\n".join(self._tail)
            self._shared.tell({"event": "output", "path": path, "ident": self.ident, "text": text})
        await self._close()  # what is told upward is on the disk
        await self._above.complete(self.summary(), self.result, self.code)

    async def _close(self) -> None:
        if self._raw:
            self._raw.close()
        await self._journal.close()

    async def _opened(self, ws: WebSocketConnection) -> None:
        async def wait(channel: Channel) -> None:
            await trio.sleep_forever()

        dialect: messages.Dialect | None = None

        async def answer(request: Request) -> Mapping[str, Any]:
            nonlocal dialect
            dialect = dialect or asker_dialect(request)
            return await self._answer(request, dialect)

        await port.talk(ws, answer, wait, self._shared.metrics)

    # ---- the task ---------------------------------------------------------------------------------------------------

    async def _run_task(self, nursery: trio.Nursery) -> None:
        job, base = self._job, self._shared.env
        env = dict(job.env) if self._shared.settings.env == "replace" and job.env else {**base, **job.env}
        env |= {"GATOR_PARENT": self._address, "GATOR_SERVER": self._address, "PYTHONUNBUFFERED": "1"}
        argv = tuple(specs.expand(text, env) for text in (job.command, *job.args))
        cwd = Path(job.cwd or os.getcwd())
        self._write_start(argv, cwd)
        mark = task_mark(self._place.path, self.ident)
        spec = Spec(argv=argv, cwd=cwd, env=env, mark=mark, limits=self._limits())
        exit_: Exit | None = None
        try:
            if self._why is None:
                async with open_child(spec, leaves=self._shared.leaves) as child:
                    self._child, self._ticks = child, (trio.current_time(), 0)
                    exit_ = await self._until_end(child, nursery)
        except ChildFailedToStart as err:
            self._journal.say("ERROR", str(err))
            self.code = NOT_STARTABLE
        except TreeSurvived as err:
            self._journal.say("ERROR", str(err))
        if exit_ is not None:
            self._judge_exit(exit_)
        elif self._why is not None:
            self.code = STOPPED_CODE
        broken = self._shared.options.limits.broken_by(self._journal.counts)
        # Who is killed for its memory may still end with 0, and errors may be allowed.
        self.result = "SUCCESS" if self.code == 0 and broken is None and self._why is None else "FAILURE"

    async def _until_end(self, child: Child, beats: trio.Nursery) -> Exit:
        async with trio.open_nursery() as nursery:
            for name, pipe in child.streams.items():
                nursery.start_soon(self._read, pipe, STREAMS[name])
            if self._job.timeout is not None:
                self._running.deadline = trio.current_time() + self._job.timeout
            with self._running:
                with trio.move_on_after(FLUSH_S) as short:  # most jobs of large arrays end within
                    await child.wait()
                if short.cancelled_caught:
                    beats.start_soon(self._beat)
                    beats.start_soon(self._journal.keep_flushing)
                    if specs.memory(self._job) and not self._is_held("memory"):
                        nursery.start_soon(self._watch_memory, child)
                    await child.wait()
            if self._running.cancelled_caught:
                if self._why is None:
                    self._why = "timeout"
                    self._journal.say("ERROR", f"not ended within its timeout of {self._job.timeout:g} s: killed")
                exit_ = await child.stop([Step(signal.SIGTERM, GRACE_S)])
            else:
                ended = child.look()
                self._has_ended = ended is not None and not _is_killed(ended)  # else by who stops us, perhaps (scancel)
                exit_ = await child.finish()
            nursery.cancel_scope.cancel()
        return exit_

    def _judge_exit(self, exit_: Exit) -> None:
        if exit_.oom:
            self._journal.say("ERROR", f"it needed more than the {specs.memory(self._job)} bytes it asked for: killed")
        if exit_.signal is not None:
            self.code = -signal.Signals[exit_.signal].value if exit_.signal in signal.Signals.__members__ else -1
        else:
            self.code = exit_.code or 0
        if self._why == "stopped":
            self.code = STOPPED_CODE
        elif self._why == "timeout":
            self.code = TIMEOUT_CODE

    def _limits(self) -> Limits:
        cores, memory = specs.cores(self._job), specs.memory(self._job)
        if not cores and not memory:
            return UNLIMITED
        return Limits(
            core=None,
            nice=0,
            oom_score_adj=None,
            memory=memory if self._is_held("memory") else None,  # without it RLIMIT_DATA would stand in
            cpus=cores if cores and self._is_held("cpu") else None,
            affinity=self._grant.cpus if self._grant.cpus and not self._is_held("cpu") else None,
        )

    def _is_held(self, controller: str) -> bool:
        leaves = self._shared.leaves
        return leaves is not None and controller in leaves.controllers

    async def stop(self) -> None:
        """End the task: TERM, KILL after 5 s. One that has ended by itself, and by no signal, has its own end."""
        if self._why is None and not self._has_ended:
            self._why = "stopped"
            self._running.cancel()

    async def _read(self, pipe: Pipe, severity: Severity) -> None:
        lines = Lines(MAX_LINE)
        try:
            while data := await pipe.receive_some():
                self._keep_raw(data)
                self._say_all(lines.feed(data), severity)
                if self._journal.db.waiting > MAX_WAITING:
                    await self._journal.flush()
        except trio.ClosedResourceError:
            pass  # the task has ended, and somebody else holds its pipe
        self._say_all(lines.eof(), severity)

    def _say_all(self, lines: list[bytes], severity: Severity) -> None:
        for line in lines:
            text = line.decode("utf-8", "replace").rstrip()
            if isinstance(line, CutLine):
                text += f"… ({line.dropped} bytes cut)"
            if text:
                self._journal.say(severity, text)
                self._tail.append(text)
                self._tail_size += len(text)
                while self._tail_size > MAX_TAIL:
                    self._tail_size -= len(self._tail.popleft())

    def _keep_raw(self, data: bytes) -> None:
        assert self._child is not None
        try:
            if self._raw is None:
                self._raw = open(self._folder / f"raw_{self._child.pid}.log", "wb")  # noqa: SIM115
            if self._raw_size <= MAX_RAW:
                self._raw.write(data[: MAX_RAW - self._raw_size])
                self._raw_size += len(data)
                if self._raw_size > MAX_RAW:
                    self._journal.say(
                        "WARNING", f"more than {MAX_RAW} bytes of output; the rest is not kept as it came"
                    )
        except OSError as err:
            self._raw_size = MAX_RAW + 1
            self._journal.say("WARNING", f"its output is not kept as it came: {err.strerror}")

    # ---- what it uses -----------------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        while True:
            await trio.sleep(self._shared.options.interval_s)
            if self._child is not None and self._state == "STARTED":  # at its end the database is closed
                self._count_processes(self._child)
            self._above.update(self.summary(), "UNKNOWN")

    def _count_processes(self, child: Child) -> None:
        used = [each for stat in child.tree() if (each := _used(stat)) is not None]
        now, ticks = trio.current_time(), sum(each[0] for each in used)
        before, self._ticks = self._ticks, (now, ticks)
        percent = max(0.0, 100 * (ticks - before[1]) / _TICKS / max(now - before[0], 1 / _TICKS))
        memory, virtual = sum(each[1] for each in used), sum(each[2] for each in used)
        self._journal.db.procstat(len(used), round(percent, 1), memory, virtual, self._shared.clock())

    async def _watch_memory(self, child: Child) -> None:
        allowed = specs.memory(self._job) or 0
        while True:
            used = sum(each[1] for stat in child.tree() if (each := _used(stat)) is not None)
            if used > allowed:
                what = f"it uses {used} bytes of memory, and asked for {allowed}"
                if self._shared.settings.enforce == "warn":
                    self._journal.say("WARNING", what)
                    return
                self._journal.say("ERROR", f"{what}: killed")
                if self._why is None:
                    self._why = "memory"
                    self._running.cancel()
                return
            await trio.sleep(SAMPLE_S)

    # ---- what it tells ----------------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """As it stands."""
        passed = None if self._state != "COMPLETE" else self.result == "SUCCESS"
        return job_summary(self.ident, {**self._journal.counts, **self._metrics}, passed=passed)

    async def states(self) -> str:
        """Its state."""
        return self._state

    async def options(self, given: messages.Options) -> dict[str, Any]:
        """A job has no slots to give. Raises ActionError."""
        raise wrong("Unknown action 'update_scheduler_opts'")

    async def resolve(self, request: messages.Resolve) -> ApiJob:
        """Itself: nothing is below it. Raises ActionError."""
        if request.root_path:
            raise wrong(f"resolve: {self.ident!r} is a job and has no child {request.root_path[0]!r}")
        return ApiJob(
            uidx=self._place.uidx,
            root=0,
            path=list(self._place.path),
            ident=self.ident,
            status=STATES.index(self._state),
            metrics={**self._journal.counts, **self._metrics},
            server_url=self._address,
            db_file=str(self._folder / "db.sqlite"),
            started=self._started,
            updated=self._shared.clock(),
            stopped=self._stopped,
            result=RESULTS.index(self.result),
            owner=None,
            children=[],
            expected_children=0,
        )

    def _write_start(self, argv: tuple[str, ...], cwd: Path) -> None:
        job = self._job
        self._journal.db.attributes(
            {
                "ident": self.ident,
                "uidx": self._place.uidx,
                "root": 0,
                "path": ".".join(self._place.path),
                "started": self._started,
                "cmd": " ".join(argv),
                "cwd": cwd,
                "host": self._shared.host,
                "req_cores": specs.cores(job) or 0,
                "req_memory": specs.memory(job) or 0,
                "req_licenses": ",".join(f"{name}={count}" for name, count in specs.licenses(job).items()),
            }
        )

    def _write_end(self) -> None:
        db = self._journal.db
        db.attributes(
            {
                "pid": self._child.pid if self._child else 0,
                "stopped": self._stopped,
                "exit": self.code,
                "result": RESULTS.index(self.result),
            }
        )
        for name, value in {**self._journal.counts, **self._metrics}.items():
            db.metric(OWN, name, value)

    # ---- its own port -----------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, dialect: messages.Dialect | None) -> Mapping[str, Any]:
        payload = request.payload
        match request.action:
            case "log":
                given: messages.Log = read("log", payload, messages.Log)
                self._journal.say(severity_of(given.severity), given.message, given.at)
                return {}
            case "metric":
                metric: messages.Metric = read("metric", payload, messages.Metric)
                if self._state == "COMPLETE":
                    raise wrong(f"Metric '{metric.name}' comes behind the end of the job")
                if is_reserved(metric.name):
                    raise wrong(f"Reserved metric name '{metric.name}'")
                if metric.name not in self._metrics and len(self._metrics) >= messages.MAX_METRICS:
                    raise wrong(f"Metric '{metric.name}' is one too many: a job has at most {messages.MAX_METRICS}")
                self._metrics[metric.name] = metric.value
                return {"result": "success"}
            case "get_messages":
                return await told_messages(self._journal, payload, STATES.index(self._state), dialect)
            case "resolve":
                return await told_layer(self.resolve, payload)
            case "get_tree":
                return {self.ident: self._state}
            case "stop":
                await self.stop()
                return {}
            case action:
                raise wrong(f"Unknown action '{action}'")


def _is_killed(exit_: Exit) -> bool:
    """By a signal; a shell whose own child was ended by one says so by its code."""
    return exit_.signal is not None or exit_.code in (128 + signal.SIGTERM, 128 + signal.SIGKILL)


def _used(stat: Stat) -> tuple[int, int, int] | None:
    """CPU ticks, resident and virtual bytes of a process; None when it has ended.

    The ticks are also those of its children that have ended: many tasks are a row of short ones. Source: proc(5).
    """
    try:
        line = Path(f"/proc/{stat.proc.pid}/stat").read_bytes()
    except OSError:
        return None
    fields = line.rpartition(b")")[2].split()
    return sum(map(int, fields[11:15])), int(fields[21]) * _PAGE, int(fields[20])
