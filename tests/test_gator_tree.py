"""A tier's state machine, by its sheet's tables."""

import pytest

from agent.core.errors import ActionError
from agent.gator import spec as specs
from agent.gator.messages import Result
from agent.gator.spec import Group
from agent.gator.summary import Summary, Sums, job_summary
from agent.gator.tree import Again, Cut, Ended, Lost, Silent, Times, Tree


def tree_of(*jobs: str, retry_on: tuple[str, ...] = ("lost",), head: str = "!JobGroup {ident: g, jobs: [") -> Tree:
    root = specs.load(f"{head}{', '.join(f'!Job {{command: x, {job}}}' for job in jobs)}]}}").root
    assert isinstance(root, Group)
    tree = Tree(root, Times(), retry_on=retry_on)  # type: ignore[arg-type]  # literals
    tree.start(0)
    return tree


def ready(tree: Tree) -> list[str]:
    return [ident for _, queue in tree.ready() for ident in queue]


def launch(tree: Tree, *idents: str, now: float = 0) -> None:
    for _, queue in tree.ready():
        for ident in [ident for ident in queue if ident in idents]:
            queue.remove(ident)
            tree.launched(ident, now, is_local=False)


def begin(tree: Tree, *idents: str, now: float = 0) -> None:
    launch(tree, *idents, now=now)
    for ident in idents:
        tree.register(ident, f"127.0.0.1:{len(ident)}", now, now)


def end(tree: Tree, ident: str, *, passed: bool = True, code: int | None = None, now: float = 0) -> list[object]:
    result: Result = "SUCCESS" if passed else "FAILURE"
    summary = job_summary(ident, {"msg_info": 1}, passed=passed)
    acts = tree.complete(ident, result, (0 if passed else 1) if code is None else code, summary, now, now)
    return list(acts)


def test_dependencies_decide_who_may_start() -> None:
    tree = tree_of("ident: a", "ident: b, on_pass: [a]", "ident: c, on_fail: [a]", "ident: d, on_done: [c]")
    assert ready(tree) == ["a"]
    begin(tree, "a")
    assert end(tree, "a") == [Ended("a", None), Ended("c", "on_fail: 'a' did not fail")]
    assert ready(tree) == ["b", "d"]  # a pruned one has ended too
    assert tree.kids["c"].pruned
    begin(tree, "b", "d")
    end(tree, "b")
    end(tree, "d")
    assert tree.is_done
    assert tree.result == "SUCCESS"
    assert tree.summary().jobs == Sums(3, 0, 3, 0)  # the pruned one is in none


def test_pruning_goes_on_to_those_who_wait_for_the_pruned() -> None:
    tree = tree_of("ident: a", "ident: b, on_pass: [a]", "ident: c, on_pass: [b]", "ident: d, on_fail: [b]")
    begin(tree, "a")
    end(tree, "a", passed=False)
    assert [ident for ident, kid in tree.kids.items() if kid.pruned] == ["b", "c"]
    assert ready(tree) == ["d"]  # ABORTED meets on_fail


def test_a_job_of_an_array_waits_for_all_copies() -> None:
    tree = tree_of("ident: a", "ident: b, on_pass: [a]", head="!JobArray {ident: g, repeats: 2, jobs: [")
    begin(tree, "a_0")
    end(tree, "a_0")
    assert ready(tree) == ["a_1"]
    begin(tree, "a_1")
    end(tree, "a_1")
    assert ready(tree) == ["b_0", "b_1"]


def test_an_empty_array_has_ended_at_once() -> None:
    root = specs.load(
        "!JobGroup {ident: g, jobs: [!JobArray {ident: none, repeats: 0, jobs: [!Job {command: x}]},"
        " !Job {ident: b, command: x, on_done: [none]}]}"
    ).root
    assert isinstance(root, Group)
    tree = Tree(root, Times())
    tree.start(0)
    assert ready(tree) == ["none"]  # a tier with nothing in it: it runs, and ends


