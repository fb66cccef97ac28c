"""The coverage role with the lab's Drill admin, and without any: sessions, runs, reports, and what it says."""

import json
import random
import shutil
import time
import xml.etree.ElementTree as ET
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal

import httpx
import msgspec
import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from agent.core.covered import (
    CoverageArmed,
    CoverageDisarmed,
    CoverageLost,
    CoverageReport,
    CoverageSession,
    CoverageWarning,
)
from agent.core.errors import ActionError
from agent.core.events import Alert, LinkChanged, RoleChanged, TestStarted
from agent.core.store import open_store
from agent.coverage import role
from agent.coverage.kept import Kept
from agent.coverage.sources import Lost, Warned
from agent.coverage.sources.named import Sources
from agent.lab.server import Lab
from agent.lab.test2code import Session
from tests.coverage_house import House, Product, house
from tests.drill_transcripts import Played, unit
from tests.test_lab_drill import post, user_of
from tests.test_lab_server import lab_in


@asynccontextmanager
async def admin(folder: Path) -> AsyncIterator[tuple[Lab, httpx.AsyncClient]]:
    async with lab_in(folder / "lab") as lab, user_of(lab) as user:
        lab.drill.switches.auto_register = True
        yield lab, user


def session_of(lab: Lab, name: str = "s1") -> Session:
    builds = lab.drill.agents["lab-07"].builds.values()
    return next(plugin.sessions[name] for plugin in builds if name in plugin.sessions)


async def ready(here: House, lab: Lab, times: int = 1) -> None:
    """Enabled, for so many times by now, and the admin knows it."""
    await here.until(lambda: [link.state for link in here.of(LinkChanged)].count("ready") >= times)
    link = lab.drill.agents["lab-07"].link
    assert link is not None
    with trio.fail_after(60):
        await link.ready.wait()


def is_told(here: House, event: CoverageSession) -> bool:
    return event in here.events


async def done(here: House, name: str = "s1") -> None:
    await here.until(lambda: CoverageSession(session=name, state="done") in here.events)


async def test_a_session_from_start_to_its_end_with_the_labs_admin(tmp_path: Path) -> None:
    product = Product("./a.js", "src/b.js")
    async with admin(tmp_path) as (lab, user), house(tmp_path, product, lab.ws_url, flush_s=0.1) as here:
        await ready(here, lab)
        assert await here.open("r-0", tmp_path) == {}  # nothing is armed
        assert (await post(user, "START", sessionId="s1", testType="AUTO", isRealtime=True))[0] == 200
        (warning,) = here.of(CoverageWarning)
        assert warning.text == "r-0: started before the session, and not covered. Start it after, or arm always."
        assert here.of(CoverageArmed) == [CoverageArmed(sources=("v8",))]
        env = await here.open("r-1", tmp_path)
        assert await trio.Path(env["PROBE"]).is_dir()
        product.reach("./a.js", "101", "t1.test.js")
        with trio.fail_after(60):
            while not session_of(lab).flushes:  # noqa: ASYNC110 - the lab tells nobody of a flush
                await trio.sleep(0.05)
        product.reach("src/b.js", "01", "t2.test.js")
        (shown,) = (await here.bus.ask("coverage", {}))["sessions"]
        assert (shown["session"], shown["state"], shown["realtime"]) == ("s1", "running", True)
        assert await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)}) == {}
        assert not await trio.Path(env["PROBE"]).exists()
        assert (await post(user, "STOP", sessionId="s1"))[0] == 200
        await done(here)
        assert here.of(CoverageDisarmed) == [CoverageDisarmed()]
        session = session_of(lab)
        assert set(session.reached) == {("./a.js", "t1.test.js"), ("src/b.js", "t2.test.js")}
        assert (session.parts, session.objects, session.strange, session.late) == (2, 2, 0, 0)
        assert lab.drill.agents["lab-07"].bad_frames == 0
        states = [event.state for event in here.of(CoverageSession)]
        assert states == ["running", "stopping", "owed", "done"]


