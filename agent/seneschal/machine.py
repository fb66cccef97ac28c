"""The agent's side of the Seneschal link, without I/O: the link's states, offers, leases, and what a run's order means.

Each method takes what happened and returns acts, which the role carries out in order: `Say` (a request to the
Seneschal), `Start` and `Abort` (of a run), or an event to publish. `kept()` is what must be on disk before the acts.

    link          offline -> registering -> replaying -> ready        (`connecting` is core/link.py's)
    reservation   available -> reserved -> running -> returned

Leases run on a clock that never steps (`Moment.mono`): a machine that learns the date in mid-run keeps its runs. What
is told or kept is epoch seconds.

Source: protocols/emissary.md, "Seneschal" (link states, run states) and "Mimir" (reservations).
"""

from collections.abc import Collection
from typing import Any, Literal, NamedTuple, TypeAlias

import msgspec

from agent.core.errors import ProtocolMisuse
from agent.core.events import ReservationChanged, ReservationState, RunRecalled, RunRefused
from agent.seneschal.messages import OFFER_LEASE_S, Available, Registered, Run, Updated

LinkState: TypeAlias = Literal["offline", "registering", "replaying", "ready"]
LinkEvent: TypeAlias = Literal["upgraded", "registered", "replayed", "closed"]

LINK: dict[tuple[LinkState, LinkEvent], LinkState] = {
    ("offline", "upgraded"): "registering",
    ("registering", "registered"): "replaying",
    ("replaying", "replayed"): "ready",
    ("registering", "closed"): "offline",
    ("replaying", "closed"): "offline",
    ("ready", "closed"): "offline",
}

ReservationEvent: TypeAlias = Literal["ordered", "withdrawn", "started", "refused", "finished"]

RESERVATION: dict[tuple[ReservationState, ReservationEvent], ReservationState] = {
    ("available", "ordered"): "reserved",
    ("available", "withdrawn"): "returned",
    ("reserved", "started"): "running",
    ("reserved", "refused"): "returned",
    ("reserved", "finished"): "returned",
    ("running", "started"): "running",  # resumed after a restart
    ("running", "finished"): "returned",
}


class Moment(NamedTuple):
    """Now: seconds of a clock that never steps, and the machine's date in epoch seconds."""

    mono: float
    epoch: float


class Say(msgspec.Struct, frozen=True):
    """Ask the Seneschal."""

    action: str
    payload: Available


class Start(msgspec.Struct, frozen=True):
    """Let the suites role decide on a run. `deadline` is by this machine's clock."""

    run: str
    reservation: str
    suite: dict[str, Any]
    deadline: float | None


class Abort(msgspec.Struct, frozen=True):
    """Cancel a run."""

    run: str
    reason: str


Act: TypeAlias = Say | Start | Abort | ReservationChanged | RunRefused | RunRecalled


class KeptReservation(msgspec.Struct, frozen=True):
    """A reservation on disk; since when (epoch seconds) it was offered, and ran."""

    id: str
    state: ReservationState
    run: str | None
    available_at: float
    running_at: float | None


class Kept(msgspec.Struct, frozen=True):
    """What outlives a restart: the last number given, the reservations, and until when (epoch) each run is ours."""

    n: int = 0
    reservations: tuple[KeptReservation, ...] = ()
    leases: dict[str, int] = {}


class _Reservation(msgspec.Struct):
    id: str
    available_at: float
    state: ReservationState = "available"
    run: str | None = None
    running_at: float | None = None

    @property
    def slot(self) -> int:
        return int(self.id.split("/")[1])


