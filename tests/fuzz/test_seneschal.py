"""An agent and a lab that exchange runs over a line that loses, cuts and repeats, while either restarts at any time.

Both sides are the pure machines; disks are plain data that survive a restart. Whatever happens, no run starts twice,
the lab is never told what it must refuse, each run that started is told to have ended once and as it did, and Mimir is
never asked for a transition that its table forbids.

Source: protocols/emissary.md, "Acceptance" 4 and 6, "Run states on the agent", "Mimir" (reservations).
"""

from contextlib import closing
from itertools import count
from pathlib import Path
from typing import Any

import msgspec
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from agent.core.errors import ActionError
from agent.core.events import Counts, ReservationChanged, RunRecalled, RunRefused
from agent.lab.graph import Graph
from agent.lab.queue import Act as LabAct
from agent.lab.queue import Cancel, LabRun, Mark, Order, Queue, Writer
from agent.mimir.graph import tell
from agent.mimir.messages import RESERVATION_REV, Upsert, Vertex
from agent.seneschal import reports
from agent.seneschal.machine import Abort, Act, Kept, Machine, Moment, Say, Start
from agent.seneschal.messages import Accepted, Complete, Refused, Register, Registered, RunReport, Update, Updated

IDENT, INSTANCE, SLOTS = "lab-07", "i-1", 2
Owed = Accepted | Refused | Complete


class Journal(msgspec.Struct):
    """What an agent's disk knows of a run."""

    reservation: str
    started: bool = False
    refused: str | None = None
    result: str | None = None


