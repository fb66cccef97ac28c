"""Transcripts of the agent's side of the Seneschal link.

    + 30                 so many seconds pass, then a tick
    > word ...           what happens; the date at the start is 1000, and offers are numbered from the date on
    < available ...      what the Seneschal is told
    = ...                every other act, in order

Source: protocols/emissary.md, "Link states", "Run states on the agent", "Mimir" (reservations).
"""

from typing import Any

import msgspec
import pytest

from agent.core.errors import ProtocolMisuse
from agent.core.events import ReservationChanged, RunRecalled, RunRefused
from agent.seneschal.machine import LINK, Abort, Act, Kept, Machine, Moment, Say, Start
from agent.seneschal.messages import Available, Registered, Run, Updated

EPOCH = 1000.0
NOTHING = Kept()


class Play:
    """A machine and its clock."""

    def __init__(self, kept: Kept = NOTHING, *, abort: bool = False, at: float = 0.0) -> None:
        self.t, self.ahead, self.put_back = at, 0.0, 0.0
        self.machine = Machine("lab", kept, self.now, abort_on_lease_lost=abort)
        self.changes: list[ReservationChanged] = []

    @property
    def now(self) -> Moment:
        return Moment(self.t, EPOCH + self.t - self.put_back)

    def happens(self, words: list[str]) -> list[Act]:
        machine, at = self.machine, self.now
        match words:
            case ["up"]:
                machine.upgraded()
            case ["registered", *runs]:
                answer = Registered(session="s", time=at.epoch + self.ahead, last_seq=0, runs=tuple(runs))
                return machine.registered(answer, {"r-here"}, at, at)
            case ["replayed"]:
                return machine.replayed(at)
            case ["closed"]:
                machine.closed(at)
            case ["slots", free, "of", total, *rest]:
                return machine.slots(int(free), int(total), rest == ["draining"], at)
            case ["run", run, "on", offer]:
                return machine.ordered(Run(run=run, reservation=offer, suite={"id": "s"}), at)
            case ["run", run, "on", offer, "until", deadline]:
                return machine.ordered(Run(run=run, reservation=offer, suite={}, deadline=float(deadline)), at)
            case ["started", run]:
                return machine.started(run, at)
            case ["started", run, "again"]:
                return machine.started(run, at, again=True)
            case ["refused", run]:
                return machine.refused(run, at)
            case ["finished", run]:
                return machine.finished(run, at)
            case ["told", run]:
                machine.told(run)
            case ["lease", run, seconds]:
                machine.updated(Updated(leases={run: float(seconds)}), at, at)
            case ["mimir", state]:
                return machine.mimir(state == "ready", at)
            case ["resumed"]:
                return machine.resumed(at)
            case _:
                raise AssertionError(words)
        return []

    def run(self, transcript: str) -> None:
        due: list[str] = []
        for line in filter(None, map(str.strip, transcript.splitlines())):
            mark, text = line[0], line[2:]
            if mark in ">+":
                assert not due, f"not expected before {line!r}: {due}"
                if mark == "+":
                    self.t += float(text)
                    acts = self.machine.tick(self.now)
                else:
                    acts = self.happens(text.split())
                self.changes += [act for act in acts if isinstance(act, ReservationChanged)]
                due = list(map(shown, acts))
            else:
                assert line == (due.pop(0) if due else None)
        assert not due, f"not in the transcript: {due}"


def shown(act: Act) -> str:
    match act:
        case Say(payload=Available() as offer):
            assert offer.slots == len(offer.reservations)
            return " ".join(["<", act.action, *offer.reservations])
        case Start():
            return f"= start {act.run} on {act.reservation}"
        case Abort():
            return f"= abort {act.run}"
        case ReservationChanged():
            return f"= {act.id} {act.state}{' recovered' if act.recovered_at else ''}"
        case RunRefused():
            return f"= refuse {act.run} {act.reason}"
        case RunRecalled():
            return f"= recall {act.run}"


READY = """
    > up
    > registered
    > replayed
    < available
    > slots 1 of 1
    = lab/0/1000 available
    < available lab/0/1000
"""


def test_a_run_from_offer_to_end() -> None:
    Play().run(
        READY
        + """
        > run r-1 on lab/0/1000
        = start r-1 on lab/0/1000
        > slots 0 of 1
        < available
        > started r-1
        = lab/0/1000 running
        > finished r-1
        = lab/0/1000 returned
        > slots 1 of 1
        = lab/0/1001 available
        < available lab/0/1001
        """
    )


