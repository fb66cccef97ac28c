"""The lab's Seneschal without I/O: suites that wait, agents that offer slots, runs and their leases.

    queued -> sent -> running -> done
    sent -> refused                         the agent will not have it, and no other should
    sent, running -> lost                   unanswered, or the lease lapsed; the suite is queued again as a new run
    lost -> done, running                   the agent came back after all; a successor that still waits is dropped

Methods take what happened and the time (epoch seconds of a clock that never steps) and return acts. `take_changes`
gives what must be on disk before the acts are carried out and before an answer goes out.

Source: protocols/emissary.md, "Seneschal" (run states on the agent, leases), "The envelope" (`seq`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import msgspec

from agent.core.errors import ActionError
from agent.seneschal.messages import (
    RUN_LEASE_S,
    Accepted,
    Available,
    Complete,
    Refused,
    Register,
    Run,
    RunReport,
    Update,
)

RESEND_S, RESENDS = 30.0, 3  # a `run` without decision is sent again, so often
AFTER_DEADLINE_S = 60.0  # what the Seneschal waits beyond a run's deadline
MAX_ENDED = 1000  # runs that are over; older ones are forgotten
TRY_AGAIN = {"busy", "draining", "space"}  # refusals that another slot, or a later time, may mend
MAY_MEND = {"internal", "rate", *TRY_AGAIN}  # errors that answer a `run`: of the agent's disk, say

State: TypeAlias = Literal["queued", "sent", "running", "done", "refused", "lost", "dropped"]


class LabRun(msgspec.Struct, kw_only=True):
    """A run as the lab knows it. `again` is the run that replaces it, `replaces` the one it replaces."""

    run: str
    suite: dict[str, Any]
    state: State = "queued"
    deadline: float | None = None
    ident: str | None = None
    reservation: str | None = None
    sent_at: float = 0
    sends: int = 0
    lease_until: float = 0
    reason: str | None = None
    again: str | None = None
    replaces: str | None = None
    report: RunReport | None = None
    complete: Complete | None = None


class Writer(msgspec.Struct, kw_only=True):
    """Up to which delivery an agent's instance was heard."""

    ident: str
    instance: str
    last_seq: int


class Order(msgspec.Struct, frozen=True):
    """Send `run` to an agent."""

    ident: str
    order: Run


class Cancel(msgspec.Struct, frozen=True):
    """Send `cancel` to an agent."""

    ident: str
    run: str
    reason: str


class Mark(msgspec.Struct, frozen=True):
    """Write a reservation's state into Mimir."""

    reservation: str
    props: dict[str, Any]


Act: TypeAlias = Order | Cancel | Mark
Owed: TypeAlias = Accepted | Refused | Complete


class _Agent(msgspec.Struct):
    """An agent that is connected."""

    register: Register
    offers: list[str] = []
    offered_until: float = 0