class World(RuleBasedStateMachine):
    """The two sides and what lies between them."""

    @initialize()
    def begin(self) -> None:
        self.t = 0.0
        self.starts: dict[str, int] = {}
        # the agent's disk
        self.kept = Kept()
        self.journal: dict[str, Journal] = {}
        self.outbox: dict[int, tuple[str, str]] = {}  # number -> (what, run)
        self.numbers = count(1)
        self.to_mimir: list[ReservationChanged] = []
        # the lab's disk
        self.disk: dict[str, bytes] = {}
        self.ids = count(1)
        self.ended: dict[str, list[str]] = {}
        self.mimir = Graph(Path(":memory:"))
        self.connected = False
        self.orders: list[Order | Cancel] = []
        self.lab = Queue(self._new_id)
        self.machine = Machine(IDENT, self.kept, self.now)
        self._slots()

    def teardown(self) -> None:  # type: ignore[explicit-override]  # typing.override needs Python 3.12
        if hasattr(self, "machine"):
            with closing(self.mimir):
                self._settle()

    @property
    def now(self) -> Moment:
        return Moment(self.t, 1000 + self.t)

    def _new_id(self) -> str:
        return f"r-{next(self.ids)}"

    # ---- the agent -------------------------------------------------------------------------------------------------

    def _owe(self, what: str, run: str) -> None:
        self.outbox[next(self.numbers)] = (what, run)

    def _do(self, acts: list[Act]) -> None:
        self.kept = self.machine.kept(self.now)
        for act in acts:
            match act:
                case Say():
                    if self.connected:
                        self._carry_out(self.lab.available(IDENT, act.payload, self.t))
                case Start():
                    self.journal[act.run] = Journal(act.reservation)
                case Abort():
                    raise AssertionError("on_lease_lost is finish")
                case ReservationChanged():
                    self.to_mimir.append(act)
                case RunRefused():
                    self.journal[act.run] = Journal(act.reservation or "", refused=act.reason)
                    self._owe("refused", act.run)
                    self._do(self.machine.refused(act.run, self.now))
                case RunRecalled():
                    if not any(run == act.run and what != "accepted" for what, run in self.outbox.values()):
                        self._owe("recalled", act.run)

    def _undecided(self) -> list[str]:
        return [run for run, row in self.journal.items() if not row.started and row.refused is None]

    def _running(self) -> list[str]:
        return [run for run, row in self.journal.items() if row.started and row.result is None]

    def _slots(self) -> None:
        self._do(self.machine.slots(SLOTS - len(self._running()), SLOTS, False, self.now))

    def _decide(self, run: str) -> None:
        if len(self._running()) == SLOTS:
            self.journal[run].refused = "busy: every slot is taken"
            self._owe("refused", run)
            self._do(self.machine.refused(run, self.now))
        else:
            self.journal[run].started = True
            self.starts[run] = self.starts.get(run, 0) + 1
            self._owe("accepted", run)
            self._do(self.machine.started(run, self.now))
        self._slots()

    def _finish(self, run: str, result: str) -> None:
        self.journal[run].result = result
        self._owe("complete", run)
        self._do(self.machine.finished(run, self.now))
        self._slots()

    def _report(self, n: int, what: str, run: str) -> Owed | None:
        row = self.journal.get(run)
        if row is None:
            return reports.unknown(n, run, IDENT)
        if what == "recalled":
            what = "complete" if row.result else "refused" if row.refused else "accepted" if row.started else ""
        match what:
            case "accepted":
                return Accepted(seq=n, run=run, reservation=row.reservation)
            case "refused":
                return Refused(seq=n, run=run, reason=row.refused or "")
            case "complete":
                late = self.machine.is_late(run, self.now)
                return complete(n, run, row.result or "", late=late)
            case _:
                return None

    # ---- the lab ---------------------------------------------------------------------------------------------------

    def _carry_out(self, acts: list[LabAct]) -> None:
        for key, value in self.lab.take_changes().items():
            if value is None:
                del self.disk[key]
                continue
            self.disk[key] = msgspec.json.encode(value)
            if isinstance(value, LabRun) and value.state == "done" and value.complete is not None:
                ends = self.ended.setdefault(value.run, [])
                if not ends or ends[-1] != value.complete.result:
                    ends.append(value.complete.result)
        for act in acts:
            match act:
                case Mark():
                    self._write(act.reservation, RESERVATION_REV[act.props["state"]], act.props)
                case Order() | Cancel():
                    if self.connected:
                        self.orders.append(act)

    def _write(self, reservation: str, rev: int | None, props: dict[str, Any]) -> None:
        try:
            self.mimir.upsert(Upsert(vertices=(Vertex(id=reservation, label="Reservation", rev=rev, props=props),)))
        except ActionError as err:  # the lab writes `lost`, and takes no for an answer
            assert "cannot go from returned to lost" in err.what  # noqa: PT017 - only this may be

    # ---- what may happen -------------------------------------------------------------------------------------------

    @rule()
    def enqueue(self) -> None:
        self.lab.enqueue({"id": "s"})
        self._carry_out(self.lab.tick(self.t))

    @rule()
    def goes_well(self) -> None:
        """So that much is under way when something breaks: all that can be done until a suite has begun."""
        self.enqueue()
        self._goes_well()

    def _goes_well(self) -> None:
        if not self.connected:
            self.connect(True)
        while self.outbox:
            self.deliver(True, True)
        if self.machine.link == "replaying":
            self.replayed()
        while self.orders:
            self.order(1)
        for run in self._undecided():
            self._decide(run)

    @precondition(lambda self: not self.connected)
    @rule(answered=st.booleans())
    def connect(self, answered: bool) -> None:
        self.machine.upgraded()
        running = tuple(
            RunReport(run=run, state="running" if self.journal[run].started else "received", since=0.0)
            for run in [*self._running(), *self._undecided()]
        )
        hello = Register(ident=IDENT, server="", version="1", instance=INSTANCE, slots=SLOTS, runs=running)
        last_seq, runs, acts = self.lab.register(hello, self.t)
        self.connected = True
        self._carry_out(acts)
        if not answered:
            self.cut()
            return
        self.outbox = {n: owed for n, owed in self.outbox.items() if n > last_seq}
        answer = Registered(session="s", time=1000 + self.t, last_seq=last_seq, runs=runs)
        self._do(self.machine.registered(answer, {report.run for report in running}, self.now, self.now))

    @precondition(lambda self: self.connected)
    @rule()
    def cut(self) -> None:
        self.connected = False
        self.orders.clear()
        self.lab.gone(IDENT)
        self.machine.closed(self.now)

    @precondition(lambda self: self.connected and self.outbox)
    @rule(arrives=st.booleans(), answered=st.booleans())
    def deliver(self, arrives: bool, answered: bool) -> None:
        n = min(self.outbox)
        message = self._report(n, *self.outbox[n])
        if message is not None:
            if not arrives:
                self.cut()
                return
            self._carry_out(self.lab.owed(IDENT, INSTANCE, message, self.t))
            if not answered:
                self.cut()
                return
            if not isinstance(message, Accepted):
                self.machine.told(message.run)
        del self.outbox[n]

    @precondition(lambda self: self.connected and not self.outbox and self.machine.link == "replaying")
    @rule()
    def replayed(self) -> None:
        self._do(self.machine.replayed(self.now))

    @precondition(lambda self: self.connected and self.orders)
    @rule(times=st.integers(0, 2))
    def order(self, times: int) -> None:
        act = self.orders.pop(0)
        if times == 0:
            self.cut()
        for _ in range(times):
            if isinstance(act, Order):
                self._ordered(act)
            elif act.run in self._running():
                self._finish(act.run, "ABORTED")

    def _ordered(self, act: Order) -> None:
        if act.order.run in self.journal:
            self._do([RunRecalled(run=act.order.run, why="again")])
        else:
            self._do(self.machine.ordered(act.order, self.now))

    @precondition(lambda self: self._undecided())
    @rule()
    def decide(self) -> None:
        self._decide(self._undecided()[0])

    @precondition(lambda self: self._running())
    @rule(result=st.sampled_from(["SUCCESS", "FAILURE"]))
    def finish(self, result: str) -> None:
        self._finish(self._running()[0], result)

    @precondition(lambda self: self.connected)
    @rule()
    def beat(self) -> None:
        named = tuple(RunReport(run=run, state="running", since=0.0) for run in self._running())
        leases, acts = self.lab.update(IDENT, Update(ident=IDENT, metrics={}, runs=named), self.t)
        self._carry_out(acts)
        self.machine.updated(Updated(time=1000 + self.t, leases=leases), self.now, self.now)

    @rule(seconds=st.sampled_from([1, 31, 61, 200, 601]))
    def time_passes(self, seconds: int) -> None:
        self.t += seconds
        self._do(self.machine.tick(self.now))
        self._carry_out(self.lab.tick(self.t))

    @precondition(lambda self: self.to_mimir)
    @rule()
    def tell_mimir(self) -> None:
        (vertex,) = tell(self.to_mimir.pop(0), IDENT, {}, None).vertices
        self.mimir.upsert(Upsert(vertices=(vertex,)))

    @rule()
    def reservations_lapse(self) -> None:
        self.mimir.lapse(1000 + self.t)

    @rule()
    def restart_agent(self) -> None:
        if self.connected:
            self.cut()
        kept = msgspec.json.decode(msgspec.json.encode(self.kept), type=Kept)
        self.machine = Machine(IDENT, kept, self.now)
        self._do(self.machine.resumed(self.now))
        for run in self.machine.runs():
            row = self.journal.get(run)
            if row is None or row.refused is not None:
                self._do(self.machine.refused(run, self.now))
            elif row.result is not None:
                self._do(self.machine.finished(run, self.now))
            elif row.started:
                self._do(self.machine.started(run, self.now))
        for run in self._running():
            self._finish(run, "ABORTED")
        self._slots()

    @rule()
    def restart_lab(self) -> None:
        if self.connected:
            self.cut()
        runs = [msgspec.json.decode(row, type=LabRun) for key, row in self.disk.items() if key.startswith("run ")]
        writers = [msgspec.json.decode(row, type=Writer) for key, row in self.disk.items() if key.startswith("writer ")]
        self.lab = Queue(self._new_id, runs, writers)

    # ---- what must hold --------------------------------------------------------------------------------------------

    @invariant()
    def no_run_starts_twice(self) -> None:
        assert all(n == 1 for n in getattr(self, "starts", {}).values())

    @invariant()
    def no_run_ends_twice(self) -> None:
        assert all(len(ends) == 1 for ends in getattr(self, "ended", {}).values())

    def _settle(self) -> None:
        """Let all come to its end over a good line; then compare the disks."""
        for _ in range(500):
            if self._is_over():
                break
            self._goes_well()
            for run in self._running():
                self._finish(run, "SUCCESS")
            while self.outbox:
                self.deliver(True, True)
            self.time_passes(1)
        while self.to_mimir:
            self.tell_mimir()
        assert self._is_over(), {run.run: run.state for run in self.lab.runs.values()}
        for run, row in self.journal.items():
            if row.result is not None:
                assert self.ended[run] == [row.result]
        self.no_run_starts_twice()
        self.no_run_ends_twice()

    def _is_over(self) -> bool:
        waiting = any(run.state in ("queued", "sent", "running") for run in self.lab.runs.values())
        return not (waiting or self.outbox or self._running() or self._undecided() or self.orders)


def complete(seq: int, run: str, result: str, *, late: bool) -> Complete:
    verdicts: dict[str, Any] = {"SUCCESS": "passed", "FAILURE": "failed", "ABORTED": "aborted"}
    fields: dict[str, Any] = {"seq": seq, "ident": IDENT, "run": run, "result": result, "late": late}
    return Complete(**fields, code=0, metrics={}, verdict=verdicts[result], counts=Counts())


World.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestWorld = World.TestCase