def test_nothing_is_offered_before_the_link_is_ready_and_zero_slots_are_told_too() -> None:
    Play().run(
        """
        > slots 2 of 2
        > up
        > registered
        + 10
        > replayed
        = lab/0/1010 available
        = lab/1/1011 available
        < available lab/0/1010 lab/1/1011
        > slots 0 of 2 draining
        = lab/0/1010 returned
        = lab/1/1011 returned
        < available
        """
    )


def test_offers_are_told_again_at_half_the_lease_and_on_every_change_only() -> None:
    Play().run(
        READY
        + """
        > slots 1 of 1
        + 29
        + 1
        < available lab/0/1000
        + 30
        < available lab/0/1000
        """
    )


def test_the_lease_of_an_offer_counts_from_the_cut() -> None:
    Play().run(
        READY
        + """
        + 20
        > closed
        + 59
        + 1
        = lab/0/1000 returned
        """
    )


def test_an_offer_outlives_a_short_cut_and_is_withdrawn_when_its_lease_lapsed() -> None:
    Play().run(
        READY
        + """
        > closed
        + 50
        > up
        > registered
        > replayed
        < available lab/0/1000
        > closed
        + 60
        = lab/0/1000 returned
        > up
        > registered
        > replayed
        = lab/0/1110 available
        < available lab/0/1110
        """
    )


def test_a_run_on_what_is_not_on_offer_is_refused() -> None:
    Play().run(
        READY
        + """
        > run r-1 on lab/0/7
        = refuse r-1 busy: lab/0/7 is not on offer
        > run r-2 on lab/0/1000
        = start r-2 on lab/0/1000
        > run r-3 on lab/0/1000
        = refuse r-3 busy: lab/0/1000 is not on offer
        """
    )


def test_a_slot_that_an_undecided_run_will_take_is_not_offered_again() -> None:
    Play().run(
        READY
        + """
        > run r-1 on lab/0/1000
        = start r-1 on lab/0/1000
        + 30
        < available
        > refused r-1
        = lab/0/1000 returned
        + 1
        = lab/0/1031 available
        < available lab/0/1031
        """
    )


def test_a_run_of_another_origin_takes_its_slot_from_the_offers() -> None:
    Play().run(
        READY
        + """
        > slots 0 of 1
        = lab/0/1000 returned
        < available
        > started control-1
        > finished control-1
        """
    )


def test_runs_that_only_the_seneschal_has_are_recalled() -> None:
    Play().run(
        """
        > up
        > registered r-here r-gone
        = recall r-gone
        """
    )


def test_a_lease_that_lapses_makes_the_end_late_and_an_update_renews_it() -> None:
    play = Play()
    play.run(
        READY
        + """
        > run r-1 on lab/0/1000
        = start r-1 on lab/0/1000
        > started r-1
        = lab/0/1000 running
        > closed
        + 500
        > lease r-1 600
        + 599
        """
    )
    assert not play.machine.is_late("r-1", play.now)
    play.run("+ 1")
    assert play.machine.is_late("r-1", play.now)
    play.run("> finished r-1\n= lab/0/1000 returned")
    assert play.machine.is_late("r-1", play.now)
    play.run("> told r-1")
    assert not play.machine.is_late("r-1", play.now)
    assert not play.machine.is_late("r-other", play.now)


def test_a_lost_lease_aborts_once_where_the_settings_say_so() -> None:
    Play(abort=True).run(
        READY
        + """
        > run r-1 on lab/0/1000
        = start r-1 on lab/0/1000
        > started r-1
        = lab/0/1000 running
        > closed
        + 599
        + 1
        = abort r-1
        + 100
        > lease r-1 600
        + 599
        + 1
        = abort r-1
        """
    )


def test_only_leases_of_runs_that_may_end_here_are_kept() -> None:
    play = Play()
    play.run(READY + "> lease r-other 600\n> run r-1 on lab/0/1000\n= start r-1 on lab/0/1000")
    assert play.machine.kept(play.now).leases.keys() == {"r-1"}
    play.run("> refused r-1\n= lab/0/1000 returned")
    assert play.machine.kept(play.now).leases == {}


def test_a_deadline_is_read_by_the_seneschals_clock() -> None:
    play = Play()
    play.ahead = 90.0
    play.run(READY)
    assert play.machine.skew == 90
    (start,) = play.happens(["run", "r-1", "on", "lab/0/1000", "until", "5090"])
    assert start == Start("r-1", "lab/0/1000", {}, 5000.0)


def test_a_date_that_is_set_between_two_answers_moves_neither_deadline_nor_lease() -> None:
    play = Play()
    play.ahead = 90.0
    play.run(READY)
    play.put_back = 86_400.0
    (start,) = play.happens(["run", "r-1", "on", "lab/0/1000", "until", "5090"])
    assert start == Start("r-1", "lab/0/1000", {}, 5000.0 - 86_400.0)
    (running,) = play.happens(["started", "r-1"])
    assert isinstance(running, ReservationChanged)
    assert running.lease_until == 1000 + 90 + 60