class Queue:
    """All runs and agents of a lab. `new_id` gives a run id that was never given before."""

    def __init__(
        self,
        new_id: Callable[[], str],
        runs: Iterable[LabRun] = (),
        writers: Iterable[Writer] = (),
        *,
        lease_s: float = RUN_LEASE_S,
    ) -> None:
        self._new_id, self._lease_s = new_id, lease_s
        self.runs = {run.run: run for run in runs}
        self._writers = {(writer.ident, writer.instance): writer for writer in writers}
        self._agents: dict[str, _Agent] = {}
        self._changes: dict[str, LabRun | Writer | None] = {}

    def take_changes(self) -> dict[str, LabRun | Writer | None]:
        """What changed since the last call, by a key for the disk; None: forgotten."""
        changes, self._changes = self._changes, {}
        return changes

    def not_kept(self, changes: Mapping[str, LabRun | Writer | None]) -> None:
        """The disk did not take these: the next `take_changes` has them again."""
        self._changes = {**changes, **self._changes}

    def agents(self) -> dict[str, Register]:
        """Who is connected, and what they said of themselves."""
        return {ident: agent.register for ident, agent in self._agents.items()}

    # ---- the lab ---------------------------------------------------------------------------------------------------

    def enqueue(self, suite: dict[str, Any], *, deadline: float | None = None) -> str:
        """Queue a suite; the run's id. The next `tick` gives it to an agent."""
        run = LabRun(run=self._new_id(), suite=suite, deadline=deadline)
        self._keep(run)
        return run.run

    def cancel(self, run: str, reason: str) -> list[Act]:
        """End a run. Raises ActionError `no_such_run`."""
        row = self.runs.get(run)
        if row is None:
            raise ActionError("no_such_run", f"{run} is not known here")
        if row.state == "queued":
            row.state, row.reason = "dropped", reason
            self._keep(row)
        elif row.ident is not None and row.state in ("sent", "running", "lost"):
            return [Cancel(row.ident, run, reason)]
        return []

    # ---- what agents say -------------------------------------------------------------------------------------------

    def register(self, register: Register, at: float) -> tuple[int, tuple[str, ...], list[Act]]:
        """An agent is here: `last_seq`, the runs it should have, acts."""
        self._agents[register.ident] = _Agent(register)
        acts = [act for report in register.runs for act in self._reported(register.ident, report, at)]
        writer = self._writers.get((register.ident, register.instance))
        here = tuple(run.run for run in self.runs.values() if run.ident == register.ident and run.state == "running")
        return (writer.last_seq if writer else 0), here, acts

    def gone(self, ident: str) -> None:
        """Its connection ended: its offers are void, its runs go on."""
        self._agents.pop(ident, None)

    def available(self, ident: str, available: Available, at: float) -> list[Act]:
        """All its offers. Raises ActionError for offers that do not fit their number, or are another's."""
        if available.slots != len(available.reservations):
            raise ActionError("bad_payload", f"key slots: {available.slots}, but {len(available.reservations)} offers")
        if len(set(available.reservations)) != available.slots:
            raise ActionError("bad_payload", "key reservations: the same offer twice")
        if foreign := [offer for offer in available.reservations if not offer.startswith(f"{ident}/")]:
            raise ActionError("bad_payload", f"key reservations: {foreign[0]} is no offer of {ident}")
        # Of a run that was given up the order may never have come: the agent still offers the place, and means it.
        taken = {
            run.reservation for run in self.runs.values() if run.ident == ident and run.state in ("sent", "running")
        }
        agent = self._agents[ident]
        agent.offers = [offer for offer in available.reservations if offer not in taken]
        agent.offered_until = at + available.lease
        return self._assign(at)

    def update(self, ident: str, update: Update, at: float) -> tuple[dict[str, float], list[Act]]:
        """A heartbeat: the leases of the runs it names, renewed."""
        leases: dict[str, float] = {}
        acts: list[Act] = []
        for report in update.runs:
            run = self.runs.get(report.run)
            if run is None:
                acts += self._reported(ident, report, at)
            elif run.ident == ident and run.state in ("sent", "running"):
                run.lease_until, run.report = at + self._lease_s, report
                leases[run.run] = self._lease_s
                self._keep(run)
        return leases, acts

    def owed(self, ident: str, instance: str, message: Owed, at: float) -> list[Act]:
        """`accepted`, `refused` or `complete`. One that was heard already changes nothing.

        Raises ActionError: then it counts as not heard.
        """
        writer = self._writers.get((ident, instance)) or Writer(ident=ident, instance=instance, last_seq=0)
        if message.seq <= writer.last_seq:
            return []
        acts = self._hear(ident, message, at)
        writer.last_seq = message.seq
        self._writers[ident, instance] = writer
        self._changes[f"writer {ident} {instance}"] = writer
        return acts

    def not_ordered(self, run: str, reason: str) -> None:
        """The agent answered `run` by an error: it has not taken it. What may mend is sent again in its time."""
        row = self.runs.get(run)
        if row is not None and row.state == "sent" and reason.partition(":")[0] not in MAY_MEND:
            row.state, row.reason = "refused", reason
            self._keep(row)

    def tick(self, at: float) -> list[Act]:
        """Time passed: decisions that did not come, leases that lapsed, offers that grew old."""
        acts: list[Act] = []
        for agent in self._agents.values():
            if at >= agent.offered_until:
                agent.offers.clear()
        for run in list(self.runs.values()):
            if run.state == "sent" and at >= run.sent_at + RESEND_S:
                acts += self._send_again(run, at) if run.sends <= RESENDS else self._lose(run, "no decision came", at)
            elif run.state == "running" and at >= run.lease_until:
                acts += self._lose(run, "its lease lapsed", at)
            elif run.deadline is not None and at >= run.deadline + AFTER_DEADLINE_S:
                if run.state == "queued":
                    run.state, run.reason = "dropped", "deadline: it passed before an agent was free"
                    self._keep(run)
                elif run.state in ("sent", "running"):
                    acts += self._lose(run, "it did not end by its deadline", at)
        return acts + self._assign(at)

    # ---- within ----------------------------------------------------------------------------------------------------

    def _keep(self, run: LabRun) -> None:
        is_new = run.run not in self.runs
        self.runs[run.run] = run
        self._changes[f"run {run.run}"] = run
        if is_new:
            self._forget()

    def _forget(self) -> None:
        ended = [run.run for run in self.runs.values() if run.state in ("done", "refused", "dropped", "lost")]
        for run in ended[:-MAX_ENDED]:
            del self.runs[run]
            self._changes[f"run {run}"] = None

    def _assign(self, at: float) -> list[Act]:
        """The oldest suite to the first offer of an agent that has its labels."""
        acts: list[Act] = []
        for run in [run for run in self.runs.values() if run.state == "queued"]:
            needs = _labels(run.suite)
            for ident, agent in self._agents.items():
                if agent.offers and at < agent.offered_until and needs <= set(agent.register.labels):
                    run.ident, run.reservation, run.state = ident, agent.offers.pop(0), "sent"
                    props = {"state": "reserved", "holder": "seneschal", "run": run.run, "reserved_at": at}
                    acts.append(Mark(run.reservation, props))
                    acts += self._send_again(run, at)
                    break
        return acts

    def _send_again(self, run: LabRun, at: float) -> list[Act]:
        run.sent_at, run.sends = at, run.sends + 1
        self._keep(run)
        order = Run(
            run=run.run,
            reservation=run.reservation or "",
            suite=run.suite,
            deadline=run.deadline,
            lease=self._lease_s,
        )
        return [Order(run.ident or "", order)]

    def _lose(self, run: LabRun, reason: str, at: float) -> list[Act]:
        run.state, run.reason = "lost", reason
        if run.suite and (run.deadline is None or at < run.deadline):
            self._again(run)
        self._keep(run)
        return [Mark(run.reservation, {"state": "lost", "lost_at": at})] if run.reservation else []

    def _again(self, run: LabRun) -> None:
        successor = LabRun(run=self._new_id(), suite=run.suite, deadline=run.deadline, replaces=run.run)
        run.again = successor.run
        self._keep(successor)

    def _hear(self, ident: str, message: Owed, at: float) -> list[Act]:
        match message:
            case Accepted():
                return self._accepted(ident, message, at)
            case Refused():
                return self._refused(ident, message, at)
            case Complete():
                return self._complete(ident, message, at)

    def _own(self, ident: str, run: str) -> LabRun:
        row = self.runs.get(run)
        if row is None:
            raise ActionError("no_such_run", f"{run} is not known here")
        if row.ident != ident:
            raise ActionError("bad_payload", f"key run: {run} is not a run of {ident}")
        return row

    def _accepted(self, ident: str, message: Accepted, at: float) -> list[Act]:
        run = self._own(ident, message.run)
        if run.reservation != message.reservation:
            raise ActionError("bad_payload", f"key reservation: {run.run} was sent for {run.reservation}")
        return self._runs(run, at)

    def _refused(self, ident: str, message: Refused, at: float) -> list[Act]:
        run = self._own(ident, message.run)
        if run.state not in ("sent", "lost"):
            return []
        if run.state == "sent" and message.reason.partition(":")[0] in TRY_AGAIN:
            self._again(run)
        run.state, run.reason = "refused", message.reason
        self._keep(run)
        return self._assign(at)

    def _complete(self, ident: str, message: Complete, at: float) -> list[Act]:
        if message.ident != ident:
            raise ActionError("bad_payload", f"key ident: {message.ident}, but {ident} registered")
        run = self.runs.get(message.run) or LabRun(run=message.run, suite={}, ident=ident)
        if run.ident != ident:
            raise ActionError("bad_payload", f"key run: {run.run} is not a run of {ident}")
        if run.state == "done":
            return []
        self._drop_successor(run)
        run.state, run.reason, run.complete = "done", message.reason, message
        self._keep(run)
        return self._assign(at)

    def _reported(self, ident: str, report: RunReport, at: float) -> list[Act]:
        """The agent has this run: what we do not know we keep, what we thought lost came back."""
        run = self.runs.get(report.run) or LabRun(run=report.run, suite={}, ident=ident)
        if run.ident != ident or run.state in ("done", "refused"):
            return []
        run.report = report
        if run.state == "sent":  # its decision is on the way
            run.lease_until = at + self._lease_s
            self._keep(run)
            return []
        return self._runs(run, at)

    def _runs(self, run: LabRun, at: float) -> list[Act]:
        """It runs there. Where its successor is at work already, it is cancelled."""
        if run.state in ("done", "refused"):
            return []
        if run.state == "lost" and not self._drop_successor(run):
            return [Cancel(run.ident or "", run.run, f"{run.again} runs in its place")]
        run.state, run.lease_until = "running", at + self._lease_s
        self._keep(run)
        return []

    def _drop_successor(self, run: LabRun) -> bool:
        """False: it is beyond being dropped."""
        successor = self.runs.get(run.again or "")
        if successor is None or successor.state == "dropped":
            return True
        if successor.state != "queued":
            return False
        successor.state, successor.reason = "dropped", f"{run.run} came back"
        self._keep(successor)
        return True


def _labels(suite: Mapping[str, Any]) -> set[str]:
    requires = suite.get("requires")
    labels = requires.get("labels") if isinstance(requires, dict) else None
    return {label for label in labels if isinstance(label, str)} if isinstance(labels, list) else set()
