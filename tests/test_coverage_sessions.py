"""The Drill agent's state machine, by the sheet's tables: each message of the seed in and out, as transcripts."""

import json
from collections import defaultdict

import pytest

from agent.coverage.catalog import Delta
from agent.coverage.messages import read_asked
from agent.coverage.sessions import Part, Say
from tests.drill_transcripts import Played, action, enabled, message, told, unit


def test_attach_register_load_and_enable() -> None:
    played = Played("./a.js", "src/b.js")
    assert played.link == "offline"
    played.play(
        """
        attach
        A> /agent/logging/update-config {"level":"DEBUG"}
        => ack /agent/logging/update-config
        A> /agent/change-header-name drill-test-name
        => ack /agent/change-header-name
        """
    )
    assert played.link == "attached"
    played.play(
        """
        A> /agent/set-packages-prefixes {"packagesPrefixes":[]}
        => ack /agent/set-packages-prefixes
        A> /agent/load {"meta":{"id":"test2code","more":1},"data":[1,2,3]}
        => ack /agent/plugin/test2code/loaded
        => ack /agent/load
        """
    )
    assert played.link == "loaded"
    played.play(
        """
        A> /agent/load-classes-data
        => ack /agent/load-classes-data
        A> /plugin/togglePlugin {"pluginId":"test2code","forceValue":true}
        => INIT {"classesCount":2,"message":"2 classes follow","init":true}
        => classes ./a.js src/b.js
        => INITIALIZED {"msg":"all classes are told"}
        => ping 1
        => ack /agent/plugin/test2code/toggle
        => ack /plugin/togglePlugin
        """
    )
    assert played.link == "enabled"


def test_the_seeds_flow_step_by_step() -> None:
    played = enabled("./a.js", "./b.js")
    played.play(
        """
        A> START_AGENT_SESSION {"sessionId":"s1","testType":"AUTO","testName":null,"isRealtime":true} k1
        C>
        => running s1
        => SESSION_STARTED {"sessionId":"s1","testType":"AUTO","isRealtime":true}
        => ack /plugin/action/k1
        => ack /plugin/action
        + 1.9
        C> ./a.js 1 t1.test.js
        + 0.1
        C> ./a.js 001 t1.test.js, ./b.js 11 t2.test.js
        => part s1 ./a.js 101 t1.test.js, ./b.js 11 t2.test.js
        => SESSION_CHANGED {"sessionId":"s1","probeCount":2}
        => ping 1
        pong 1
        + 2
        C> ./a.js 1 t1.test.js
        + 2
        C> ./a.js 01 t1.test.js
        => part s1 ./a.js 111 t1.test.js
        => SESSION_CHANGED {"sessionId":"s1","probeCount":1}
        => ping 2
        A> STOP {"sessionId":"s1"} k2
        => stopping s1
        C> ./b.js 001 t2.test.js
        => owed s1
        => part s1 ./b.js 111 t2.test.js
        => SESSION_FINISHED {"sessionId":"s1"}
        => ping 3
        => ack /plugin/action/k2
        => ack /plugin/action
        pong 3
        => done s1
        """
    )
    assert not played.machine.sessions


def test_the_seeds_exception_flow_cancel_instead_of_stop() -> None:
    played = enabled("./a.js")
    played.play(
        """
        A> START_AGENT_SESSION {"sessionId":"s1","testType":"MANUAL","isRealtime":false,"isGlobal":true}
        C>
        => running s1
        => SESSION_STARTED {"sessionId":"s1","testType":"MANUAL","isRealtime":false}
        => ack /plugin/action
        C> ./a.js 1 t1.test.js
        A> CANCEL {"sessionId":"s1"} k3
        => cancelled s1
        => SESSION_CANCELLED {"sessionId":"s1"}
        => ack /plugin/action/k3
        => ack /plugin/action
        + 5
        C> ./a.js 1 t1.test.js
        A> CANCEL {"sessionId":"nobody"}
        => SESSION_CANCELLED {"sessionId":"nobody"}
        => ack /plugin/action
        """
    )


