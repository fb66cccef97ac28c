"""The children of a tier that are not tasks of its process: started by a scheduler, they connect to the tier's port.

    started -> spec, register -> update ... -> complete -> closed -> the scheduler sees it end

The newest connection that registers for a child is the child's; what an older one still says is answered `superseded`.

Source: protocols/gator.md, "State machine", "Reconnect", "Schedulers", "Direction".
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import trio

from agent.core.channel import Channel
from agent.core.envelope import Request
from agent.core.errors import ActionError, PeerError
from agent.gator import dialects
from agent.gator.answers import told_spec
from agent.gator.dialects import read, wrong
from agent.gator.journal import Journal
from agent.gator.layer import Limits, Shared
from agent.gator.messages import MAX_MESSAGE_IN, Count, Dialect, Register
from agent.gator.pool import Demand, Grant
from agent.gator.schedulers import CannotSchedule, Need, Order, Scheduler
from agent.gator.settings import GatorSettings
from agent.gator.spec import Group
from agent.gator.told import fault
from agent.gator.tree import Act, Kid, Tree

log = logging.getLogger(__name__)

STOP_S: Final = 15.0  # for a child that was told to stop
ASK_S: Final = 10.0
LIMITS: Final = (("warning", None), ("error", 0), ("critical", 0))  # and what Gator itself takes for unsaid


class Events(msgspec.Struct, frozen=True):
    """What happened to jobs below a tier of ours; `first` is the number of the first, from 0 on."""

    first: Count = 0
    events: list[dict[str, Any]] = []


class Link:
    """One connection to the tier's port: which child it is, in which dialect."""

    def __init__(self) -> None:
        self.ident: str | None = None
        self.superseded = False
        self.named_as_d0 = False
        self.dialect: Dialect | None = None
        self.channel: Channel | None = None