@pytest.mark.parametrize(
    ("step", "said"),
    [
        (lambda tree: tree.register("x", "h:1", 0, 0), "Bad child ID x"),
        (lambda tree: tree.register("b", "h:1", 0, 0), "registers before it was launched"),
        (lambda tree: tree.update("a", job_summary("a", {}, passed=None), 0, 0), "for child 'a' before start"),
        (lambda tree: end(tree, "a"), "Completion received for child 'a' before start"),
    ],
)
def test_children_out_of_turn_are_refused(step: object, said: str) -> None:
    tree = tree_of("ident: a", "ident: b, on_pass: [a]")
    launch(tree, "a")
    with pytest.raises(ActionError, match=said):
        step(tree)  # type: ignore[operator]


def test_a_second_completion_is_good_only_if_it_is_the_same() -> None:
    tree = tree_of("ident: a")
    begin(tree, "a")
    assert end(tree, "a") == [Ended("a", None)]
    assert end(tree, "a") == []
    with pytest.raises(ActionError, match="Child sent a second completion message"):
        end(tree, "a", code=3)
    with pytest.raises(ActionError, match="Child sent update after completion"):
        tree.update("a", job_summary("a", {}, passed=None), 0, 0)


def test_who_does_not_register_in_time_is_lost() -> None:
    tree = tree_of("ident: a")
    launch(tree, "a")
    assert tree.overdue(59.9, 59.9) == []
    assert tree.overdue(60, 60) == [
        Lost("a", "it did not register within 60 s"),
        Ended("a", "it did not register within 60 s"),
    ]
    assert (tree.kids["a"].code, tree.result, tree.summary().failed) == (254, "FAILURE", (("g", "a"),))
    with pytest.raises(ActionError, match="given up: superseded"):
        tree.register("a", "h:1", 61, 61)


def test_a_child_that_queues_has_its_time_to_register_from_then_on() -> None:
    tree = tree_of("ident: a")
    launch(tree, "a")
    tree.waits_in_queue("a", 50)
    assert tree.overdue(100, 100) == []
    assert len(tree.overdue(110, 110)) == 2


def test_silence_is_told_and_then_the_end() -> None:
    tree = tree_of("ident: a")
    begin(tree, "a")
    assert tree.overdue(14, 14) == []
    assert tree.overdue(15, 15) == [Silent("a", 15)]
    assert tree.overdue(20, 20) == []
    tree.heard("a", 20)
    assert tree.overdue(36, 36) == [Silent("a", 16)]
    assert tree.overdue(50, 50)[0] == Lost("a", "it told nothing for 30 s")


def test_a_dead_line_is_no_dead_child() -> None:
    tree = tree_of("ident: a")
    begin(tree, "a")
    assert tree.overdue(15, 15, lambda ident: True) == [Silent("a", 15)]
    assert tree.overdue(30, 30, lambda ident: True) == [Cut("a")]
    assert tree.overdue(600, 600, lambda ident: True) == []
    tree.heard("a", 620)  # the line came back
    assert tree.overdue(630, 630) == []
    assert tree.overdue(650, 650, lambda ident: True) == [Cut("a")]
    assert tree.overdue(660, 660)[0] == Lost("a", "it told nothing for 40 s")  # what was sent to it has been taken


def test_a_dead_line_that_stays_dead_is_waited_for_no_longer_than_a_closed_one() -> None:
    tree = tree_of("ident: a")
    begin(tree, "a")
    assert tree.overdue(30, 30, lambda ident: True) == [Cut("a")]
    assert tree.overdue(629, 629, lambda ident: True) == []
    assert tree.overdue(630, 630, lambda ident: True)[0] == Lost("a", "it was not connected for 600 s")


def test_a_dead_line_is_waited_for_longer_by_who_did_not_listen() -> None:
    tree = tree_of("ident: a")
    begin(tree, "a")
    assert tree.overdue(30, 30, lambda ident: True) == [Cut("a")]
    tree.stood_still(3000)
    assert tree.overdue(3629, 3629, lambda ident: True) == []
    assert tree.overdue(3630, 3630, lambda ident: True)[0] == Lost("a", "it was not connected for 600 s")


def test_who_did_not_listen_finds_nobody_silent() -> None:
    tree = tree_of("ident: a", "ident: b", "ident: c")
    for ident in "abc":
        begin(tree, ident)
    tree.gone("b", 0)
    tree.process_ended("c", 0)
    tree.stood_still(3000)
    assert tree.overdue(3001, 3001) == []
    assert [act.ident for act in tree.overdue(3002, 3002) if isinstance(act, Lost)] == ["c"]
    assert [act.ident for act in tree.overdue(3030, 3030) if isinstance(act, Lost)] == ["a"]
    assert [act.ident for act in tree.overdue(3600, 3600) if isinstance(act, Lost)] == ["b"]


