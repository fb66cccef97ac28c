"""The frozen agent, both forms, on its own: no Python on its PATH, and in a root that has nothing but libc.

What `make dist` made is run as it is copied to a machine: demo, service, control, log scanner. deb and rpm are opened
with the tools of their systems, the list of parts is read by CycloneDX's own library.
"""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
from collections.abc import Callable, Generator, Sequence
from pathlib import Path

import pytest

import agent
from agent.core.bundle import checksums, damaged, is_unpacked
from agent.schema import schema
from tests.certificates import authority, issue

pytestmark = pytest.mark.interop

FORMS = ["agent", "onedir/agent"]
LIMIT_S = 120

both = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def tools(tmp_path: Path) -> Callable[..., dict[str, str]]:
    """`tools("sh", node)`: an environment whose PATH has these commands alone."""

    def place(*commands: str | Path, **more: str) -> dict[str, str]:
        folder = tmp_path / "tools"
        folder.mkdir(exist_ok=True)
        for command in commands:
            found = shutil.which(command)
            assert found is not None
            (folder / Path(command).name).symlink_to(found)
        return {"PATH": str(folder), "HOME": str(tmp_path), "TMPDIR": str(unpacked(tmp_path)), **more}

    return place


def unpacked(tmp_path: Path) -> Path:
    """Where the single file puts its files."""
    folder = tmp_path / "unpacked"
    folder.mkdir(exist_ok=True)
    return folder


def run(argv: Sequence[str | Path], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=LIMIT_S)