def started(played: Played, *names: str, **payload: object) -> Played:
    for name in names:
        tree = {"sessionId": name, "testType": "AUTO", "isRealtime": False, "isGlobal": False} | payload
        played.machine.do(read_asked(action("START_AGENT_SESSION", tree)), played.now)
    played.does("C>")
    return played


def test_without_realtime_no_session_changed_and_nothing_is_sent_when_nothing_was_gained() -> None:
    started(enabled("./a.js"), "s1").play(
        """
        + 2
        C> ./a.js 1 t1.test.js
        => part s1 ./a.js 1 t1.test.js
        => ping 1
        + 2
        C> ./a.js 1 t1.test.js
        + 2
        C>
        """
    )


def test_a_covered_process_may_be_a_period_behind_at_a_stop() -> None:
    played = started(enabled("./a.js"), "s1")
    played.play(
        """
        alive
        A> STOP {"sessionId":"s1"} k2
        => stopping s1
        + 1.0
        C> ./a.js 1 t1.test.js
        """
    )
    assert played.machine.due() == pytest.approx(played.now + 0.1)
    assert not played.machine.final(played.now)
    played.now = played.machine.due()
    assert played.machine.final(played.now)
    played.play(
        """
        C> ./a.js 01 t1.test.js
        => owed s1
        => part s1 ./a.js 11 t1.test.js
        => SESSION_FINISHED {"sessionId":"s1"}
        => ping 1
        => ack /plugin/action/k2
        => ack /plugin/action
        """
    )


def test_stop_all_says_one_word_for_all_and_also_for_none() -> None:
    started(enabled("./a.js"), "s1", "s2").play(
        """
        A> STOP_ALL
        => stopping s1
        => stopping s2
        C> ./a.js 1 t1.test.js
        => owed s1
        => owed s2
        => part s1 ./a.js 1 t1.test.js
        => part s2 ./a.js 1 t1.test.js
        => SESSIONS_FINISHED {"ids":["s1","s2"]}
        => ping 1
        => ack /plugin/action
        pong 1
        => done s1
        => done s2
        A> STOP_ALL
        => SESSIONS_FINISHED {"ids":[]}
        => ack /plugin/action
        """
    )


def test_cancel_all_and_the_scope_that_cancels_silently() -> None:
    played = started(enabled("./a.js"), "s1", "s2")
    played.play(
        """
        A> CANCEL_ALL
        => cancelled s1
        => cancelled s2
        => SESSIONS_CANCELLED {"ids":["s1","s2"]}
        => ack /plugin/action
        A> CANCEL_ALL
        => SESSIONS_CANCELLED {"ids":[]}
        => ack /plugin/action
        """
    )
    started(played, "s3").play(
        """
        A> INIT_ACTIVE_SCOPE {"id":"i","name":"n","prevId":"p"} k5
        => cancelled s3
        => SCOPE_INITIALIZED {"id":"i","name":"n","prevId":"p"}
        => ack /plugin/action/k5
        => ack /plugin/action
        """
    )


def test_unknown_ids_are_answered_and_a_known_one_is_not_started_twice() -> None:
    played = started(enabled("./a.js"), "s1")
    played.does("C> ./a.js 1 t1.test.js")
    played.play(
        """
        A> STOP {"sessionId":"nobody"} k1
        => SESSION_FINISHED {"sessionId":"nobody"}
        => ack /plugin/action/k1
        => ack /plugin/action
        A> START_AGENT_SESSION {"sessionId":"s1","testType":"OTHER","isRealtime":"true","isGlobal":"false"}
        => SESSION_STARTED {"sessionId":"s1","testType":"AUTO","isRealtime":false}
        => ack /plugin/action
        + 2
        C>
        => part s1 ./a.js 1 t1.test.js
        => ping 1
        """
    )