class Machine:
    """One agent towards its Seneschal. `skew` is what the Seneschal's clock is ahead of ours, in seconds."""

    def __init__(self, ident: str, kept: Kept, at: Moment, *, abort_on_lease_lost: bool = False) -> None:
        self.link: LinkState = "offline"
        self.skew = 0.0
        self._ahead = at.epoch - at.mono  # the same of the clock that never steps: the date may, between two answers
        self._ident, self._abort_on_lease_lost = ident, abort_on_lease_lost
        self._n = kept.n
        self._reservations = {
            r.id: _Reservation(r.id, r.available_at, r.state, r.run, r.running_at) for r in kept.reservations
        }
        self._leases = {run: at.mono + until - at.epoch for run, until in kept.leases.items()}
        self._lapsed: set[str] = set()
        self._free = self._total = 0
        self._said: tuple[str, ...] | None = None  # the offers as last told on this connection
        self._said_at = at.mono  # when an offer was last renewed, or could have been
        self._mimir_away_since: float | None = at.mono

    # ---- the link --------------------------------------------------------------------------------------------------

    def upgraded(self) -> None:
        """The connection is open; `register` goes out."""
        self._move("upgraded")

    def registered(self, answer: Registered, here: Collection[str], asked: Moment, at: Moment) -> list[Act]:
        """`register` was answered. `here` are the runs of which this machine knows; the others' end must be told."""
        self._move("registered")
        self._read_clock(answer.time, asked, at)
        why = "the Seneschal has it, and it does not run here"
        return [RunRecalled(run=run, why=why) for run in answer.runs if run not in here]

    def replayed(self, at: Moment) -> list[Act]:
        """All that was owed is told: offers may go out."""
        self._move("replayed")
        return self._offer(at)

    def closed(self, at: Moment) -> None:
        """The connection is gone. Offers stand until their lease lapses."""
        if self.link != "offline":
            if self.link == "ready":
                self._said_at = at.mono
            self._move("closed")
        self._said = None

    def updated(self, answer: Updated, asked: Moment, at: Moment) -> None:
        """A heartbeat was answered: leases are counted from when it was asked, to be on the safe side."""
        if answer.time is not None:
            self._read_clock(answer.time, asked, at)
        for run, lease in answer.leases.items():
            if run in self._leases:
                self._leases[run] = asked.mono + lease
                self._lapsed.discard(run)

    # ---- slots and offers ------------------------------------------------------------------------------------------

    def slots(self, free: int, total: int, draining: bool, at: Moment) -> list[Act]:
        """The suites role has so many free slots; with `draining` none is offered."""
        self._free, self._total = 0 if draining else free, total
        return self._offer(at)

    def mimir(self, is_ready: bool, at: Moment) -> list[Act]:
        """The link to Mimir came or went. While it was away reservations lapsed there: they come back."""
        if not is_ready:
            self._mimir_away_since = at.mono if self._mimir_away_since is None else self._mimir_away_since
            return []
        away, self._mimir_away_since = self._mimir_away_since, None
        if away is None or at.mono - away < OFFER_LEASE_S:
            return []
        acts: list[Act] = []
        for reservation in list(self._reservations.values()):
            if reservation.state == "available":
                acts.append(self._step(reservation, "withdrawn", at, recovered=True))
            elif reservation.state == "running":
                acts.append(self._changed(reservation, at, recovered=True))
        return acts + self._offer(at)

    def current(self) -> list[KeptReservation]:
        """The reservations that are not returned."""
        return [
            KeptReservation(r.id, r.state, r.run, r.available_at, r.running_at) for r in self._reservations.values()
        ]

    # ---- runs ------------------------------------------------------------------------------------------------------

    def ordered(self, order: Run, at: Moment) -> list[Act]:
        """A `run` of which this machine has not heard yet."""
        reservation = self._reservations.get(order.reservation)
        if reservation is None or reservation.state != "available":
            reason = f"busy: {order.reservation} is not on offer"
            return [RunRefused(run=order.run, reason=reason, origin="seneschal", reservation=order.reservation)]
        reservation.run = order.run
        self._step(reservation, "ordered", at)  # the Seneschal itself writes `reserved` into Mimir
        self._leases[order.run] = at.mono + order.lease
        deadline = None if order.deadline is None else at.epoch + order.deadline - self._theirs(at)
        return [Start(order.run, order.reservation, order.suite, deadline)]

    def runs(self) -> list[str]:
        """The runs that hold a reservation."""
        return [r.run for r in self._reservations.values() if r.run is not None]

    def started(self, run: str, at: Moment, *, again: bool = False) -> list[Act]:
        """The run has its slot; `again`: it was resumed after a restart."""
        reservation = self._reservation_of(run)
        if reservation is not None and reservation.state == "running" and not again:
            return []  # seen twice: in the journal and on the bus
        return self._of_run(run, "started", at)

    def refused(self, run: str, at: Moment) -> list[Act]:
        """The run will not start."""
        self.told(run)
        return self._of_run(run, "refused", at)

    def finished(self, run: str, at: Moment) -> list[Act]:
        """The run is over; its lease counts until `told`."""
        return self._of_run(run, "finished", at)

    def told(self, run: str) -> None:
        """The Seneschal has the run's end."""
        self._leases.pop(run, None)
        self._lapsed.discard(run)

    def is_late(self, run: str, at: Moment) -> bool:
        """Has the run's lease lapsed?"""
        return at.mono >= self._leases.get(run, at.mono + 1)

    # ---- time ------------------------------------------------------------------------------------------------------

    def tick(self, at: Moment) -> list[Act]:
        """Time passed: leases that lapsed, offers to renew."""
        acts: list[Act] = []
        for run, until in self._leases.items():
            if at.mono >= until and run not in self._lapsed:
                self._lapsed.add(run)
                if self._abort_on_lease_lost and self._reservation_of(run):
                    acts.append(Abort(run, "lease lost: the Seneschal was not heard of in time"))
        if self.link != "ready" and at.mono >= self._said_at + OFFER_LEASE_S:
            acts += [self._step(r, "withdrawn", at) for r in self._with("available")]
        return acts + self._offer(at)

    def kept(self, at: Moment) -> Kept:
        """What must outlive a restart."""
        leases = {run: round(at.epoch + until - at.mono) for run, until in self._leases.items()}
        return Kept(self._n, tuple(self.current()), leases)

    def resumed(self, at: Moment) -> list[Act]:
        """After a restart: nobody knows which offers of the former life still stand, so they are returned."""
        return [self._step(r, "withdrawn", at, recovered=True) for r in self._with("available")]

    # ---- within ----------------------------------------------------------------------------------------------------

    def _move(self, event: LinkEvent) -> None:
        if (self.link, event) not in LINK:
            raise ProtocolMisuse(
                f"the Seneschal link cannot be {event} while {self.link}", remedy="This is a bug of the agent."
            )
        self.link = LINK[self.link, event]

    def _read_clock(self, theirs: float, asked: Moment, at: Moment) -> None:
        self.skew = theirs - (asked.epoch + at.epoch) / 2
        self._ahead = theirs - (asked.mono + at.mono) / 2

    def _theirs(self, at: Moment) -> float:
        return at.mono + self._ahead

    def _with(self, state: ReservationState) -> list[_Reservation]:
        return [r for r in self._reservations.values() if r.state == state]

    def _reservation_of(self, run: str) -> _Reservation | None:
        return next((r for r in self._reservations.values() if r.run == run), None)

    def _of_run(self, run: str, event: ReservationEvent, at: Moment) -> list[Act]:
        reservation = self._reservation_of(run)
        if reservation is None:
            return []  # a run that came another way, or one whose end was seen twice
        return [self._step(reservation, event, at, recovered=(reservation.state, event) == ("running", "started"))]

    def _step(
        self, reservation: _Reservation, event: ReservationEvent, at: Moment, *, recovered: bool = False
    ) -> ReservationChanged:
        if (reservation.state, event) not in RESERVATION:
            raise ProtocolMisuse(
                f"reservation {reservation.id} cannot be {event} while {reservation.state}",
                remedy="This is a bug of the agent.",
            )
        reservation.state = RESERVATION[reservation.state, event]
        if reservation.state == "running" and reservation.running_at is None:
            reservation.running_at = at.epoch
        if reservation.state == "returned":
            del self._reservations[reservation.id]
        return self._changed(reservation, at, recovered=recovered)

    def _changed(self, reservation: _Reservation, at: Moment, *, recovered: bool = False) -> ReservationChanged:
        # The whole story each time: Mimir ignores what comes after a later state.
        is_over = reservation.state == "returned"
        return ReservationChanged(
            id=reservation.id,
            state=reservation.state,
            run=reservation.run,
            lease_until=None if is_over else self._theirs(at) + OFFER_LEASE_S,
            available_at=reservation.available_at,
            running_at=reservation.running_at,
            returned_at=at.epoch if is_over else None,
            recovered_at=at.epoch if recovered else None,
        )

    def _offer(self, at: Moment) -> list[Act]:
        """As many offers as free slots that no undecided run will take; told on change and at half the lease."""
        acts: list[Act] = []
        wanted = max(0, self._free - len(self._with("reserved")))
        offers = self._with("available")
        acts += [self._step(r, "withdrawn", at) for r in offers[wanted:]]
        if self.link != "ready":
            return acts
        acts += [self._changed(self._new_offer(at), at) for _ in range(len(offers), wanted)]
        ids = tuple(r.id for r in self._with("available"))
        if ids != self._said or at.mono >= self._said_at + OFFER_LEASE_S / 2:
            self._said, self._said_at = ids, at.mono
            acts.append(Say("available", Available(slots=len(ids), lease=OFFER_LEASE_S, reservations=ids)))
        return acts

    def _new_offer(self, at: Moment) -> _Reservation:
        # Numbers grow from the date on: after the loss of the store none of the former life is given again.
        self._n = max(self._n + 1, int(at.epoch))
        taken = {r.slot for r in self._reservations.values()}
        slot = next(slot for slot in range(len(taken) + 1) if slot not in taken)
        reservation = _Reservation(f"{self._ident}/{slot}/{self._n}", at.epoch)
        self._reservations[reservation.id] = reservation
        return reservation
