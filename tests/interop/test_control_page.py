"""The status page in a real Chromium: what it shows, what it survives, what it must not run."""

import json
import os
import re
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
from trio_websocket import WebSocketConnection, open_websocket_url

from agent.control.settings import ControlSettings
from agent.core.events import Alert, LinkChanged, LogAnchor, LogAround, LogContext, LogMatched, TestFinished
from agent.core.learned import LogEvidence, LogForecast
from agent.core.supervise import Health, Role
from agent.coverage.session import Shown, Status
from tests.control_house import House, house
from tests.ended_run import finished, started

pytestmark = pytest.mark.interop

LIMIT_S = 60
OPTIONS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync --remote-debugging-port=0 about:blank"
)
HOSTILE = "<img src=x onerror=\"document.title='owned'\"><script>document.title='owned'</script> ‮ end"


class Tab:
    """A page that is open in the browser, by the DevTools protocol."""

    def __init__(self, ws: WebSocketConnection) -> None:
        self._ws, self._number = ws, 0
        self._session: str | None = None

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        await self._ws.send_message(json.dumps(message))
        while (answer := json.loads(await self._ws.get_message())).get("id") != self._number:
            pass  # events of the browser
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    async def open(self, url: str) -> None:
        target = await self.call("Target.createTarget", url="about:blank")
        attached = await self.call("Target.attachToTarget", targetId=target["targetId"], flatten=True)
        self._session = attached["sessionId"]
        await self.call("Page.navigate", url=url)

    async def run(self, script: str) -> Any:
        answer = await self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true; each change of the page is looked at."""
        script = f"""new Promise(done => {{
            const look = () => document.readyState === 'complete' && ({condition}) ? done(true) : false
            if (look()) return
            new MutationObserver(look).observe(document, {{subtree: true, childList: true, attributes: true,
                characterData: true}})
            addEventListener('load', look)
        }})"""
        with trio.fail_after(LIMIT_S):
            assert await self.run(script) is True

    async def press(self, key: str, code: int) -> None:
        for kind in ("rawKeyDown", "char", "keyUp") if key == "Enter" else ("keyDown", "keyUp"):
            text = {"text": "\r"} if kind == "char" else {}
            await self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **text)

    async def text(self, selector: str) -> str:
        text: str = await self.run(f"document.querySelector({json.dumps(selector)}).innerText")
        return text


@pytest.fixture
async def browser(peer_command: Callable[[str], Path], tmp_path: Path) -> AsyncIterator[str]:
    """Where a fresh Chromium listens for DevTools."""
    chromium = peer_command("chromium")
    argv = [str(chromium), *OPTIONS.split(), f"--user-data-dir={tmp_path / 'chromium'}"]
    env = {**os.environ, "HOME": str(tmp_path)}
    async with trio.open_nursery() as nursery:
        start = partial(trio.run_process, argv, stderr=subprocess.PIPE, check=False, env=env, start_new_session=True)
        process = await nursery.start(start)
        said = b""
        with trio.fail_after(LIMIT_S):
            while not (found := re.search(rb"DevTools listening on (ws://\S+)", said)):
                said += await process.stderr.receive_some()
        nursery.start_soon(_drain, process.stderr)
        yield found[1].decode()
        nursery.cancel_scope.cancel()


async def _drain(stream: trio.abc.ReceiveStream) -> None:
    async for _ in stream:
        pass


@asynccontextmanager
async def tab(browser: str, server: House, token: str = "peek") -> AsyncIterator[Tab]:
    async with open_websocket_url(browser, max_message_size=16 * 2**20) as ws:
        page = Tab(ws)
        await page.open(f"{server.http}/")
        await page.until("!document.querySelector('#login').hidden")
        await page.run(
            f"document.querySelector('#token').value = {json.dumps(token)};"
            "document.querySelector('#login').requestSubmit()"
        )
        yield page


def record(case: str, **more: Any) -> TestFinished:
    plain = TestFinished(
        run="r-9", suite="login", case=case, name=case, file="login.js", state="passed", ended=1.0, duration=0.012
    )
    return msgspec.structs.replace(plain, **more)


class Machine:
    """What the suites role would answer."""

    def __init__(self) -> None:
        self.runs: list[dict[str, Any]] = []

    async def answer(self, payload: dict[str, Any]) -> dict[str, Any]:
        return {"runs": self.runs, "draining": False}


async def test_the_page_shows_a_running_suite_live_and_survives_a_restart(
    browser: str, tmp_path: Path, held_port: int
) -> None:
    machine = Machine()
    settings = ControlSettings(listen=(f"127.0.0.1:{held_port}",))
    async with house(tmp_path, settings, handlers={"runs": machine.answer}) as server:
        server.publish(record("before › the page"))
        async with tab(browser, server) as page:
            await page.until("document.querySelector('#connection').innerText === 'live'")
            assert await page.text("#ident") == "lab-07"
            assert "No peer is set" in await page.text("#links")
            await page.until("document.querySelector('#results').innerText.includes('before › the page')")
            test = {"test": "logs in", "since": 1.0, "counts": {"passed": 3}}
            machine.runs = [{"run": "r-9", "suite": "login", "state": "running"} | test]
            server.publish(started("r-9"), record("logs in", state="failed", message="no\nsuch page"))
            await page.until("document.querySelector('#runs').innerText.includes('logs in')")
            await page.until("document.querySelector('#results').innerText.includes('such page')")
            for shown in ("r-9", "login", "running", "3 passed"):
                assert shown in await page.text("#runs tbody tr")
            server.publish(LinkChanged(name="mimir", state="offline", error="refused"))
            server.publish(Alert(code="link.mimir", text="Mimir refuses.", remedy="Look at the token.", since=1.0))
            await page.until("document.querySelector('#alerts').innerText.includes('Look at the token.')")
            for shown in ("mimir", "offline", "refused"):
                assert shown in await page.text("#links tbody tr")
            assert "control" in await page.text("#roles tbody")
            # ---- the agent ends; the page says so, and goes on when it is there again
            await server.supervisor.stop("control")
            await page.until("document.querySelector('#connection').innerText.startsWith('Not connected')")
            server.publish(record("while it was away"))
            await server.restart(settings)
            await page.until("document.querySelector('#connection').innerText === 'live'")
            await page.until("document.querySelector('#results').innerText.includes('while it was away')")
            machine.runs = []
            server.publish(finished("r-9"))
            await page.until("document.querySelector('#results').innerText.includes('login is over')")
            await page.until("document.querySelector('#runs').innerText.includes('Nothing runs.')")
            shown = await page.run("[...document.querySelectorAll('#results li')].map(item => item.innerText)")
            assert [text.split("\n")[0].split(" r-9")[0] for text in shown] == [
                "passed login is over", "passed while it was away 12 ms", "failed logs in 12 ms",
                "passed before › the page 12 ms",
            ]  # fmt: skip


async def test_a_tree_of_jobs_is_shown_by_its_groups(browser: str, tmp_path: Path) -> None:
    machine = Machine()
    machine.runs = [
        {"run": "r-9", "suite": "tree", "state": "running", "test": None, "since": 1.0, "counts": {"passed": 1}}
    ]
    nightly = {"build": "COMPLETE", "tests": {"x_0": "STARTED", HOSTILE: {"x": "PENDING"}}}

    async def get_tree(payload: dict[str, Any]) -> dict[str, Any]:
        return {"lab-07": {"r-8": {"ended": {"x": "COMPLETE"}}, "r-9": {"nightly": nightly}}}

    settings = ControlSettings(listen=("127.0.0.1:0",))
    handlers = {"runs": machine.answer, "get_tree": get_tree}
    async with house(tmp_path, settings, handlers=handlers) as server, tab(browser, server) as page:
        await page.until("!document.querySelector('#trees').hidden")
        shown = await page.run(
            "[...document.querySelectorAll('#trees tbody tr')].map(row => [...row.cells].map(cell => cell.textContent))"
        )
        assert shown == [
            ["r-9", "nightly", "0", "0", "1"],
            ["r-9", "nightly/tests", "0", "1", "0"],
            ["r-9", f"nightly/tests/{HOSTILE}", "1", "0", "0"],
        ]
        machine.runs = []
        server.publish(finished("r-9"))
        await page.until("document.querySelector('#trees').hidden")


async def test_the_page_shows_coverage_sessions(browser: str, tmp_path: Path) -> None:
    sessions = [
        Shown(
            session=HOSTILE, state="owed", test_type="AUTO", test_name=None, realtime=True, since=1.0, entries=12,
            waiting=True,
        ),
        Shown(
            session="s2", state="running", test_type="AUTO", test_name="smoke", realtime=False, since=1.0, entries=3,
            waiting=False,
        ),
    ]  # fmt: skip

    async def coverage(payload: dict[str, Any]) -> dict[str, Any]:
        status = Status(link="offline", build="1", armed=True, classes=3, sessions=tuple(sessions), runs=())
        answer: dict[str, Any] = msgspec.to_builtins(status)
        return answer

    settings = ControlSettings(listen=("127.0.0.1:0",))
    handlers = {"runs": Machine().answer, "coverage": coverage}
    async with house(tmp_path, settings, handlers=handlers) as server, tab(browser, server) as page:
        await page.until("!document.querySelector('#coverage').hidden")
        lines = "[...document.querySelectorAll('#coverage tbody tr')]"
        cells = await page.run(f"{lines}.map(row => [...row.cells].map(cell => cell.textContent))")
        assert [row[:2] + row[3:] for row in cells] == [
            [HOSTILE, "owed", "AUTO", "", "12", "not all yet"],
            ["s2", "running", "AUTO", "smoke", "3", "all"],
        ]
        sessions.clear()
        await page.until("document.querySelector('#coverage').hidden")


async def test_the_page_shows_monitors_and_their_steps(browser: str, tmp_path: Path) -> None:
    step = {"states": {"ok": 3}, "last": "ok", "at": 1.0, "ms": 12.5, "p50": 9.96, "p95": 12.5, "p99": 12.5}
    never = {"states": {}, "last": "not_run", "at": 1.0, "ms": None, "p50": None, "p95": None, "p99": None}
    shown = [{"id": "web", "state": "running", "steps": {"Ping": step, HOSTILE: never}}]
    shown.append({"id": "new", "state": "idle", "steps": {}})

    async def monitors(payload: dict[str, Any]) -> dict[str, Any]:
        return {"monitors": shown}

    settings = ControlSettings(listen=("127.0.0.1:0",))
    handlers = {"runs": Machine().answer, "monitors": monitors}
    async with house(tmp_path, settings, handlers=handlers) as server, tab(browser, server) as page:
        await page.until("!document.querySelector('#monitors').hidden")
        lines = "[...document.querySelectorAll('#monitors tbody tr')]"
        cells = await page.run(f"{lines}.map(row => [...row.cells].map(cell => cell.textContent))")
        assert [row[:4] + row[5:] for row in cells] == [
            ["web", "running", "Ping", "ok", "13 ms", "10.0 / 13 / 13 ms"],
            ["", "", HOSTILE, "not_run", "", ""],
            ["new", "idle", "", "", "", ""],
        ]


async def test_hostile_titles_and_lines_are_text(browser: str, tmp_path: Path) -> None:
    async with house(tmp_path) as server, tab(browser, server) as page:
        await page.until("document.querySelector('#connection').innerText === 'live'")
        server.publish(
            record(HOSTILE, state="failed", message=HOSTILE),
            Alert(code=HOSTILE, text=HOSTILE, remedy=HOSTILE, since=1.0),
            LinkChanged(name=HOSTILE, state=HOSTILE),
            msgspec.structs.replace(finished("r-9"), suite=HOSTILE, verdict="failed", reason=HOSTILE),
            matched(HOSTILE, anchors=(LogAnchor(1, HOSTILE),), before=(HOSTILE,)),
            LogContext(path=HOSTILE, match="lm-1", after=(HOSTILE,), record=(HOSTILE, HOSTILE)),
        )
        await page.until("document.querySelector('#results').innerText.includes('is over')")
        await page.until("document.querySelectorAll('#alerts li').length === 1")
        await page.until("document.querySelector('#logs pre.record')")
        assert (await page.text("#logs li pre")).split("\n") == [HOSTILE] * 4
        assert await page.run("document.querySelectorAll('img, main script').length") == 0
        assert await page.run("document.title") == "lab-07"


def matched(text: str, *, anchors: tuple[LogAnchor, ...] = (), before: tuple[str, ...] = ()) -> LogMatched:
    context = LogAround(found=True, anchors=anchors, before=before, elided=0, looked=100)
    return LogMatched(
        id="lm-1", path=text, generation=1, offset=7, length=5, rule="oops", severity="error", text=text,
        context=context, run="r-9", test="r-9:logs in",
    )  # fmt: skip


async def test_a_log_match_is_shown_in_its_context_and_with_its_test(browser: str, tmp_path: Path) -> None:
    async with house(tmp_path) as server, tab(browser, server) as page:
        await page.until("document.querySelector('#connection').innerText === 'live'")
        around = LogAround(
            found=True, anchors=(LogAnchor(9, "nearest"), LogAnchor(1, "outermost")), before=("just before",), elided=7,
            looked=100,
        )  # fmt: skip
        server.publish(msgspec.structs.replace(matched("the line"), context=around))
        await page.until("document.querySelector('#logs').innerText.includes('the line')")
        server.publish(LogContext(path="the line", match="lm-1", after=("behind it",), record=("trace", "  at x")))
        await page.until("document.querySelector('#logs pre.record')")
        assert (await page.text("#logs li pre")).split("\n") == [
            "outermost", "nearest", "… 7 lines left out", "just before", "the line", "behind it",
        ]  # fmt: skip
        assert await page.text("#logs .hit") == "the line"
        assert await page.text("#logs pre.record") == "trace\n  at x"
        for shown in ("error", "oops", "in r-9:logs in"):
            assert shown in await page.text("#logs li")


async def test_forecasts_and_what_became_of_them_are_shown(browser: str, tmp_path: Path) -> None:
    opened = LogForecast(
        path="a.log", id="lf-1", state="open", class_=HOSTILE, probability=0.914, horizon_s=60.0, expected_s=(1.0, 9.0),
        key="vol-3", evidence=(LogEvidence("a.log", 0, HOSTILE, 7),),
    )  # fmt: skip
    failed = LogEvidence("a.log", 9, "vol-3 failed", 8)
    async with house(tmp_path) as server, tab(browser, server) as page:
        await page.until("document.querySelector('#connection').innerText === 'live'")
        assert await page.run("document.querySelector('#forecasts').hidden")
        server.publish(opened)
        await page.until("!document.querySelector('#forecasts').hidden")
        assert await page.text("#forecasts li span.word") == "open"
        assert await page.text("#forecasts li pre") == f"{HOSTILE}\n"
        assert "vol-3 91 % within 60 s" in await page.text("#forecasts li")
        server.publish(msgspec.structs.replace(opened, state="hit", evidence=(*opened.evidence, failed)))
        await page.until("document.querySelector('#forecasts li').innerText.includes('vol-3 failed')")
        assert await page.run("document.querySelectorAll('#forecasts li').length") == 1
        assert await page.text("#forecasts li span.word") == "hit"
        for state, count in (("hit", 3), ("expired", 1)):
            server.metrics.gauge("logs_forecasts_total", partial(float, count), state=state)
        server.metrics.gauge("logs_forecasts_missed_total", lambda: 2)
        await page.until("document.querySelector('#forecasts p').textContent.startsWith('0 open. 3 of 4')")
        assert await page.text("#forecasts p") == (
            "0 open. 3 of 4 came true (75 %), 3 of 5 failures were forecast (60 %)."
        )


async def test_the_health_of_every_role_and_what_the_machine_is(browser: str, tmp_path: Path) -> None:
    facts = {"dmi.sys_vendor": "Acme", "dmi.product_name": "Anvil", "os.id": "rhel", "os.version": "9", "arch": "arm"}

    async def profile(payload: dict[str, Any]) -> dict[str, Any]:
        more = {"forced": False, "fits": [], "refused": [], "warnings": [], "settings": {}}
        return {"profile": "anvil", "facts": facts | {"cpu.model": "Hammer", "cpu.cores": 4}} | more

    async def broken(health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        raise OSError("no such device")

    async with house(tmp_path, handlers={"profile": profile}) as server, tab(browser, server) as page:
        await page.until("document.querySelector('#machine').innerText.includes('Anvil')")
        assert "Acme Anvil, rhel 9 arm, Hammer (4 cores), profile anvil" in await page.text("#machine")
        await server.supervisor.start(Role("logs", broken))
        rows = (
            "[...document.querySelectorAll('#roles tbody tr')].map(row => [...row.cells].map(cell => cell.innerText))"
        )
        # All at one look: it is started again and again.
        await page.until(
            f"(([control, logs]) => control?.join() === 'control,running,0,' && logs?.[0] === 'logs'"
            f" && logs[1] === 'backoff' && logs[3] === 'no such device')({rows})"
            " && getComputedStyle(document.querySelector('#roles td.bad')).color === 'rgb(179, 20, 29)'"
        )


async def test_a_wrong_token_is_said_and_the_page_asks_again(browser: str, tmp_path: Path) -> None:
    async with house(tmp_path) as server, tab(browser, server, token="wrong") as page:
        await page.until("document.querySelector('#refused').innerText.includes('the token is not known here')")
        assert await page.run("sessionStorage.getItem('token')") is None
        assert "Nothing runs" not in await page.text("main")  # it does not know


async def test_a_connection_that_is_lost_in_its_greeting_keeps_the_token(browser: str, tmp_path: Path) -> None:
    async with house(tmp_path) as server, tab(browser, server) as page:
        await page.until("document.querySelector('#connection').textContent === 'live'")
        await page.run("begin(); window.lost = socket; socket.close(); null")
        await page.until("socket !== lost && document.querySelector('#connection').textContent === 'live'")
        assert await page.run("document.querySelector('#login').hidden") is True


@pytest.mark.parametrize("scheme", ["light", "dark"])
async def test_it_works_in_a_narrow_window_in_light_and_dark(browser: str, tmp_path: Path, scheme: str) -> None:
    async with house(tmp_path) as server, tab(browser, server) as page:
        await page.until("document.querySelector('#connection').innerText === 'live'")
        await page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        await page.call("Emulation.setDeviceMetricsOverride", width=320, height=640, deviceScaleFactor=1, mobile=False)
        server.publish(record("x" * 300), LinkChanged(name="seneschal" * 9, state="connecting"))
        await page.until("document.querySelectorAll('#links tbody tr').length === 1")
        assert await page.run("document.documentElement.scrollWidth") <= 320
        ground = await page.run("getComputedStyle(document.body).backgroundColor")
        assert ground == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]


async def test_it_is_used_by_keyboard_alone(browser: str, tmp_path: Path) -> None:
    async with house(tmp_path) as server, open_websocket_url(browser, max_message_size=16 * 2**20) as ws:
        server.publish(LinkChanged(name="mimir", state="ready"))
        page = Tab(ws)
        await page.open(f"{server.http}/")
        await page.until("document.activeElement.id === 'token'")
        await page.call("Input.insertText", text="peek")
        await page.press("Enter", 13)
        await page.until("document.querySelector('#connection').innerText === 'live'")
        await page.until("document.querySelectorAll('#links tbody tr').length === 1")
        await page.run("document.querySelector('.skip').focus()")  # where a visitor begins
        reached = []
        for _ in range(3):
            await page.press("Tab", 9)
            reached.append(await page.run("document.activeElement.className || document.activeElement.tagName"))
            assert await page.run("getComputedStyle(document.activeElement).outlineStyle") == "solid"
        assert reached == ["OL", "wide", "wide"]  # the results, and the tables that have rows, can be scrolled
        await page.run("document.querySelector('.skip').focus()")
        await page.press("Enter", 13)
        await page.until("document.activeElement.id === 'runs'")
