"""`agent ctl`: requests and events of a running agent, from the command line."""

import errno
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from agent import ctl
from agent.control.settings import ControlSettings, ControlTls, Token
from agent.core.channel import Refused
from agent.core.errors import PeerRefused, PeerUnreachable
from agent.core.events import Logged
from agent.core.link import Dial
from agent.settings import Settings
from tests.certificates import Issued, issue
from tests.control_house import House, house
from tests.raw_websocket import pings_at_the_close

SETTINGS = """\
ident = "lab-07"
[state]
dir = "{folder}/state"
reserve = "4KiB"
[suites]
roots = ["{folder}"]
[control]
listen = ["127.0.0.1:{port}"]
"""


Command = Callable[..., "subprocess.CompletedProcess[str]"]


class Lines:
    """What was written, and when something was."""

    def __init__(self) -> None:
        self.text = ""
        self.came = trio.Event()

    def write(self, lines: str) -> None:
        self.text += lines
        self.came.set()
        self.came = trio.Event()

    async def told(self, count: int) -> list[dict[str, Any]]:
        with trio.fail_after(60):
            while self.text.count("\n") < count:
                await self.came.wait()
        return [json.loads(line) for line in self.text.splitlines()]


def publish(server: House, *messages: str) -> None:
    server.publish(*(Logged(severity="INFO", message=message) for message in messages))


def test_values_are_json_or_else_text() -> None:
    pairs = ["run=r-9", "deadline=7.5", 'suite={"id": "x"}', "refresh=true", "reason=a=b", "text=", "n=007"]
    assert ctl.payload_of(pairs) == {
        "run": "r-9", "deadline": 7.5, "suite": {"id": "x"}, "refresh": True, "reason": "a=b", "text": "", "n": "007",
    }  # fmt: skip
    assert ctl.payload_of([deep := "suite=" + "[" * 10**5]) == {"suite": deep.removeprefix("suite=")}
    for wrong in ("run", "=x", ""):
        with pytest.raises(ValueError, match="is no key=value"):
            ctl.payload_of([wrong])


@pytest.mark.parametrize(
    ("given", "url", "expected"),
    [
        ({}, None, "ws://127.0.0.1:13172/"),
        ({"listen": ("0.0.0.0:5",)}, None, "ws://127.0.0.1:5/"),
        ({"listen": ("[::]:5",), "tls": ControlTls(cert="c")}, None, "wss://[::1]:5/"),
        ({}, "http://lab-07:13172/", "ws://lab-07:13172/"),
        ({}, "wss://lab-07/", "wss://lab-07/"),
    ],
)
def test_the_agent_is_found_by_its_settings(given: dict[str, Any], url: str | None, expected: str) -> None:
    assert ctl.dial_of(Settings(control=ControlSettings(**given)), url, None).url == expected


def test_what_is_no_url_and_where_none_can_be_known_is_said() -> None:
    with pytest.raises(ValueError, match="'lab-07' is no ws://HOST"):
        ctl.dial_of(Settings(), "lab-07", None)
    chosen = Settings(control=ControlSettings(listen=("127.0.0.1:0",)))
    with pytest.raises(ValueError, match=r"control.listen = '127.0.0.1:0' became was told in the agent's log alone"):
        ctl.dial_of(chosen, None, None)


async def test_the_agent_here_is_known_by_its_own_certificate(tmp_path: Path) -> None:
    (tmp_path / "sesame").write_text("sesame\n")
    (tmp_path / "sesame").chmod(0o600)
    async with house(tmp_path, tls=True) as server:
        issue(Issued(tmp_path / "ca.pem", tmp_path / "ca.key"), tmp_path, "lab-08")
        for cert, error in (("lab-07", None), ("lab-08", PeerRefused)):
            control = ControlSettings(
                listen=(server.address,),
                tokens=(Token(file=str(tmp_path / "sesame")),),
                tls=ControlTls(cert=str(tmp_path / f"{cert}.pem")),
            )
            with pytest.raises(error, match="does not hold") if error else nullcontext():
                answer = await ctl.ask(ctl.dial_of(Settings(control=control), None, None), "status", {})
                assert answer["ident"] == "lab-07"


