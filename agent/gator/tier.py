"""A tier: hands jobs to children, hears of them, sums them up, passes on what comes from above.

tree.py decides what becomes of children; here it is carried out. They are tasks of this process, or run elsewhere
(elsewhere.py: `--isolate`, a `command`, another scheduler).

Source: protocols/gator.md, "State machine", "Direction", "Schedulers"; seeds/gator-websocket-api.md, "Tier Actions".
"""

import logging
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import msgspec
import trio
from trio_websocket import WebSocketConnection

from agent.core.channel import Channel
from agent.core.envelope import Request
from agent.gator import messages, port
from agent.gator import spec as specs
from agent.gator.answers import asker_dialect, told_layer, told_messages, told_spec
from agent.gator.dialects import read, wrong
from agent.gator.elsewhere import Elsewhere, Link, set_aside
from agent.gator.journal import Journal
from agent.gator.layer import Above, Below, Place, Shared, States, severity_of
from agent.gator.layerdb import GROUP, sync_all
from agent.gator.messages import RESULTS, STATES, ApiJob, Result, Severity
from agent.gator.pool import Demand, Held, demand
from agent.gator.schedulers import Scheduler
from agent.gator.spec import Group, Job, Node
from agent.gator.summary import Summary
from agent.gator.tree import Act, Again, Cut, Ended, Kid, Lost, Silent, Times, Tree
from agent.gator.view import View
from agent.gator.wrapper import Wrapper

log = logging.getLogger(__name__)

CHECK_S: Final = 1.0  # between two looks for lost children
UPDATE_S: Final = 0.5  # updates for jobs that ended come at most that often
SYNC_S: Final = 5.0  # between two times that the files of an array's jobs are brought onto the disk
MAX_LOCAL: Final = 64  # children at once in this process, beside those that hold a slot: tiers, jobs that wind up


