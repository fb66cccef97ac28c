"""A tier's state machine: which children may start, who is lost, what they sum up to. Pure; time is an argument.

    PENDING   -> LAUNCHED    its dependencies are met and the scheduler has taken it
    LAUNCHED  -> STARTED     register
    STARTED   -> COMPLETE    complete; or lost, and not to be tried again
    PENDING   -> COMPLETE    pruned: a dependency cannot be met any more; or the tier is stopped

Times are seconds that only grow (`now`); `at` are epoch seconds, for people. What is to be done is given as acts.

Source: protocols/gator.md, "State machine", "Decisions".
"""

from collections import deque
from collections.abc import Callable, Iterator
from typing import Final, Literal, TypeAlias

import msgspec

from agent.gator import spec as specs
from agent.gator.dialects import wrong
from agent.gator.messages import RESULTS, STATES, ChildState, Result, State
from agent.gator.spec import Child, Group, Job, Node, Size
from agent.gator.summary import Summary, Sums, Total, expected, given_up

REGISTER_S: Final = 60.0  # from LAUNCHED (slurm: from RUNNING) to register
WARN_INTERVALS, LOST_INTERVALS = 3, 6  # without a message from a child whose socket is open
LOST_CODE, STOPPED_CODE, TIMEOUT_CODE = 254, 255, 124

RetryOn: TypeAlias = Literal["lost", "timeout", "fail"]


class Times(msgspec.Struct, frozen=True):
    """How long a tier waits, in seconds. `end_s`: for `complete` once the scheduler says that the process has ended."""

    interval_s: float = 5.0
    resume_wait_s: float = 600.0
    end_s: float = 2.0


class Ended(msgspec.Struct, frozen=True):
    """A child is COMPLETE: `why` says so where it did not do so itself (pruned, lost, stopped)."""

    ident: str
    why: str | None


class Again(msgspec.Struct, frozen=True):
    """A child is to be started again; `attempt` is the number of the one that has ended."""

    ident: str
    attempt: int
    why: str


class Silent(msgspec.Struct, frozen=True):
    """A child is due with a message."""

    ident: str
    for_s: float


class Cut(msgspec.Struct, frozen=True):
    """A child's line is dead, though its socket is open. That says nothing of the child: it may come back."""

    ident: str


class Lost(msgspec.Struct, frozen=True):
    """A child is given up: its processes are to be ended. Again or Ended follows."""

    ident: str
    why: str


Act: TypeAlias = Ended | Again | Silent | Cut | Lost


class Kid:
    """What a tier knows of one child."""

    __slots__ = (
        "at_end", "at_start", "at_update", "attempt", "child", "code", "cut_since", "ended_since", "gone_since",
        "heard", "how_ended", "is_local", "last", "pruned", "result", "retries", "server", "state", "warned",
    )  # fmt: skip

    def __init__(self, child: Child, retries: int) -> None:
        self.child = child
        self.state: State = "PENDING"
        self.result: Result = "UNKNOWN"
        self.code = 0
        self.pruned = self.warned = self.is_local = False
        self.server = ""
        self.at_start: float | None = None
        self.at_update: float | None = None
        self.at_end: float | None = None
        self.heard = 0.0  # when it was launched, or told something
        self.gone_since: float | None = None  # its socket
        self.cut_since: float | None = None  # its socket is open, and leads nowhere
        self.ended_since: float | None = None  # its process
        self.how_ended = ""
        self.attempt, self.retries = 1, retries
        self.last: tuple[Result, int, Summary] | None = None  # its `complete`

    def tell(self, metrics: dict[str, int | float]) -> ChildState:
        """As the seed's `children` tells it, which knows no ABORTED: who never ran has no result."""
        aborted: Result = "UNKNOWN" if self.last is None else "FAILURE"
        return ChildState(
            state=self.state,
            result=aborted if self.result == "ABORTED" else self.result,
            server=self.server,
            metrics=metrics,
            exitcode=self.code,
            started=int(self.at_start or 0),
            updated=int(self.at_update or 0),
            completed=int(self.at_end or 0),
            pruned=self.pruned,
        )

    @property
    def numbers(self) -> tuple[int, int]:
        """State and result as D2 numbers them."""
        return STATES.index(self.state), RESULTS.index(self.result)


class _Place:
    """The children of one job of the spec: dependencies are between those."""

    def __init__(self, node: Node) -> None:
        self.node = node
        self.size = specs.size(node)
        self.idents: list[str] = []
        self.open = 0  # children that have not ended
        self.passed = self.failed = 0
        self.waits: set[str] = {*node.on_done, *node.on_fail, *node.on_pass}
        self.followers: list[str] = []


