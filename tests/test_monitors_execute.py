"""Real programs that behave, lie, hang, flood and die: each has its lines, and nothing of it is left."""

import os
import tempfile
from pathlib import Path

import pytest
import trio

from agent.core.process import Child, Exit
from agent.core.processtree import tree
from agent.monitors import execute
from agent.monitors.role import MARK
from agent.monitors.settings import MonitorLimits
from tests.monitors_house import ID, House, house, monitor, program

RUN = f"{ID}-000001"


async def nothing_left(here: House) -> bool:
    """No process, and soon no folder."""
    found = [stat for stat in tree(f"{MARK}{RUN}") if not stat.ended]
    with trio.fail_after(60):
        while list((here.store.folder / "monitors").iterdir()):  # noqa: ASYNC110  # nothing tells of it
            await trio.sleep(0.01)
    return not found


async def test_a_good_run(tmp_path: Path) -> None:
    body = """
print("noise before", flush=True)
config = shake()
hear(); say("Log Info " + config["Host"]); say("Step OK")
hear(); say("Step Time k=v 12.5")
print(os.environ["TMPDIR"] == os.getcwd() == os.environ["TMP"], sorted(os.environ), file=sys.stderr)
assert hear() == "Exit 0"
"""
    given = monitor(program(tmp_path, body), steps=("A", "B"), config={"Host": "hé"}, env={"EXTRA": "1"})
    async with house(tmp_path, given) as here:
        first, second = await here.run_once()
        assert (first.state, first.timed_by, second.ms, second.metadata) == ("ok", "orchestrator", 12.5, {"k": "v"})
        [run] = here.runs()
        assert (run.ended_by, run.rc, run.signal, run.dialect, run.stray_results) == ("exit", 0, None, "metrist", 0)
        said = [(line.source, line.text) for line in here.logs()]
        assert said[:2] == [("noise", "noise before"), ("log", "hé")]
        seen = said[2][1]
        assert seen.startswith("True ")
        assert "'EXTRA'" in seen
        assert "HOME" not in seen
        assert await nothing_left(here)


@pytest.mark.parametrize(
    ("body", "state", "rc", "sign"),
    [
        ("shake(); hear()", "crashed", 0, None),
        ("shake(); hear(); sys.exit(3)", "crashed", 3, None),
        ("shake(); hear(); os.kill(os.getpid(), signal.SIGSEGV)", "crashed", None, "SIGSEGV"),
        ("sys.exit('no network')", "not_run", 1, None),
    ],
)
async def test_a_program_that_dies_is_told_with_its_last_words(
    tmp_path: Path, body: str, state: str, rc: int | None, sign: str | None
) -> None:
    last = "print('last words', file=sys.stderr, flush=True)\n"
    async with house(tmp_path, monitor(program(tmp_path, last + body), steps=("A", "B"))) as here:
        first, second = await here.run_once()
        assert (first.state, first.rc, first.signal) == (state, rc, sign)
        assert str(first.stderr_tail).startswith("last words\n")
        assert second.cause == ("earlier_step" if state == "crashed" else "handshake_failed")
        assert here.runs()[0].ended_by == "self"


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """We see the end of a pipe, and then the program's, before what it wrote into its other pipe between the two."""
    look = Child.look

    def late(child: Child) -> Exit | None:
        os.waitid(os.P_PIDFD, child.fileno(), os.WEXITED | os.WNOWAIT)
        return look(child)

    monkeypatch.setattr(Child, "look", late)
    monkeypatch.setattr(execute, "DRAIN_S", 0.0)


async def test_what_it_wrote_before_its_end_is_read_however_slow_we_are(tmp_path: Path, slow: None) -> None:
    body = "shake(); hear(); os.close(1); os.write(2, b'last words'); os._exit(3)"
    async with house(tmp_path, monitor(program(tmp_path, body))) as here:
        [step] = await here.run_once()
        assert (step.state, step.rc, step.stderr_tail) == ("crashed", 3, "last words")


async def test_a_webhook_that_it_waited_for_at_its_end_is_not_asked_for(tmp_path: Path, slow: None) -> None:
    body = "shake(); hear(); os.close(2); say('Wait For Webhook u'); os._exit(0)"
    async with house(tmp_path, monitor(program(tmp_path, body), webhook_url="http://127.0.0.1:9/{uid}")) as here:
        assert [step.state for step in await here.run_once()] == ["crashed"]


async def test_a_result_written_just_before_the_end_counts(tmp_path: Path) -> None:
    async with house(tmp_path, monitor(program(tmp_path, "shake(); hear(); say('Step OK'); os._exit(0)"))) as here:
        assert [step.state for step in await here.run_once()] == ["ok"]