@contextlib.contextmanager
def service(
    argv: Sequence[str | Path], env: dict[str, str], listens_at: Path
) -> Generator[tuple[subprocess.Popen[str], str]]:
    """An agent that is READY, and the host:port of its control server; killed at the end if it is still there.

    `listens_at` is where it finds the socket of its supervisor.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as supervisor:
        supervisor.bind(str(listens_at))
        supervisor.settimeout(LIMIT_S)
        process = subprocess.Popen(argv, env=env, stderr=subprocess.PIPE, text=True, start_new_session=True)
        try:
            assert process.stderr is not None
            said = ""
            while not (found := re.search(r"control listens addresses=(\S+)", said)):
                line = process.stderr.readline()
                assert line, f"ended: {said}"
                said += line
            while "READY=1" not in supervisor.recv(65_536).decode():
                pass
            yield process, found[1]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)  # the single file is two processes
                process.communicate(timeout=LIMIT_S)


def settings(folder: Path, more: str = "") -> Path:
    """agent.toml of a machine that has no lab."""
    folder.mkdir(exist_ok=True)
    file = folder / "agent.toml"
    text = f'ident = "frozen-{os.getpid()}"\n[state]\ndir = "{folder}/state"\nreserve = "4KiB"\n'
    file.write_text(f'{text}[suites]\nroots = ["{folder}"]\n[control]\nlisten = ["127.0.0.1:0"]\n{more}')
    return file


@both
def test_it_says_what_it_was_made_from_and_what_it_needs(frozen: Path, form: str) -> None:
    said = json.loads(run([frozen / form, "--version", "--json"], {}).stdout)
    assert said["version"] == agent.__version__
    assert said["build"].startswith("frozen ")
    elf = [frozen / "onedir/agent", *(frozen / "onedir/lib").rglob("*.so*")]
    symbols = run(["objdump", "-T", *elf], dict(os.environ)).stdout
    asked = {tuple(map(int, found.split("."))) for found in re.findall(r"GLIBC_([\d.]+)\)", symbols)}
    assert said["glibc"] == ".".join(map(str, max(asked)))
    assert said["glibc"] in run([frozen / form, "--version"], {}).stdout


@both
def test_the_schema_keeps_its_descriptions(frozen: Path, form: str) -> None:
    assert json.loads(run([frozen / form, "schema"], {}).stdout) == json.loads(json.dumps(schema()))


@both
def test_it_scans_a_log(frozen: Path, tmp_path: Path, form: str) -> None:
    rules, log = tmp_path / "rules.toml", tmp_path / "kern.log"
    rules.write_text('version = 1\n[[rule]]\nid = "oom"\nseverity = "error"\nregex = "Out of memory"\n')
    log.write_text("all is well\nOut of memory: Killed process 12\n")
    done = run([frozen / form, "logs", "scan", "--rules", rules, log], {})
    assert (done.returncode, json.loads(done.stdout)["rule"]) == (0, "oom"), done.stderr


@both
def test_it_learns_from_a_log(frozen: Path, tmp_path: Path, form: str) -> None:
    log, labels, model = tmp_path / "past.log", tmp_path / "labels.jsonl", tmp_path / "logs.model"
    log.write_text("".join(f"disk {n} is late\ndisk {n} failed\nfan {n} is fine\n" for n in range(200)))
    classes = (None, "disk", None)
    labels.write_text("".join(json.dumps({"line": n + 1, "class": classes[n % 3]}) + "\n" for n in range(600)))
    told = []
    for command in (
        ("templates", log),
        ("learn", "--model", model, "--labels", labels, "--failure", r"disk (?<disk>\d+) failed", log),
        ("evaluate", "--model", model, "--labels", labels, "--failure", "failed", log),
    ):
        done = run([frozen / form, "logs", *command], {})
        assert done.returncode == 0, done.stderr
        told.append([json.loads(line) for line in done.stdout.splitlines()])
    templates, (learned,), (scored,) = told
    assert [template["text"] for template in templates] == ["disk <*> is late", "disk <*> failed", "fan <*> is fine"]
    assert (learned["classes"], learned["chains"]) == ({"disk": 200}, {"disk": 1})
    assert scored["alerts"]["f1"] == 1.0
    assert scored["forecasts"]["hits"] > 0


def demo(frozen: Path, form: str, env: dict[str, str], *more: str | Path) -> tuple[int, dict[str, str], str]:
    done = run([frozen / form, "demo", "--json", *more], env)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout), done.stderr


@both
def test_demo_with_no_more_than_a_shell(frozen: Path, form: str, tools: Callable[..., dict[str, str]]) -> None:
    code, result, said = demo(frozen, form, tools("sh"))
    assert "sample  command: a shell is all it needs" in said
    assert (code, result["runner"], result["verdict"]) == (0, "command", "passed")


def test_demo_with_ava(
    frozen: Path,
    tmp_path: Path,
    npm_project: Callable[..., Path],
    node: Path,
    tools: Callable[..., dict[str, str]],
) -> None:
    sample = tmp_path / "cache/emissary/sample-ava"
    sample.mkdir(parents=True)
    (sample / "node_modules").symlink_to(npm_project("ava@6.4.1") / "node_modules")
    env = tools("sh", "npm", node, XDG_CACHE_HOME=str(tmp_path / "cache"))
    code, result, _ = demo(frozen, "onedir/agent", env)
    assert (code, result["runner"], result["verdict"]) == (0, "ava", "passed")


def test_demo_with_pytest(frozen: Path, python_peer: Callable[..., Path], tools: Callable[..., dict[str, str]]) -> None:
    env = tools("sh")
    env["PATH"] += f":{python_peer('pytest==9.2.0').parent}"
    code, result, _ = demo(frozen, "onedir/agent", env)
    assert (code, result["runner"], result["verdict"]) == (0, "pytest", "passed")


@both
@pytest.mark.parametrize("callers", [{}, {"LD_LIBRARY_PATH": "/opt/lab/lib"}])
def test_a_child_sees_its_callers_environment(
    frozen: Path, tmp_path: Path, form: str, tools: Callable[..., dict[str, str]], callers: dict[str, str]
) -> None:
    project = tmp_path / "project"
    project.mkdir()
    text = 'id = "env"\nrunner = "command"\ncommand = ["env"]\nenv_pass = ["LD_*", "_*", "PYI*"]\n'
    (project / "suite.toml").write_text(text)
    env = tools("sh", "env", **callers)
    code, result, _ = demo(frozen, form, env, "--suite", project)
    (output,) = tmp_path.glob(f".cache/emissary/demo-*/agent/runs/{result['run']}/stdout.log")
    seen = dict(line.split("=", 1) for line in output.read_text().splitlines())
    assert code == 0
    assert {name: value for name, value in seen.items() if name.startswith(("LD_", "_PYI", "PYI"))} == callers
    assert seen["PATH"] == env["PATH"]


@both
def test_the_service_serves_until_it_is_told_to_end(
    frozen: Path, tmp_path: Path, form: str, tools: Callable[..., dict[str, str]]
) -> None:
    ca = authority(tmp_path)
    server = issue(ca, tmp_path, "agent")
    server.key.chmod(0o600)
    tls = f'tls = {{ cert = "{server.cert}", key = "{server.key}" }}\n'
    config = settings(tmp_path / "machine", tls)
    notify = tmp_path / "notify"
    env = tools("sh")
    ctl: list[str | Path] = [frozen / form, "ctl", "--config", config]
    with service([frozen / form, "run", "--config", config], env | {"NOTIFY_SOCKET": str(notify)}, notify) as (
        process,
        address,
    ):
        ctl += ["--url", f"wss://{address}/"]
        trusting = env | {"SSL_CERT_FILE": str(ca.cert)}
        status = json.loads(run([*ctl, "status"], trusting).stdout)
        assert status["ident"] == f"frozen-{os.getpid()}"
        # An authority that nobody knows; a system without any says so.
        refused = run([*ctl, "status"], env)
        assert refused.returncode != 0
        assert re.search("unable to get local issuer certificate|no trusted certificates", refused.stderr)
        suite = tmp_path / "machine/suite.toml"
        suite.write_text('id = "echo"\nrunner = "command"\ncommand = ["sh", "-c", "echo hello"]\n')
        name = json.loads(run([*ctl, "run_suite", f"path={suite}"], trusting).stdout)["run"]
        watch = [*ctl, "watch", "--since", "0", "--kind", "SuiteFinished"]
        with subprocess.Popen(watch, env=trusting, stdout=subprocess.PIPE, text=True) as events:
            assert events.stdout is not None
            finished = json.loads(events.stdout.readline())
            events.terminate()
        assert (finished["run"], finished["data"]["verdict"]) == (name, "passed")
        onedir = frozen / "onedir"
        for folder in unpacked(tmp_path).glob("_MEI*/run"):  # of the single file: the same release as the folder
            assert is_unpacked(folder)
            assert checksums(folder) == checksums(onedir)
            assert damaged(folder) == []
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert list(unpacked(tmp_path).iterdir()) == []


@pytest.fixture
def root(frozen: Path, tmp_path: Path) -> Path:
    """A root with libc, what the boot loader needs, and a shell: no more, and nothing of Python."""
    sh = Path(shutil.which("sh") or "/bin/sh").resolve()
    onedir, env = frozen / "onedir", {"PATH": os.environ["PATH"]}
    asked = run(["ldd", onedir / "agent", sh], env).stdout
    asked += run(["ldd", *(onedir / "lib").rglob("*.so*")], env | {"LD_LIBRARY_PATH": str(onedir / "lib")}).stdout
    root = tmp_path / "root"
    for library in {Path(name) for name in re.findall(r"(?:=> |^\s+)(/\S+) \(0x", asked, re.MULTILINE)}:
        if onedir not in library.parents:
            (root / library.relative_to("/")).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(library, root / library.relative_to("/"))
    for folder in ("bin", "proc", "dev", "tmp", "run"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "dev/null").touch()
    shutil.copy(sh, root / "bin/sh")
    shutil.copytree(onedir, root / "onedir")
    shutil.copy(frozen / "agent", root / "agent")
    return root


@pytest.fixture
def inside(root: Path) -> list[str]:
    """What goes before a command to run it in that root, with namespaces of its own."""
    own = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    unshare, chroot = (
        shutil.which(name, path="/usr/bin:/usr/sbin:/bin:/sbin") or name for name in ("unshare", "chroot")
    )
    enter = [unshare, *own, "--mount", "--pid", "--fork", "--kill-child", f"--mount-proc={root / 'proc'}"]
    argv = [*enter, chroot, str(root)]
    tried = run([*argv, "/bin/sh", "-c", "exit 0"], dict(os.environ))
    if tried.returncode:
        pytest.skip(f"no chroot of our own here: {tried.stderr.strip()}")
    return argv


IN_ROOT = {"PATH": "/bin", "HOME": "/", "TMPDIR": "/tmp"}  # of that root


@both
def test_in_an_empty_root_it_runs_a_suite_and_serves(frozen: Path, root: Path, inside: list[str], form: str) -> None:
    done = run([*inside, f"/{form}", "demo", "--json"], IN_ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"] == "passed"
    settings(root / "machine")
    config = root / "machine/agent.toml"
    config.write_text(config.read_text().replace(str(root), ""))
    argv = [*inside, f"/{form}", "run", "--config", "/machine/agent.toml"]
    with service(argv, IN_ROOT | {"NOTIFY_SOCKET": "/run/notify"}, root / "run/notify") as (_, address):
        asked = [*inside, f"/{form}", "ctl", "--config", "/machine/agent.toml", "--url", f"ws://{address}/", "status"]
        assert json.loads(run(asked, IN_ROOT).stdout)["ident"] == f"frozen-{os.getpid()}"


def test_where_the_single_file_cannot_unpack_the_folder_runs(
    frozen: Path, tmp_path: Path, tools: Callable[..., dict[str, str]]
) -> None:
    """A TMPDIR on a file system that runs nothing; the remedy is another TMPDIR, or the one-folder form."""
    if os.geteuid() != 0:
        pytest.skip("a file system of our own: only as root")
    folder, good = unpacked(tmp_path), tmp_path / "good"
    good.mkdir()
    script = f'mount -t tmpfs -o noexec,size=64m none {folder} && shift && "$@"'

    def on_noexec(argv: Sequence[str | Path], **more: str) -> subprocess.CompletedProcess[str]:
        return run(["/usr/bin/unshare", "--mount", "/bin/sh", "-c", script, "-", "-", *argv], env | more)

    env = tools("sh", "mount")
    refused = on_noexec([frozen / "agent", "--version"])
    assert (refused.returncode, "failed to map segment" in refused.stderr) == (127, True)  # before our code runs
    assert on_noexec([frozen / "agent", "--version"], TMPDIR=str(good)).returncode == 0
    assert on_noexec([frozen / "onedir/agent", "--version"]).returncode == 0


def test_the_deb_holds_the_release_and_says_what_it_needs(
    frozen: Path, tmp_path: Path, peer_command: Callable[[str], Path]
) -> None:
    (deb,) = frozen.glob("*.deb")
    dpkg_deb, env = peer_command("dpkg-deb"), dict(os.environ)
    assert run([dpkg_deb, "-x", deb, tmp_path / "root"], env).returncode == 0
    release = tmp_path / "root/usr/lib/emissary"
    assert checksums(release) == checksums(frozen / "onedir")
    assert damaged(release) == []
    assert os.access(release / "agent", os.X_OK)
    bom = tmp_path / "root/usr/share/doc/emissary/agent.cdx.json"
    assert bom.read_bytes() == (frozen / "agent.cdx.json").read_bytes()
    assert (bom.parent / "copyright").read_bytes() == (frozen / "LICENCES.txt").read_bytes()
    floor = json.loads(run([frozen / "onedir/agent", "--version", "--json"], {}).stdout)["glibc"]
    fields = run([dpkg_deb, "-f", deb, "Package", "Version", "Depends"], env).stdout
    assert fields == f"Package: emissary\nVersion: {agent.__version__}\nDepends: libc6 (>= {floor}), zlib1g\n"
    assert run([dpkg_deb, "-e", deb, tmp_path / "control"], env).returncode == 0
    for script in ("postinst", "prerm", "postrm"):
        assert run(["sh", "-n", tmp_path / "control" / script], env).returncode == 0
        assert os.access(tmp_path / "control" / script, os.X_OK)


def test_the_rpm_holds_the_release_and_says_what_it_needs(frozen: Path, peer_command: Callable[[str], Path]) -> None:
    (package,) = frozen.glob("*.rpm")
    rpm, env = peer_command("rpm"), dict(os.environ)
    asked = run([rpm, "-qp", "--qf", "[%{FILENAMES} %{FILEDIGESTS} %{FILEMODES:octal}\\n]", package], env).stdout
    files = {name: (digest, mode) for name, digest, mode in (line.rsplit(" ", 2) for line in asked.splitlines())}
    expected = checksums(frozen / "onedir")
    assert {f"/usr/lib/emissary/{name}": digest for name, digest in expected.items()}.items() <= {
        name: digest for name, (digest, _) in files.items()
    }.items()
    assert files["/usr/lib/emissary/agent"][1] == "100755"
    floor = json.loads(run([frozen / "onedir/agent", "--version", "--json"], {}).stdout)["glibc"]
    needs = run([rpm, "-qp", "--requires", package], env).stdout
    assert f"glibc >= {floor}\n" in needs
    scripts = run([rpm, "-qp", "--scripts", package], env).stdout
    assert scripts.count("/usr/lib/emissary/agent install") == 2


VALIDATE = """
import sys
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(sys.stdin.read())
sys.exit(str(error) if error else 0)
"""


def test_the_list_of_parts_is_cyclonedx_and_names_every_part(frozen: Path, python_peer: Callable[..., Path]) -> None:
    text = (frozen / "agent.cdx.json").read_text()
    python = python_peer("cyclonedx-python-lib[json-validation]==11.12.0")
    done = subprocess.run([python, "-c", VALIDATE], input=text, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stderr
    parts = {part["name"]: part for part in json.loads(text)["components"]}
    assert {"CPython", "OpenSSL", "SQLite", "PCRE2", "trio", "msgspec", "trio-websocket"} <= parts.keys()
    assert all(part["version"] and part["licenses"] for part in parts.values())


def test_the_licences_of_all_parts_are_there_word_for_word(frozen: Path) -> None:
    text = (frozen / "LICENCES.txt").read_text()
    parts = json.loads((frozen / "agent.cdx.json").read_text())["components"]
    assert [part for part in parts if f"\n  {part['name']} {part['version']}: " not in text] == []
    words = {
        "trio 0.": "Permission is hereby granted, free of charge",
        "msgspec 0.": "Redistribution and use in source and binary forms",
        "CPython 3.": "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2",
        "pyinstaller-bootloader 6.": "Bootloader Exception",
    }
    sections = re.split("\n={78}\n(.*)\n={78}\n", text)[1:]
    told = dict(zip(sections[::2], sections[1::2], strict=True))
    missing = [part for part, term in words.items() if not any(part in of and term in told[of] for of in told)]
    assert missing == []


def test_the_checksums_are_those_of_the_files(frozen: Path) -> None:
    onedir = frozen / "onedir"
    files = {str(path.relative_to(onedir)) for path in onedir.rglob("*") if path.is_file()}
    assert {*checksums(onedir), "lib/SHA256SUMS"} == files
    assert not is_unpacked(onedir)
    for folder, sums in ((frozen, "SHA256SUMS"), (frozen / "onedir", "lib/SHA256SUMS")):
        done = subprocess.run(["sha256sum", "--check", "--quiet", sums], cwd=folder, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "")