async def test_a_session_in_which_nothing_was_seen_says_why(tmp_path: Path) -> None:
    async with admin(tmp_path) as (lab, user), house(tmp_path, Product("./a.js"), lab.ws_url) as here:
        await ready(here, lab)
        for name, runs in {"s1": [], "s2": ["r-1"]}.items():
            assert (await post(user, "START", sessionId=name))[0] == 200
            for run in runs:
                await here.open(run, tmp_path)
            assert (await post(user, "STOP", sessionId=name))[0] == 200
            await done(here, name)
        assert [warning.text for warning in here.of(CoverageWarning)] == [
            "Nothing was collected: no runner was started while the session was open.",
            "Nothing was collected: r-1: The probe saw nothing.",
        ]


async def test_what_was_seen_before_a_start_is_not_the_sessions(tmp_path: Path) -> None:
    product = Product("./a.js")
    fixed = {"arm": "always", "build_version": "1"}
    async with admin(tmp_path) as (lab, user), house(tmp_path, product, lab.ws_url, **fixed) as here:
        await ready(here, lab)
        assert await here.open("r-1", tmp_path)
        product.reach("./a.js", "1")
        await post(user, "START", sessionId="s1")
        product.reach("./a.js", "01")
        await post(user, "START", sessionId="s2")
        product.reach("./a.js", "001")
        await post(user, "STOP_ALL")
        await done(here, "s2")
        flags = {name: [*session_of(lab, name).reached.values()] for name in ("s1", "s2")}
        assert [bin(value).count("1") for values in flags.values() for value in values] == [2, 1]


async def test_classes_of_a_run_are_announced_and_the_build_changes_when_no_session_is_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Product("./a.js")
    monkeypatch.delattr(random.Random, "uniform")  # at once: it waits for no jitter, as after a line that was cut
    async with admin(tmp_path) as (lab, user), house(tmp_path, product, lab.ws_url) as here:
        await ready(here, lab)
        (empty,) = lab.drill.agents.values()
        first = empty.config.build_version
        await post(user, "START", sessionId="s1")
        await here.open("r-1", tmp_path)
        product.reach("./a.js", "1")
        await post(user, "STOP", sessionId="s1")
        await done(here)
        assert session_of(lab).strange == 0
        await ready(here, lab, 2)
        (again,) = lab.drill.agents.values()
        assert again.config.build_version != first
        assert again.config.build_version.startswith("cat-")
        assert set(again.plugin.classes) == {"./a.js"}


async def test_a_restart_of_the_agent_takes_its_session_up(tmp_path: Path) -> None:
    product = Product("./a.js")
    async with admin(tmp_path) as (lab, user):
        async with house(tmp_path, product, lab.ws_url) as here:
            await ready(here, lab)
            await post(user, "START", sessionId="s1", testName="smoke")
            await here.open("r-1", tmp_path)
            product.reach("./a.js", "1")
            await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
            assert not session_of(lab).reached  # no flush was due yet
        async with house(tmp_path, product, lab.ws_url) as here:
            await ready(here, lab)
            (shown,) = (await here.bus.ask("coverage", {}))["sessions"]
            assert (shown["state"], shown["test_name"]) == ("running", "smoke")
            await here.open("r-2", tmp_path)
            product.reach("./a.js", "01")
            assert (await post(user, "STOP", sessionId="s1"))[0] == 200
            await done(here)
        (flags,) = session_of(lab).reached.values()
        assert bin(flags).count("1") == 2
        async with house(tmp_path, product, lab.ws_url) as here:
            assert (await here.bus.ask("coverage", {}))["sessions"] == ()


async def test_a_cut_line_does_not_end_a_session_that_has_found_more_classes(tmp_path: Path) -> None:
    """For the admin these would be another build, which it has no session of."""
    product = Product("./a.js")
    async with admin(tmp_path) as (lab, user), house(tmp_path, product, lab.ws_url) as here:
        await ready(here, lab)
        await post(user, "START", sessionId="s1")
        await here.open("r-1", tmp_path)
        link = lab.drill.agents["lab-07"].link
        assert link is not None
        times = [each.state for each in here.of(LinkChanged)].count("ready")
        link.lose()
        await ready(here, lab, times + 1)
        product.reach("./a.js", "1")
        assert (await post(user, "STOP", sessionId="s1"))[0] == 200
        await done(here)
        assert len(session_of(lab).reached) == 1
        await ready(here, lab, times + 2)  # and now it is another build
        assert list(lab.drill.agents["lab-07"].plugin.sessions) == []