class Tier:
    """A group or array. `scheduler` runs children that are not of this process. `run` once; `stop` at any time."""

    def __init__(
        self,
        spec: Group,
        folder: Path,
        above: Above,
        shared: Shared,
        scheduler: Scheduler | None,
        *,
        forward: bool,
        is_many: bool = False,
        ports: port.Ports | None = None,
    ) -> None:
        self._ports = ports
        self.ident = spec.ident
        self.code = 0
        self._spec, self._folder, self._above, self.shared = spec, folder, above, shared
        self._journal = Journal(folder, shared, above, is_tier=True, is_many=is_many, forward=forward)
        times = Times(
            interval_s=shared.options.interval_s,
            resume_wait_s=shared.settings.resume_wait_s,
            end_s=2.0 if scheduler is None or scheduler.name == "local" else 10.0,
        )
        self.tree = Tree(spec, times, retry_on=shared.settings.retry_on)
        self.place = Place()
        self._address = ""
        self._state: messages.State = "LAUNCHED"
        self._started: float | None = None
        self._stopped: float | None = None
        self._wake = trio.Event()
        self._told = trio.Event()  # something to tell above
        self._ends = 0  # children that have ended, ever
        self._below: dict[str, Below] = {}  # the children in this process
        self._uids: dict[str, int] = {ident: uid for uid, ident in enumerate(self.tree.kids, 1)}
        self._elsewhere = (
            Elsewhere(self.tree, self._journal, shared, scheduler, self.do, self._wake_up, self.started)
            if scheduler
            else None
        )
        self._view = View(self.tree, {}, None, folder, [], self._uids, self._own_job)  # until it is registered
        self._nursery: trio.Nursery | None = None
        self._is_unwanted = False  # stopped before it was started
        self._to_sync: list[Path] = []  # files of an array's jobs that have ended

    @property
    def result(self) -> Result:
        return self.tree.result

    async def run(self) -> None:
        """Run it and tell it above. Raises OSError and sqlite3.Error when its folder cannot be made."""
        await self._journal.open(specs.dump(self._spec))
        pool = self.shared.pool
        pool.freed.append(self._wake_up)
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._ports = self._ports or port.keep(nursery, self.shared.settings, self.shared.metrics)
                with await self._ports.open(self._opened, children=len(self.tree.kids)) as listening:
                    self._address = listening.address
                    await self._run(nursery)
                nursery.cancel_scope.cancel()
        finally:
            pool.freed.remove(self._wake_up)
            with trio.CancelScope(shield=True):
                await self._journal.close()

    async def _run(self, nursery: trio.Nursery) -> None:
        self.place = await self._above.register(self._address)
        self._view = View(self.tree, self._below, self._elsewhere, self._folder, self.path, self._uids, self._own_job)
        self._started = self.shared.clock()
        self._state = "STARTED"
        self._write_start()
        nursery.start_soon(self._beat)
        nursery.start_soon(self._journal.keep_flushing)
        nursery.start_soon(self._keep_synced)
        self.do(self.tree.start(self.shared.clock()))
        if self._is_unwanted:
            await self.stop()
        await self._until_done()
        self._stopped = self.shared.clock()
        self._state = "COMPLETE"
        await self._write_end()
        await self._above.complete(self.summary(), self.tree.result, self.code)

    def _wake_up(self) -> None:
        self._wake.set()

    async def _until_done(self) -> None:
        """Start what may start, notice who is lost, until all children have ended."""
        due = trio.current_time() + CHECK_S
        while True:
            if (late := trio.current_time() - due) >= 0:
                if late >= CHECK_S:
                    self.tree.stood_still(late)
                is_cut = self._elsewhere.is_cut if self._elsewhere is not None else lambda ident: False
                self.do(self.tree.overdue(trio.current_time(), self.shared.clock(), is_cut))
                due = trio.current_time() + CHECK_S
            self._start_ready()
            if self.tree.is_done and not self._below and not (self._elsewhere and len(self._elsewhere)):
                return
            self._wake = trio.Event()
            with trio.move_on_at(due):
                await self._wake.wait()

    # ---- starting children ------------------------------------------------------------------------------------------

    def _start_ready(self) -> None:
        left = False
        for node, queue in self.tree.ready():
            while queue:
                started = self._start(node, queue[0])
                if not started:
                    left = True
                    break
                queue.popleft()
        if not left and not self.tree.stopping and self._elsewhere:
            assert self._nursery is not None
            self._elsewhere.share_slots(self._nursery)

    def _start(self, node: Node, ident: str) -> bool:
        """Start a child, if there is room for it, and nothing left of its last attempt: they have one folder."""
        assert self._nursery is not None
        pool, is_local = self.shared.pool, self._elsewhere is None
        if ident in self._below or (self._elsewhere is not None and self._elsewhere.is_running(ident)):
            return False
        if is_local and len(self._below) >= pool.slots + MAX_LOCAL:
            return False
        asked = demand(node) if isinstance(node, Job) else Demand(0) if is_local else pool.share(node)
        # Of a root's spec each job fits (role.check); a child tier may have been given less than one of its jobs wants.
        wanted = msgspec.structs.replace(asked, slots=min(asked.slots, pool.slots))
        if why := pool.why_never(wanted):
            self.tree.launched(ident, trio.current_time(), is_local=is_local)
            self.do(self.tree.lose(ident, f"it cannot be started: {why}", self.shared.clock()))
            return True
        grant = pool.take(wanted)
        if grant is None:
            return False
        if wanted != asked:
            self._journal.say("WARNING", f"Child '{ident}' wants {asked.slots} slots, and has all {pool.slots} of here")
        kid = self.tree.kids[ident]
        self.tree.launched(ident, trio.current_time(), is_local=is_local)
        folder = self._folder_of(kid)
        if self._elsewhere is None:
            held = Held(pool, grant)
            self._below[ident] = layer = self._layer(ident, folder, held)
            self._nursery.start_soon(self._run_here, layer, kid, folder, held)
        else:
            self._elsewhere.start(self._nursery, kid, folder, self._address, grant)
        return True

    def _folder_of(self, kid: Kid) -> Path:
        return self._folder / kid.child.folder

    def _layer(self, ident: str, folder: Path, held: Held) -> "Wrapper | Tier":
        node, above = self.tree.spec_of(ident), _Inside(self, ident)
        forward, is_many = self.shared.options.all_messages, self._spec.repeats is not None
        if isinstance(node, Job):
            return Wrapper(
                node,
                folder,
                above,
                self.shared,
                held.grant,
                forward=forward,
                is_many=is_many,
                release=held.give,
                ports=self._ports,
            )
        return Tier(node, folder, above, self.shared, None, forward=forward, is_many=is_many, ports=self._ports)

    async def _run_here(self, layer: "Wrapper | Tier", kid: Kid, folder: Path, held: Held) -> None:
        ident = layer.ident
        try:
            if kid.attempt > 1:
                await trio.to_thread.run_sync(set_aside, folder, kid.attempt - 1)
            await layer.run()
        except (OSError, sqlite3.Error) as err:
            self._journal.say("ERROR", f"Child '{ident}' cannot run: {err}")
            self.do(self.tree.lose(ident, str(err), self.shared.clock()))
        except Exception as err:  # a bug of ours ends one child, and not the tree
            log.exception("layer failed ident=%s", ident)
            self.do(self.tree.lose(ident, f"internal error: {err!r}", self.shared.clock()))
        finally:
            self._below.pop(ident, None)
            if self._spec.repeats is not None:
                self._to_sync.append(folder / "db.sqlite")
            held.give()
            self._wake_up()

    # ---- what becomes of children -----------------------------------------------------------------------------------

    def do(self, acts: list[Act]) -> None:
        """Carry out what the tree wants."""
        for act in acts:
            kid = self.tree.kids[act.ident]
            match act:
                case Silent():
                    self._journal.say("WARNING", f"Child '{act.ident}' has told nothing for {act.for_s:.0f} s")
                    if self._elsewhere is not None and self._nursery is not None:
                        self._elsewhere.knock(self._nursery, act.ident)
                case Cut():
                    wait_s = self.shared.settings.resume_wait_s
                    self._journal.say(
                        "WARNING", f"Child '{act.ident}': its line is dead; it has {wait_s:g} s to connect again"
                    )
                case Lost():
                    self._journal.say("CRITICAL", f"Child '{act.ident}' is lost: {act.why}")
                    self._end_elsewhere(act.ident)
                case Again():
                    self._journal.say("WARNING", f"Child '{act.ident}' is started again: {act.why}")
                    self._end_elsewhere(act.ident)
                case Ended():
                    self._ended(act, kid)
        if acts:
            self._wake_up()
            self._told.set()

    def _end_elsewhere(self, ident: str) -> None:
        if self._elsewhere is not None:
            self._elsewhere.end(ident)

    def _ended(self, act: Ended, kid: Kid) -> None:
        self._ends += 1
        db = self._journal.db
        uid = self.uid(act.ident)
        at = self.shared.clock()
        db.child(uid, kid.server, kid.at_start, kid.at_end, kid.at_update or at, RESULTS.index(kid.result))
        if kid.pruned:
            self._journal.say("INFO", f"Child '{act.ident}' is pruned: {act.why}")
            assert self._nursery is not None
            self._nursery.start_soon(self._write_pruned, kid)
        elif kid.result != "ABORTED":
            for name, value in self.tree.total.get(act.ident).metrics.items():
                db.metric(act.ident, name, value)
        self._tell_end(act, kid)

    def _tell_end(self, act: Ended, kid: Kid) -> None:
        """Of a job; and of a tier that did not tell of each of its jobs itself."""
        event = {
            "path": self.path,
            "ident": act.ident,
            "result": kid.result,
            "code": kid.code,
            "pruned": kid.pruned,
            "why": act.why,
            "started": kid.at_start,
            "ended": kid.at_end,
            "folder": str(self._folder_of(kid)),
            "metrics": {} if kid.result == "ABORTED" else dict(self.tree.total.get(act.ident).metrics),
        }
        if not self.tree.size_of(act.ident).tiers:
            self.shared.tell({"event": "end", **event})
        elif not kid.is_local or act.why is not None:
            last = Summary() if kid.result == "ABORTED" else self.tree.total.get(act.ident)
            failed = [[*self.path, *path] for path in last.failed]
            self.shared.tell({"event": "tier_end", **event, "failed": failed, "failed_jobs": last.jobs.failed})

    async def _write_pruned(self, kid: Kid) -> None:
        """A file for a child that never ran: real readers want one."""
        node = specs.child_spec(self._spec, kid.child)
        journal = Journal(
            self._folder_of(kid), self.shared, self._above, is_tier=isinstance(node, Group), is_many=True, forward=False
        )
        try:
            await journal.open(specs.dump(node))
        except (OSError, sqlite3.Error) as err:
            self._journal.say("WARNING", f"no file for the pruned child '{node.ident}': {err}")
            return
        uidx, result = self.uid(node.ident), RESULTS.index("ABORTED")
        path = ".".join(self.path)
        journal.db.attributes({"ident": node.ident, "uidx": uidx, "root": 0, "path": path, "result": result})
        await journal.close()

    @property
    def path(self) -> list[str]:
        """The idents above its children."""
        return [*self.place.path, self.ident]

    def uid(self, ident: str) -> int:
        """A child's number."""
        return self._uids[ident]

    def started(self, ident: str) -> None:
        """A child has registered."""
        kid = self.tree.kids[ident]
        if isinstance(self.tree.spec.jobs[kid.child.place], Job):
            self.shared.tell({"event": "start", "path": self.path, "ident": ident, "started": kid.at_start})

    def pass_on(self, severity: Severity, message: str, at: float) -> None:
        """A message from below."""
        self._journal.pass_on(severity, message, at)

    # ---- upward -----------------------------------------------------------------------------------------------------

    def summary(self) -> Summary:
        """Of all below, with the messages of this tier itself."""
        below = self.tree.summary()
        metrics = dict(below.metrics)
        for name, value in self._journal.counts.items():
            metrics[name] = metrics.get(name, 0) + value
        return msgspec.structs.replace(below, metrics=metrics)

    async def _beat(self) -> None:
        """An update at once, then each interval, and soon after jobs have ended."""
        while True:
            self._told = trio.Event()
            self._above.update(self.summary(), "UNKNOWN" if not self.tree.is_done else self.tree.result)
            for name, value in self.tree.total.metrics.items():
                self._journal.db.metric(GROUP, name, value)
            with trio.move_on_after(max(self.shared.options.interval_s - UPDATE_S, 0)):
                await self._told.wait()
            await trio.sleep(UPDATE_S)

    async def _keep_synced(self) -> None:
        while True:
            await trio.sleep(SYNC_S)
            await self._sync()

    async def _sync(self) -> None:
        files, self._to_sync = self._to_sync, []
        if files:
            try:
                await trio.to_thread.run_sync(sync_all, self._folder, files)
            except OSError as err:
                self._journal.say("WARNING", f"{self._folder}: not known to be on the disk: {err.strerror}")

    def _write_start(self) -> None:
        db = self._journal.db
        db.attributes(
            {
                "ident": self.ident,
                "uidx": self.place.uidx,
                "root": 0,
                "path": ".".join(self.place.path),
                "started": self._started,
                "host": self.shared.host,
                "pid": os.getpid(),
            }
        )
        db.children(
            (ident, str(self._folder_of(kid) / "db.sqlite"), self.tree.size_of(ident).jobs)
            for ident, kid in self.tree.kids.items()
        )

    async def _write_end(self) -> None:
        await self._sync()
        self._journal.db.attributes(
            {"stopped": self._stopped, "result": RESULTS.index(self.tree.result), "exit": self.code}
        )
        for name, value in self.tree.total.metrics.items():
            self._journal.db.metric(GROUP, name, value)
        await self._journal.flush()

    # ---- downward ---------------------------------------------------------------------------------------------------

    async def stop(self) -> None:
        """Start nothing more; returns when every child was told to stop."""
        if self._state == "LAUNCHED":
            self._is_unwanted = True
            return
        if not self.tree.stopping:
            self.do(self.tree.stop(self.shared.clock()))
        for layer in list(self._below.values()):
            await layer.stop()
        if self._elsewhere is not None and self._nursery is not None:
            await self._elsewhere.stop(self._nursery)

    async def options(self, given: messages.Options) -> dict[str, Any]:
        """`update_scheduler_opts`: more slots; how many were taken. Raises ActionError."""
        more = given.options.get("concurrency", 0)
        if isinstance(more, bool) or not isinstance(more, int) or more < 0:
            raise wrong(f"update_scheduler_opts: concurrency is {more!r}, not a number of slots")
        jobs = self.tree.total.jobs
        taken = min(more, max(jobs.total - jobs.passed - jobs.failed - self.shared.pool.slots, 0))
        if taken:
            self.shared.pool.add(taken)
        return {"concurrency": taken}

    # ---- what it tells of what is below -----------------------------------------------------------------------------

    async def states(self) -> States:
        """Every child with its state, tiers with all below."""
        return await self._view.states()

    async def resolve(self, request: messages.Resolve) -> ApiJob:
        """It, or what is below it by that path. Raises ActionError."""
        return await self._view.resolve(request)

    def _own_job(self, below: list[ApiJob]) -> ApiJob:
        summary = self.summary()
        return ApiJob(
            uidx=self.place.uidx,
            root=0,
            path=list(self.place.path),
            ident=self.ident,
            status=STATES.index(self._state),
            metrics=dict(summary.metrics),
            server_url=self._address,
            db_file=str(self._folder / "db.sqlite"),
            started=self._started,
            updated=self.shared.clock(),
            stopped=self._stopped,
            result=RESULTS.index(self.tree.result),
            owner=None,
            children=below,
            expected_children=len(self.tree.kids),
        )

    # ---- its own port -----------------------------------------------------------------------------------------------

    async def _opened(self, ws: WebSocketConnection) -> None:
        link = Link()

        async def answer(request: Request) -> Mapping[str, Any]:
            return await self._answer(link, request)

        async def wait(channel: Channel) -> None:
            link.channel = channel
            await trio.sleep_forever()

        def at_once(request: Request) -> Mapping[str, Any] | None:
            return self._answer_child(link, request)

        try:
            await port.talk(ws, answer, wait, self.shared.metrics, at_once)
        finally:
            if self._elsewhere is not None:
                self._elsewhere.closed(link)

    def _answer_child(self, link: Link, request: Request) -> Mapping[str, Any] | None:
        if self._elsewhere is None:
            return None
        return self._elsewhere.answer(link, request, self.path, self._uids)

    async def _answer(self, link: Link, request: Request) -> Mapping[str, Any]:
        payload = request.payload
        if (told := self._answer_child(link, request)) is not None:
            return told
        dialect = link.dialect = link.dialect or ("d0" if link.named_as_d0 else asker_dialect(request))
        match request.action:
            case "spec":
                return told_spec(self.tree, payload)
            case "register" | "update" | "complete":
                raise wrong(f"{request.action}: the children of this tier run within it")
            case "children":
                asked: messages.Children = read("children", payload, messages.Children)
                if payload.get("format", dialect) == "d2":
                    return {"children": self._view.jobs(asked), "status": STATES.index(self._state)}
                return self._view.children(asked)
            case "log":
                given: messages.Log = read("log", payload, messages.Log)
                at = self.shared.clock() if given.at is None else given.at
                if self._elsewhere is not None:
                    self._elsewhere.heard(link)
                self._journal.pass_on(severity_of(given.severity), given.message, at)
                return {}
            case "get_messages":
                return await told_messages(self._journal, payload, STATES.index(self._state), dialect)
            case "resolve":
                return await told_layer(self.resolve, payload)
            case "get_tree":
                return {self.ident: await self.states()}
            case "stop":
                await self.stop()
                return {}
            case action:
                raise wrong(f"Unknown action '{action}'")


class _Inside:
    """The tier above, for a child that is a task of the same process."""

    def __init__(self, tier: Tier, ident: str) -> None:
        self._tier, self._ident = tier, ident

    async def register(self, server: str) -> Place:
        tier, shared = self._tier, self._tier.shared
        tier.tree.register(self._ident, server, trio.current_time(), shared.clock())
        tier.started(self._ident)
        return Place(tuple(tier.path), tier.uid(self._ident))

    def update(self, summary: Summary, result: Result) -> None:
        if self._tier.tree.kids[self._ident].state == "STARTED":
            self._tier.tree.update(self._ident, summary, trio.current_time(), self._tier.shared.clock())

    async def complete(self, summary: Summary, result: Result, code: int) -> None:
        now, at = trio.current_time(), self._tier.shared.clock()
        self._tier.do(self._tier.tree.complete(self._ident, result, code, summary, now, at))

    def log(self, severity: Severity, message: str, at: float) -> None:
        self._tier.pass_on(severity, message, at)
