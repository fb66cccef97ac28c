"""Runners and a Seneschal that do everything wrong: a clear word in the right place, and the agent lives.

Source: issue 2, "Bad input"; protocols/suites.md, acceptance 2, 4 and 5; protocols/emissary.md, "The envelope".
"""

import json
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from tests.faults.station import LIMIT_S, Station, bench, peak_mib, until

FLOOD = "import os\nfor _ in range(6400): os.write(2, b'x' * 65536)\nprint('1..1')\nprint('ok')"  # 400 MiB
LONG = "print('1..2')\nprint('ok 1 - ' + 'x' * {size})\nprint('ok 2 - short')"
DAEMON = """
import os, signal
print("1..1", flush=True)
if not os.fork():
    os.setsid()
    if not os.fork():
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        while True:
            signal.pause()
    os._exit(0)
print("ok")
"""

# What the runner does, limits of its own; then the verdict, what the result must say, and how many tests passed.
BAD = {
    "prints nothing": ("pass", {}, "lost", "", 0),
    "prints garbage": (
        "import os\nos.write(1, bytes(range(256)) * 4096)", {}, "lost", "", 0,
    ),
    "never ends": (
        "import time\nprint('1..2\\nok', flush=True)\ntime.sleep(1000)",
        {"stall": 5, "grace": 0.2}, "aborted", "limits.stall: no new result for 5 s", 1,
    ),
    "forks a daemon": (DAEMON, {}, "passed", "", 1),
    "floods stderr": (FLOOD, {}, "passed", "output_cut", 1),
    "a line of 1 MiB": (LONG.format(size=2**20), {}, "passed", "", 2),
    "a title of 10 MB": (LONG.format(size=10**7), {}, "passed", "", 2),
    "is not there": (None, {}, "blocked", "no-such-program", 0),
    "is killed": ("import os\nprint('1..2\\nok', flush=True)\nos.kill(os.getpid(), 9)", {}, "lost", "SIGKILL", 1),
}  # fmt: skip


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Station]:
    made = Station(f"lab-{os.getpid()}", tmp_path / "machine")
    yield made
    made.kill()


async def test_whatever_a_runner_does_the_lab_learns_of_it_and_the_agent_stays_small(
    machine: Station, tmp_path: Path
) -> None:
    async with bench(tmp_path / "lab") as lab:
        machine.configure(lab.lab.address, lab.lab.token_file)
        machine.start()
        await lab.told(lab.lab.seneschal.enqueue(machine.write_suite("echo 1..1; echo ok")))
        before = peak_mib(machine.pid)
        for what, (script, limits, verdict, says, passed) in BAD.items():
            command = ["no-such-program"] if script is None else [sys.executable, "-c", script]
            suite = machine.write_suite("") | {"command": command, "limits": limits}
            row = await lab.told(lab.lab.seneschal.enqueue(suite))
            text = (machine.state / "runs" / row.run / "result.json").read_text()
            result = await lab.agree(machine, row.run)
            assert row.complete is not None
            assert (row.complete.verdict, result["verdict"]) == (verdict, verdict), (what, text[:2000])
            assert says in text, (what, text[:2000])
            assert result["counts"]["passed"] == passed, what
            assert len(text) < 2 * 2**20, what
            assert all(len(test["name"].encode()) <= 1024 for test in result["tests"]), what
            assert machine.is_alive()
        assert peak_mib(machine.pid) - before < 32
    assert "Traceback" not in machine.log.read_text()


async def test_a_document_that_is_wrong_is_refused_with_what_is_wrong(machine: Station, tmp_path: Path) -> None:
    async with bench(tmp_path / "lab") as lab:
        machine.configure(lab.lab.address, lab.lab.token_file)
        machine.start()
        good = machine.write_suite("echo 1..1; echo ok")
        wrong = {
            "runner": good | {"runner": "jest"},
            "cwd": good | {"cwd": "../.."},
            "colour": good | {"colour": "red"},
            "source": {key: value for key, value in good.items() if key != "source"},
        }
        for key, document in wrong.items():
            ordered = lab.lab.seneschal.enqueue(document)
            with trio.fail_after(LIMIT_S):
                row = await lab.lab.seneschal.ended(ordered)
            told = row.reason or ""
            if row.state == "done":  # what only preparing shows
                told = json.dumps(machine.result(ordered)["tests"])
                assert row.complete is not None
                assert row.complete.verdict == "blocked"
            else:
                assert (row.state, told.partition(":")[0]) == ("refused", "bad_suite")
            assert key in told, told
        outside = good | {"source": {"dir": "/etc"}}
        row = await lab.told(lab.lab.seneschal.enqueue(outside))
        assert "is not below suites.roots" in json.dumps(machine.result(row.run)["tests"])
        assert "Traceback" not in machine.log.read_text()