async def restarted(here: House, times: int) -> None:
    await here.until(lambda: any(each.state == "running" and each.restarts == times for each in here.of(RoleChanged)))


async def test_a_restart_of_the_admin_takes_the_session_up(tmp_path: Path) -> None:
    product = Product("./a.js")
    async with admin(tmp_path) as (lab, user), house(tmp_path, product, lab.ws_url, flush_s=0.1) as here:
        await ready(here, lab)
        assert (await post(user, "START", sessionId="s1"))[0] == 200
        await here.open("r-1", tmp_path)
        await ready(here, lab)
        product.reach("./a.js", "101")
        with trio.fail_after(60):
            while not session_of(lab).reached:  # noqa: ASYNC110 - the lab tells nobody of a part
                await trio.sleep(0.05)
        known, times = lab.drill.agents.pop("lab-07"), [link.state for link in here.of(LinkChanged)].count("ready")
        assert known.link is not None
        known.link.lose()  # it has forgotten all, as a new process has
        await ready(here, lab, times + 1)
        product.reach("./a.js", "01")
        assert (await post(user, "STOP", sessionId="s1"))[0] == 200
        await done(here)
        assert session_of(lab).reached == {("./a.js", "t1.test.js"): 0x010101}


async def test_a_role_that_fails_and_is_started_again_loses_nothing(tmp_path: Path) -> None:
    product = Product("./a.js", "./b.js")
    fixed = {"build_version": "1", "flush_s": 0.1}
    async with admin(tmp_path) as (lab, user), house(tmp_path, product, lab.ws_url, **fixed) as here:
        await ready(here, lab)
        assert (await post(user, "START", sessionId="s1"))[0] == 200
        await here.open("r-1", tmp_path, report=True)
        await here.open("r-2", tmp_path)
        product.fails.append("look at r-2")
        product.reach("./a.js", "1")  # r-1 is looked at before, and gives it away only once
        await here.until(lambda: any(each.state == "backoff" for each in here.of(RoleChanged)))
        product.reach("./a.js", "01")  # nobody looks
        assert await here.open("r-3", tmp_path)  # and yet what starts now is covered, and what ends is reported
        product.reach("./b.js", "1")
        told = await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
        assert (told["covered"], told["warnings"]) == (3, [])
        await restarted(here, 1)
        await ready(here, lab, 2)
        product.reach("./a.js", "001")
        assert (await here.bus.ask("coverage", {}))["runs"] == ("r-2", "r-3")
        for run in ("r-2", "r-3"):
            await here.bus.ask("coverage_close", {"run": run, "artifacts": str(tmp_path)})
        assert (await post(user, "STOP", sessionId="s1"))[0] == 200
        await done(here)
        reached = session_of(lab).reached
        assert {name: bin(flags).count("1") for (name, _), flags in reached.items()} == {"./a.js": 3, "./b.js": 1}


async def test_a_last_look_that_fails_leaves_the_report_of_what_was_seen_before(tmp_path: Path) -> None:
    product = Product("./a.js")
    async with house(tmp_path, product) as here:
        for run in ("r-1", "r-2"):
            await here.open(run, tmp_path, report=True)
        product.reach("./a.js", "1")
        await here.bus.ask("coverage_close", {"run": "r-2", "artifacts": str(tmp_path)})  # all runs are looked at
        product.fails.append("last look at r-1")
        told = await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
        failure = "What ran last may be missing: RuntimeError: no last look at r-1"
        assert (told["covered"], told["warnings"]) == (1, [failure])
        assert (await here.bus.ask("coverage", {}))["runs"] == ()


async def test_other_settings_are_taken_up_with_sessions_and_runs_as_they_are(tmp_path: Path) -> None:
    product = Product("./a.js")
    async with admin(tmp_path) as (lab, user), house(tmp_path, product, lab.ws_url, build_version="1") as here:
        await ready(here, lab)
        await post(user, "START", sessionId="s1")
        env = await here.open("r-1", tmp_path, report=True)
        product.reach("./a.js", "1")
        await here.reload(flush_s=0.1, stop_reply="both")
        await ready(here, lab, 2)
        product.reach("./a.js", "01")
        assert await trio.Path(env["PROBE"]).is_dir()
        told = await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
        assert told["covered"] == 2
        assert (await post(user, "STOP", sessionId="s1"))[0] == 200
        await done(here)
        (flags,) = session_of(lab).reached.values()
        assert bin(flags).count("1") == 2


