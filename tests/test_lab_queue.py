"""Transcripts of the lab's Seneschal: suites, offers, runs and leases.

    + 30              so many seconds pass, then a tick
    > word ...        what happens; agent "a" unless another is named
    < run r-1 a/0/1   what an agent is sent
    = a/0/1 reserved  what is written into Mimir
    ! reason          what was answered by an error
    ? r-1 running     a state that is asserted

Source: protocols/emissary.md, "Run states on the agent", "The envelope" (`seq`).
"""

from itertools import count
from typing import Any

import msgspec
import pytest

from agent.core.errors import ActionError
from agent.core.events import Counts
from agent.lab.queue import MAX_ENDED, Act, Cancel, LabRun, Mark, Order, Queue, Writer
from agent.seneschal.messages import Accepted, Available, Complete, Refused, Register, RunReport, Update

SUITE = {"id": "login"}


def complete(seq: int, run: str, ident: str = "a", **changes: Any) -> Complete:
    fields: dict[str, Any] = {
        "seq": seq, "ident": ident, "run": run, "result": "SUCCESS", "code": 0, "metrics": {}, "verdict": "passed",
        "counts": Counts(),
    }  # fmt: skip
    return Complete(**{**fields, **changes})


class Play:
    """A queue, its clock and its disk."""

    def __init__(self) -> None:
        self.t = 0.0
        self._ids = count(1)
        self.disk: dict[str, bytes] = {}
        self.queue = Queue(self._new_id)
        self.hellos: list[tuple[int, tuple[str, ...]]] = []
        self.leases: dict[str, float] = {}

    def _new_id(self) -> str:
        return f"r-{next(self._ids)}"

    def _kept(self) -> list[LabRun]:
        return [msgspec.json.decode(row, type=LabRun) for key, row in self.disk.items() if key.startswith("run ")]

    def restart(self) -> None:
        writers = [msgspec.json.decode(row, type=Writer) for key, row in self.disk.items() if key.startswith("writer ")]
        self.queue = Queue(self._new_id, self._kept(), writers)

    def happens(self, words: list[str]) -> list[Act]:
        queue, t = self.queue, self.t
        match words:
            case ["queue", *rest]:
                deadline = float(rest[0]) if rest else None
                queue.enqueue(SUITE, deadline=deadline)
            case ["labelled", label]:
                queue.enqueue({"id": "x", "requires": {"labels": [label]}})
            case ["register", ident, *runs]:
                reports = tuple(RunReport(run=run, state="running", since=0.0) for run in runs)
                hello = Register(
                    ident=ident, server="", version="1", instance="i", slots=1, labels=("rhel9",), runs=reports
                )
                last_seq, here, acts = queue.register(hello, t)
                self.hellos.append((last_seq, here))
                return acts
            case ["gone", ident]:
                queue.gone(ident)
            case ["offer", *offers]:
                ident = offers[0].split("/")[0]
                return queue.available(ident, Available(slots=len(offers), lease=60, reservations=tuple(offers)), t)
            case ["update", *runs]:
                reports = tuple(RunReport(run=run, state="running", since=0.0) for run in runs)
                self.leases, acts = queue.update("a", Update(ident="a", metrics={}, runs=reports), t)
                return acts
            case ["accepted", seq, run, offer]:
                return queue.owed("a", "i", Accepted(seq=int(seq), run=run, reservation=offer), t)
            case ["refused", seq, run, reason]:
                return queue.owed("a", "i", Refused(seq=int(seq), run=run, reason=reason), t)
            case ["complete", seq, run]:
                return queue.owed("a", "i", complete(int(seq), run), t)
            case ["error", code, run]:
                queue.not_ordered(run, f"{code}: no")
            case ["cancel", run]:
                return queue.cancel(run, "why")
            case ["restart"]:
                self.restart()
            case _:
                raise AssertionError(words)
        return []

    def run(self, transcript: str) -> None:
        due: list[str] = []
        for line in filter(None, map(str.strip, transcript.splitlines())):
            mark, text = line[0], line[2:]
            if mark in "+>?":
                assert not due, f"not expected before {line!r}: {due}"
            if mark == "?":
                name, state = text.split()
                assert self.queue.runs[name].state == state
            elif mark in "+>":
                due = self._act(mark, text)
            else:
                assert line == (due.pop(0) if due else None)
        assert not due, f"not in the transcript: {due}"

    def _act(self, mark: str, text: str) -> list[str]:
        try:
            if mark == "+":
                self.t += float(text)
                acts = self.queue.tick(self.t)
            else:
                acts = self.happens(text.split())
        except ActionError as err:
            return [f"! {err.reason}"]
        for key, row in self.queue.take_changes().items():
            if row is None:
                del self.disk[key]
            else:
                self.disk[key] = msgspec.json.encode(row)
        kept, live = (
            {run.run: msgspec.structs.replace(run, report=None) for run in runs}  # which is for display
            for runs in (self._kept(), self.queue.runs.values())
        )
        assert kept == live, "what a restart would find"
        return list(map(shown, acts))


