"""The sessions of the lab's Drill admin, as transcripts: what users ask (U>), agents are told (A<) and say (A>)."""

import json

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.core.head import HttpError
from agent.lab.drillwire import (
    AstEntity,
    CoverageDataPart,
    ExecClassData,
    Init,
    InitDataPart,
    Initialized,
    Method,
    SyncMessage,
    read_action,
    read_frame,
)
from agent.lab.test2code import GRACE_S, MAX_ENDED, MAX_SESSIONS, Plugin, Totals, flags_of
from tests.test_lab_drillwire import framed


def classes(**probes: int) -> tuple[AstEntity, ...]:
    return tuple(
        AstEntity(".", name, (Method("f", (), "", tuple(range(count)), count, ""),)) for name, count in probes.items()
    )


def announced(**probes: int) -> Plugin:
    plugin = Plugin("1.4.2")
    announce(plugin, **probes)
    return plugin


def announce(plugin: Plugin, **probes: int) -> None:
    plugin.hear(Init(len(probes), "", True), 0.0)
    plugin.hear(InitDataPart(classes(**probes)), 0.0)
    plugin.hear(Initialized(""), 0.0)


def play(plugin: Plugin, transcript: str) -> None:
    """`P> s1 ./a 10 t1`: a part; `T> 0.5`: so many seconds later; `S> s1 active 1 1 0 2`: what became of a session.

    That is its state, parts, objects, flushes and the probes reached.
    """
    now, due = 0.0, ""
    for line in filter(None, map(str.strip, transcript.splitlines())):
        mark, text = line[:2], line[3:]
        match mark:
            case "U>":
                assert not due, f"not expected before {line!r}: {due}"
                try:
                    told = msgspec.to_builtins(plugin.carry_out(read_action(text.encode())))
                    due = f"A< {told['type']} {' '.join(map(json.dumps, told.get('payload', {}).values()))}".rstrip()
                except HttpError as err:
                    due = f"U< {err.status}"
            case "A<" | "U<":
                assert line == due
                due = ""
            case "A>":
                message = read_frame(framed(json.loads(text)))[1]
                assert message is not None
                plugin.hear(message, now)
            case "P>":
                ident, *rest = text.split()
                rows = zip(rest[::3], rest[1::3], rest[2::3], strict=True)
                data = [ExecClassData(name, [flag == "1" for flag in flags], test) for name, flags, test in rows]
                plugin.hear(CoverageDataPart(ident, data), now)
            case "T>":
                now += float(text)
                plugin.settle(now)
            case "S>":
                ident = text.split()[0]
                one = plugin.sessions[ident]
                assert text == f"{ident} {one.state} {one.parts} {one.objects} {one.flushes} {one.totals.covered}"
    assert not due


def test_the_flow_of_the_seed() -> None:
    play(
        announced(a=2, b=3),
        """
        U> {"type":"START","payload":{"sessionId":"s1","testType":"AUTO","isRealtime":true}}
        A< START_AGENT_SESSION "s1" "AUTO" null true false
        A> {"type":"SESSION_STARTED","sessionId":"s1","testType":"AUTO","isRealtime":true,"ts":1}
        P> s1 ./a 10 t1
        S> s1 active 1 1 0 0
        A> {"type":"SESSION_CHANGED","sessionId":"s1","probeCount":1}
        S> s1 active 1 1 1 1
        P> s1 ./a 11 t1 ./b 101 t2
        A> {"type":"SESSION_CHANGED","sessionId":"s1","probeCount":2}
        U> {"type":"STOP","payload":{"sessionId":"s1"}}
        A< STOP "s1"
        P> s1 ./b 010 t2
        A> {"type":"SESSION_FINISHED","sessionId":"s1","ts":2}
        S> s1 finishing 3 4 2 4
        T> 0.4
        S> s1 finishing 3 4 2 4
        T> 0.1
        S> s1 finished 3 4 2 5
        U> {"type":"STOP","payload":{"sessionId":"s1"}}
        U< 404
        """,
    )


def test_the_exception_flow_of_the_seed() -> None:
    plugin = announced(a=2)
    play(
        plugin,
        """
        U> {"type":"START","payload":{"sessionId":"s1"}}
        A< START_AGENT_SESSION "s1" "MANUAL" null false false
        P> s1 ./a 10 t1
        U> {"type":"CANCEL","payload":{"sessionId":"s1"}}
        A< CANCEL "s1"
        P> s1 ./a 10 t1
        A> {"type":"SESSION_CANCELLED","sessionId":"s1","ts":2}
        S> s1 cancelled 1 1 0 0
        U> {"type":"CANCEL","payload":{"sessionId":"s1"}}
        U< 404
        U> {"type":"START","payload":{"sessionId":"s1"}}
        A< START_AGENT_SESSION "s1" "MANUAL" null false false
        """,
    )
    assert plugin.unknown == 1


