"""The control server over real sockets: who comes in, what is answered, what is streamed, what a slow client costs."""

import json
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
import trio
from trio_websocket import ConnectionClosed

import agent
from agent.control.role import url_of
from agent.control.settings import ControlSettings, ControlTls
from agent.control.streams import QUEUE_EVENTS
from agent.core.channel import Refused
from agent.core.errors import ActionError, PeerError, PeerRefused
from agent.core.events import Alert, AlertCleared, LinkChanged, Logged, RunChanged, RunStarted, TestStarted, decode
from agent.core.link import Dial, connect
from agent.core.store import MAX_PENDING
from agent.core.tls import TlsSettings, client_context
from tests.certificates import Issued, issue
from tests.control_house import AT, LOOPBACK, House, client, data, house


async def get(server: House, path: str, token: str | None = "sesame", **headers: str) -> httpx.Response:
    shown = {"authorization": f"Bearer {token}"} if token else {}
    context = client_context(server.tls) if server.tls.ca_file else False
    async with httpx.AsyncClient(verify=context, trust_env=False, timeout=60) as browser:
        return await browser.get(server.http + path, headers=shown | headers)


def logged(message: str) -> Logged:
    return Logged(severity="INFO", message=message)


STARTED = RunStarted(
    run="r-9", suite="login", title="Login", runner="ava", driver="tap", source="x", origin="control", slot=0
)


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
async def server(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[House]:
    async with house(tmp_path, tls=request.param) as built:
        yield built


# ---- who comes in --------------------------------------------------------------------------------------------------


async def test_every_action_but_auth_is_refused_until_a_token_was_shown(server: House) -> None:
    async with client(server.dial(None)) as nobody:
        for action in ("status", "subscribe", "stop", "nonsense"):
            with pytest.raises(Refused, match=r"unauthorized: .* before a token was shown"):
                await nobody.ask(action, {})
        with pytest.raises(Refused, match="unauthorized: the token is not known here"):
            await nobody.ask("auth", {"token": "wrong"})
        assert await nobody.ask("auth", {"token": "peek"}) == {}
        assert (await nobody.ask("status", {}))["ident"] == "lab-07"
        with pytest.raises(Refused, match="forbidden: stop takes a token with the scope control; yours has read"):
            await nobody.ask("stop", {})
    counted = {labels: value for name, labels, value in server.metrics if name == "control_refused_total"}
    assert counted == {(("code", "forbidden"),): 1, (("code", "unauthorized"),): 5}


async def test_a_wrong_token_in_the_head_is_401_and_a_foreign_origin_403(server: House) -> None:
    with pytest.raises(PeerRefused, match="answered 401"):
        async with connect(server.dial("wrong")):
            pass
    with pytest.raises(PeerRefused, match="answered 403"):
        async with connect(server.dial("sesame", origin="http://evil.example")):
            pass
    async with client(server.dial("sesame", origin=server.http)) as ours:
        assert (await ours.ask("identify", {}))["tool"] == "emissary"


async def test_guessing_is_stopped_for_a_minute(server: House) -> None:
    async with client(server.dial(None)) as guesser:
        for n in range(5):
            with pytest.raises(Refused, match="unauthorized"):
                await guesser.ask("auth", {"token": f"guess {n}"})
        with pytest.raises(Refused, match="rate: 5 wrong tokens within 60 s"):
            await guesser.ask("auth", {"token": "sesame"})
    with pytest.raises(PeerError, match="answered 429"):
        async with connect(server.dial()):
            pass


async def test_who_shows_no_token_within_5_s_is_closed_with_1008(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.02
    async with house(tmp_path) as server, connect(server.dial(None)) as ws:
        with pytest.raises(ConnectionClosed) as closed:
            await ws.get_message()
    assert closed.value.reason is not None
    assert (closed.value.reason.code, closed.value.reason.reason) == (1008, "no token within 5 s")


async def test_a_client_certificate_has_the_scope_of_its_name(tmp_path: Path) -> None:
    tls = ControlTls(cert="lab-07.pem", client_ca="ca.pem", names={"laptop": "read"})
    settings = ControlSettings(listen=("127.0.0.1:0",), tls=tls)
    async with house(tmp_path, settings, tls=True) as server:
        by = Issued(tmp_path / "ca.pem", tmp_path / "ca.key")
        for name, allowed in (("laptop", True), ("stranger", False)):
            shown = issue(by, tmp_path, name)
            tls_of_client = TlsSettings(server.tls.ca_file, shown.cert, shown.key)
            async with client(Dial(server.url, tls=tls_of_client)) as them:
                if allowed:
                    assert (await them.ask("status", {}))["ident"] == "lab-07"
                    with pytest.raises(Refused, match="forbidden"):
                        await them.ask("drain", {})
                else:
                    with pytest.raises(Refused, match="unauthorized"):
                        await them.ask("status", {})
        with pytest.raises(PeerError):
            async with client(server.dial()) as without:  # a token, but no certificate
                await without.ask("status", {})


async def test_insecure_loopback_needs_no_token_but_a_host_that_is_loopback(tmp_path: Path) -> None:
    settings = ControlSettings(listen=("127.0.0.1:0",), insecure_loopback=True)
    async with house(tmp_path, settings) as server:
        async with client(server.dial(None)) as local:
            assert (await local.ask("status", {}))["draining"] is False
        assert (await get(server, "/healthz", None)).status_code == 200
        assert (await get(server, "/healthz", None, host="evil.example")).status_code == 403


@pytest.mark.parametrize(
    ("given", "what"),
    [
        ({"listen": ("0.0.0.0:1",), "tokens": ()}, "0.0.0.0:1 is open to anybody"),
        ({"listen": ("[::]:1",), "insecure_loopback": True}, "insecure_loopback: is for loopback alone"),
    ],
)
def test_settings_that_let_anybody_in_are_refused(given: dict[str, Any], what: str) -> None:
    with pytest.raises(ValueError, match=what):
        ControlSettings(**given)
    ControlSettings(listen=("[::1]:13172", "localhost:1"), tokens=())


def test_an_address_is_listened_at_once() -> None:
    with pytest.raises(ValueError, match=r"listen: 127\.0\.0\.1:1 stands there twice\. Take one of them away\."):
        ControlSettings(listen=("127.0.0.1:1", "[::1]:1", "127.0.0.1:1"))
    ControlSettings(listen=("127.0.0.1:0", "127.0.0.1:0"))  # two free ports


@pytest.mark.parametrize(
    ("address", "tls", "url"),
    [("127.0.0.1:13172", False, "ws://127.0.0.1:13172/"), ("[::1]:5", True, "wss://[::1]:5/")],
)
def test_the_url_names_where_it_listens(address: str, tls: bool, url: str) -> None:
    assert url_of(address, has_tls=tls) == url


def test_the_url_of_every_address_names_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "lab-07")
    assert url_of("0.0.0.0:13172", has_tls=False) == url_of("[::]:13172", has_tls=False) == "ws://lab-07:13172/"


# ---- actions -------------------------------------------------------------------------------------------------------


async def test_bad_requests_get_their_error_and_the_connection_stays(server: House) -> None:
    async with connect(server.dial()) as ws:
        said = {
            "{": "bad_json: not a JSON object",
            "[]": "bad_json: not a JSON object",
            '{"action":"nonsense","req_id":1}': "unknown_action: nothing here answers 'nonsense'",
            '{"action":"shut_down","req_id":1}': "unknown_action: nothing here answers 'shut_down'",
            '{"action":"search_log","req_id":1}': "unknown_action: nothing here answers 'search_log'",
            '{"action":"unsubscribe","req_id":1}': "bad_payload: key sub is missing",
            '{"action":"unsubscribe","req_id":1,"payload":{"sub":4}}': "not_found: subscription 4 is not open",
            '{"action":"subscribe","payload":{"since":-1}}': "bad_payload: key since: Expected `int` >= 0",
            '{"action":"subscribe","payload":{"since":9}}': "bad_payload: since: 9 is above 1, the highest number here",
            '{"action":"log","payload":{"message":"x","severity":"LOUD"}}': "bad_payload: key severity: Invalid enum",
        }
        for sent, reason in said.items():
            await ws.send_message(sent)
            assert json.loads(await ws.get_message())["reason"].startswith(reason)
        await ws.send_message(b"{}")
        assert "a binary frame" in json.loads(await ws.get_message())["reason"]
        await ws.send_message('{"req_id":"x"}')
        identified = {"tool": "emissary", "version": agent.__version__}
        answer = {"action": "identify", "rsp_id": "x", "result": "success", "payload": identified}
        assert json.loads(await ws.get_message()) == answer


async def test_what_outlives_the_agent_is_on_disk_when_it_is_answered(tmp_path: Path) -> None:
    async def drain(payload: dict[str, Any]) -> dict[str, Any]:
        here.store.put("drained", True)
        return {}

    async with house(tmp_path, handlers={"drain": drain}) as here, client(here.dial()) as asker:
        for _ in range(20):
            await asker.ask("drain", {})
            assert here.store.behind_s(trio.current_time()) == 0


async def test_status_shows_all_at_one_look(tmp_path: Path) -> None:
    run = {"run": "r-9", "suite": "login", "state": "running", "test": "a › b", "since": AT, "counts": {"passed": 3}}

    async def runs(payload: dict[str, Any]) -> dict[str, Any]:
        return {"slots": 1, "free": 0, "draining": True, "runs": [run | {"origin": "control", "reservation": None}]}

    async def reservations(payload: dict[str, Any]) -> dict[str, Any]:
        return {"reservations": [{"id": "lab-07/0/1", "state": "running", "run": "r-9"}]}

    async with house(tmp_path, handlers={"runs": runs, "reservations": reservations}) as server:
        server.store.owe("mimir", lambda event: isinstance(event, Alert))
        server.publish(LinkChanged(name="mimir", state="offline", error="refused"))
        server.publish(Alert(code="link.mimir", text="It refuses.", remedy="Look.", since=5.0))
        await server.store.commit()
        async with client(server.dial("peek")) as reader:
            status = await reader.ask("status", {})
        uptime, oldest = status.pop("uptime"), status["outbox"]["mimir"].pop("oldest")
        assert 0 <= uptime < 300
        assert oldest > AT - 1e9
        assert status == {
            "ident": "lab-07",
            "version": agent.__version__,
            "roles": {"control": {"state": "running", "restarts": 0, "error": None, "overdue": 0.0}},
            "runs": [run],
            "outbox": {"mimir": {"waiting": 1, "held": 0}},
            "links": {"mimir": {"state": "offline", "since": AT, "error": "refused"}},
            "seq": 3,
            "entitlement": None,
            "reservation": [{"id": "lab-07/0/1", "state": "running", "run": "r-9"}],
            "draining": True,
            "alerts": [{"code": "link.mimir", "text": "It refuses.", "remedy": "Look.", "since": 5.0}],
            "full": False,
        }


async def test_a_request_is_handed_to_the_role_that_answers_it(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    async def run_suite(payload: dict[str, Any]) -> dict[str, Any]:
        asked.append(payload)
        if payload["suite"]["id"] == "busy":
            raise ActionError("busy", "every slot is taken")
        return {"run": "r-1"}

    async def cancel(payload: dict[str, Any]) -> dict[str, Any]:
        raise RuntimeError("a bug")

    handlers = {"run_suite": run_suite, "cancel": cancel}
    async with house(tmp_path, handlers=handlers) as server, client(server.dial()) as them:
        given = {"suite": {"id": "login"}, "deadline": 7.0, "origin": "seneschal", "reservation": "x"}
        assert await them.ask("run_suite", given) == {"run": "r-1"}
        with pytest.raises(Refused, match="busy: every slot is taken"):
            await them.ask("run_suite", {"suite": {"id": "busy"}})
        with pytest.raises(Refused, match="internal: 'cancel' failed here"):
            await them.ask("cancel", {"run": "r-1"})
        with pytest.raises(Refused, match="bad_payload: key run is missing"):
            await them.ask("cancel", {})
    assert asked[0] == {"suite": {"id": "login"}, "deadline": 7.0, "origin": "control"}


async def test_a_request_waits_for_the_roles_while_the_agent_starts(tmp_path: Path) -> None:
    async def drain(payload: dict[str, Any]) -> dict[str, Any]:
        return {}

    async with house(tmp_path, handlers={"drain": drain}, is_up=False) as server, client(server.dial()) as them:
        assert (await them.ask("status", {}))["ident"] == "lab-07"
        assert (await get(server, "/healthz")).json()["starting"] is True
        answers: list[dict[str, Any]] = []

        async def ask() -> None:
            answers.append(await them.ask("drain", {}))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert answers == []
            server.up.set()
        assert answers == [{}]


async def test_a_request_that_waits_in_vain_hears_that_the_agent_is_starting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.control.role.START_S", 0.01)
    async with house(tmp_path, is_up=False) as server, client(server.dial()) as them:
        with pytest.raises(Refused, match="busy: the agent is starting, nothing answers 'drain' yet"):
            await them.ask("drain", {})


async def test_a_logged_message_is_an_event_with_run_and_test_when_these_are_unambiguous(server: House) -> None:
    async with client(server.dial()) as them:
        await them.ask("log", {"message": "nobody runs"})
        server.publish(STARTED, TestStarted(run="r-9", suite="login", case="a", name="a", file=None, started=AT))
        await trio.testing.wait_all_tasks_blocked()
        await them.post("log", {"message": "in a", "severity": "ERROR", "timestamp": 1684696137})
        await them.ask("identify", {})
        server.publish(TestStarted(run="r-9", suite="login", case="b", name="b", file=None, started=AT))
        await trio.testing.wait_all_tasks_blocked()
        await them.ask("log", {"message": "in a or b"})
        await server.store.commit()
    rows = await server.store.read(kinds=["Logged"])
    events = [decode(row.kind, row.data) for row in rows]
    assert events == [
        Logged(severity="INFO", message="nobody runs"),
        Logged(severity="ERROR", message="in a", timestamp=1684696137, run="r-9", test="r-9:a"),
        Logged(severity="INFO", message="in a or b", run="r-9"),
    ]
    assert [(row.run, row.test) for row in rows] == [(None, None), ("r-9", "r-9:a"), ("r-9", None)]


async def test_who_logs_faster_than_the_disk_takes_it_waits(tmp_path: Path) -> None:
    count, size = 3000, 1000
    async with house(tmp_path) as server, client(server.dial()) as them, trio.open_nursery() as nursery:
        writer, busy = server.store._one_writer, object()
        await writer.acquire_on_behalf_of(busy)

        async def log() -> None:
            for n in range(count):
                await them.post("log", {"message": f"{n} {'x' * size}"})

        nursery.start_soon(log)
        await trio.testing.wait_all_tasks_blocked(0.2)
        assert MAX_PENDING < server.store._pending_bytes < MAX_PENDING + 3 * size
        writer.release_on_behalf_of(busy)
        await them.ask("subscribe", {"kinds": ["Logged"], "since": 0})
        assert [event["data"]["message"].split()[0] for event in await them.told(count)] == list(map(str, range(count)))


# ---- streams -------------------------------------------------------------------------------------------------------


async def test_a_subscriber_gets_the_kinds_it_asked_for_from_now_on(server: House) -> None:
    server.publish(logged("before"), Alert(code="x", text="it burns", remedy="Put it out.", since=1.0))
    await server.store.commit()
    async with client(server.dial("peek")) as them:
        answer = await them.ask("subscribe", {"kinds": ["Alert*"]})
        assert answer == {"sub": 1, "seq": 3, "oldest": 1}
        server.publish(logged("not asked for"), AlertCleared(code="x"), RunChanged(run="r", state="done"))
        (event,) = await them.told(1)
        assert event == {"seq": 5, "at": event["at"], "kind": "AlertCleared", "data": {"code": "x"}}
        assert them.messages[0]["sub"] == 1
        assert await them.ask("unsubscribe", {"sub": 1}) == {}
        server.publish(Alert(code="y", text="it burns", remedy="Put it out.", since=2.0))
        await server.store.commit()
        await them.ask("identify", {})
        assert len(them.events) == 1


async def test_a_filter_by_run_and_test_skips_the_others_without_a_gap(server: House) -> None:
    async with client(server.dial()) as them:
        await them.ask("subscribe", {"filter": {"run": "r-9"}, "since": 0})
        await them.ask("subscribe", {"filter": {"test": "r-9:b"}})
        for case in "ab":
            server.publish(
                RunChanged(run="r-8", state="running"),
                TestStarted(run="r-9", suite="login", case=case, name=case, file=None, started=AT),
            )
        events = await them.told(3)
    by_sub = [(m["sub"], e["test"]) for m in them.messages for e in m["events"]]
    assert sorted(by_sub) == [(1, "r-9:a"), (1, "r-9:b"), (2, "r-9:b")]
    assert all(event["run"] == "r-9" for event in events)


async def test_many_events_go_in_one_message_up_to_500(server: House) -> None:
    async with client(server.dial()) as them:
        await them.ask("subscribe", {"kinds": ["Logged"]})
        server.publish(*(logged(str(n)) for n in range(1200)))
        events = await them.told(1200)
        assert data(events) == [str(n) for n in range(1200)]
        assert len(them.messages) <= 4
        assert max(len(message["events"]) for message in them.messages) == 500


async def test_since_replays_what_was_missed_and_goes_on_without_gap_or_double(server: House) -> None:
    """Events are published all the while: before, while the journal is read, and after."""
    count = 3000
    async with trio.open_nursery() as nursery:

        async def publish() -> None:
            for n in range(count):
                server.publish(logged(str(n)))
                if n % 50 == 0:
                    await trio.sleep(0.001)

        nursery.start_soon(publish)
        since = 1
        for _ in range(5):
            async with client(server.dial()) as them:
                await them.ask("subscribe", {"since": since, "kinds": ["Logged"]})
                told = await them.told(min(400, count + 1 - since))
                assert [event["seq"] for event in told] == list(range(since + 1, since + 1 + len(told)))
                since = told[-1]["seq"]
        async with client(server.dial()) as them:
            await them.ask("subscribe", {"since": since})
            told = await them.told(count + 1 - since)
    assert [event["seq"] for event in told] == list(range(since + 1, count + 2))


async def test_where_the_journal_no_longer_reaches_the_first_event_is_a_gap(server: House) -> None:
    server.publish(*(logged(str(n)) for n in range(10)))
    await server.store.commit()
    server.store._db.execute("DELETE FROM journal WHERE seq < 5 OR seq = 8")  # as pruning does
    async with client(server.dial()) as them:
        assert (await them.ask("subscribe", {"since": 2}))["oldest"] == 5
        told = await them.told(8)
    assert [event.get("seq") or event["data"] for event in told] == [
        {"from": 3, "to": 4}, 5, 6, 7, {"from": 8, "to": 8}, 9, 10, 11,
    ]  # fmt: skip


async def test_a_client_that_stops_reading_gets_a_gap_with_exact_numbers_and_costs_the_others_nothing(
    tmp_path: Path,
) -> None:
    async with house(tmp_path) as server, connect(server.dial()) as slow, client(server.dial()) as quick:
        await slow.send_message('{"action":"subscribe","payload":{}}')
        await slow.get_message()
        await quick.ask("subscribe", {})
        published = QUEUE_EVENTS + 15_000  # more than the sockets and the queue hold
        for n in range(0, published, 1000):
            server.publish(*(logged("x" * 500) for _ in range(1000)))
            await quick.told(n + 1000)
        seen: list[int] = []
        gaps: list[tuple[int, int]] = []
        while not seen or seen[-1] < published + 1:
            for event in json.loads(await slow.get_message())["payload"]["events"]:
                if event["kind"] == "Gap":
                    gaps.append((event["data"]["from"], event["data"]["to"]))
                    assert event["data"]["from"] == seen[-1] + 1
                    seen += range(event["data"]["from"], event["data"]["to"] + 1)
                else:
                    seen.append(event["seq"])
        assert seen == list(range(2, published + 2))
        assert gaps
        assert [event["seq"] for event in quick.events] == seen


async def test_with_the_policy_disconnect_a_slow_client_is_closed_with_1013(tmp_path: Path) -> None:
    async with house(tmp_path) as server, connect(server.dial()) as slow:
        await slow.send_message('{"action":"subscribe","payload":{"policy":"disconnect"}}')
        await slow.get_message()
        server.publish(*(logged("x" * 200) for _ in range(2 * QUEUE_EVENTS)))  # some leave the queue at once
        with suppress(ConnectionClosed), trio.fail_after(30):
            while True:
                await slow.get_message()
        assert slow.closed is not None
        assert (slow.closed.code, slow.closed.reason) == (1013, "subscription 1 does not keep up")


async def test_a_connection_has_32_subscriptions_at_most(server: House) -> None:
    async with client(server.dial()) as them:
        for n in range(32):
            assert (await them.ask("subscribe", {}))["sub"] == n + 1
        with pytest.raises(Refused, match="busy: 32 subscriptions are open; end one of them first"):
            await them.ask("subscribe", {})
        await them.ask("unsubscribe", {"sub": 7})
        assert (await them.ask("subscribe", {}))["sub"] == 33


async def test_a_subscription_may_be_ended_before_its_answer_came(server: House) -> None:
    """What it would replay begins beside the next request, and trio draws lots for which of the two is first."""
    async with client(server.dial()) as them:

        async def ask(action: str, payload: dict[str, Any]) -> None:
            await them.ask(action, payload)

        for number in range(1, 21):
            server.publish(logged("a"))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(ask, "subscribe", {"since": 0})
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(ask, "unsubscribe", {"sub": number})
        assert (await _numbers(server))["control_subscriptions"] == 0
        assert (await them.ask("subscribe", {}))["sub"] == 21


async def test_when_a_client_leaves_nothing_of_it_stays(server: House) -> None:
    async with client(server.dial()) as them:
        await them.ask("subscribe", {})
        assert dict(await _numbers(server))["control_subscriptions"] == 1
        assert dict(await _numbers(server))["control_clients"] == 1
    await trio.testing.wait_all_tasks_blocked(0.05)
    assert (await _numbers(server))["control_clients"] == 0
    assert (await _numbers(server))["control_subscriptions"] == 0


async def _numbers(server: House) -> dict[str, Any]:
    return dict(await server.bus.ask("metrics", {}))


async def test_the_default_listens_on_loopback_alone() -> None:
    assert ControlSettings().listen == ("127.0.0.1:13172",)
    assert LOOPBACK.max_connections == 64


async def test_a_port_that_is_taken_is_said_and_tried_again(tmp_path: Path) -> None:
    async with house(tmp_path / "a") as server, house(tmp_path / "b", _at(server.address)) as other:
        status = other.supervisor.status["control"]
        assert status.state == "backoff"
        assert status.error is not None
        assert status.error.startswith(f"control.listen: {server.address}: Address already in use. End what uses")


def _at(address: str) -> ControlSettings:
    return ControlSettings(listen=(address,))