def shown(act: Act) -> str:
    match act:
        case Order():
            return f"< run {act.order.run} {act.order.reservation}"
        case Cancel():
            return f"< cancel {act.run}"
        case Mark():
            return f"= {act.reservation} {act.props['state']}"


SENT = """
    > queue
    > register a
    > offer a/0/1
    = a/0/1 reserved
    < run r-1 a/0/1
    ? r-1 sent
"""
RUNNING = f"""
    {SENT}
    > accepted 1 r-1 a/0/1
    ? r-1 running
"""


def test_a_suite_waits_for_an_offer_and_runs_to_its_end() -> None:
    Play().run(
        RUNNING
        + """
        > complete 2 r-1
        ? r-1 done
        """
    )


def test_a_run_without_decision_is_sent_again_three_times_then_queued_anew() -> None:
    Play().run(
        SENT
        + """
        + 29
        + 1
        < run r-1 a/0/1
        + 30
        < run r-1 a/0/1
        + 30
        < run r-1 a/0/1
        + 30
        = a/0/1 lost
        ? r-1 lost
        ? r-2 queued
        > offer a/0/2
        = a/0/2 reserved
        < run r-2 a/0/2
        """
    )


def test_the_offer_of_an_order_that_never_came_is_good_for_another() -> None:
    Play().run(
        SENT
        + """
        > offer a/0/1
        + 30
        < run r-1 a/0/1
        + 30
        < run r-1 a/0/1
        + 30
        < run r-1 a/0/1
        + 30
        = a/0/1 lost
        ? r-1 lost
        > offer a/0/1
        = a/0/1 reserved
        < run r-2 a/0/1
        """
    )


def test_the_offer_of_a_run_that_the_agent_could_not_read_is_good_for_another() -> None:
    Play().run(
        SENT
        + """
        > error bad_payload r-1
        ? r-1 refused
        > queue
        > offer a/0/1
        = a/0/1 reserved
        < run r-2 a/0/1
        """
    )


def test_the_offers_of_an_agent_that_is_gone_are_void() -> None:
    Play().run(
        """
        > register a
        > offer a/0/1
        > gone a
        > queue
        + 1
        ? r-1 queued
        """
    )


def test_what_has_ended_does_not_come_back() -> None:
    Play().run(
        """
        > queue 1000
        > register a
        > offer a/0/1
        = a/0/1 reserved
        < run r-1 a/0/1
        > accepted 1 r-1 a/0/1
        > complete 2 r-1
        > update r-1
        > register a r-1
        > accepted 3 r-1 a/0/1
        + 5000
        ? r-1 done
        """
    )
    Play().run(SENT + "> refused 1 r-1 bad_suite:\n> accepted 2 r-1 a/0/1\n> update r-1\n? r-1 refused")