def test_a_session_that_is_started_once_more_is_told_whole_once_more() -> None:
    """By an admin that was restarted, and has nothing of it."""
    played = started(enabled("./a.js"), "s1")
    played.does("C> ./a.js 1 t1.test.js")
    played.play(
        """
        + 2
        C>
        => part s1 ./a.js 1 t1.test.js
        => ping 1
        pong 1
        A> START_AGENT_SESSION {"sessionId":"s1","testType":"AUTO","isRealtime":false,"isGlobal":false}
        => SESSION_STARTED {"sessionId":"s1","testType":"AUTO","isRealtime":false}
        => ack /plugin/action
        + 2
        C>
        => part s1 ./a.js 1 t1.test.js
        => ping 2
        """
    )


def test_a_start_that_comes_twice_at_once_and_a_stop_meanwhile() -> None:
    enabled("./a.js").play(
        """
        A> START_AGENT_SESSION {"sessionId":"s1","testType":"AUTO"} k1
        A> START_AGENT_SESSION {"sessionId":"s1","testType":"AUTO"} k2
        A> STOP {"sessionId":"s1"} k3
        C> ./a.js 1 too-early
        => running s1
        => SESSION_STARTED {"sessionId":"s1","testType":"AUTO","isRealtime":false}
        => ack /plugin/action/k1
        => ack /plugin/action
        => SESSION_STARTED {"sessionId":"s1","testType":"AUTO","isRealtime":false}
        => ack /plugin/action/k2
        => ack /plugin/action
        => stopping s1
        => owed s1
        => empty s1
        => SESSION_FINISHED {"sessionId":"s1"}
        => ping 1
        => ack /plugin/action/k3
        => ack /plugin/action
        """
    )


def test_a_cancel_while_stopping_ends_the_wait_of_the_stop() -> None:
    played = started(enabled("./a.js"), "s1")
    played.does("C> ./a.js 1 t1.test.js")
    played.play(
        """
        alive
        A> STOP {"sessionId":"s1"} k1
        => stopping s1
        A> CANCEL {"sessionId":"s1"} k2
        => cancelled s1
        => ack /plugin/action/k1
        => ack /plugin/action
        => SESSION_CANCELLED {"sessionId":"s1"}
        => ack /plugin/action/k2
        => ack /plugin/action
        + 5
        C> ./a.js 01 t1.test.js
        """
    )


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        ("finished", ['SESSION_FINISHED {"sessionId":"s1"}']),
        ("sessions-finished", ['SESSIONS_FINISHED {"ids":["s1"]}']),
        ("both", ['SESSION_FINISHED {"sessionId":"s1"}', 'SESSIONS_FINISHED {"ids":["s1"]}']),
    ],
)
def test_the_word_at_the_end_of_a_stop_is_a_setting(reply: str, words: list[str]) -> None:
    played = started(enabled("./a.js", stop_reply=reply), "s1")
    played.does('A> STOP {"sessionId":"s1"}')
    said = [told(act) for act in played.does("C> ./a.js 1")]
    assert [word for word in said if "FINISHED" in word] == words