async def test_what_cannot_be_started_is_told(tmp_path: Path) -> None:
    async with house(tmp_path, monitor(("/no/such/program",), steps=("A", "B"))) as here:
        steps = await here.run_once()
        assert [(step.state, step.cause) for step in steps] == [("not_run", "start_failed")] * 2
        assert "/no/such/program" in str(steps[0].text)
        assert here.runs()[0].ended_by is None


STUBBORN = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        while True:
            time.sleep(60)
    os._exit(0)
"""


async def test_the_ladder_reaches_the_last_descendant(tmp_path: Path) -> None:
    body = STUBBORN + "shake(); hear()\nwhile True: time.sleep(60)"
    given = monitor(program(tmp_path, body), timeout=0.5, exit_grace=0.2, eof_grace=0.1)
    async with house(tmp_path, given) as here:
        [step] = await here.run_once()
        assert (step.state, step.text) == ("timeout", "no result within 0.5 s")
        assert (here.runs()[0].ended_by, here.runs()[0].signal) == ("kill", "SIGKILL")
        assert await nothing_left(here)


async def test_a_descendant_that_holds_the_pipes_does_not_delay_the_end(tmp_path: Path) -> None:
    body = STUBBORN + "shake(); hear(); say('Step OK'); hear()"
    async with house(tmp_path, monitor(program(tmp_path, body))) as here:
        [step] = await here.run_once()
        assert step.state == "ok"
        assert (here.runs()[0].ended_by, here.runs()[0].rc) == ("exit", 0)
        assert await nothing_left(here)


async def test_cleanup_after_an_error_and_work_after_the_exit_reply_have_their_time(tmp_path: Path) -> None:
    mark = tmp_path / "cleaned"
    body = f"""
shake(); hear(); say("Step Error it is down")
assert hear() == "Exit 1"
say("Exit"); time.sleep(1); open({str(mark)!r}, "w").write("clean")
"""
    async with house(tmp_path, monitor(program(tmp_path, body), cleanup=True)) as here:
        [step] = await here.run_once()
        assert (step.state, step.text) == ("error", "it is down")
        assert here.runs()[0].ended_by == "exit"
        assert mark.read_text() == "clean"


async def test_a_monitor_that_waits_for_the_end_of_its_input_is_ended_by_it(tmp_path: Path) -> None:
    body = "shake(); hear(); say('Step OK'); hear()\nwhile True: hear()"
    async with house(tmp_path, monitor(program(tmp_path, body), exit_grace=0.1, eof_grace=60.0)) as here:
        assert [step.state for step in await here.run_once()] == ["ok"]
        assert (here.runs()[0].ended_by, here.runs()[0].rc) == ("eof", 1)


async def test_one_that_dripfeeds_noise_and_never_starts_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execute, "TERM_S", 60.0)
    body = "while True: print('loading', flush=True); time.sleep(0.05)"
    async with house(tmp_path, monitor(program(tmp_path, body), handshake_timeout=0.5, eof_grace=0.0)) as here:
        [step] = await here.run_once()
        assert (step.cause, step.text) == ("handshake_timeout", "still starting after 0.5 s")
        assert here.runs()[0].ended_by == "term"


async def test_one_that_does_not_read_cannot_block_us(tmp_path: Path) -> None:
    body = "say('Started 1.1'); say('Ready'); time.sleep(600)"
    given = monitor(program(tmp_path, body), config={"big": "x" * 90_000}, handshake_timeout=0.5, eof_grace=0.1)
    async with house(tmp_path, given) as here:
        [step] = await here.run_once()
        assert step.cause == "handshake_timeout"


async def test_a_flood_on_both_pipes_is_drained_and_counted(tmp_path: Path) -> None:
    body = """
shake(); hear()
for _ in range(64):
    os.write(1, b"noise of stdout\\n" * 4096); os.write(2, b"noise of stderr\\n" * 4096)
say("Step OK"); hear()
"""
    async with house(tmp_path, monitor(program(tmp_path, body))) as here:
        assert [step.state for step in await here.run_once()] == ["ok"]
        [run] = here.runs()
        forwarded = sum(len(line.text) for line in here.logs() if line.source != "agent")
        assert forwarded <= 2**20
        assert run.dropped_bytes + forwarded == 2 * 64 * 4096 * len("noise of stdout")


async def test_the_agent_ends_in_mid_run(tmp_path: Path) -> None:
    body = STUBBORN + "shake(); hear(); say('Step OK'); hear()\nwhile True: time.sleep(60)"
    async with house(tmp_path, monitor(program(tmp_path, body), steps=("A", "B", "C"))) as here:
        await here.bus.ask("run_monitor", {"id": ID})
        await here.until(lambda: here.steps())
    assert [(step.state, step.cause) for step in here.steps()] == [
        ("ok", None),
        ("not_run", "stopped"),
        ("not_run", "stopped"),
    ]
    assert await nothing_left(here)


async def test_auto_finds_out_that_the_other_spelling_is_meant(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    body = f"""
open({str(starts)!r}, "a").write("x")
shake(); said = hear()
if not said.startswith("Run step "):
    say(f'Log Error Unexpected message "{{said}}", assuming we have to exit'); sys.exit()