def test_an_agent_speaks_of_its_own_runs_only() -> None:
    play = Play()
    play.run(SENT + "> register b")
    said = (
        Accepted(seq=1, run="r-1", reservation="a/0/1"),
        Refused(seq=1, run="r-1", reason="busy:"),
        complete(1, "r-1"),
        complete(1, "r-1", ident="b"),
    )
    for message in said:
        with pytest.raises(ActionError, match=r"r-1 is not a run of b|ident: a, but b registered"):
            play.queue.owed("b", "i", message, 0.0)
    play.run("? r-1 sent\n> register b\n? r-1 sent")
    assert play.hellos[-1] == (0, ())  # what was refused counts as not heard


def test_a_lease_that_lapses_is_lost_and_the_late_end_replaces_it() -> None:
    Play().run(
        RUNNING
        + """
        + 599
        > update r-1
        + 599
        + 1
        = a/0/1 lost
        ? r-1 lost
        ? r-2 queued
        > complete 2 r-1
        ? r-1 done
        ? r-2 dropped
        > complete 3 r-2
        ! bad_payload: key run: r-2 is not a run of a
        """
    )


def test_an_update_renews_only_what_is_that_agents() -> None:
    play = Play()
    play.run(RUNNING + "> update r-1 r-else")
    assert play.leases == {"r-1": 600.0}
    play.run("? r-else running")
    assert play.queue.runs["r-else"].ident == "a"


def test_what_was_lost_and_comes_back_runs_on_unless_its_successor_is_at_work() -> None:
    lost = RUNNING + "+ 600\n= a/0/1 lost\n? r-2 queued\n"
    Play().run(lost + "> register a r-1\n? r-1 running\n? r-2 dropped")
    Play().run(
        lost
        + """
        > register b
        > offer b/0/1
        = b/0/1 reserved
        < run r-2 b/0/1
        > register a r-1
        < cancel r-1
        ? r-1 lost
        """
    )


def test_a_decision_that_comes_late_takes_the_run_back() -> None:
    Play().run(
        SENT
        + """
        > gone a
        + 30
        < run r-1 a/0/1
        + 30
        < run r-1 a/0/1
        + 30
        < run r-1 a/0/1
        + 30
        = a/0/1 lost
        > accepted 1 r-1 a/0/1
        ? r-1 running
        ? r-2 dropped
        """
    )


@pytest.mark.parametrize("reason", ["busy:", "draining", "space:"])
def test_a_refusal_that_may_mend_queues_the_suite_anew(reason: str) -> None:
    Play().run(
        SENT
        + f"""
        > refused 1 r-1 {reason}
        ? r-1 refused
        ? r-2 queued
        """
    )


@pytest.mark.parametrize("reason", ["bad_suite:", "no_runner", "labels", "deadline"])
def test_a_refusal_for_good_is_the_end(reason: str) -> None:
    play = Play()
    play.run(SENT + f"> refused 1 r-1 {reason}\n? r-1 refused")
    assert list(play.queue.runs) == ["r-1"]


def test_an_order_that_is_answered_by_an_error_was_not_taken() -> None:
    Play().run(SENT + "> error too_big r-1\n? r-1 refused\n> error too_big r-1\n> error too_big r-9")


@pytest.mark.parametrize("code", ["internal", "busy"])
def test_an_order_that_is_answered_by_an_error_that_may_mend_is_sent_again(code: str) -> None:
    Play().run(
        SENT
        + f"""
        > error {code} r-1
        + 30
        < run r-1 a/0/1
        > accepted 1 r-1 a/0/1
        ? r-1 running
        """
    )


def test_what_was_heard_already_changes_nothing() -> None:
    play = Play()
    play.run(
        RUNNING
        + """
        > complete 2 r-1
        > accepted 1 r-1 a/0/1
        > complete 2 r-1
        > register a
        ? r-1 done
        """
    )
    assert play.hellos[-1] == (2, ())


def test_a_second_end_under_a_new_number_changes_nothing() -> None:
    play = Play()
    play.run(RUNNING + "> complete 2 r-1")
    first = play.queue.runs["r-1"].complete
    play.run("> complete 3 r-1\n? r-1 done")
    assert play.queue.runs["r-1"].complete is first