def test_all_sessions_at_once() -> None:
    play(
        announced(a=2),
        """
        U> {"type":"STOP_ALL"}
        A< STOP_ALL
        A> {"type":"SESSIONS_FINISHED","ids":[],"ts":2}
        U> {"type":"START","payload":{"sessionId":"s1","isGlobal":true,"testName":"smoke"}}
        A< START_AGENT_SESSION "s1" "MANUAL" "smoke" false true
        U> {"type":"START","payload":{"sessionId":"s1"}}
        U< 409
        U> {"type":"START","payload":{"sessionId":"s2","isGlobal":true}}
        U< 409
        U> {"type":"START","payload":{"sessionId":"s2"}}
        A< START_AGENT_SESSION "s2" "MANUAL" null false false
        A> {"type":"SESSIONS_FINISHED","ids":["s1","s2","s3"],"ts":2}
        T> 0.5
        S> s1 finished 0 0 0 0
        S> s2 finished 0 0 0 0
        U> {"type":"START","payload":{"sessionId":"s1"}}
        U< 409
        U> {"type":"START","payload":{"sessionId":"s3","isGlobal":true}}
        A< START_AGENT_SESSION "s3" "MANUAL" null false true
        U> {"type":"CANCEL_ALL"}
        A< CANCEL_ALL
        A> {"type":"SESSIONS_CANCELLED","ids":["s3"],"ts":2}
        S> s3 cancelled 0 0 0 0
        S> s2 finished 0 0 0 0
        """,
    )


def test_a_session_that_the_agent_drops_is_over() -> None:
    play(
        announced(a=2),
        """
        U> {"type":"START","payload":{"sessionId":"s1"}}
        A< START_AGENT_SESSION "s1" "MANUAL" null false false
        P> s1 ./a 10 t1
        A> {"type":"SESSION_CANCELLED","sessionId":"s1","ts":2}
        S> s1 cancelled 1 1 0 0
        U> {"type":"STOP","payload":{"sessionId":"s1"}}
        U< 404
        U> {"type":"START","payload":{"sessionId":"s1"}}
        A< START_AGENT_SESSION "s1" "MANUAL" null false false
        A> {"type":"SESSIONS_CANCELLED","ids":["s1","s2"],"ts":2}
        S> s1 cancelled 0 0 0 0
        """,
    )


def test_a_session_has_room_for_so_many_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.lab.test2code.MAX_ENTRIES", 2)
    plugin = announced(a=1)
    plugin.carry_out(read_action(b'{"type":"START","payload":{"sessionId":"s1"}}'))
    for test in "tuvt":
        plugin.hear(CoverageDataPart("s1", [ExecClassData("./a", [True], test)]), 0.0)
    session = plugin.sessions["s1"]
    assert (sorted(test for _, test in session.reached), session.strange) == (["t", "u"], 1)


def test_data_and_tests_of_others_go_through() -> None:
    play(
        announced(),
        """
        U> {"type":"ADD_SESSION_DATA","payload":{"sessionId":"s1","data":"{}"}}
        U< 404
        U> {"type":"START","payload":{"sessionId":"s1"}}
        A< START_AGENT_SESSION "s1" "MANUAL" null false false
        U> {"type":"ADD_SESSION_DATA","payload":{"sessionId":"s1","data":"{}"}}
        A< ADD_SESSION_DATA "s1" "{}"
        U> {"type":"ADD_TESTS","payload":{"sessionId":"s1","tests":[{"id":"7"}]}}
        A< ADD_SESSION_TESTS "s1" [{"id": "7"}]
        """,
    )


def test_an_empty_id_becomes_a_uuid() -> None:
    plugin = announced()
    plugin.carry_out(read_action(b'{"type":"START"}'))
    plugin.carry_out(read_action(b'{"type":"START","payload":{"sessionId":""}}'))
    assert [len(ident) for ident in plugin.sessions] == [36, 36]