def test_quoted_values_unknown_topics_and_actions_are_acknowledged() -> None:
    played = enabled("./a.js")
    played.play(
        """
        A> START_AGENT_SESSION {"sessionId":"s1","testType":"AUTO","isRealtime":"true","isGlobal":"true"} k1
        C>
        => running s1
        => SESSION_STARTED {"sessionId":"s1","testType":"AUTO","isRealtime":true}
        => ack /plugin/action/k1
        => ack /plugin/action
        A> DANCE {"sessionId":"s1"} k2
        => ack /plugin/action/k2
        => ack /plugin/action
        A> STOP {} k3
        => ack /plugin/action/k3
        => ack /plugin/action
        A> ADD_SESSION_TESTS {"sessionId":"s1","tests":[]}
        => ack /plugin/action
        A> /plugin/action no JSON
        => ack /plugin/action
        A> /plugin/action {"id":"other","message":"{}","confirmationKey":"k4"}
        => ack /plugin/action/k4
        => ack /plugin/action
        A> /no/such/topic whatever
        => ack /no/such/topic
        A> /agent/load [
        => ack /agent/load
        A> /agent/load {"meta":{"id":"other"}}
        => ack /agent/load
        A> /plugin/togglePlugin {"pluginId":"other"}
        => ack /plugin/togglePlugin
        A> /plugin/togglePlugin 7
        => ack /plugin/togglePlugin
        A> /plugin/updatePluginConfig {}
        => ack /plugin/updatePluginConfig
        A> /agent/toggle {}
        => ack /agent/toggle
        A> /agent/update-config {}
        => ack /agent/update-config
        A> /agent/update-parameters {}
        => ack /agent/update-parameters
        """
    )
    assert played.link == "enabled"
    assert played.machine.do(read_asked("no frame"), 0) == []
    assert played.machine.do(read_asked('{"type":"MESSAGE_DELIVERED","destination":"/x"}'), 0) == []


def test_the_state_names_running_and_owed_sessions() -> None:
    played = started(enabled("./a.js"), "s1", "s2")
    for line in ('A> STOP {"sessionId":"s1"}', "C>"):
        played.does(line)
    played.play(
        """
        A> /plugin/state
        => SYNC_MESSAGE {"activeSessions":["s1","s2"]}
        => ack /plugin/state
        """
    )


def test_toggled_off_all_are_cancelled_and_a_toggle_without_value_flips() -> None:
    started(enabled("./a.js"), "s1").play(
        """
        A> /plugin/togglePlugin {"pluginId":"test2code"}
        => cancelled s1
        => SESSIONS_CANCELLED {"ids":["s1"]}
        => ack /agent/plugin/test2code/toggle
        => ack /plugin/togglePlugin
        A> /plugin/togglePlugin {"pluginId":"test2code"}
        => INIT {"classesCount":1,"message":"1 classes follow","init":true}
        => classes ./a.js
        => INITIALIZED {"msg":"all classes are told"}
        => ping 1
        => ack /agent/plugin/test2code/toggle
        => ack /plugin/togglePlugin
        """
    )


@pytest.mark.parametrize(
    ("topic", "link"),
    [("/plugin/unload", "attached"), ("/agent/unload", "attached"), ("/plugin/resetPlugin", "enabled")],
)
def test_unload_and_reset_cancel_all(topic: str, link: str) -> None:
    played = started(enabled("./a.js"), "s1")
    played.play(
        f"""
        A> {topic} test2code
        => cancelled s1
        => ack {topic}
        """
    )
    assert played.link == link


def test_after_a_toggle_on_all_entries_are_told_again() -> None:
    played = started(enabled("./a.js", "./b.js"), "s1", isRealtime=True)
    played.play(
        """
        + 2
        C> ./a.js 1 t1.test.js
        => part s1 ./a.js 1 t1.test.js
        => SESSION_CHANGED {"sessionId":"s1","probeCount":1}
        => ping 1
        pong 1
        A> /plugin/togglePlugin {"pluginId":"test2code","forceValue":"true"}
        => INIT {"classesCount":2,"message":"2 classes follow","init":true}
        => classes ./a.js ./b.js
        => INITIALIZED {"msg":"all classes are told"}
        => ping 2
        => ack /agent/plugin/test2code/toggle
        => ack /plugin/togglePlugin
        => part s1 ./a.js 1 t1.test.js
        => SESSION_CHANGED {"sessionId":"s1","probeCount":1}
        => ping 3
        """
    )