def test_a_restart_forgets_the_offers_and_nothing_else() -> None:
    play = Play()
    play.run(
        RUNNING
        + """
        > queue
        > restart
        ? r-1 running
        ? r-2 queued
        > register a r-1
        > offer a/0/2
        = a/0/2 reserved
        < run r-2 a/0/2
        > complete 2 r-1
        ? r-1 done
        """
    )
    assert play.hellos[-1] == (1, ("r-1",))


def test_offers_lapse_and_are_replaced_by_the_next_ones() -> None:
    Play().run(
        """
        > register a
        > offer a/0/1 a/1/2
        > offer a/0/3
        + 60
        > queue
        + 1
        > offer a/0/3
        = a/0/3 reserved
        < run r-1 a/0/3
        > queue
        > offer a/0/3
        ? r-2 queued
        > gone a
        + 1
        """
    )


def test_offers_that_do_not_fit_are_refused() -> None:
    play = Play()
    play.run("> register a")
    for bad in (
        Available(slots=2, lease=60, reservations=("a/0/1",)),
        Available(slots=2, lease=60, reservations=("a/0/1", "a/0/1")),
        Available(slots=1, lease=60, reservations=("b/0/1",)),
    ):
        with pytest.raises(ActionError, match=r"key (slots|reservations)"):
            play.queue.available("a", bad, 0)


def test_a_suite_goes_to_an_agent_with_its_labels() -> None:
    Play().run(
        """
        > labelled sles
        > labelled rhel9
        > register a
        > offer a/0/1
        = a/0/1 reserved
        < run r-2 a/0/1
        ? r-1 queued
        """
    )


def test_the_deadline_and_a_minute_more() -> None:
    Play().run(
        """
        > queue 100
        > queue 100
        > register a
        > offer a/0/1
        = a/0/1 reserved
        < run r-1 a/0/1
        > accepted 1 r-1 a/0/1
        + 159
        + 1
        = a/0/1 lost
        ? r-1 lost
        ? r-2 dropped
        """
    )


def test_a_message_about_anothers_run_is_an_error_and_counts_as_not_heard() -> None:
    play = Play()
    play.run(
        RUNNING
        + """
        > accepted 2 r-9 a/0/1
        ! no_such_run: r-9 is not known here
        > accepted 2 r-1 a/0/7
        ! bad_payload: key reservation: r-1 was sent for a/0/1
        > refused 2 r-9 busy
        ! no_such_run: r-9 is not known here
        """
    )
    with pytest.raises(ActionError, match="r-1 is not a run of b"):
        play.queue.owed("b", "i", complete(1, "r-1", ident="b"), 0)
    with pytest.raises(ActionError, match="but b registered"):
        play.queue.owed("b", "i", complete(1, "r-1"), 0)
    play.run("> complete 2 r-1\n? r-1 done")


def test_the_end_of_a_run_that_only_the_agent_knew_is_kept() -> None:
    play = Play()
    play.run("> register a r-7\n? r-7 running\n> complete 1 r-7\n? r-7 done")
    play.run("> complete 2 r-8\n? r-8 done")


def test_cancel_reaches_the_agent_or_drops_what_waits() -> None:
    Play().run(
        RUNNING
        + """
        > cancel r-1
        < cancel r-1
        > complete 2 r-1
        > cancel r-1
        > queue
        > cancel r-2
        ? r-2 dropped
        > cancel r-9
        ! no_such_run: r-9 is not known here
        """
    )


def test_old_ends_are_forgotten_on_disk_too() -> None:
    play = Play()
    for n in range(MAX_ENDED + 5):
        play.run(f"> queue\n> cancel r-{n + 1}")
    play.run("> queue")
    assert len(play.queue.runs) == MAX_ENDED + 1
    assert set(play.disk) == {f"run {run}" for run in play.queue.runs}


def test_old_ends_of_runs_that_only_agents_knew_are_forgotten_too() -> None:
    play = Play()
    play.run("> register a")
    for n in range(MAX_ENDED + 5):
        play.run(f"> complete {n + 1} r-{n + 1}")
    assert len(play.queue.runs) == MAX_ENDED
    assert {name for name in play.disk if name.startswith("run ")} == {f"run {run}" for run in play.queue.runs}