async def test_a_session_is_in_the_store_before_the_admin_hears_that_it_has_begun_or_is_over(tmp_path: Path) -> None:
    product = Product("./a.js")
    async with admin(tmp_path) as (lab, user), house(tmp_path, product, lab.ws_url) as here:
        await ready(here, lab)
        endings: dict[str, Literal["done", "cancelled"]] = {"STOP": "done", "CANCEL": "cancelled"}
        for end, then in endings.items():
            assert (await post(user, "START", sessionId=end))[0] == 200
            *_, saved = await Kept(here.store).read()
            assert [each.id for each in saved] == [end]
            assert (await post(user, end, sessionId=end))[0] == 200
            await here.until(partial(is_told, here, CoverageSession(session=end, state=then)))
            assert (await Kept(here.store).read())[2] == []


async def test_an_end_that_cannot_be_told_is_an_alert_after_a_minute(autojump_clock: MockClock, tmp_path: Path) -> None:
    (tmp_path / "state").mkdir(mode=0o700)
    machine = Played("./a.js")
    for line in (
        "attach",
        'A> START_AGENT_SESSION {"sessionId":"s1"}',
        "C>",
        'A> STOP {"sessionId":"s1"}',
        "cut",
        "C>",
    ):
        machine.does(line)
    store = open_store(tmp_path / "state", reserve=4096)
    async with trio.open_nursery() as nursery:
        await nursery.start(store.run)
        Kept(store).keep(machine.machine.sessions.values())
        nursery.cancel_scope.cancel()
    store.close()
    async with lab_in(tmp_path / "lab") as lab:
        lab.drill.switches.auto_register = True
        async with house(tmp_path, Product("./a.js"), "ws://127.0.0.1:9", build_version="1") as here:
            await here.until(lambda: any(alert.code == "coverage.undelivered" for alert in here.of(Alert)))
            assert 60 <= trio.current_time() <= 80
            (alert,) = (alert for alert in here.of(Alert) if alert.code == "coverage.undelivered")
            assert alert.text == "coverage of 1 sessions is not delivered to the Drill admin: s1"
        async with house(tmp_path, Product("./a.js"), lab.ws_url, build_version="1") as here:
            await done(here)


async def test_a_changed_file_drops_what_was_seen_of_it(tmp_path: Path) -> None:
    product = Product("./a.js")
    async with admin(tmp_path) as (lab, user), house(tmp_path, product, lab.ws_url, build_version="1") as here:
        await ready(here, lab)
        await post(user, "START", sessionId="s1")
        await here.open("r-1", tmp_path)
        product.reach("./a.js", "1")
        await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
        product.units = [unit("./a.js", checksum="other")]
        await here.open("r-2", tmp_path)
        (lost,) = here.of(CoverageLost)
        assert (lost.session, lost.classes) == ("s1", 1)


async def test_a_run_that_asks_for_coverage_gets_its_files_without_any_admin(tmp_path: Path) -> None:
    product = Product("./a.js", "src/b.js")
    async with house(tmp_path, product) as here:
        assert await here.open("r-0", tmp_path) == {}
        env = await here.open("r-1", tmp_path, report=True)
        assert await trio.Path(env["PROBE"]).is_dir()
        product.reach("./a.js", "101", "t1.test.js")
        product.told = [Warned("careful"), Lost(2, "too many")]
        totals = await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
        warnings = ["careful", "Of 2 classes coverage is lost: too many."]
        assert totals == {"files": 2, "lines": 16, "covered": 2, "warnings": warnings}
        assert here.of(CoverageReport) == [CoverageReport(run="r-1", files=2, lines=16, covered=2)]
        assert here.of(CoverageWarning) == [CoverageWarning(session="r-1", text="careful")]
        assert here.of(CoverageLost) == [CoverageLost(session="r-1", classes=2, why="too many")]
        lcov = (tmp_path / "lcov.info").read_text()
        assert "TN:t1_test_js\n" in lcov
        assert lcov.count("DA:1,1\n") == 1
        found = ET.parse(tmp_path / "cobertura.xml").getroot()
        assert (found.get("lines-valid"), found.get("lines-covered")) == ("16", "2")
        shown = await here.bus.ask("coverage", {})
        assert (shown["link"], shown["sessions"], shown["runs"]) == (None, (), ())
        msgspec.json.encode(shown)