time.sleep(0.3); say("Step Time 0.25"); assert hear() == "Exit"
"""
    async with house(tmp_path, monitor(program(tmp_path, body), dialect="auto")) as here:
        for expected in ("xx", "xxx"):  # what it speaks is remembered
            [step] = await here.run_once()
            assert (step.state, step.ms) == ("ok", 250.0)
            assert starts.read_text() == expected
        assert [run.dialect for run in here.runs()] == ["seed", "seed"]


async def test_limits_hold_in_the_program(tmp_path: Path) -> None:
    body = """
import resource
config = shake(); hear()
say("Log Info %d %d" % (resource.getrlimit(resource.RLIMIT_NOFILE)[0], resource.getrlimit(resource.RLIMIT_CORE)[0]))
say("Step OK"); hear()
"""
    given = monitor(program(tmp_path, body), limits=MonitorLimits(nofile=64))
    async with house(tmp_path, given) as here:
        await here.run_once()
        assert [line.text for line in here.logs()] == ["64 0"]


async def test_a_secret_appears_nowhere(tmp_path: Path) -> None:
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "token").write_text("s3cr3t-token\n")
    (secrets / "token").chmod(0o600)
    body = """
token = shake()["Token"]; hear()
print("noise", token, flush=True); print("error", token, file=sys.stderr, flush=True)
say("Log Info " + token); say("Step Error it was " + token); hear()
"""
    given = monitor(program(tmp_path, body), config={"Token": "@secret@:token"}, env={"T": "@secret@:token"})
    async with house(tmp_path, given, secrets_dir=str(secrets)) as here:
        await here.run_once()
        assert len(here.logs()) == 3
        assert "s3cr3t" not in repr(here.events)
        (secrets / "token").chmod(0o644)
        [step] = await here.run_once()
        assert step.cause == "secret_unresolved"
        assert "config.Token" in str(step.text)
        assert "chmod 600" in str(step.text)


async def test_a_service_without_root_has_its_secrets_among_its_credentials(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secrets_token").write_text("from-systemd")
    (tmp_path / "secrets_token").chmod(0o400)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    given = monitor(program(tmp_path, "shake(); hear(); say('Step OK'); hear()"), config={"Token": "@secret@:token"})
    async with house(tmp_path, given, secrets_dir="/no/such/folder") as here:
        assert [step.state for step in await here.run_once()] == ["ok"]


async def test_a_death_before_started_is_known_at_once(tmp_path: Path) -> None:
    async with house(tmp_path, monitor(("/bin/false",))) as here:
        [step] = await here.run_once()
        assert (step.cause, step.rc) == ("handshake_failed", 1)  # and not handshake_timeout, 30 s later


async def test_another_user_has_his_folder_elsewhere_and_nothing_is_left_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root runs a monitor as another user")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    for folder in (tmp_path, tmp_path / "tmp"):  # pytest's own are for us alone
        folder.mkdir(exist_ok=True)
        folder.chmod(0o755)
    left = tmp_path / "tmp" / f"{MARK}{ID}-000007-0123"
    left.mkdir()
    (left / "file").touch()
    base = tmp_path / "state/monitors"
    base.mkdir(parents=True)
    (base / left.name).symlink_to(left)
    (base / f"{MARK}{ID}-000007-4567").symlink_to(tmp_path / "tmp/never-made")
    script = "say() { printf '%05d %s' ${#1} \"$1\"; }; id -un >&2; stat -c %U:%a . >&2; touch x; say 'Started 1.1'"
    async with house(tmp_path, monitor(("/bin/sh", "-c", script), user="nobody")) as here:
        assert list(base.iterdir()) == list((tmp_path / "tmp").iterdir()) == []
        await here.run_once()
        assert [line.text for line in here.logs() if line.source == "stderr"] == ["nobody", "nobody:700"]
    assert list(base.iterdir()) == list((tmp_path / "tmp").iterdir()) == []


async def test_a_user_that_is_not_there_refuses_the_run(tmp_path: Path) -> None:
    async with house(tmp_path, monitor(("/bin/true",), user="no-such-user")) as here:
        [step] = await here.run_once()
        assert (step.state, step.cause, "no user 'no-such-user'" in (step.text or "")) == (
            "not_run",
            "start_failed",
            True,
        )
        assert await nothing_left(here)