def test_without_its_socket_a_child_has_the_time_to_resume() -> None:
    tree = tree_of("ident: a")
    begin(tree, "a")
    tree.gone("a", 10)
    assert tree.overdue(600, 600) == []
    tree.register("a", "h:2", 605, 605)  # back
    assert tree.overdue(612, 612) == []
    tree.gone("a", 620)
    tree.gone("a", 900)  # another line that was dead for long
    assert tree.overdue(1219, 1219) == []
    assert tree.overdue(1220, 1220)[0] == Lost("a", "it was not connected for 600 s")


def test_a_process_that_ended_without_a_word_is_lost_soon() -> None:
    tree = tree_of("ident: a")
    begin(tree, "a")
    tree.process_ended("a", 5)
    assert tree.overdue(6.9, 6.9) == []
    assert tree.overdue(7, 7)[0] == Lost("a", "its process ended, and it did not say how")


def test_a_lost_child_is_tried_again_as_often_as_it_says() -> None:
    tree = tree_of("ident: a, retries: 1")
    begin(tree, "a")
    tree.process_ended("a", 0)
    why = "its process ended, and it did not say how"
    assert tree.overdue(2, 2) == [Lost("a", why), Again("a", 1, why)]
    assert ready(tree) == ["a"]
    begin(tree, "a", now=3)
    assert tree.kids["a"].attempt == 2
    tree.process_ended("a", 3)
    assert tree.overdue(5, 5) == [Lost("a", why), Ended("a", why)]
    assert tree.summary().jobs == Sums(1, 0, 0, 1)


def test_failures_are_tried_again_only_where_that_is_said() -> None:
    tree = tree_of("ident: a, retries: 1")
    begin(tree, "a")
    assert end(tree, "a", passed=False) == [Ended("a", None)]
    tree = tree_of("ident: a, retries: 1", retry_on=("fail",))
    begin(tree, "a")
    assert end(tree, "a", passed=False) == [Again("a", 1, "it ended with code 1")]
    tree = tree_of("ident: a, retries: 1", retry_on=("timeout",))
    begin(tree, "a")
    assert end(tree, "a", passed=False, code=124) == [Again("a", 1, "it ended with code 124")]


def test_stopped_what_has_not_begun_is_aborted() -> None:
    tree = tree_of("ident: a", "ident: b", "ident: c, on_pass: [a]")
    begin(tree, "a")
    acts = tree.stop(1)
    assert {act.ident for act in acts} == {"b", "c"}
    assert ready(tree) == []
    assert list(tree.live) == ["a"]
    end(tree, "a", passed=False, code=255)
    assert tree.is_done
    assert tree.result == "FAILURE"
    assert tree.kids["b"].result == "ABORTED"
    assert tree.kids["b"].tell({}).result == "UNKNOWN"  # the seed has no other word
    assert not tree.kids["b"].pruned


def test_who_says_that_it_was_aborted_has_failed_in_the_words_of_the_seed() -> None:
    tree = tree_of("ident: a")
    begin(tree, "a")
    tree.complete("a", "ABORTED", 255, Summary(), 1, 1)
    assert tree.kids["a"].numbers == (3, 3)
    assert tree.kids["a"].tell({}).result == "FAILURE"


def test_a_stop_behind_the_end_changes_nothing() -> None:
    tree = tree_of("ident: a")
    begin(tree, "a")
    end(tree, "a")
    assert tree.stop(1) == []
    assert tree.result == "SUCCESS"


def test_the_seed_is_told_a_pruned_child_as_complete_and_unknown() -> None:
    tree = tree_of("ident: a", "ident: b, on_fail: [a]")
    begin(tree, "a")
    end(tree, "a")
    told = tree.kids["b"].tell({})
    assert (told.state, told.result, told.pruned, told.started) == ("COMPLETE", "UNKNOWN", True, 0)
    assert tree.kids["b"].numbers == (3, 3)