def test_data_that_others_collected_is_mapped_and_merged() -> None:
    played = started(enabled("./a.js"), "s1")
    played.play(
        """
        A> ADD_SESSION_DATA {"sessionId":"s1","data":"profile"} k1
        => map s1 profile
        A> ADD_SESSION_DATA {"sessionId":"s2","data":"profile"} k2
        => warning s2 ADD_SESSION_DATA for a session that is not open; its data is dropped
        => ack /plugin/action/k2
        => ack /plugin/action
        """
    )
    (mapped,) = played.maps
    acts = played.machine.added(mapped, [Delta("./a.js", 0b101, "manual")])
    assert [told(act) for act in acts] == ["ack /plugin/action/k1", "ack /plugin/action"]
    played.play(
        """
        + 2
        C>
        => part s1 ./a.js 101 manual
        => ping 1
        A> ADD_SESSION_DATA {"sessionId":"s1","data":"x"}
        => map s1 x
        """
    )
    assert [told(act) for act in played.machine.added(played.maps[1], [], "no V8 profile")] == [
        "warning s1 ADD_SESSION_DATA: no V8 profile", "ack /plugin/action",
    ]  # fmt: skip


def test_a_cut_link_makes_dirty_what_no_pong_has_proved() -> None:
    played = started(enabled("./a.js", "./b.js"), "s1")
    played.play(
        """
        + 2
        C> ./a.js 1 t1.test.js
        => part s1 ./a.js 1 t1.test.js
        => ping 1
        pong 1
        + 2
        C> ./b.js 1 t1.test.js
        => part s1 ./b.js 1 t1.test.js
        => ping 2
        cut
        + 2
        C> ./b.js 01 t2.test.js
        attach
        => part s1 ./b.js 1 t1.test.js, ./b.js 01 t2.test.js
        => ping 3
        """
    )
    assert played.link == "enabled"


def test_a_link_cut_right_after_the_stop_owes_data_and_end() -> None:
    played = started(enabled("./a.js"), "s1", "s2", "s3")
    played.play(
        """
        A> STOP {"sessionId":"s1"} k1
        => stopping s1
        C> ./a.js 1 t1.test.js
        => owed s1
        => part s1 ./a.js 1 t1.test.js
        => SESSION_FINISHED {"sessionId":"s1"}
        => ping 1
        => ack /plugin/action/k1
        => ack /plugin/action
        A> STOP_ALL
        => stopping s2
        => stopping s3
        cut
        C> ./a.js 01 t1.test.js
        => owed s2
        => owed s3
        attach
        => part s1 ./a.js 1 t1.test.js
        => SESSION_FINISHED {"sessionId":"s1"}
        => ping 2
        => part s2 ./a.js 11 t1.test.js
        => part s3 ./a.js 11 t1.test.js
        => SESSIONS_FINISHED {"ids":["s2","s3"]}
        => ping 3
        pong 2
        => done s1
        pong 3
        => done s2
        => done s3
        """
    )


def test_a_stop_of_a_session_that_is_owed_is_answered_again_at_once() -> None:
    played = started(enabled("./a.js"), "s1")
    for line in ('A> STOP {"sessionId":"s1"}', "C> ./a.js 1 t1.test.js"):
        played.does(line)
    played.play(
        """
        A> STOP {"sessionId":"s1"} k2
        => SESSION_FINISHED {"sessionId":"s1"}
        => ping 2
        => ack /plugin/action/k2
        => ack /plugin/action
        pong 1
        pong 2
        => done s1
        """
    )


def test_a_restart_of_the_agent_resumes_its_sessions_once_it_is_enabled_again() -> None:
    played = started(enabled("./a.js", "./b.js"), "s1", "s2")
    for line in ("C> ./a.js 1 t1.test.js", 'A> STOP {"sessionId":"s2"}', "cut", "C> ./b.js 1 t2.test.js"):
        played.does(line)
    again = played.restarted()
    again.play(
        """
        C> ./b.js 01 t2.test.js
        attach
        A> STOP {"sessionId":"s2"} k9
        => ack /plugin/action/k9
        => ack /plugin/action
        A> /plugin/togglePlugin {"pluginId":"test2code","forceValue":true}
        => INIT {"classesCount":2,"message":"2 classes follow","init":true}
        => classes ./a.js ./b.js
        => INITIALIZED {"msg":"all classes are told"}
        => ping 1
        => ack /agent/plugin/test2code/toggle
        => ack /plugin/togglePlugin
        => part s1 ./a.js 1 t1.test.js, ./b.js 11 t2.test.js
        => ping 2
        => part s2 ./a.js 1 t1.test.js, ./b.js 1 t2.test.js
        => SESSION_FINISHED {"sessionId":"s2"}
        => ping 3
        pong 3
        => done s2
        """
    )