def test_skew_is_measured_from_the_middle_of_the_request() -> None:
    play = Play()
    play.run("> up")
    answer = Registered(session="s", time=1001.0, last_seq=0)
    play.machine.registered(answer, (), Moment(0, 1000.0), Moment(4, 1004.0))
    assert play.machine.skew == -1
    play.machine.updated(Updated(time=1010.0), Moment(4, 1004.0), Moment(6, 1006.0))
    assert play.machine.skew == 5
    play.machine.updated(Updated(), Moment(6, 1006.0), Moment(8, 1008.0))
    assert play.machine.skew == 5


def test_after_a_restart_offers_are_returned_and_runs_keep_their_reservation_and_lease() -> None:
    before = Play()
    before.run(
        READY
        + """
        > slots 2 of 2
        = lab/1/1001 available
        < available lab/0/1000 lab/1/1001
        > run r-1 on lab/0/1000
        = start r-1 on lab/0/1000
        """
    )
    kept = msgspec.json.decode(msgspec.json.encode(before.machine.kept(before.now)), type=Kept)
    after = Play(kept, at=300.0)
    assert after.machine.runs() == ["r-1"]
    after.run(
        """
        > resumed
        = lab/1/1001 returned recovered
        > started r-1
        = lab/0/1000 running
        > started r-1
        > started r-1 again
        = lab/0/1000 running recovered
        > finished r-1
        = lab/0/1000 returned
        > finished r-1
        """
    )
    after.t = 599.0
    assert not after.machine.is_late("r-1", after.now)
    after.t = 600.0
    assert after.machine.is_late("r-1", after.now)


def test_an_offers_number_is_never_given_again_even_after_the_loss_of_the_store() -> None:
    play = Play()
    play.run(READY)
    play.t = 5.0
    again = Play(at=5.0)
    again.run(
        """
        > up
        > registered
        > replayed
        < available
        > slots 1 of 1
        = lab/0/1005 available
        < available lab/0/1005
        """
    )


def test_what_lapsed_in_mimir_comes_back_with_its_link() -> None:
    play = Play()
    play.run(
        READY
        + """
        > mimir ready
        > slots 2 of 2
        = lab/1/1001 available
        < available lab/0/1000 lab/1/1001
        > run r-1 on lab/0/1000
        = start r-1 on lab/0/1000
        > slots 1 of 2
        = lab/1/1001 returned
        < available
        > started r-1
        = lab/0/1000 running
        > slots 1 of 2
        = lab/1/1002 available
        < available lab/1/1002
        > mimir connecting
        > mimir offline
        + 20
        > mimir ready
        > mimir offline
        + 10
        < available lab/1/1002
        + 30
        < available lab/1/1002
        + 20
        > mimir ready
        = lab/0/1000 running recovered
        = lab/1/1002 returned recovered
        = lab/1/1080 available
        < available lab/1/1080
        """
    )


def test_a_reservation_says_since_when_and_until_when_by_the_labs_clock() -> None:
    play = Play()
    play.ahead = 7.0
    play.run(
        READY
        + """
        > run r-1 on lab/0/1000
        = start r-1 on lab/0/1000
        > slots 0 of 1
        < available
        + 2
        > started r-1
        = lab/0/1000 running
        + 3
        > finished r-1
        = lab/0/1000 returned
        """
    )
    told: list[dict[str, Any]] = [
        {name: value for name, value in msgspec.to_builtins(change).items() if value is not None}
        for change in play.changes
    ]
    offer = {"id": "lab/0/1000", "available_at": 1000.0}
    assert told == [
        {**offer, "state": "available", "lease_until": 1067.0},
        {**offer, "state": "running", "run": "r-1", "running_at": 1002.0, "lease_until": 1069.0},
        {**offer, "state": "returned", "run": "r-1", "running_at": 1002.0, "returned_at": 1005.0},
    ]


@pytest.mark.parametrize("state", ["offline", "registering", "replaying", "ready"])
@pytest.mark.parametrize("event", ["upgraded", "registered", "replayed", "closed"])
def test_what_the_link_table_does_not_have_is_a_misuse(state: Any, event: Any) -> None:
    play = Play()
    play.machine.link = state
    if (state, event) in LINK:
        play.machine._move(event)
        assert play.machine.link == LINK[state, event]
    else:
        with pytest.raises(ProtocolMisuse, match=f"cannot be {event} while {state}"):
            play.machine._move(event)


def test_closing_a_closed_link_is_nothing() -> None:
    play = Play()
    play.run("> closed\n> up\n> closed\n> closed")
    assert play.machine.link == "offline"