@pytest.mark.parametrize("change", [False, True])
async def test_a_resumed_run_reports_what_it_had_reached_before(tmp_path: Path, change: bool) -> None:
    product, kept = Product("./a.js"), str(tmp_path / "coverage.json")
    async with house(tmp_path, product) as here:
        await here.open("r-1", tmp_path, report=True, kept=kept)
        product.reach("./a.js", "1")
        ended = {"run": "r-1", "artifacts": str(tmp_path), "resumes": True}
        assert await here.bus.ask("coverage_close", ended) == {}
        assert here.of(CoverageReport) == []
    if change:
        product.units = [unit("./a.js", checksum="other")]
    async with house(tmp_path, product) as here:
        await here.open("r-1", tmp_path, report=True, kept=kept)
        product.reach("./a.js", "01")
        told = await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
        assert told["covered"] == (1 if change else 2)


async def test_a_checkpoint_of_a_run_that_cannot_be_read_or_written_is_no_crash(tmp_path: Path) -> None:
    product, kept = Product("./a.js"), tmp_path / "coverage.json"
    kept.write_text("{")
    async with house(tmp_path, product) as here:
        for run, file in {"r-1": kept, "r-2": tmp_path / "not/there"}.items():
            await here.open(run, tmp_path, report=True, kept=str(file))
            product.reach("./a.js", "1")
            ended = {"run": run, "artifacts": str(tmp_path), "resumes": True}
            assert await here.bus.ask("coverage_close", ended) == {}


async def test_a_run_that_reached_nothing_says_why(tmp_path: Path) -> None:
    async with house(tmp_path, Product("./a.js")) as here:
        await here.open("r-1", tmp_path, report=True)
        told = await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
        assert told == {"files": 1, "lines": 8, "covered": 0, "warnings": ["The probe saw nothing."]}
        assert here.of(CoverageWarning) == [CoverageWarning(session="r-1", text="The probe saw nothing.")]


async def test_jvms_that_run_by_themselves_are_in_a_runs_reasons_and_warnings(tmp_path: Path) -> None:
    product = Product()
    product.teller = "product"
    async with house(tmp_path, product, sources=("v8", "jacoco")) as here:
        await here.open("r-1", tmp_path, report=True)
        product.told = [Warned("The JVM was killed."), Warned("No JVM is there yet.", passes=True), Lost(2, "why not")]
        told = await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
        nothing = "The probe saw nothing. The probe saw nothing."  # of the run, and of the JVMs
        assert told["warnings"] == ["The JVM was killed.", "Of 2 classes coverage is lost: why not.", nothing]
        assert [(each.session, each.text) for each in here.of(CoverageWarning)] == [
            ("", "The JVM was killed."),
            ("", "No JVM is there yet."),
            ("r-1", nothing),
        ]


@pytest.mark.parametrize("what", ["prepare", "write"])
async def test_what_cannot_be_read_or_written_is_an_answer_and_no_crash(tmp_path: Path, what: str) -> None:
    product = Product("./a.js")
    async with house(tmp_path, product) as here:
        if what == "prepare":
            product.broken = OSError(28, "no space left")
            with pytest.raises(ActionError, match=r"cannot prepare the coverage of r-1: .*no space left"):
                await here.open("r-1", tmp_path, report=True)
        else:
            await here.open("r-1", tmp_path, report=True)
            with pytest.raises(ActionError, match=r"cannot write the coverage of r-1: .*No such file"):
                await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path / "not/there")})
        assert (await here.bus.ask("coverage", {}))["runs"] == ()