def test_the_65th_session_is_refused_and_said_so() -> None:
    played = started(enabled("./a.js"), *(f"s{n}" for n in range(64)))
    played.play(
        """
        A> START_AGENT_SESSION {"sessionId":"s64","testType":"AUTO"} k1
        => warning s64 64 sessions are open, which is the limit; this one is not started. Stop others first.
        => SESSION_CANCELLED {"sessionId":"s64"}
        => ack /plugin/action/k1
        => ack /plugin/action
        """
    )
    assert len(played.machine.sessions) == 64


def test_the_test_is_the_runners_file_else_the_sessions_name_else_unspecified() -> None:
    played = started(enabled("./a.js"), "named", testName="smoke")
    started(played, "nameless").play(
        """
        + 2
        C> ./a.js 1 t1.test.js, ./a.js 01
        => part named ./a.js 1 t1.test.js, ./a.js 01 smoke
        => part nameless ./a.js 1 t1.test.js, ./a.js 01 unspecified
        => ping 1
        """
    )


def test_a_full_store_gives_up_tests_first_then_refuses_classes() -> None:
    classes = [f"./{n}.js" for n in range(10)]
    played = started(enabled(*classes, max_pending=4 * 330), "s1")
    played.play(
        """
        + 2
        C> ./0.js 1 t1.test.js, ./0.js 01 t2.test.js, ./1.js 1 t1.test.js
        => part s1 ./0.js 1 t1.test.js, ./1.js 1 t1.test.js, ./0.js 01 t2.test.js
        => ping 1
        + 2
        C> ./2.js 1 t1.test.js, ./2.js 01 t2.test.js, ./1.js 1 t3.test.js
        => part s1 ./0.js 11 unspecified, ./1.js 1 unspecified, ./2.js 11 unspecified
        => ping 2
        + 2
        C> ./3.js 1 t1.test.js, ./4.js 1 t1.test.js, ./5.js 1 t1.test.js, ./0.js 001
        => lost s1 2 coverage.max_pending_mib is reached; tests were told apart no more, then new classes refused
        => part s1 ./3.js 1 unspecified, ./0.js 111 unspecified
        => ping 3
        + 2
        C> ./5.js 1 t1.test.js
        """
    )


def test_room_comes_back_when_a_session_is_over() -> None:
    played = started(enabled("./a.js", "./b.js", max_pending=400), "s1")
    played.does("C> ./a.js 1")
    played.does('A> CANCEL {"sessionId":"s1"}')
    started(played, "s2").play(
        """
        C> ./b.js 1
        + 2
        C>
        => part s2 ./b.js 1 unspecified
        => ping 1
        """
    )


def test_classes_that_are_found_later_are_announced_before_their_probes() -> None:
    played = started(enabled("./a.js"), "s1")
    played.play(
        """
        + 2
        C> ./a.js 1 t1.test.js, ./late.js 1 t1.test.js
        => part s1 ./a.js 1 t1.test.js
        => ping 1
        """
    )
    assert [told(act, played.first) for act in played.machine.announce([unit("./late.js")])] == [
        'INIT {"classesCount":2,"message":"2 classes follow","init":true}',
        "classes ./a.js ./late.js",
        'INITIALIZED {"msg":"all classes are told"}',
        "ping 2",
        "part s1 ./a.js 1 t1.test.js, ./late.js 1 t1.test.js",
        "ping 3",
    ]


