"""`agent gator` from its command line: roots, exit codes, signals, isolated children."""

import json
import os
import re
import select
import signal
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from agent.gator import role
from agent.gator import spec as specs
from agent.gator.pool import Pool

AGENT = (sys.executable, "-m", "agent", "gator")
WITHIN_S = 240


def run(spec: str, folder: Path, *flags: str, **more: Any) -> subprocess.CompletedProcess[str]:
    file = folder / "spec.yaml"
    file.write_text(spec)
    argv = (*AGENT, "--tracking", str(folder / "t"), *flags, str(file))
    return subprocess.run(argv, capture_output=True, text=True, timeout=WITHIN_S, **more)


def test_a_tree_that_passes_ends_with_0_and_says_so(tmp_path: Path) -> None:
    done = run('!JobGroup {ident: g, jobs: [!Job {ident: a, command: "true"}]}', tmp_path)
    assert (done.returncode, done.stdout) == (0, "SUCCESS: 1 of 1 jobs passed, 0 failed\n")


def test_of_many_failed_jobs_the_first_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    done = run('!JobArray {ident: t, repeats: 22, jobs: [!Job {ident: x, command: "false"}]}', tmp_path)
    assert done.stdout.startswith("FAILURE: 0 of 22 jobs passed, 22 failed\nfailed: t/x_")
    assert (done.stdout.count("\n"), done.stdout.endswith("\nand 2 more failed\n")) == (22, True)


def test_a_single_job_may_be_the_root(tmp_path: Path) -> None:
    done = run("!Job {ident: a, command: sh, args: [-c, 'echo hello; exit 3']}", tmp_path)
    assert done.returncode == 1
    assert "[INFO   ] hello\n" in done.stdout
    assert "failed: a\n" in done.stdout
    assert (tmp_path / "t/db.sqlite").exists()


def test_a_single_job_is_started_again_as_its_retries_say(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('[gator]\nretry_on = ["fail"]\n')
    task = f"echo x >> {tmp_path}/ran; test $(wc -l < {tmp_path}/ran) = 2"
    done = run(
        f"!Job {{ident: a, command: sh, args: [-c, '{task}'], retries: 3}}",
        tmp_path,
        *("--config", str(tmp_path / "agent.toml")),
    )
    assert "[WARNING] 'a' is started again: it ended with code 1\n" in done.stdout
    assert (done.returncode, (tmp_path / "ran").read_text()) == (0, "x\nx\n")
    assert (tmp_path / "t/attempt_1/db.sqlite").exists()
    assert (tmp_path / "t/db.sqlite").exists()


@pytest.mark.parametrize(
    ("spec", "flags", "said"),
    [
        ("!Job {ident: a, cmd: x}", (), "spec.yaml:1: a: column 22: the key 'cmd' is not known here"),
        ("!!python/object/apply:os.system [touch pwned]", (), "got the tag '!!python/object/apply:os.system'"),
        ("!JobGroup {ident: g, jobs: [!Job {ident: a, command: x, on_done: [a]}]}", (), "waits for itself: a -> a"),
        (
            "!JobGroup {ident: g, jobs: [\n!Job {ident: a, command: x, resources: [!Cores [9]]}]}",
            ("--sched-arg", "concurrency=2"),
            "spec.yaml:2: g/a: resources: it wants 9 slots; there are 2",
        ),
        ("!Job {ident: a, command: x}", ("--sched-arg", "concurrency=two"), "concurrency=two: no whole number"),
        (
            "!Job {ident: a, command: x}",
            ("--scheduler", "slurm", "--sched-arg", "batch=two"),
            "--sched-arg batch=two: no whole number. Write it as batch=4.",
        ),
        ("!Job {ident: a, command: x}", ("--sched-arg", "licenses=l=1,m=all"), "licenses=m=all: no whole number"),
        (
            "!Job {ident: a, command: x}",
            ("--sched-arg", "cpus=0-3"),
            "cpus=0-3: no list of CPUs. Write it as cpus=0,1.",
        ),
        ("!Job {ident: a, command: x}", ("--sched-arg", "colour=red"), "--sched-arg colour: not known"),
        ("!Job {ident: a, command: x}", ("--sched-arg", "colour"), "--sched-arg is KEY=VALUE"),
        ("!Job {ident: a, command: x}", ("--interval", "0"), "--interval is more than 0"),
        ("!Job {ident: a, command: x}", ("--interval", "nan"), "--interval is more than 0"),
        ("!Job {ident: a, command: x}", ("--resume-wait", "nan"), "--resume-wait is from 0 to 86400"),
        (
            "!Job {ident: a, command: x}",
            ("--tracking", "/dev/null/t"),
            "--tracking /dev/null/t: no folder to write in: ",
        ),
        ("!Job {ident: a, command: x}", ("--events-fd", "977"), "--events-fd 977: not open for writing"),
    ],
)
def test_what_cannot_be_run_is_refused_with_2_and_nothing_is_started(
    tmp_path: Path, spec: str, flags: tuple[str, ...], said: str
) -> None:
    done = run(spec, tmp_path, *flags, cwd=None)
    assert (done.returncode, done.stdout) == (2, "")
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "t").exists()