async def test_a_run_does_not_wait_for_ever_for_its_coverage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    product = Product("./a.js")
    product.hangs = {"r-1", "r-2"}
    async with house(tmp_path, product) as here:
        monkeypatch.setattr(role, "PREPARE_S", 0.01)
        with pytest.raises(ActionError, match=r"coverage of r-1: the files of its product are not read after 0.01 s"):
            await here.open("r-1", tmp_path, report=True)
        monkeypatch.undo()
        product.hung = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(here.open, "r-2", tmp_path, report=True))
            await product.hung.wait()
            nursery.cancel_scope.cancel()  # the run was
        assert (await here.bus.ask("coverage", {}))["runs"] == ()
        assert list((tmp_path / "state/coverage/runs").iterdir()) == []
        assert await here.open("r-3", tmp_path, report=True) != {}


async def test_a_product_that_cannot_be_read_yet_holds_up_no_run_and_no_start(tmp_path: Path) -> None:
    product = Product("./a.js")
    product.hangs = {"product"}
    async with admin(tmp_path) as (lab, _), house(tmp_path, product, lab.ws_url, arm="always") as here:
        await product.hung.wait()  # the role is up, and reads
        assert await here.open("r-1", tmp_path, report=True) != {}
        assert lab.drill.agents == {}
        product.hangs.clear()
        await here.reload(arm="session")
        await ready(here, lab)


async def test_a_product_that_starts_while_the_agent_does_not_run_finds_what_to_load(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    product = Product()
    monkeypatch.setattr(product, "make", Sources().make)
    async with admin(tmp_path) as (lab, _), house(tmp_path, product, lab.ws_url, sources=("python",)) as here:
        await ready(here, lab)
    assert (tmp_path / "state/coverage/product/python/emissary_coverage.py").exists()
    assert not (tmp_path / "state/coverage/product/python.sock").exists()


async def test_nonsense_is_refused_by_name(tmp_path: Path) -> None:
    async with house(tmp_path, Product()) as here:
        with pytest.raises(ActionError, match="key dir is missing"):
            await here.bus.ask("coverage_open", {"run": "r-1"})
        assert await here.bus.ask("coverage_close", {"run": "never opened", "artifacts": "/"}) == {}


async def test_data_that_others_collected(tmp_path: Path) -> None:
    def payload(text: str) -> dict[str, Any]:
        return {"sessionId": "s1", "data": text}

    async with admin(tmp_path) as (lab, user), house(tmp_path, Product("./a.js"), lab.ws_url) as here:
        await ready(here, lab)
        await post(user, "START", sessionId="s1")
        assert (await post(user, "ADD_SESSION_DATA", **payload("no profile")))[0] == 200
        (warning,) = here.of(CoverageWarning)
        assert warning.text.startswith("ADD_SESSION_DATA: ")
        assert (await post(user, "ADD_SESSION_DATA", **payload(300_000 * "x")))[0] == 200
        assert len(here.of(CoverageWarning)) == 2


async def test_a_file_that_the_runner_names_is_credited_whatever_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """checks/a.js is no name of a test file; a report of Node is written as a worker of AVA writes it."""
    product, project, recorded = Product(), tmp_path / "project", Path(__file__).parent / "data/coverage/v8"
    project.mkdir()
    shutil.copy(recorded / "queue.mjs", project)
    scripts = (recorded / "report1.json").read_text().replace("file:///product", project.as_uri())
    test = {"url": (project / "checks/a.js").as_uri(), "functions": []}
    report = scripts.replace('"result":[', f'"result":[{json.dumps(test)},')
    monkeypatch.setattr(product, "make", Sources().make)
    async with house(tmp_path, product) as here:
        env = await here.open("r-1", project, report=True)
        started = TestStarted(run="r-1", suite="s", case="a", name="a", file="checks/a.js", started=1.0)
        for run in ("r-0", "r-1"):
            here.bus.publish(msgspec.structs.replace(started, run=run))
        here.bus.publish(msgspec.structs.replace(started, file=None))
        await wait_all_tasks_blocked()
        (Path(env["EMISSARY_V8"]) / f"coverage-1-{10 * time.time_ns() // 1_000_000}-1.json").write_text(report)
        told = await here.bus.ask("coverage_close", {"run": "r-1", "artifacts": str(tmp_path)})
        assert told["covered"] > 10
        assert "TN:checks_a_js\n" in (tmp_path / "lcov.info").read_text()