class Elsewhere:
    """Used by one tier. `do` carries out the tree's acts, `wake` has it look again, `started` tells of a child."""

    def __init__(
        self,
        tree: Tree,
        journal: Journal,
        shared: Shared,
        scheduler: Scheduler,
        do: Callable[[list[Act]], None],
        wake: Callable[[], None],
        started: Callable[[str], None],
    ) -> None:
        self.scheduler = scheduler
        self._tree, self._journal, self._shared, self._do, self._wake, self._started = (
            tree,
            journal,
            shared,
            do,
            wake,
            started,
        )
        self._links: dict[str, Link] = {}  # the newest of each child
        self._scopes: dict[str, trio.CancelScope] = {}
        self._running: set[str] = set()  # beside those of the scopes: who was given up, and is being ended
        self._overs: dict[str, trio.Event] = {}  # set when a child has told its end
        self._grants: dict[str, list[Grant]] = {}
        self._taken: dict[tuple[str, int], int] = {}  # events of a child's attempt

    def __len__(self) -> int:
        """How many run."""
        return len(self._scopes)

    def is_running(self, ident: str) -> bool:
        """Is anything left of a child, though it was given up?"""
        return ident in self._running

    def link(self, ident: str) -> Link | None:
        """The open connection of a child."""
        link = self._links.get(ident)
        return link if link is not None and link.channel is not None else None

    def links(self) -> Iterator[tuple[str, Channel]]:
        """Every child that is connected."""
        yield from ((ident, link.channel) for ident, link in list(self._links.items()) if link.channel is not None)

    # ---- their processes --------------------------------------------------------------------------------------------

    def start(self, nursery: trio.Nursery, kid: Kid, folder: Path, address: str, grant: Grant) -> None:
        """Have the scheduler run a child that is LAUNCHED."""
        ident = kid.child.ident
        scope = self._scopes[ident] = trio.CancelScope()
        self._running.add(ident)
        over = self._overs[ident] = trio.Event()
        self._grants[ident] = [grant]
        nursery.start_soon(self._run, kid, self._order(ident, folder, address, grant), scope, over)

    async def _run(self, kid: Kid, order: Order, scope: trio.CancelScope, over: trio.Event) -> None:
        ident = order.ident
        grants = self._grants[ident]
        try:
            with scope:
                if kid.attempt > 1:
                    await trio.to_thread.run_sync(set_aside, order.folder, kid.attempt - 1)
                waits = partial(self._waits, ident)
                how = await self.scheduler.run(order, waits, over)
                if self._scopes.get(ident) is scope:
                    what = f"{how}; what it printed is in {order.folder / 'layer.log'}"
                    self._tree.process_ended(ident, trio.current_time(), what)
        except (CannotSchedule, OSError) as err:
            self._do(self._tree.lose(ident, f"it cannot be started: {err}", self._shared.clock()))
        finally:
            if self._scopes.get(ident) is scope:
                del self._scopes[ident]
            self._running.discard(ident)
            for grant in grants:
                self._shared.pool.give(grant)
            grants.clear()
            self._wake()

    def _waits(self, ident: str) -> None:
        self._tree.waits_in_queue(ident, trio.current_time())

    def end(self, ident: str) -> None:
        """A child is given up: whatever runs of it is ended, and what it still says is not heard."""
        link = self._links.pop(ident, None)
        if link is not None:
            link.ident, link.superseded = None, True
        if (scope := self._scopes.pop(ident, None)) is not None:
            scope.cancel()

    def knock(self, nursery: trio.Nursery, ident: str) -> None:
        """Send a silent child something: if its line is dead, its kernel will not take that either."""
        if (link := self.link(ident)) is not None and link.channel is not None:
            nursery.start_soon(self._knock, link.channel)

    async def _knock(self, channel: Channel) -> None:
        with suppress(PeerError):
            await channel.ask("", {}, timeout_s=ASK_S)

    def is_cut(self, ident: str) -> bool:
        """Is there an open connection with that child whose other end does not take what is sent?"""
        link = self.link(ident)
        return link is not None and link.channel is not None and link.channel.unacknowledged > 0

    async def stop(self, nursery: trio.Nursery) -> None:
        """Tell all to stop; those that do not are ended by `nursery`, 15 s later."""
        async with trio.open_nursery() as telling:
            for ident, scope in list(self._scopes.items()):
                link = self._links.get(ident)
                if link is not None and link.channel is not None:
                    telling.start_soon(self._tell_stop, link.channel)
                nursery.start_soon(self._end_when_overdue, ident, scope, STOP_S if link is not None else 0)

    async def _tell_stop(self, channel: Channel) -> None:
        with suppress(PeerError):  # it has ended, or will be
            await channel.ask("stop", {}, timeout_s=ASK_S)

    async def _end_when_overdue(self, ident: str, scope: trio.CancelScope, after_s: float) -> None:
        await trio.sleep(after_s)
        if self._scopes.get(ident) is scope:
            self._do(self._tree.lose(ident, "it had to be stopped", self._shared.clock()))

    def _order(self, ident: str, folder: Path, address: str, grant: Grant) -> Order:
        """With the flags that real Gator has; those that say what is so anyway are left out, for the older ones."""
        options, node, demand = self._shared.options, self._tree.spec_of(ident), grant.demand
        is_ours = "command" not in dict(options.sched_args)
        flags = ["--interval", f"{options.interval_s:g}"]
        flags.append("--all-msg" if options.all_messages else "--quiet")
        settings = self._shared.settings
        if is_ours:  # flags that only ours know
            if settings.resume_wait_s != GatorSettings().resume_wait_s:
                flags += ["--resume-wait", f"{settings.resume_wait_s:g}"]
            for file in options.config:
                flags += ["--config", file]
        if settings.dialect == "d0":  # it has no more flags than these
            options = msgspec.structs.replace(options, limits=Limits(), isolate=False, sched_args=())
            demand, is_ours = Demand(1), False
        for name, default in LIMITS:
            if (most := getattr(options.limits, name)) != default:
                flags.append(f"--limit-{name}={-1 if most is None else most}")
        if isinstance(node, Group):
            args = dict(options.sched_args)
            args.pop("concurrency", None)
            if options.isolate:
                args["isolated"] = "1"
            if demand.slots != 1 or is_ours:  # real Gator has one slot if nothing is said, and ours all CPUs
                args["concurrency"] = str(demand.slots)
            if is_ours and self.scheduler.name == "local":  # Slurm counts them itself
                args["memory"] = str(demand.memory)
                args["licenses"] = ",".join(f"{name}={count}" for name, count in demand.licenses)
                args["cpus"] = ",".join(map(str, grant.cpus))
            for name, value in args.items():
                flags += ["--sched-arg", f"{name}={value}"]
            return Order(ident, folder, Need(address, tuple(flags), is_job=False))  # what is granted is for its jobs
        need = Need(address, tuple(flags), demand.slots, demand.memory, demand.licenses, node.timeout)
        is_held = self._shared.leaves is not None and "cpu" in self._shared.leaves.controllers
        return Order(ident, folder, need, () if is_held else grant.cpus)

    # ---- slots ------------------------------------------------------------------------------------------------------

    def share_slots(self, nursery: trio.Nursery) -> None:
        """Slots that no child waits for go to tiers that have more jobs than slots."""
        pool = self._shared.pool
        for ident, link in self._links.items():
            grants = self._grants.get(ident)
            if not grants or link.channel is None or link.dialect not in ("d2", "emissary"):
                continue
            jobs = self._tree.total.get(ident).jobs
            more = jobs.total - jobs.passed - jobs.failed - sum(grant.demand.slots for grant in grants)
            if not self._tree.size_of(ident).tiers or more < 1 or pool.free_slots < 1:
                continue
            grant = pool.take(Demand(min(more, pool.free_slots)))
            if grant is not None:
                grants.append(grant)
                nursery.start_soon(self._offer, ident, link.channel, grants, grant)

    async def _offer(self, ident: str, channel: Channel, grants: list[Grant], grant: Grant) -> None:
        offered, taken = grant.demand.slots, 0
        try:
            payload = {"options": {"concurrency": offered}}
            answer = await channel.ask("update_scheduler_opts", payload, timeout_s=ASK_S)
            taken = min(max(int(answer.get("concurrency", 0)), 0), offered)
        except (PeerError, ValueError, TypeError) as err:
            log.info("slots not taken ident=%s error=%s", ident, err)
        if taken < offered and grant in grants:  # else it has ended, and given all back
            grants.remove(grant)
            if taken:
                grants.append(Grant(Demand(taken)))
            # `freed` is not called: the same would be offered at once again.
            self._shared.pool.free_slots += offered - taken

    # ---- what they say ----------------------------------------------------------------------------------------------

    def closed(self, link: Link) -> None:
        """A connection has ended."""
        link.channel = None
        if link.ident is not None and self._links.get(link.ident) is link:
            del self._links[link.ident]
            self._tree.gone(link.ident, trio.current_time())
            self._wake()

    def heard(self, link: Link) -> None:
        """A connection told something that is no update."""
        if link.ident is not None:
            self._tree.heard(link.ident, trio.current_time())

    def answer(self, link: Link, request: Request, path: list[str], uids: Mapping[str, int]) -> dict[str, Any] | None:
        """The answer to an action of children; None when it is none. Raises ActionError."""
        try:
            match request.action:
                case "spec":
                    return self._spec(link, request.payload)
                case "register":
                    return self._register(link, request.payload, path, uids)
                case "update":
                    return self._update(link, request.payload, path)
                case "complete":
                    return self._complete(link, request.payload)
                case _:
                    return None
        except ActionError as err:
            self._journal.say("WARNING", f"{link.ident or 'a peer'}: {request.action} refused: {err.reason}")
            raise

    def _spec(self, link: Link, payload: Mapping[str, Any]) -> dict[str, Any]:
        ident, link.named_as_d0 = dialects.named("spec", payload)
        answer = told_spec(self._tree, payload)
        if self._tree.kids[ident].state == "PENDING":
            raise wrong(f"Child '{ident}' asks for its spec before it was launched")
        if isinstance(payload.get("emissary"), dict) and link.channel is not None:
            link.channel.max_message = MAX_MESSAGE_IN
        return answer

    def _register(
        self, link: Link, payload: Mapping[str, Any], path: list[str], uids: Mapping[str, int]
    ) -> dict[str, Any]:
        ident, link.named_as_d0 = dialects.named("register", payload)
        given: Register = read("register", payload, Register)
        if link.ident not in (None, ident):
            raise wrong(f"Bad child ID {ident}: this connection is that of '{link.ident}'")
        before = self._links.get(ident)
        is_new = ident in self._tree.kids and self._tree.kids[ident].state == "LAUNCHED"
        self._tree.register(ident, given.server, trio.current_time(), self._shared.clock())
        if is_new:
            self._started(ident)
        if before is not None and before is not link:
            before.ident, before.superseded = None, True
            self._journal.say("WARNING", f"Child '{ident}' registers again on another connection; the newest counts")
        if isinstance(payload.get("emissary"), dict):
            link.dialect = "emissary"
        link.ident, link.superseded = ident, False
        self._links[ident] = link
        self._wake()
        return dialects.register_answer(path, uids[ident])

    def _child_of(self, link: Link, action: str, payload: Mapping[str, Any]) -> str:
        """The child that speaks. One that lost its connection may go on on another without registering again."""
        ident, named_as_d0 = dialects.named(action, payload)
        if link.superseded:
            raise wrong("superseded: another connection has registered for this child")
        if link.ident is None:
            known = self._links.get(ident)
            if known is not None and known is not link:
                raise wrong(f"Child '{ident}' is another connection: superseded")
            kid = self._tree.kids.get(ident)
            if kid is None:
                raise wrong(f"Bad child ID {ident}")
            if kid.state == "STARTED":
                link.ident = ident
                self._links[ident] = link
        elif ident != link.ident:
            raise wrong(f"Bad child ID {ident}: this connection is that of '{link.ident}'")
        if link.dialect is None:
            link.dialect = dialects.child_dialect(named_as_d0 or link.named_as_d0, payload)
        return ident

    def _update(self, link: Link, payload: Mapping[str, Any], path: list[str]) -> dict[str, Any]:
        ident = self._child_of(link, "update", payload)
        summary, _ = dialects.read_update(payload, self._tree.size_of(ident))
        self._tree.update(ident, summary, trio.current_time(), self._shared.clock())
        if link.dialect == "emissary":
            self._take_events(ident, payload, path)
        return {}

    def _take_events(self, ident: str, payload: Mapping[str, Any], path: list[str]) -> None:
        """What happened to jobs below a child of ours: each counts once, however often it is told."""
        try:
            given = msgspec.convert(payload.get("emissary", {}), Events)
        except msgspec.ValidationError as err:
            raise wrong(f"update: emissary: {err}") from err
        key = ident, self._tree.kids[ident].attempt
        taken = self._taken.get(key, 0)
        news = given.events[max(0, taken - given.first) :]
        for event in news:
            if why := fault(event, (*path, ident)):
                raise wrong(f"update: emissary: {why}")
        for event in news:
            self._shared.tell(event)
        self._taken[key] = max(taken, given.first + len(given.events))

    def _complete(self, link: Link, payload: Mapping[str, Any]) -> dict[str, Any]:
        ident = self._child_of(link, "complete", payload)
        summary, result, code = dialects.read_complete(ident, payload, self._tree.size_of(ident))
        now, at = trio.current_time(), self._shared.clock()
        self._do(self._tree.complete(ident, result, code, summary, now, at))
        if ident in self._overs:
            self._overs.pop(ident).set()
        return {}


def set_aside(folder: Path, attempt: int) -> None:
    """An attempt that has ended becomes the folder `attempt_N` in the next one's. Blocks. Raises OSError."""
    if folder.exists():
        aside = folder.with_name(f"{folder.name}.attempt_{attempt}")
        folder.rename(aside)
        folder.mkdir()
        aside.rename(folder / f"attempt_{attempt}")
        for earlier in list((folder / f"attempt_{attempt}").glob("attempt_*")):
            earlier.rename(folder / earlier.name)