class WrongSeneschal:
    """Takes whoever comes, says what it was told to say, and keeps what is answered."""

    def __init__(self) -> None:
        self.said: list[dict[str, Any]] = []
        self.closes: list[int | None] = []
        self.to_say: list[str | bytes] = []
        self.registered = 0

    async def serve(self, request: WebSocketRequest) -> None:
        ws = await request.accept()
        try:
            await self._talk(ws)
        except ConnectionClosed as err:
            self.closes.append(err.reason.code if err.reason else None)

    async def _talk(self, ws: WebSocketConnection) -> None:
        while True:
            message = json.loads(await ws.get_message())
            if "action" not in message:
                self.said.append(message)
                continue
            payload: dict[str, Any] = {}
            if message["action"] == "register":
                self.registered += "slots" in message["payload"]  # not for Mimir, which is here too
                payload = {"session": "s", "heartbeat": 5, "deadline": 20, "time": 0, "last_seq": 0, "runs": []}
            answer = {"action": message["action"], "rsp_id": message.get("req_id"), "result": "success"}
            await ws.send_message(json.dumps({**answer, "payload": payload}))
            if message["action"] == "available":
                while self.to_say:
                    await ws.send_message(self.to_say.pop(0))

    async def answered(self, count: int) -> bool:
        return len(self.said) >= count

    async def is_registered(self, times: int) -> bool:
        return self.registered >= times


async def test_a_seneschal_that_talks_nonsense_gets_answers_and_the_link_lives(machine: Station) -> None:
    wrong = WrongSeneschal()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(partial(serve_websocket, wrong.serve, "127.0.0.1", 0, ssl_context=None))
        token = machine.folder / "token-of-the-lab"
        token.write_text("0123456789abcdef\n")
        token.chmod(0o600)
        machine.configure(f"127.0.0.1:{server.port}", token)
        order = {"run": f"r-{os.getpid()}-w", "reservation": "lab/0/99", "suite": {}}
        wrong.to_say = [
            json.dumps({"action": "fly", "req_id": 1, "payload": {}}),
            json.dumps({"action": "run", "req_id": 2, "payload": {}}),
            json.dumps({"action": "run", "req_id": 3, "payload": order | {"run": "../../etc"}}),
            json.dumps({"action": "run", "req_id": 4, "payload": order | {"suite": {"title": "x" * 300_000}}}),
            json.dumps({"action": "cancel", "req_id": 5, "payload": {"run": "unknown", "reason": ""}}),
            "this is no JSON",
            "[1, 2, 3]",
            b"\x00\x01binary",
            json.dumps({"rsp_id": 4711, "result": "success", "payload": {}}),
        ]
        machine.start()
        await until(lambda: wrong.answered(8))
        reasons = {answer["rsp_id"]: answer["reason"] for answer in wrong.said if answer["rsp_id"] is not None}
        codes = {number: reason.partition(":")[0] for number, reason in reasons.items()}
        assert codes == {1: "unknown_action", 2: "bad_payload", 3: "bad_payload", 4: "too_big", 5: "no_such_run"}
        assert "key run is missing" in reasons[2]
        assert [answer["reason"].partition(":")[0] for answer in wrong.said if answer["rsp_id"] is None] == [
            "bad_json"
        ] * 3
        assert (wrong.registered, wrong.closes) == (1, [])

        # A frame that is too big ends the connection with 1009, and the next one is as good as new.
        wrong.to_say = ["x" * (2 * 2**20)]
        await machine.end()
        machine.start()
        await until(lambda: wrong.is_registered(3))
        assert 1009 in wrong.closes
        assert machine.is_alive()
        assert "Traceback" not in machine.log.read_text()
        nursery.cancel_scope.cancel()
