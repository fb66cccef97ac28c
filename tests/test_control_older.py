"""The older services' endpoints over real sockets."""

import base64
import json
import re
from pathlib import Path
from typing import Any

import pytest
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection

from agent.control.settings import ControlSettings
from agent.core.errors import ActionError, PeerRefused
from agent.core.events import EntitlementChanged, FileChanged, RoleChanged
from agent.core.link import Dial, connect
from agent.core.supervise import Role
from agent.files.role import run_files
from agent.files.settings import FilesSettings
from tests.control_house import House, house
from tests.faults.station import until


def changed(path: str) -> FileChanged:
    return FileChanged(path=path, what="modified")


class Roles:
    """What the other roles answer."""

    def __init__(self) -> None:
        self.status, self.content = 0, b"one"
        self.refusal: ActionError | None = None
        self.asked: list[tuple[str, dict[str, Any]]] = []

    @property
    def handlers(self) -> dict[str, Any]:
        async def entitlement(payload: dict[str, Any]) -> dict[str, Any]:
            return {"status": self.status, "name": "x"}

        async def watch_file(payload: dict[str, Any]) -> dict[str, Any]:
            self.asked.append(("watch_file", payload))
            if self.refusal is not None:
                raise self.refusal
            if payload["path"].startswith("/proc"):
                raise ActionError("bad_payload", "key path: not there")
            return {"watch": "w1"}

        async def unwatch_file(payload: dict[str, Any]) -> dict[str, Any]:
            self.asked.append(("unwatch_file", payload))
            return {}

        async def look_file(payload: dict[str, Any]) -> dict[str, Any]:
            if not self.content:
                raise ActionError("not_found", "it is gone")
            return {"path": payload["path"], "content": base64.b64encode(self.content).decode()}

        return {
            "entitlement": entitlement, "watch_file": watch_file, "unwatch_file": unwatch_file, "look_file": look_file,
        }  # fmt: skip


def at(server: House, path: str, token: str = "sesame") -> Dial:
    return Dial(server.url.rstrip("/") + path, tls=server.tls, headers=(("authorization", f"Bearer {token}"),))


async def said(ws: WebSocketConnection) -> dict[str, Any]:
    with trio.fail_after(60):
        frame: dict[str, Any] = json.loads(await ws.get_message())
    return frame


@pytest.mark.parametrize("tls", [False, True])
async def test_get_status_quit_and_other_words_on_the_root(tmp_path: Path, tls: bool) -> None:
    roles = Roles()
    async with house(tmp_path, tls=tls, handlers=roles.handlers) as server, connect(at(server, "/")) as ws:
        await ws.send_message('{"op":"get-status","body":"","to":"lab-07","from":"me"}')
        assert await said(ws) == {"op": "get-status", "body": "0", "to": "me", "from": "lab-07"}
        await ws.send_message('{"op":"dance"}')
        reason = "unknown_action: op 'dance' is none of get-status, quit, disconnect"
        assert await said(ws) == {"result": "error", "rsp_id": None, "reason": reason}
        await ws.send_message('{"op":7}')
        assert (await said(ws))["reason"].startswith("bad_payload: key op: Expected `str`")
        await ws.send_message('{"action":"identify","op":"get-status"}')
        assert (await said(ws))["payload"]["tool"] == "emissary"
        await ws.send_message('{"op":"quit"}')
        with pytest.raises(ConnectionClosed):
            await ws.get_message()
        assert ws.closed is not None
        assert ws.closed.code == 1000


async def test_without_a_token_the_older_frames_are_refused(tmp_path: Path) -> None:
    async with house(tmp_path) as server:
        async with connect(server.dial(None)) as ws:
            await ws.send_message('{"op":"get-status"}')
            assert (await said(ws))["reason"].startswith("unauthorized: ")
        with pytest.raises(PeerRefused, match="403"):  # a watch is more than reading
            async with connect(at(server, "/ws/monitor//etc/rhsm", "peek")):
                pass


async def test_the_status_is_told_on_connect_on_change_and_on_any_frame(tmp_path: Path) -> None:
    roles = Roles()
    async with house(tmp_path, handlers=roles.handlers) as server, connect(at(server, "/ws/rhsm/status", "peek")) as ws:
        first = await said(ws)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}\+00:00", first.pop("time"))
        assert first == {"entitlementStatus": 0, "overallStatus": "Current"}
        roles.status = 1
        server.publish(EntitlementChanged(status=1, name="expired", raw="Invalid", source="rhsm1", previous=0))
        assert (await said(ws))["overallStatus"] == "Invalid"
        await ws.send_message("anything")
        assert (await said(ws))["entitlementStatus"] == 1