async def test_where_clients_need_a_certificate_the_agents_own_is_shown(tmp_path: Path) -> None:
    (tmp_path / "sesame").write_text("sesame\n")
    (tmp_path / "sesame").chmod(0o600)
    cert, key, ca = (str(tmp_path / name) for name in ("lab-07.pem", "lab-07.key", "ca.pem"))
    mutual = ControlTls(cert=cert, key=key, client_ca=ca)
    async with house(tmp_path, ControlSettings(listen=("127.0.0.1:0",), tls=mutual), tls=True) as server:
        control = ControlSettings(listen=(server.address,), tokens=(Token(file=str(tmp_path / "sesame")),), tls=mutual)
        answer = await ctl.ask(ctl.dial_of(Settings(control=control), None, None), "status", {})
        assert answer["ident"] == "lab-07"


async def test_a_request_gives_its_answers_payload_or_the_error(tmp_path: Path) -> None:
    async with house(tmp_path, tls=True) as server:
        assert (await ctl.ask(server.dial(), "status", {}))["ident"] == "lab-07"
        with pytest.raises(Refused, match="unknown_action: nothing here answers 'dance'"):
            await ctl.ask(server.dial(), "dance", {})
        with pytest.raises(PeerRefused, match="401"):
            await ctl.ask(server.dial("wrong"), "status", {})
    with pytest.raises(PeerUnreachable):
        await ctl.ask(server.dial(), "status", {})


async def test_an_answer_counts_when_a_ping_crosses_our_close(autojump_clock: MockClock) -> None:
    answering = partial(pings_at_the_close, answer=b'{"rsp_id":0,"result":"success","payload":{"a":1}}')
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, answering, 0, host="127.0.0.1"))
        autojump_clock.autojump_threshold = 0.02  # what is on its way through the loopback is no silence
        assert await ctl.ask(Dial(f"ws://127.0.0.1:{listener.socket.getsockname()[1]}/"), "status", {}) == {"a": 1}
        nursery.cancel_scope.cancel()


async def test_watch_resumes_behind_what_it_printed_when_the_agent_was_restarted(
    tmp_path: Path, held_port: int
) -> None:
    out, settings = Lines(), ControlSettings(listen=(f"127.0.0.1:{held_port}",))
    async with trio.open_nursery() as nursery:
        async with house(tmp_path, settings) as server:
            publish(server, "a")
            await server.store.commit()
            nursery.start_soon(ctl.watch, server.dial(), ["Log*"], 0, out.write)
            await out.told(1)
            publish(server, "b")
            await out.told(2)
        async with house(tmp_path, settings) as again:
            publish(again, "c")
            await again.store.commit()
            events = await out.told(3)
            publish(again, "d")
            events = await out.told(4)
            nursery.cancel_scope.cancel()
    assert [event["data"]["message"] for event in events] == ["a", "b", "c", "d"]
    assert [event["kind"] for event in events] == ["Logged"] * 4


async def test_watch_without_a_number_begins_now_and_keeps_its_place_from_then(tmp_path: Path) -> None:
    out = Lines()
    async with house(tmp_path) as server, trio.open_nursery() as nursery:
        publish(server, "before")
        await server.store.commit()
        nursery.start_soon(ctl.watch, server.dial(), ["Logged"], None, out.write)
        with trio.fail_after(60):
            while not dict(await server.bus.ask("metrics", {}))["control_subscriptions"]:  # noqa: ASYNC110  # no event
                await trio.sleep(0.01)
        publish(server, "after")
        (event,) = await out.told(1)
        assert event["data"]["message"] == "after"
        nursery.cancel_scope.cancel()


async def test_watch_ends_when_its_reader_has_gone(tmp_path: Path) -> None:
    def write(lines: str) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    async with house(tmp_path) as server:
        with trio.fail_after(60), pytest.raises(BrokenPipeError):
            await ctl.watch(server.dial(), [], 0, write)


async def test_watch_ends_when_the_journal_is_another_one(tmp_path: Path) -> None:
    async with house(tmp_path) as server:
        with pytest.raises(Refused, match="since: 999 is above 1"):
            await ctl.watch(server.dial(), [], 999, Lines().write)


async def test_watch_of_an_agent_that_is_not_there_ends_at_once(tmp_path: Path) -> None:
    async with house(tmp_path) as server:
        pass
    with pytest.raises(PeerUnreachable):
        await ctl.watch(server.dial(), [], None, Lines().write)


# ---- the commands --------------------------------------------------------------------------------------------------