class Tree:
    """The children of one tier."""

    def __init__(self, spec: Group, times: Times, *, retry_on: tuple[RetryOn, ...] = ("lost",)) -> None:
        self.spec, self._times, self._retry_on = spec, times, retry_on
        self.kids: dict[str, Kid] = {}
        self.total = Total()
        self.stopping = False
        self._places = {job.ident: _Place(job) for job in spec.jobs}
        self._names = [job.ident for job in spec.jobs]
        self._live: dict[str, Kid] = {}  # LAUNCHED and STARTED
        self._open = 0
        self._ready: dict[str, deque[str]] = {}  # by place: of one job all children want the same resources
        for child in specs.children(spec):
            place = self._places[self._names[child.place]]
            retries = (place.node.retries or 0) if isinstance(place.node, Job) else 0
            self.kids[child.ident] = Kid(child, retries)
            self.total.put(child.ident, expected(place.size))
            place.idents.append(child.ident)
            place.open += 1
            self._open += 1
        for name, place in self._places.items():
            for other in place.waits:
                self._places[other].followers.append(name)

    def start(self, at: float) -> list[Act]:
        """What may start at once becomes ready; jobs that wait for an empty array see it ended."""
        acts: list[Act] = []
        free = [name for name, place in self._places.items() if not place.waits]
        self._ready = {name: deque(self._places[name].idents) for name in free}
        for name in free:
            if not self._places[name].idents:
                self._place_ended(name, at, acts)
        return acts

    # ---- what may start ---------------------------------------------------------------------------------------------

    def ready(self) -> Iterator[tuple[Job | Group, deque[str]]]:
        """Of each job with children that may start: the job, and these in order. The caller takes from the left."""
        if not self.stopping:
            for name in list(self._ready):
                if queue := self._ready[name]:
                    yield self._places[name].node, queue
                if not queue:
                    self._ready.pop(name, None)

    def size_of(self, ident: str) -> Size:
        """How much is in a child."""
        return self._place_of(self.kids[ident]).size

    def launched(self, ident: str, now: float, *, is_local: bool) -> None:
        """The scheduler has it. A local one lives in this process, and cannot fall silent."""
        kid = self.kids[ident]
        kid.state, kid.heard, kid.is_local = "LAUNCHED", now, is_local
        kid.gone_since = kid.cut_since = kid.ended_since = None
        kid.warned = False
        self._live[ident] = kid

    # ---- what children tell -----------------------------------------------------------------------------------------

    def spec_of(self, ident: str) -> Node:
        """What that child is to run. Raises ActionError."""
        kid = self._kid(ident)
        return specs.child_spec(self.spec, kid.child)

    def register(self, ident: str, server: str, now: float, at: float) -> Kid:
        """It has started, or is back. Raises ActionError: unknown, not launched, given up."""
        kid = self._kid(ident)
        if kid.state == "PENDING":
            raise wrong(f"Child '{ident}' registers before it was launched")
        if kid.state == "COMPLETE" and kid.last is None:
            raise wrong(f"Child '{ident}' was given up: superseded")
        if kid.state == "LAUNCHED":
            kid.state, kid.at_start = "STARTED", at
        kid.server, kid.at_update = server, at
        self.heard(ident, now)
        return kid

    def heard(self, ident: str, now: float) -> None:
        """It told something, on an open socket."""
        kid = self.kids[ident]
        kid.heard, kid.warned = now, False
        kid.gone_since = kid.cut_since = None

    def update(self, ident: str, summary: Summary, now: float, at: float) -> None:
        """Raises ActionError: unknown, not registered, after its completion."""
        kid = self._kid(ident)
        if kid.state == "COMPLETE":
            raise wrong("Child sent update after completion")
        if kid.state != "STARTED":
            raise wrong(f"Update received for child '{ident}' before start")
        self.heard(ident, now)
        kid.at_update = at
        self.total.put(ident, summary)

    def complete(self, ident: str, result: Result, code: int, summary: Summary, now: float, at: float) -> list[Act]:
        """It has ended. The same again changes nothing. Raises ActionError: unknown, not registered, differing."""
        kid = self._kid(ident)
        told = (result, code, summary)
        if kid.state == "COMPLETE":
            if kid.last == told:
                return []
            raise wrong(
                f"Child '{ident}' was given up: superseded"
                if kid.last is None
                else "Child sent a second completion message"
            )
        if kid.state != "STARTED":
            raise wrong(f"Completion received for child '{ident}' before start")
        self.heard(ident, now)
        kid.at_update = at
        why: RetryOn = "timeout" if code == TIMEOUT_CODE else "fail"
        if result != "SUCCESS" and why in self._retry_on and (acts := self._again(kid, f"it ended with code {code}")):
            return acts
        kid.last = told
        self.total.put(ident, summary)
        return self._end(kid, result, code, at, None)

    # ---- what becomes of them otherwise -----------------------------------------------------------------------------

    def gone(self, ident: str, now: float) -> None:
        """Its socket is closed; the scheduler may still see it alive."""
        kid = self.kids[ident]
        if kid.state == "STARTED" and kid.gone_since is None:
            kid.gone_since = now

    def process_ended(self, ident: str, now: float, how: str = "") -> None:
        """The scheduler says that it runs no more, and how it ended."""
        kid = self.kids[ident]
        if kid.ended_since is None:
            kid.ended_since, kid.how_ended = now, how

    def waits_in_queue(self, ident: str, now: float) -> None:
        """The scheduler has not begun with it: the time to register has not begun either."""
        kid = self.kids[ident]
        if kid.state == "LAUNCHED":
            kid.heard = now

    def stood_still(self, for_s: float) -> None:
        """The tier itself did not run for that long: what children said meanwhile is not read yet."""
        for kid in self._live.values():
            kid.heard += for_s
            if kid.gone_since is not None:
                kid.gone_since += for_s
            if kid.cut_since is not None:
                kid.cut_since += for_s
            if kid.ended_since is not None:
                kid.ended_since += for_s

    def overdue(self, now: float, at: float, is_cut: Callable[[str], bool] = lambda ident: False) -> list[Act]:
        """Who is silent, and who is lost by now. `is_cut` tells of a child whether its line is dead."""
        acts: list[Act] = []
        for ident, kid in list(self._live.items()):
            if kid.is_local:
                continue
            silent = now - kid.heard
            if self._is_mute(kid, silent):
                if not is_cut(ident):
                    kid.cut_since = None
                elif kid.cut_since is None:
                    kid.cut_since = now
                    acts.append(Cut(ident))
            why = self._why_lost(kid, now)
            if why is not None:
                acts += self.lose(ident, why, at)
            elif (
                kid.state == "STARTED"
                and kid.gone_since is None
                and kid.cut_since is None
                and not kid.warned
                and silent >= WARN_INTERVALS * self._times.interval_s
            ):
                kid.warned = True
                acts.append(Silent(ident, silent))
        return acts

    def _why_lost(self, kid: Kid, now: float) -> str | None:
        times = self._times
        if kid.ended_since is not None and now - kid.ended_since >= times.end_s:
            return "its process ended, and it did not say how" + (f": {kid.how_ended}" if kid.how_ended else "")
        if kid.state == "LAUNCHED":
            return f"it did not register within {REGISTER_S:g} s" if now - kid.heard >= REGISTER_S else None
        since = kid.cut_since if kid.gone_since is None else kid.gone_since
        if since is not None:
            if now - since >= times.resume_wait_s:
                return f"it was not connected for {times.resume_wait_s:g} s"
            return None
        if self._is_mute(kid, now - kid.heard):
            return f"it told nothing for {now - kid.heard:.0f} s"
        return None

    def _is_mute(self, kid: Kid, silent: float) -> bool:
        """Did it tell nothing for too long, on an open socket?"""
        return kid.state == "STARTED" and kid.gone_since is None and silent >= LOST_INTERVALS * self._times.interval_s

    def lose(self, ident: str, why: str, at: float) -> list[Act]:
        """Give a child up: end it, then again or never. Of a tier that is stopped it was stopped too."""
        kid = self.kids[ident]
        if kid.state == "COMPLETE":
            return []
        acts: list[Act] = [Lost(ident, why)]
        if "lost" in self._retry_on and (again := self._again(kid, why)):
            return acts + again
        self.total.put(ident, given_up(self.size_of(ident), ident, self.total.get(ident)))
        return acts + self._end(kid, "FAILURE", STOPPED_CODE if self.stopping else LOST_CODE, at, why)

    def stop(self, at: float) -> list[Act]:
        """Nothing more is started; what has not begun is aborted. When all have ended nothing changes."""
        if self.is_done:
            return []
        self.stopping = True
        acts: list[Act] = []
        for ident, kid in self.kids.items():
            if kid.state == "PENDING":
                self._abort(ident, at, "not begun when the tier was stopped", acts, pruned=False)
        return acts

    # ---- sums -------------------------------------------------------------------------------------------------------

    @property
    def is_done(self) -> bool:
        return self._open == 0

    @property
    def result(self) -> Result:
        """FAILURE as soon as something has failed; SUCCESS when all have ended."""
        if self.total.jobs.failed or self.total.tiers.failed or self.stopping:
            return "FAILURE"
        return "SUCCESS" if self.is_done else "UNKNOWN"

    def summary(self) -> Summary:
        """Of all below, and this tier itself."""
        failed = bool(self.total.jobs.failed or self.total.tiers.failed) or self.stopping
        own = Sums(1, int(not self.is_done), int(self.is_done and not failed), int(self.is_done and failed))
        return Summary(
            jobs=self.total.jobs,
            tiers=self.total.tiers + own,
            metrics=dict(self.total.metrics),
            failed=self.total.failed(self.spec.ident),
            running=self.total.running(self.spec.ident),
        )

    @property
    def live(self) -> dict[str, Kid]:
        """Those that are LAUNCHED or STARTED."""
        return self._live

    # ---- ends -------------------------------------------------------------------------------------------------------

    def _kid(self, ident: str) -> Kid:
        kid = self.kids.get(ident)
        if kid is None:
            raise wrong(f"Bad child ID {ident}")
        return kid

    def _place_of(self, kid: Kid) -> _Place:
        return self._places[self._names[kid.child.place]]

    def _again(self, kid: Kid, why: str) -> list[Act]:
        """Back to what may start, if it may be tried again; [] if not."""
        if kid.retries < 1 or self.stopping:
            return []
        ident, attempt = kid.child.ident, kid.attempt
        kid.retries -= 1
        kid.attempt += 1
        kid.state, kid.server, kid.at_start = "PENDING", "", None
        del self._live[ident]
        self.total.put(ident, expected(self.size_of(ident)))
        self._ready.setdefault(self._names[kid.child.place], deque()).append(ident)
        return [Again(ident, attempt, why)]

    def _end(self, kid: Kid, result: Result, code: int, at: float, why: str | None) -> list[Act]:
        kid.state, kid.result, kid.code, kid.at_end = "COMPLETE", result, code, at
        self._live.pop(kid.child.ident, None)
        self._open -= 1
        acts: list[Act] = [Ended(kid.child.ident, why)]
        name = self._names[kid.child.place]
        place = self._places[name]
        place.open -= 1
        place.passed += result == "SUCCESS"
        place.failed += result in ("FAILURE", "ABORTED")
        if place.open == 0:
            self._place_ended(name, at, acts)
        return acts

    def _place_ended(self, name: str, at: float, acts: list[Act]) -> None:
        """All children of a job have ended: those that waited for it may start, or never will."""
        todo = [name]
        while todo:
            done = todo.pop()
            for follower in self._places[done].followers:
                place = self._places[follower]
                place.waits.discard(done)
                if place.waits:
                    continue
                unmet = self._unmet(place.node)
                if unmet is None and not self.stopping:
                    self._ready[follower] = deque(place.idents)
                    if not place.idents:
                        todo.append(follower)
                    continue
                for ident in place.idents:
                    if self.kids[ident].state == "PENDING":
                        self._abort(
                            ident, at, unmet or "the tier was stopped", acts, pruned=unmet is not None, told=False
                        )
                todo.append(follower)

    def _abort(self, ident: str, at: float, why: str, acts: list[Act], *, pruned: bool, told: bool = True) -> None:
        kid = self.kids[ident]
        kid.pruned = pruned
        self.total.put(ident, None)
        kid.state, kid.result, kid.at_end = "COMPLETE", "ABORTED", at
        self._open -= 1
        acts.append(Ended(ident, why))
        name = self._names[kid.child.place]
        place = self._places[name]
        place.open -= 1
        place.failed += 1
        if told and place.open == 0:
            self._place_ended(name, at, acts)

    def _unmet(self, node: Node) -> str | None:
        """Which dependency is not met, now that all have ended."""
        for name in node.on_pass:
            place = self._places[name]
            if place.passed < len(place.idents):
                return f"on_pass: '{name}' did not pass"
        for name in node.on_fail:
            if not self._places[name].failed:
                return f"on_fail: '{name}' did not fail"
        return None