def test_probes_of_a_file_that_was_changed_meanwhile_are_dropped_and_said() -> None:
    played = started(enabled("./a.js", "./b.js"), "s1")
    played.does("C> ./a.js 1 t1.test.js, ./b.js 1 t1.test.js, ./never.js 1 t1.test.js")
    acts = [told(act, 1) for act in played.machine.announce([unit("./a.js", checksum="c1"), unit("./b.js")])]
    assert acts[0] == "lost s1 1 their files were changed while the session was open"
    assert acts[-2:] == ["part s1 ./b.js 1 t1.test.js", "ping 2"]
    played.play(
        """
        A> STOP {"sessionId":"s1"}
        => stopping s1
        C>
        => owed s1
        => lost s1 1 their files are no part of the product as it is announced
        => SESSION_FINISHED {"sessionId":"s1"}
        => ping 3
        => ack /plugin/action
        pong 3
        => done s1
        """
    )


def test_classes_that_the_admin_may_not_have_read_are_loaded_and_announced_again() -> None:
    played = Played("./a.js")
    for line in ("attach", 'A> /agent/load {"meta":{"id":"test2code"}}', "A> /plugin/togglePlugin {}"):
        played.does(line)
    assert (played.link, played.machine.synced) == ("enabled", False)
    played.play(
        """
        cut
        attach
        """
    )
    assert played.link == "attached"
    played.does("A> /plugin/togglePlugin {}")
    played.does("pong 2")
    assert (played.link, played.machine.synced) == ("enabled", True)
    for line in ("cut", "attach"):
        played.does(line)
    assert (played.link, played.machine.synced) == ("enabled", True)


def test_another_build_is_loaded_anew() -> None:
    played = enabled("./a.js")
    played.does("cut")
    played.machine.new_build()
    played.play("attach")
    assert played.link == "attached"


def test_nothing_is_due_without_a_session_that_waits_for_it() -> None:
    played = enabled("./a.js")
    assert played.machine.due() == float("inf")
    started(played, "s1")
    assert played.machine.due() == played.now + 2
    played.now += 30
    started(played, "s2")
    played.does('A> STOP {"sessionId":"s1"}')
    assert played.machine.due() == played.now
    played.does("C>")
    assert played.machine.due() > played.now
    played.machine.flushed(played.now + 1)
    assert played.machine.due() == played.now + 3


def test_no_text_of_the_admin_breaks_the_machine() -> None:
    played = enabled("./a.js")
    for text in (json.dumps(None), "[]", "{}", message("", "x"), '{"type":7}', "\x00", b"\xff\xfe"):
        acts = played.machine.do(read_asked(text), 0)
        assert all(isinstance(act, Say) for act in acts)


def test_what_is_shown_of_a_session() -> None:
    played = started(enabled("./a.js"), "s1", testName="smoke")
    played.does("C> ./a.js 1")
    (shown,) = [session.shown() for session in played.machine.sessions.values()]
    assert (shown.session, shown.state, shown.test_name, shown.entries, shown.waiting) == (
        "s1",
        "running",
        "smoke",
        1,
        True,
    )


def test_a_session_that_has_seen_nothing_has_nothing_to_tell() -> None:
    played = started(enabled("./a.js"), "s1")
    played.does("+ 2")
    assert played.does("C>") == []
    (shown,) = [session.shown() for session in played.machine.sessions.values()]
    assert not shown.waiting


def test_parts_carry_what_their_entry_has_merged() -> None:
    played = started(enabled("./a.js"), "s1")
    seen = defaultdict[tuple[str, str], int](int)
    for n in range(6):
        played.now += 2
        for act in played.does(f"C> ./a.js {'0' * n}1 t1.test.js"):
            if isinstance(act, Part):
                for class_id, test, probes in (entry for batch in act.batches for entry in batch.entries()):
                    assert probes & seen[class_id, test] == seen[class_id, test]
                    seen[class_id, test] = probes
    assert seen == {("./a.js", "t1.test.js"): 0b111111}