def test_neither_spec_nor_parent_is_an_error_of_usage(tmp_path: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name != "GATOR_PARENT"}
    done = subprocess.run(AGENT, capture_output=True, text=True, timeout=WITHIN_S, env=env)
    assert (done.returncode, "Name a spec, or --parent and --id." in done.stderr) == (2, True)
    for parent in ("no such:x", "nonsense", "http://host:1", "host:99999"):
        argv = (*AGENT, "--id", "x", "--tracking", str(tmp_path), "--parent", parent)
        done = subprocess.run(argv, capture_output=True, text=True, timeout=WITHIN_S)
        assert (done.returncode, "Write it as HOST:PORT" in done.stderr) == (2, True), parent
    done = subprocess.run((*AGENT, "/no/such.yaml"), capture_output=True, text=True, timeout=WITHIN_S)
    assert (done.returncode, "/no/such.yaml: cannot be read" in done.stderr) == (2, True)


def test_every_flag_of_gators_own_command_line_is_taken(tmp_path: Path) -> None:
    flags = (
        *("--limit-error=0", "--limit-critical=0", "--limit-warning=5", "--interval", "5", "--scheduler", "local"),
        *("--quiet", "--all-msg", "--verbose", "--progress", "--id", "x", "--hub", "127.0.0.1:9"),
        *("--sched-arg", "concurrency=1", "--sched-arg", "babysit=1", "--resume-wait", "5"),
    )
    done = run("!Job {ident: a, command: 'true'}", tmp_path, *flags)
    assert done.returncode == 0, done.stderr