async def test_a_file_is_told_on_connect_and_on_change_and_the_watch_ends_with_the_client(tmp_path: Path) -> None:
    roles = Roles()
    async with house(tmp_path, handlers=roles.handlers) as server:
        async with connect(at(server, "/ws/monitor//etc/rhsm/rhsm.conf")) as ws:
            first = await said(ws)
            assert (first["event"], first["file"], first["content"]) == ("open", "/etc/rhsm/rhsm.conf", "b25l")
            server.publish(changed("/etc/other"), changed("/etc/rhsm/rhsm.conf"))
            assert (await said(ws))["event"] == "change"
            await ws.send_message(b"ping")
            assert (await said(ws))["event"] == "pong"
            roles.content = b""
            server.publish(changed("/etc/rhsm/rhsm.conf"))
            assert ((await said(ws))["content"]) == ""
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert roles.asked == [
            ("watch_file", {"path": "/etc/rhsm/rhsm.conf", "content": True, "passing": True}),
            ("unwatch_file", {"watch": "w1"}),
        ]
        assert len(server.board.links) == 0


async def with_files(server: House, folder: Path) -> None:
    """Start the role that watches files, or start it again."""

    async def run(health: Any, *, task_status: trio.TaskStatus[None]) -> None:
        settings = FilesSettings(content_allow=(str(folder),))
        await run_files(server.bus, server.store, settings, health, metrics=server.metrics, task_status=task_status)

    await server.supervisor.stop("files")
    await server.supervisor.start(Role("files", run))


async def is_left_alone(server: House) -> bool:
    """Is nothing watched any more?"""
    return ("files_watched_directories", (), 0) in list(server.metrics)


async def test_a_file_is_told_after_its_role_began_anew_and_what_became_of_it_meanwhile(tmp_path: Path) -> None:
    file = tmp_path / "rhsm.conf"
    file.write_text("one")
    async with house(tmp_path) as server:
        await with_files(server, tmp_path)
        async with connect(at(server, f"/ws/monitor/{file}")) as ws:
            assert base64.b64decode((await said(ws))["content"]) == b"one"
            await server.supervisor.stop("files")
            file.write_text("two")
            await with_files(server, tmp_path)
            told = await said(ws)
            assert (told["event"], base64.b64decode(told["content"])) == ("change", b"two")
            file.write_text("three")
            while base64.b64decode((await said(ws))["content"]) != b"three":
                pass
        await until(lambda: is_left_alone(server), 60)


async def test_a_file_that_cannot_be_watched_any_more_closes_with_the_reason(tmp_path: Path) -> None:
    roles = Roles()
    path = "/ws/monitor//etc/rhsm/rhsm.conf"
    async with house(tmp_path, handlers=roles.handlers) as server, connect(at(server, path)) as ws:
        assert (await said(ws))["event"] == "open"
        roles.refusal = ActionError("too_big", "256 paths are watched already")
        server.publish(RoleChanged(name="logs", state="running", restarts=0, error=None))
        server.publish(RoleChanged(name="files", state="running", restarts=1, error=None))
        with trio.fail_after(60), pytest.raises(ConnectionClosed):
            await ws.get_message()
        assert ws.closed is not None
        assert (ws.closed.code, ws.closed.reason) == (1008, "too_big: 256 paths are watched already")


async def test_what_happens_while_the_first_frame_is_made_is_told_after_it(tmp_path: Path) -> None:
    roles, looks = Roles(), 0

    async def look_file(payload: dict[str, Any]) -> dict[str, Any]:
        nonlocal looks
        looks += 1
        if looks == 1:
            server.publish(changed(payload["path"]))
            await server.store.commit()
        return {"content": base64.b64encode(b"%d" % looks).decode()}

    path, handlers = "/ws/monitor//etc/rhsm/rhsm.conf", roles.handlers | {"look_file": look_file}
    async with house(tmp_path, handlers=handlers) as server, connect(at(server, path)) as ws:
        assert base64.b64decode((await said(ws))["content"]) == b"1"
        assert base64.b64decode((await said(ws))["content"]) == b"2"


async def test_who_leaves_when_the_watch_is_gone_already_is_no_failure(tmp_path: Path) -> None:
    async def forgotten(payload: dict[str, Any]) -> dict[str, Any]:
        raise ActionError("not_found", "watch w1 is not known here")

    handlers = Roles().handlers | {"unwatch_file": forgotten}
    async with house(tmp_path, handlers=handlers) as server:
        async with connect(at(server, "/ws/monitor//etc/rhsm/rhsm.conf")) as ws:
            assert (await said(ws))["event"] == "open"
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert "http_internal_errors_total" not in {name for name, _, _ in server.metrics}


async def test_a_path_that_cannot_be_watched_closes_with_the_reason(tmp_path: Path) -> None:
    async with house(tmp_path, handlers=Roles().handlers) as server, connect(at(server, "/ws/monitor//proc/x")) as ws:
        with pytest.raises(ConnectionClosed):
            await ws.get_message()
        assert ws.closed is not None
        assert (ws.closed.code, ws.closed.reason) == (1008, "bad_payload: key path: not there")


async def test_without_compat_there_are_no_such_endpoints(tmp_path: Path) -> None:
    settings = ControlSettings(listen=("127.0.0.1:0",), compat=False)
    async with house(tmp_path, settings) as server:
        for path in ("/ws/rhsm/status", "/ws/monitor//etc/rhsm", "/ws/execute/sh"):
            with pytest.raises(PeerRefused, match="404"):
                async with connect(at(server, path)):
                    pass
        async with connect(at(server, "/")) as ws:
            await ws.send_message('{"op":"get-status"}')
            assert (await said(ws))["payload"]["tool"] == "emissary"