@contextmanager
def started(argv: Sequence[str | Path], **options: Any) -> Iterator["subprocess.Popen[str]"]:
    """A process that has ended when the block has, also where the test fails."""
    with subprocess.Popen(argv, **options) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def agent(
    tmp_path: Path, held_port: int, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., "subprocess.CompletedProcess[str]"]]:
    """`agent(...)` runs a command with the settings of an agent that is up."""
    config, command = tmp_path / "agent.toml", [sys.executable, "-m", "agent"]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        # The command finds the port in the settings, so it cannot be 0 there.
        config.write_text(SETTINGS.format(folder=tmp_path, port=held_port))
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        with started([*command, "run", "--config", config], stderr=subprocess.DEVNULL) as service:
            assert listening.recv(4096).startswith(b"READY=1")
            yield lambda *more: subprocess.run(
                [*command, "ctl", "--config", config, *more], capture_output=True, text=True, timeout=60
            )
            service.send_signal(signal.SIGTERM)
            assert service.wait(60) == 0


def test_the_whole_way_from_the_command_line(agent: Command, tmp_path: Path) -> None:
    assert agent("undrain").returncode == 0  # answered once every role had its start
    status = json.loads(agent("status").stdout)
    assert status["ident"] == "lab-07"
    assert {role["state"] for role in status["roles"].values()} == {"running"}
    assert {"control", "suites"} <= status["roles"].keys()
    assert (tmp_path / "state/token").stat().st_mode & 0o777 == 0o600

    (tmp_path / "suite").mkdir()
    (tmp_path / "suite/suite.toml").write_text(
        'id = "own"\nrunner = "tap"\ncommand = ["printf", "1..1\\\\nok 1 - a\\\\n"]\n'
    )
    run = json.loads(agent("run_suite", f"path={tmp_path}/suite").stdout)["run"]
    argv = [sys.executable, "-m", "agent", "ctl", "--config", str(tmp_path / "agent.toml"), "watch", "--since", "0"]
    argv += ["--kind", "Suite*", "--kind", "TestFinished"]
    with started(argv, stdout=subprocess.PIPE, text=True) as watch:
        assert watch.stdout is not None
        events = [json.loads(watch.stdout.readline()) for _ in range(2)]
        watch.send_signal(signal.SIGINT)
        assert watch.wait(60) == 1
    assert [(event["kind"], event["run"]) for event in events] == [("TestFinished", run), ("SuiteFinished", run)]

    assert json.loads(agent("config").stdout)["ident"]["value"] == "lab-07"
    assert json.loads(agent("drain").stdout) == {}
    assert json.loads(agent("status").stdout)["draining"] is True
    refused = agent("run_suite", f"path={tmp_path}/suite")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert re.search(r"refused run_suite: draining", refused.stderr)
    assert json.loads(agent("undrain").stdout) == {}
    config = tmp_path / "agent.toml"
    (tmp_path / "rules.toml").write_text("version = 1\n[[rule]]\nid = 'slow'\nregex = '\\d'\n")
    config.write_text(
        config.read_text().replace("[suites]\n", "[suites]\nslots = 2\n")
        + "max_connections = 7\n"
        + f'[logs]\nrules = ["{tmp_path}/rules.toml"]\n[[logs.watch]]\nname = "a"\npath = "{tmp_path}/a.log"\n'
    )
    answer = json.loads(agent("reload").stdout)
    assert {"control.max_connections", "suites.slots", "logs.rules"} <= set(answer["changed"])
    assert answer["needs_restart"] == ["control.max_connections"]
    assert (answer["rules"] >= 1, answer["slow"]) == (True, ["slow"])  # a hardware profile may bring its own
    (tmp_path / "rules.toml").write_text("version = 1\n[[rule]]\nid = 'broken'\nregex = '('\n")
    refused = agent("reload")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert f"bad_payload: {tmp_path}/rules.toml:4: rule[broken].regex: missing closing parenthesis" in refused.stderr
    assert "slow" in [rule["rule"] for rule in json.loads(agent("list_logs").stdout)["rules"]]
    for wrong in (["status", "x"], ["status", "--since", "1"], ["watch", "a=b"], ["--url", "nonsense", "status"]):
        assert agent(*wrong).returncode == 2
    assert agent("--url", "ws://127.0.0.1:1/", "status").returncode == 3