def test_late_data_counts_within_the_grace_alone() -> None:
    plugin = announced(a=2)
    play(
        plugin,
        """
        U> {"type":"START","payload":{"sessionId":"s1"}}
        A< START_AGENT_SESSION "s1" "MANUAL" null false false
        A> {"type":"SESSION_FINISHED","sessionId":"s1","ts":2}
        P> s1 ./a 10 t1
        T> 0.5
        S> s1 finished 1 1 0 1
        P> s1 ./a 11 t1
        S> s1 finished 1 1 0 1
        """,
    )
    assert plugin.sessions["s1"].late == 2


def test_what_does_not_fit_the_announcement_is_counted_and_not_merged() -> None:
    plugin = announced(a=2)
    plugin.carry_out(read_action(b'{"type":"START","payload":{"sessionId":"s1"}}'))
    data = [
        ExecClassData(name, probes, "t") for name, probes in (("./a", [True]), ("./b", [True]), ("./a", [True] * 2))
    ]
    plugin.hear(CoverageDataPart("s1", data), 0.0)
    session = plugin.sessions["s1"]
    assert (session.strange, session.objects) == (2, 3)
    assert plugin.reached([session])["./a"].bit_count() == 2


def test_a_class_with_other_probes_is_forgotten_and_one_with_the_same_is_kept() -> None:
    plugin = announced(a=2, b=2)
    plugin.carry_out(read_action(b'{"type":"START","payload":{"sessionId":"s1"}}'))
    plugin.hear(CoverageDataPart("s1", [ExecClassData(name, [True, True], "t") for name in ("./a", "./b")]), 0.0)
    announce(plugin, a=1, b=2)
    session = plugin.sessions["s1"]
    assert list(plugin.reached([session])) == ["./b"]


def test_an_agent_has_so_many_sessions_at_a_time() -> None:
    plugin = announced()
    for number in range(MAX_SESSIONS):
        plugin.carry_out(read_action(b'{"type":"START","payload":{"sessionId":"s%d"}}' % number))
    with pytest.raises(HttpError, match="409: 64 sessions are active, which is the limit: end one of them first"):
        plugin.carry_out(read_action(b'{"type":"START","payload":{}}'))
    plugin.carry_out(read_action(b'{"type":"CANCEL","payload":{"sessionId":"s7"}}'))
    plugin.carry_out(read_action(b'{"type":"START","payload":{}}'))


def test_an_agent_has_so_many_sessions_of_a_lab_that_was_restarted() -> None:
    plugin = announced()
    for begin in range(0, 200, 50):
        plugin.hear(SyncMessage(tuple(f"s{number}" for number in range(begin, begin + 50))), 0.0)
    assert list(plugin.sessions) == [f"s{number}" for number in range(MAX_SESSIONS)]


def test_ended_sessions_are_kept_up_to_a_number() -> None:
    plugin = announced()
    for number in range(MAX_ENDED + 3):
        plugin.carry_out(read_action(b'{"type":"START","payload":{"sessionId":"s%d"}}' % number))
        plugin.carry_out(read_action(b'{"type":"CANCEL_ALL"}'))
    assert len(plugin.sessions) == MAX_ENDED + 1
    assert "s0" not in plugin.sessions


@given(
    st.lists(st.tuples(st.sampled_from("ab"), st.lists(st.booleans(), min_size=9, max_size=9), st.text()), min_size=1)
)
def test_what_is_reached_is_the_or_of_all_that_was_said(said: list[tuple[str, list[bool], str]]) -> None:
    plugin = announced(a=9, b=9)
    plugin.carry_out(read_action(b'{"type":"START","payload":{"sessionId":"s1"}}'))
    for name, probes, test in said:
        plugin.hear(CoverageDataPart("s1", [ExecClassData(f"./{name}", probes, test)]), 0.0)
    session = plugin.sessions["s1"]
    merged = {f"./{name}": [any(flags) for flags in zip(*of, strict=True)] for name, of in _by_class(said).items()}
    assert {name: flags_of(flags, 9) for name, flags in plugin.reached([session]).items()} == merged
    plugin.hear(read_frame(framed({"type": "SESSION_FINISHED", "sessionId": "s1", "ts": 1}))[1], 0.0)  # type: ignore[arg-type]
    plugin.settle(GRACE_S)
    assert session.totals == Totals(sum(map(any, merged.values())), sum(map(sum, merged.values())))
    assert session.tests.keys() == {test for _, _, test in said}


def _by_class(said: list[tuple[str, list[bool], str]]) -> dict[str, list[list[bool]]]:
    return {name: [probes for of, probes, _ in said if of == name] for name in {of for of, _, _ in said}}