def test_a_single_job_is_told_with_its_start_and_end(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    done = run("!Job {ident: a, command: 'true'}", tmp_path, "--events-fd", str(writing), pass_fds=(writing,))
    os.close(writing)
    with open(reading) as pipe:
        plan, start, end = map(json.loads, pipe)
    assert (done.returncode, plan) == (0, {"event": "plan", "jobs": [["a"]]})
    assert start == {"event": "start", "path": [], "ident": "a", "started": end["started"]}
    assert (end["event"], end["result"], end["code"], end["started"] <= end["ended"]) == ("end", "SUCCESS", 0, True)


NESTED = """\
!JobGroup
ident: g
jobs:
  - !Job { ident: a, command: "true" }
  - !JobArray { ident: t, repeats: 2, jobs: [!Job { ident: x, command: sh, args: [-c, "exit $GATOR_ARRAY_INDEX"] }] }
"""


def test_isolated_children_are_processes_and_their_jobs_are_told_once(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    try:
        flags = ("--isolate", "--quiet", "--events-fd", str(writing))
        done = run(NESTED, tmp_path, *flags, pass_fds=(writing,))
    finally:
        os.close(writing)
    with open(reading) as pipe:
        events = [json.loads(line) for line in pipe]
    assert done.returncode == 1, done.stderr
    assert sorted((*event["path"], event["ident"], event["code"]) for event in events if event["event"] == "end") == [
        ("g", "a", 0),
        ("g", "t", "x_0", 0),
        ("g", "t", "x_1", 1),
    ]
    pids = set()
    for layer in (".", "t"):
        db = sqlite3.connect(tmp_path / "t" / layer / "db.sqlite")
        pids |= set(db.execute("SELECT value FROM Attribute WHERE name='pid'").fetchall())
        db.close()
    assert len(pids) == 2


def five_that_say_much_and_one_that_is_reached(folder: Path) -> str:
    """The path of a spec."""
    long = "!Job {ident: x, command: sh, args: [-c, 'printf %060000d 1']}"  # five are more than a pipe takes
    os.mkfifo(folder / "reached")
    last = f"!Job {{ident: last, command: sh, args: [-c, 'echo > {folder}/reached'], on_pass: [t]}}"
    (folder / "spec.yaml").write_text(
        f"!JobGroup {{ident: g, jobs: [!JobArray {{ident: t, repeats: 5, jobs: [{long}]}}, {last}]}}"
    )
    return str(folder / "spec.yaml")


def wait_until_reached(folder: Path) -> None:
    reached = os.open(folder / "reached", os.O_RDONLY | os.O_NONBLOCK)
    assert select.select([reached], [], [], WITHIN_S)[0]
    os.close(reached)


def test_a_reader_of_events_that_stands_still_holds_up_no_job(tmp_path: Path) -> None:
    spec = five_that_say_much_and_one_that_is_reached(tmp_path)
    reading, writing = os.pipe()
    argv = (*AGENT, "--quiet", "--tracking", str(tmp_path / "t"), "--events-fd", str(writing))
    with subprocess.Popen((*argv, spec), pass_fds=(writing,)) as root, open(reading) as pipe:
        os.close(writing)
        try:
            wait_until_reached(tmp_path)
            kinds = [json.loads(line)["event"] for line in pipe]
        finally:
            root.kill()
    assert (kinds.count("start"), kinds.count("output"), kinds.count("end"), len(kinds)) == (6, 5, 6, 1 + 17)


def test_a_reader_of_messages_that_stands_still_holds_up_no_job_and_misses_nothing(tmp_path: Path) -> None:
    spec = five_that_say_much_and_one_that_is_reached(tmp_path)
    argv = (*AGENT, "--all-msg", "--tracking", str(tmp_path / "t"), spec)
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as root:
        try:
            wait_until_reached(tmp_path)
            out, _ = root.communicate(timeout=WITHIN_S)
        finally:
            root.kill()
    *said, end = out.splitlines()
    assert [len(line.partition("] [INFO   ] ")[2]) for line in said] == [60_000] * 5
    assert (end, root.returncode) == ("SUCCESS: 6 of 6 jobs passed, 0 failed", 0)


def test_jobs_of_isolated_tiers_have_cpus_of_their_own(tmp_path: Path) -> None:
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        pytest.skip("one CPU: there is nothing to choose")
    script = "import os; print(*os.sched_getaffinity(0))"
    job = f'!Job {{ident: x, command: {sys.executable}, args: [-c, "{script}"], resources: [!Cores [1]]}}'
    tiers = ", ".join(f"!JobGroup {{ident: {ident}, jobs: [{job}]}}" for ident in "ab")
    done = run(f"!JobGroup {{ident: g, jobs: [{tiers}]}}", tmp_path, "--isolate", "--all-msg")
    assert done.returncode == 0, done.stderr
    said = [line.rpartition(" ")[2] for line in done.stdout.splitlines() if "[INFO   ]" in line]
    assert sorted(said) == [str(cpus[0]), str(cpus[1])]


def test_each_isolated_child_has_a_cgroup_of_its_own(tmp_path: Path, cgroup_home: Path) -> None:
    os.setxattr(cgroup_home, "user.delegate", b"1")
    os.mkfifo(tmp_path / "both")  # each waits for the other
    see = f"cat /proc/self/cgroup; wc -l {cgroup_home}/cgroup.procs"
    jobs = [
        f"!Job {{ident: {name}, command: sh, args: [-c, '{script}; {see}']}}"
        for name, script in (("a", f"cat {tmp_path}/both"), ("b", f"echo > {tmp_path}/both"))
    ]
    (tmp_path / "spec.yaml").write_text(f"!JobGroup {{ident: g, jobs: [{', '.join(jobs)}]}}")
    enter = ("sh", "-c", f'echo 0 > {cgroup_home}/cgroup.procs; exec "$0" "$@"')
    argv = (*enter, *AGENT, "--isolate", "--all-msg", "--tracking", str(tmp_path / "t"), "--sched-arg", "concurrency=2")
    done = subprocess.run((*argv, str(tmp_path / "spec.yaml")), capture_output=True, text=True, timeout=WITHIN_S)
    assert done.returncode == 0, done.stdout + done.stderr
    for ident in "ab":
        assert re.search(rf"0::/{cgroup_home.name}/run-\d-\S+\.{ident}/run-1-", done.stdout), done.stdout
    assert f"0 {cgroup_home}/cgroup.procs" in done.stdout  # else it could give its children no limits
    assert [*cgroup_home.glob("run-*")] == []


def test_isolated_children_read_the_settings_of_the_root(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('[gator]\nenv = "replace"\n')
    task = "!Job {ident: a, command: /bin/sh, args: [-c, 'echo $A${HOME+home}']}"
    spec = f"!JobGroup {{ident: g, env: {{A: b}}, jobs: [{task}]}}"
    done = run(spec, tmp_path, "--isolate", "--all-msg", "--config", "agent.toml", cwd=tmp_path)
    assert (done.returncode, "[INFO   ] b\n" in done.stdout) == (0, True), done.stdout


def test_the_secret_of_an_address_is_in_no_argument(tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text('[gator]\nlisten = "0.0.0.0"\n')
    see = f"cat /proc/$PPID/cmdline > {tmp_path}/argv; cat /proc/$PPID/environ > {tmp_path}/environ"
    script = tmp_path / "see"
    script.write_text(f"#!/bin/sh\n{see}\n")
    script.chmod(0o755)
    spec = f"!JobGroup {{ident: g, jobs: [!Job {{ident: a, command: {script}}}]}}"
    done = run(spec, tmp_path, "--isolate", "--config", str(tmp_path / "agent.toml"))
    assert done.returncode == 0, done.stdout + done.stderr
    argv = (tmp_path / "argv").read_text()
    environ = dict(each.partition("=")[::2] for each in (tmp_path / "environ").read_text().split("\0"))
    secret = environ["GATOR_PARENT"].partition("/t/")[2]
    assert "\0--id\0a\0" in argv
    assert len(secret) >= 22
    assert secret not in argv
    assert secret not in environ["EMISSARY_RUN"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_tree(tmp_path: Path, number: int) -> None:
    spec = tmp_path / "s.yaml"
    spec.write_text("!JobGroup {ident: g, jobs: [!Job {ident: a, command: sh, args: [-c, 'echo up; sleep 600']}]}")
    argv = (*AGENT, "--all-msg", "--tracking", str(tmp_path / "t"), str(spec))
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as root:
        assert root.stdout is not None
        assert "up" in root.stdout.readline()
        root.send_signal(number)
        out, _ = root.communicate(timeout=WITHIN_S)
    assert (root.returncode, "FAILURE: 0 of 1 jobs passed, 1 failed" in out) == (1, True)


def test_a_child_that_is_stopped_before_it_reached_its_parent_ends(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        deaf.settimeout(WITHIN_S)
        parent = f"127.0.0.1:{deaf.getsockname()[1]}"
        argv = (*AGENT, "--id", "a", "--parent", parent, "--tracking", str(tmp_path))
        with subprocess.Popen(argv, stderr=subprocess.PIPE, text=True) as child:
            connection, _ = deaf.accept()
            with connection:
                child.send_signal(signal.SIGTERM)
                _, said = child.communicate(timeout=WITHIN_S)
    assert (child.returncode, "stopped before the parent was reached ident=a" in said) == (
        1,
        True,
    )  # 3 if it had waited


def test_licences_that_nobody_counts_are_named(tmp_path: Path) -> None:
    spec = "!JobGroup {ident: g, jobs: [!Job {ident: a, command: 'true', resources: [!License [l]]}]}"
    assert role.unlisted(specs.load(spec).root, Pool(1, 0, {})) == ["l"]
    assert "license 'l' is not in [gator.licenses]" in run(spec, tmp_path).stderr
