"""One run as a transcript: each state, each result, each cause of protocols/monitors.md."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.monitors.messages import Configured, Noise, Ready, Started, StepOk, parse
from agent.monitors.secrets import Redactor
from agent.monitors.session import STDERR_TAIL, TOLD_BURST, Act, Leave, StepEnded, Told, config_text, refused
from agent.monitors.settings import Monitor
from tests.monitor_transcripts import EPOCH, monitor, play, session

HANDSHAKE = """
    M> Started 1.1
    O> Version 1.1
    M> Ready
    O> Config {}
    M> Configured
"""


def test_the_recorded_run() -> None:
    play(
        session('{"ApiToken":"abc","Name":"h\\u00e9llo"}', steps=("Print",)),
        """
        M> Started 1.1
        O> Version 1.1
        M> Ready
        O> Config {"ApiToken":"abc","Name":"h\\u00e9llo"}
        M> Configured
        O> Run Step Print
        M> Log Debug Starting step Print
        => log debug Print: Starting step Print
        N> plain print to stdout
        => noise info Print: plain print to stdout
        M> Step Time 0.07949799999096285
        => Print ok 0.079498 ms by monitor
        => leave Exit 0 30
        M> Exit
        X> 0
        """,
    )


def test_steps_follow_each_other_and_are_timed_by_us_where_they_do_not_themselves() -> None:
    play(
        session(steps=("A", "B"), cleanup=True),
        HANDSHAKE
        + """
        O> Run Step A
        T> 0.5
        M> Step OK k=76616C7565,n=3432,plain=x-y
        => A ok 500 ms by orchestrator k=value,n=42.0,plain=x-y
        O> Run Step B
        M> Step Time status=200 12,5
        => B ok 12.5 ms by monitor status=200.0
        => leave Exit 1 30
        X> 0
        """,
    )


def test_a_number_that_is_too_great_for_json_stays_text() -> None:
    run = session()
    play(run, HANDSHAKE + "O> Run Step Ping")
    [ended, _] = run.feed([StepOk(metadata=f"n={'9' * 400}")], 2.5)
    assert isinstance(ended, StepEnded)
    assert ended.metadata == {"n": "9" * 400}


def test_times_are_those_of_the_wall_clock() -> None:
    run = session()
    play(run, HANDSHAKE + "O> Run Step Ping")
    [ended, _] = run.feed([StepOk()], 2.5)
    assert isinstance(ended, StepEnded)
    assert (ended.started_at, ended.ended_at, ended.ms) == (EPOCH, EPOCH + 2.5, 2500)


@pytest.mark.parametrize(
    ("said", "state"),
    [
        ("Step Error it is down", "=> A error: it is down"),
        ("Step Error code=503 it is down", "=> A error code=503.0: it is down"),
        ("Step Time NaN", "=> A protocol_error: Step Time NaN"),
        ("Step Time -3", "=> A protocol_error: Step Time -3"),
        ("Step Time 1 2 3", "=> A protocol_error: Step Time 1 2 3"),
        ("Step Time \u0661\u0662", "=> A protocol_error: Step Time \u0661\u0662"),
    ],
)
def test_after_a_failed_step_the_run_stops_or_goes_on_as_the_settings_say(said: str, state: str) -> None:
    begun = HANDSHAKE + f"O> Run Step A\nM> {said}\n{state}\n"
    play(session(steps=("A", "B")), begun + "=> leave Exit 0 30\nX> 0\n=> B not_run (earlier_step)")
    play(session(steps=("A", "B"), on_error="continue"), begun + "O> Run Step B")


def test_a_step_that_takes_too_long_is_told_then_and_its_late_result_is_stray() -> None:
    run = session(steps=("A", "B"), on_error="continue")
    play(
        run,
        HANDSHAKE
        + """
        O> Run Step A
        T> 9.9
        T> 10
        => A timeout: no result within 10 s
        => leave Exit 0 5
        M> Step OK
        => agent warning A: stray result: StepOk
        X> 0
        => B not_run (earlier_step)
        """,
    )
    assert run.stray == 1


def test_what_was_read_when_a_step_is_ordered_cannot_be_its_result() -> None:
    run = session(steps=("A", "B"))
    play(
        run,
        """
        M> Started 1.1
        O> Version 1.1
        M> Ready
        O> Config {}
        M> Configured | Step OK
        O> Run Step A
        => agent warning A: stray result: StepOk
        M> Step OK | Step OK
        => A ok 0 ms by orchestrator
        O> Run Step B
        => agent warning B: stray result: StepOk
        """,
    )
    assert run.stray == 2


@pytest.mark.parametrize("how", ["0", "3", "SIGSEGV"])
def test_an_end_in_the_step_is_a_crash_whatever_the_exit_code(how: str) -> None:
    shown = f"signal={how}" if how.startswith("SIG") else f"rc={how}"
    play(
        session(steps=("A", "B")),
        HANDSHAKE
        + f"""
        O> Run Step A
        E> Segmentation fault
        => stderr info A: Segmentation fault
        X> {how}
        => A crashed {shown}: it ended in the step
        => B not_run (earlier_step)
        """,
    )


def test_a_handshake_that_fails_names_its_cause() -> None:
    play(
        session(),
        """
        E> no module web
        => stderr info -: no module web
        X> 1
        => Ping not_run (handshake_failed) rc=1: it ended while starting
        """,
    )
    play(
        session(),
        """
        M> Started 2.0
        => leave None 0
        X> 1
        => Ping not_run (incompatible) rc=1: it announces version '2.0'; 1.x is spoken here
        """,
    )
    play(
        session(),
        """
        M> Started 1.7
        O> Version 1.1
        N> still loading
        => noise info -: still loading
        T> 59.9
        N> still loading
        => noise info -: still loading
        T> 60
        => leave None 0
        X> SIGTERM
        => Ping not_run (handshake_timeout) signal=SIGTERM: still greeted after 60 s
        """,
    )


def test_a_run_that_is_stopped_has_a_line_for_every_step() -> None:
    play(
        session(steps=("A", "B")),
        HANDSHAKE
        + """
        O> Run Step A
        S>
        => A not_run (stopped)
        => leave Exit 0 30
        X> 0
        => B not_run (stopped)
        """,
    )
    play(session(), "M> Started 1.1\nO> Version 1.1\nS>\n=> leave None 0\nX> 1\n=> Ping not_run (stopped)")


def test_a_message_in_the_wrong_state_is_noise() -> None:
    play(
        session(),
        """
        M> Ready
        => noise info -: Ready (not expected while starting)
        M> Started 1.1
        O> Version 1.1
        M> Started 1.1
        => noise info -: Started 1.1 (not expected while greeted)
        """,
    )


def test_the_seed_dialect() -> None:
    play(
        session(dialect="seed", cleanup=True),
        """
        M> Started 1.0
        O> Version 1.0
        M> Ready
        O> Config {}
        M> Configured
        O> Run step Ping
        T> 1
        M> Step Time 0.25
        => Ping ok 250 ms by monitor
        => leave Exit 30
        X> 0
        """,
    )


def test_a_time_longer_than_the_step_is_no_seconds() -> None:
    play(
        session(dialect="seed"),
        """
        M> Started 1.4
        O> Version 1.1
        M> Ready
        O> Config {}
        M> Configured
        O> Run step Ping
        M> Step Time 250
        => agent warning Ping: unit_suspect: 250 s is longer than the step took; see the setting time_unit
        => Ping ok 250000 ms by monitor
        => leave Exit 30
        """,
    )
    assert monitor(dialect="seed", time_unit="ms").unit("seed") == "ms"


def test_auto_takes_the_spelling_from_the_version() -> None:
    play(
        session(dialect="auto"),
        "M> Started 1.0\nO> Version 1.0\nM> Ready\nO> Config {}\nM> Configured\nO> Run step Ping",
    )
    play(session(dialect="auto"), HANDSHAKE + "O> Run Step Ping")
    play(session(dialect="auto", spoken="metrist"), "M> Started 1.0\nO> Version 1.1")


QUOTED = 'Unexpected message "Run Step Ping", assuming we have to exit'


def test_auto_starts_once_more_only_when_our_order_was_quoted() -> None:
    run = session(dialect="auto")
    play(run, HANDSHAKE + f"O> Run Step Ping\nM> Log Error {QUOTED}\n=> log error Ping: {QUOTED}\nX> 0")
    assert run.again == "seed"
    run = session(dialect="auto")
    other = "it may speak another dialect than metrist (setting dialect)"
    play(run, HANDSHAKE + f"O> Run Step Ping\nX> 0\n=> Ping crashed rc=0: it ended in the step; {other}")
    assert run.again is None
    silent = f"T> 10\n=> Ping timeout: no result within 10 s; {other}\n=> leave Exit 0 5"
    play(session(dialect="auto"), HANDSHAKE + f"O> Run Step Ping\n{silent}")
    known = "M> Step OK\n=> Ping ok 0 ms by orchestrator\nO> Run Step Pong"
    run = session(dialect="auto", steps=("Ping", "Pong"))
    play(run, HANDSHAKE + f"O> Run Step Ping\n{known}\nX> 0\n=> Pong crashed rc=0: it ended in the step")
    run = session(dialect="auto", spoken="seed")  # the second start
    play(
        run,
        """
        M> Started 1.1
        O> Version 1.1
        M> Ready
        O> Config {}
        M> Configured
        O> Run step Ping
        N> what is "Run step Ping"?
        => noise info Ping: what is "Run step Ping"?
        X> 0
        => Ping crashed rc=0: it ended in the step, and quoted the order: it may speak another dialect than seed (setting dialect)
        """,  # noqa: E501
    )


def test_the_name_of_a_webhook_tells_no_secret() -> None:
    run = session(redactor=Redactor({"s3cr3t"}))
    play(run, HANDSHAKE + "O> Run Step Ping\nM> Wait For Webhook of-s3cr3t")
    [ended, _] = run.tick(run.due() or 0.0)
    assert isinstance(ended, StepEnded)
    assert ended.text == "no result within 10 s; it waits for webhook of-***"


@pytest.mark.parametrize("url", ["ftp://lab/", "http://", "lab/{uid}", "http://[::1/{uid}", "http://lab:99999/"])
def test_a_webhook_service_has_an_http_url(url: str) -> None:
    with pytest.raises(ValueError, match="is not an http URL"):
        Monitor(id="web", command=("/bin/true",), steps=("A",), webhook_url=url)
    Monitor(id="web", command=("/bin/true",), steps=("A",), webhook_url="https://lab.example:8443/{monitor}/{uid}")


def test_a_webhook_is_polled_or_named_by_the_timeout() -> None:
    run = session(webhook_url="http://127.0.0.1/{uid}")
    play(run, HANDSHAKE + "O> Run Step Ping\nM> Wait For Webhook u-1\n=> poll u-1")
    assert [act.text for act in run.webhook('{"a":1}')] == ['Webhook Wait Response {"a":1}']  # type: ignore[union-attr]
    play(
        session(),
        HANDSHAKE
        + """
        O> Run Step Ping
        M> Wait For Webhook u-1
        M> Wait For Webhook u-2
        => noise info Ping: WebhookWait u-2 (not expected while step)
        T> 10
        => Ping timeout: no result within 10 s; it waits for webhook u-1
        => leave Exit 0 5
        """,
    )


def test_a_step_waits_for_one_webhook_after_the_other() -> None:
    run = session(webhook_url="http://127.0.0.1/{uid}")
    play(run, HANDSHAKE + "O> Run Step Ping\nM> Wait For Webhook u-1\n=> poll u-1")
    run.webhook("1")
    play(run, "M> Wait For Webhook u-2\n=> poll u-2")
    run.webhook("2")
    play(run, "T> 10\n=> Ping timeout: no result within 10 s\n=> leave Exit 0 5")


def test_a_webhook_is_waited_for_by_the_step_that_said_so() -> None:
    run = session(steps=("Ping", "Ping"), webhook_url="http://127.0.0.1/{uid}")
    play(run, HANDSHAKE + "O> Run Step Ping\nM> Wait For Webhook u\n=> poll u")
    assert run.waits_for is not None
    play(run, "M> Step OK\n=> Ping ok 0 ms by orchestrator\nO> Run Step Ping")
    assert run.waits_for is None  # nobody asks for it beside the one that this step may wait for


def test_a_secret_is_taken_out_of_everything() -> None:
    hidden = Redactor(["s3cr3t-token", 'quo"ted'])
    play(
        session(redactor=hidden, on_error="continue", steps=("A", "B")),
        HANDSHAKE
        + """
        O> Run Step A
        M> Log Info got s3cr3t-token
        => log info A: got ***
        N> {"x": "quo\\"ted"}
        => noise info A: {"x": "***"}
        E> s3cr3t-token
        => stderr info A: ***
        M> Step Error k=7333637233742d746f6b656e with s3cr3t-token
        => A error k=***: with ***
        O> Run Step B
        M> Step OK
        => B ok 0 ms by orchestrator
        => leave Exit 0 30
        """,
    )


def test_the_end_of_stderr_is_kept_without_half_a_secret() -> None:
    run = session(redactor=Redactor(["s3cr3t-token"]))
    play(run, HANDSHAKE + "O> Run Step Ping")
    run.keep_stderr(b"x" * 100_000 + b"s3cr3t-token" + b"y" * (STDERR_TAIL - 6))
    [ended] = run.exited(1, None, 1.0)
    assert isinstance(ended, StepEnded)
    assert ended.stderr_tail is not None
    assert len(ended.stderr_tail) <= STDERR_TAIL
    assert "token" not in ended.stderr_tail
    assert ended.stderr_tail.endswith("yyy")


def test_a_flood_of_lines_is_forwarded_in_part_counted_and_told_once() -> None:
    run = session()
    acts = run.feed([Noise("0123456789")] * 10_000, 0.0)
    told = [act for act in acts if isinstance(act, Told)]
    assert len([act for act in told if act.source == "noise"]) == TOLD_BURST
    assert [act.text for act in told if act.source == "agent"] == [
        "more than 1000 lines a second or 1048576 bytes a run are not forwarded"
    ]
    assert run.dropped == 10 * (10_000 - TOLD_BURST)
    assert len(run.feed([Noise("later")] * 5, 1.0)) == 5


def test_a_run_that_is_refused_has_its_lines_too() -> None:
    lines = refused(monitor(steps=("A", "B")), "secret_unresolved", "config.Token: no such secret")
    assert [(line.step, line.state, line.cause) for line in lines] == [
        ("A", "not_run", "secret_unresolved"),
        ("B", "not_run", "secret_unresolved"),
    ]
    assert config_text({"Host": "hé"}) == '{"Host":"h\\u00e9"}'


SAID = st.sampled_from(
    [
        *("Started 1.1", "Started 1.0", "Started 2.0", "Ready", "Configured", "Exit", "Step OK", "Step OK a=1"),
        *("Step Time 5", "Step Time 1e999", "Step Time NaN", "Step Time", "Step Error it is down", "Step Error"),
        *('Log Error "Run Step A"', "Log", "Wait For Webhook u", "nothing that is known"),
    ]
)
HAPPENS = (
    st.tuples(st.just("reads"), st.lists(SAID, max_size=4))
    | st.tuples(st.just("waits"), st.floats(0, 100))
    | st.tuples(st.just("stops"), st.none())
)


@given(
    st.lists(HAPPENS, max_size=20),
    st.sampled_from(["metrist", "seed", "auto"]),
    st.sampled_from(["stop", "continue"]),
    st.sampled_from([0, 3, "SIGKILL"]),
    st.booleans(),
)
def test_whatever_it_says_every_planned_step_has_one_line(
    happens: list[tuple[str, Any]], dialect: str, on_error: str, end: int | str, is_greeted: bool
) -> None:
    run, now, acts = session(dialect=dialect, on_error=on_error, steps=("A", "B", "C")), 0.0, list[Act]()
    if is_greeted:
        acts += run.feed([Started("1.1"), Ready(), Configured()], now)
    for what, what_of_it in happens:
        if what == "reads":
            acts += run.feed([parse(text.encode()) or Noise(text) for text in what_of_it], now)
        elif what == "stops":
            acts += run.stop(now)
        else:
            now += what_of_it
            acts += run.tick(now)
    acts += run.exited(None, end, now) if isinstance(end, str) else run.exited(end, None, now)
    ended = [act.step for act in acts if isinstance(act, StepEnded)]
    assert ended == (["A", "B", "C"] if run.again is None else [])
    left = [act for act in acts if isinstance(act, Leave)]
    assert len(left) <= 1
    assert run.state == "over"
