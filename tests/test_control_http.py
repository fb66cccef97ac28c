"""What the control server's port says over plain HTTP: health, numbers, artifacts, the page's files."""

from pathlib import Path

import httpx
import msgspec
import pytest

from agent.core.events import Alert, Artifact
from agent.core.tls import client_context
from tests.control_house import House, house
from tests.ended_run import finished


async def get(server: House, path: str, token: str | None = "sesame", method: str = "GET") -> httpx.Response:
    headers = {"authorization": f"Bearer {token}"} if token else {}
    context = client_context(server.tls) if server.tls.ca_file else False
    async with httpx.AsyncClient(verify=context, trust_env=False, timeout=60) as browser:
        return await browser.request(method, server.http + path, headers=headers)


async def test_healthz_is_200_while_all_is_well_and_503_with_what_fails(tmp_path: Path) -> None:
    async with house(tmp_path) as server:
        well = await get(server, "/healthz", None)
        assert (well.status_code, well.json()["ok"]) == (200, True)
        status = server.supervisor.status["control"]
        status.state, status.error = "backoff", "it broke"
        bad = await get(server, "/healthz", None)
        assert (bad.status_code, bad.json()["roles"]) == (503, ["control"])
        told = (await get(server, "/healthz", "peek")).json()
        assert told["roles"] == {"control": {"state": "backoff", "restarts": 0, "error": "it broke", "overdue": 0.0}}
        status.state, status.error = "running", None
        server.board.feed(Alert(code="link.mimir", text="It refuses.", remedy="Look.", since=5.0), 5.0)
        assert (await get(server, "/healthz", None)).json()["alerts"] == ["link.mimir"]
        alerts = (await get(server, "/healthz", "peek")).json()["alerts"]
        assert alerts == [{"code": "link.mimir", "text": "It refuses.", "remedy": "Look.", "since": 5.0}]
        server.board.alerts.clear()
        server.store.full = True
        assert (await get(server, "/healthz", None)).status_code == 503
        assert (await get(server, "/healthz", "wrong")).status_code == 401


@pytest.mark.parametrize("tls", [False, True])
async def test_metrics_are_text_for_who_may_read(tmp_path: Path, tls: bool) -> None:
    async with house(tmp_path, tls=tls) as server:
        server.store.owe("mimir", lambda event: True)
        assert (await get(server, "/metrics", None)).status_code == 401
        assert (await get(server, "/metrics?token=peek&access_token=peek", None)).status_code == 401
        found = await get(server, "/metrics", "peek")
    assert found.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    lines = found.text.splitlines()
    assert 'emissary_role_up{role="control"} 1.0' in lines
    assert 'emissary_outbox_waiting{sink="mimir"} 0' in lines
    assert 'emissary_http_refused_total{status="401"} 2' in lines
    assert "emissary_journal_seq 1" in lines


@pytest.fixture
def content() -> bytes:
    return bytes(range(256)) * 1000


async def with_run(server: House, content: bytes) -> Path:
    folder = server.store.folder / "runs" / "r-9"
    folder.mkdir(parents=True)
    (folder / "xunit.xml").write_bytes(content)
    (folder / "result.json").write_text("{}")
    (folder / "secret.log").write_text("not named")
    (folder / "link.log").symlink_to("/etc/passwd")
    event = finished("r-9", folder / "xunit.xml")
    artifacts = event.artifacts | {
        "link.log": Artifact(path=str(folder / "link.log"), sha256="0" * 64, size=1),
        "gone.log": Artifact(path=str(folder / "gone.log"), sha256="0" * 64, size=1),
        "else.log": Artifact(path="/etc/passwd", sha256="0" * 64, size=1),
    }
    server.bus.publish(msgspec.structs.replace(event, artifacts=artifacts))
    await server.store.commit()
    return folder


async def test_an_artifact_is_sent_as_it_is(tmp_path: Path, content: bytes) -> None:
    async with house(tmp_path) as server:
        await with_run(server, content)
        found = await get(server, "/runs/r-9/xunit.xml", "peek")
        assert (found.status_code, found.content) == (200, content)
        assert found.headers["content-type"] == "application/xml"
        assert found.headers["etag"] == '"' + "0" * 64 + '"'
        head = await get(server, "/runs/r-9/xunit.xml", method="HEAD")
        assert (head.headers["content-length"], head.content) == (str(len(content)), b"")
        assert (await get(server, "/runs/r-9/xunit.xml", None)).status_code == 401
        result = await get(server, "/runs/r-9/result.json", "peek")
        assert (result.headers["content-type"], result.json()) == ("application/json", {})


@pytest.mark.parametrize(
    "path",
    [
        "r-9/secret.log", "r-8/result.json", "r-9/link.log", "r-9/gone.log", "r-9/else.log", "r-9/", "r-9", "",
        "r-8/xunit.xml", "r-9/%2e%2e/r-9/xunit.xml", "r-9%2fxunit.xml%00", "../token",
        "r-9//xunit.xml", "%2e%2e/token", "r-9/xunit.xml/",
    ],
)  # fmt: skip
async def test_nothing_but_what_the_result_names_is_sent(tmp_path: Path, content: bytes, path: str) -> None:
    async with house(tmp_path) as server:
        await with_run(server, content)
        found = await get(server, f"/runs/{path}")
    assert found.status_code in (400, 404)
    assert b"root:" not in found.content


async def test_the_page_needs_no_token_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    async with house(tmp_path) as server:
        for path, kind in (("/", "text/html"), ("/page.css", "text/css"), ("/page.js", "text/javascript")):
            found = await get(server, path, None)
            assert found.status_code == 200
            assert found.headers["content-type"] == f"{kind}; charset=utf-8"
            assert "default-src 'none'" in found.headers["content-security-policy"]
            assert "http://" not in found.text.replace("http://www.w3.org", "")
            assert "https://" not in found.text
        assert (await get(server, "/", None, method="POST")).status_code == 405
        assert (await get(server, "/role.py")).status_code == 404
