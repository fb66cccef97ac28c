"""The shape of the house, kept from the code's own imports. The rules are ARCHITECTURE's; each function states one."""

import ast
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

PROTOCOLS = {
    *("control", "suites", "seneschal", "mimir", "polarize", "logs", "files", "coverage", "monitors", "eman", "gator"),
}
FLOORS = [
    {"_native"},
    {"core"},
    PROTOCOLS,
    {"lab"},
    {"settings"},
    {"checks", "ownlog", "standard"},
    {"selftest"},
    {"app", "ctl", "logscan", "loglearn", "logtemplates", "foreground", "install"},
    {"demo", "schema"},
    {"cli"},
    {"__main__"},
]

# Programs of their own: what a test runner, the product under test or the orchestrator loads, and the demo's suites.
LOADED_ELSEWHERE = (
    "agent/suites/runners/plugins/",
    "agent/coverage/hook.cjs",
    "agent/coverage/preload/",
    "agent/monitors/sdk.py",
    "agent/monitors/examples/",
)
SAMPLES = "agent/lab/samples/"
# Beside role.py, the files of a protocol folder that do I/O by design: the older services' endpoints; the Eman hub,
# Gator's layers and their files, the probe sources; the CI Bus; what gets a suite onto the disk, runs it, and writes
# down its end; what looks which AVA a project has; the file monitor's disk, descriptor and thread; D-Bus; what follows
# logs and reads one, and the file of their model; what runs a monitor.
DOES_IO = (
    *("agent/control/older.py", "agent/eman/hub.py", "agent/eman/connection.py", "agent/coverage/sources"),
    *(f"agent/coverage/{name}.py" for name in ("attach", "watched", "kept")),
    *(f"agent/gator/{name}.py" for name in ("layerdb", "schedulers", "port", "journal", "answers", "view", "told")),
    *(f"agent/gator/{name}.py" for name in ("wrapper", "tier", "elsewhere", "uplink", "service", "hub", "orphans")),
    *("agent/polarize/cibus.py", "agent/files/disk.py", "agent/files/follow.py", "agent/files/services.py"),
    *(
        "agent/logs/disk.py",
        "agent/logs/follow.py",
        "agent/logs/wake.py",
        "agent/logs/paths.py",
        "agent/logs/search.py",
        "agent/logs/source.py",
        "agent/logs/records.py",
        "agent/logs/streams.py",
        "agent/logs/growing.py",
        "agent/logs/learning.py",
        "agent/logs/forecasts.py",
        "agent/logs/modelfile.py",
        "agent/logs/corpus.py",
        "agent/logs/labelling.py",
    ),
    *("agent/monitors/execute.py", "agent/monitors/folders.py"),
    *(f"agent/suites/{name}.py" for name in ("prepare", "archive", "execute", "capture", "report", "runners/ava")),
)
IO_MODULES = {
    *("trio", "trio_websocket", "socket", "ssl", "select", "selectors", "httpx", "http.client", "urllib.request"),
    *("subprocess", "sqlite3", "threading", "inotify_simple", "jeepney.io"),
    *(
        f"agent.core.{module}"
        for module in (
            "bus",
            "cgroup",
            "channel",
            "inotify",
            "link",
            "listen",
            "process",
            "processtree",
            "store",
            "supervise",
        )
    ),
}
IO_CALLS = {"open", "read_text", "read_bytes", "write_text", "write_bytes"}
CLOCKS = {
    *("time.time", "time.time_ns", "time.monotonic", "time.monotonic_ns"),
    *("datetime.now", "datetime.utcnow", "datetime.datetime.now", "datetime.datetime.utcnow"),
}

NEEDS_NO_TEST_FILE = {"__init__", "__main__", "settings", "messages", "acts"}


def committed(*patterns: str) -> list[str]:
    """Paths below the checkout that git knows; in a tree without git, those that exist."""
    git = subprocess.run(["git", "-C", ROOT, "ls-files", "--", *patterns], capture_output=True, text=True)
    if git.returncode == 0:
        return [path for path in git.stdout.splitlines() if (ROOT / path).exists()]
    return [str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern.replace("*", "**/*"))]


MODULES = [path for path in committed("agent/*.py") if not path.startswith((*LOADED_ELSEWHERE, SAMPLES))]
TESTS = committed("tests/*.py")


def imports(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Line and dotted name of all that a file imports, anywhere in it; `from a import b` gives `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, name.name) for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{'.' * node.level}{node.module or ''}.{name.name}") for name in node.names)


def folder(path: str) -> str:
    """What stands directly below agent/: a folder's or a module's name."""
    return Path(path).parts[1].removesuffix(".py")


def floor(name: str) -> int | None:
    """The floor's number, 0 at the ground; None for what is on none."""
    return next((number for number, names in enumerate(FLOORS) if name in names), None)


def is_within(name: str, modules: set[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


def is_pure(path: str) -> bool:
    """Must it be free of I/O? All of a protocol folder, but for its role and the few files that are for I/O."""
    return folder(path) in PROTOCOLS and Path(path).name != "role.py" and not path.startswith(DOES_IO)


def file_of(name: str) -> str:
    """The file of a protocol folder that an imported name comes from: agent.eman.hub.serve -> agent/eman/hub.py."""
    return f"{'/'.join(name.split('.')[:3])}.py"


def stands_on_a_floor(path: str, tree: ast.Module) -> Iterator[str]:
    if floor(folder(path)) is None and folder(path) != "__init__":
        yield f"{path}: {folder(path)} is on no floor of ARCHITECTURE.md"


def imports_only_lower_floors(path: str, tree: ast.Module) -> Iterator[str]:
    for line, name in imports(tree):
        if name.startswith("."):
            yield f"{path}:{line}: a relative import; write the whole name"
        if not name.startswith("agent."):
            continue
        here, there, target = floor(folder(path)), floor(name.split(".")[1]), name.split(".")[1]
        if here is not None and there is not None and target != folder(path) and there >= here:
            yield f"{path}:{line}: imports {name}; agent.{target} is not on a floor below agent.{folder(path)}"


def imports_no_role(path: str, tree: ast.Module) -> Iterator[str]:
    for line, name in imports(tree):
        if folder(path) in {"core", "lab", *PROTOCOLS} and name.startswith("agent.") and "role" in name.split("."):
            yield f"{path}:{line}: imports {name}; roles meet on the bus"


def lab_imports_only_pure_files(path: str, tree: ast.Module) -> Iterator[str]:
    for line, name in imports(tree):
        of_protocol = name.startswith("agent.") and name.split(".")[1] in PROTOCOLS
        if (
            folder(path) == "lab"
            and of_protocol
            and not is_pure(file_of(name))
            and file_of(name) != "agent/eman/hub.py"
        ):
            yield f"{path}:{line}: imports {name}, which is not pure"


def protocols_do_no_io(path: str, tree: ast.Module) -> Iterator[str]:
    if not is_pure(path):
        return
    for line, name in imports(tree):
        if is_within(name, IO_MODULES):
            yield f"{path}:{line}: imports {name}; I/O belongs into role.py"
        if name.startswith(f"agent.{folder(path)}.") and not is_pure(file_of(name)):
            yield f"{path}:{line}: imports {name}, which is not pure"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in IO_CALLS:
            yield f"{path}:{node.lineno}: {ast.unparse(node.func)}; I/O belongs into role.py"


def protocols_read_no_clock(path: str, tree: ast.Module) -> Iterator[str]:
    if not is_pure(path):
        return
    for line, name in imports(tree):
        if name in CLOCKS:
            yield f"{path}:{line}: imports {name}; time is an argument"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and ast.unparse(node) in CLOCKS:
            yield f"{path}:{node.lineno}: reads {ast.unparse(node)}; time is an argument"


def runs_on_trio(path: str, tree: ast.Module) -> Iterator[str]:
    for line, name in imports(tree):
        if is_within(name, {"asyncio", "anyio"}):
            yield f"{path}:{line}: imports {name}; the house runs on trio"


Rule = Callable[[str, ast.Module], Iterator[str]]
RULES: list[Rule] = [
    stands_on_a_floor,
    imports_only_lower_floors,
    imports_no_role,
    lab_imports_only_pure_files,
    protocols_do_no_io,
    protocols_read_no_clock,
    runs_on_trio,
]


def report(faults: list[str]) -> None:
    assert not faults, "\n" + "\n".join(faults)


@pytest.mark.parametrize("rule", RULES)
def test_the_code_keeps(rule: Rule) -> None:
    faults: list[str] = []
    for path in MODULES:
        faults += rule(path, ast.parse((ROOT / path).read_text(), path))
    report(faults)


@pytest.mark.parametrize(
    ("rule", "path", "source"),
    [
        (stands_on_a_floor, "agent/utils.py", ""),
        (imports_only_lower_floors, "agent/core/bus.py", "from agent.logs.messages import Match"),
        (imports_only_lower_floors, "agent/logs/role.py", "from agent.suites import messages"),
        (imports_only_lower_floors, "agent/lab/server.py", "def run():\n    import agent.app"),
        (imports_only_lower_floors, "agent/core/bus.py", "from .events import Event"),
        (imports_no_role, "agent/eman/hub.py", "from agent.eman.role import run"),
        (imports_no_role, "agent/lab/server.py", "from agent.eman import role"),
        (lab_imports_only_pure_files, "agent/lab/drill.py", "from agent.coverage.sources.v8 import read"),
        (protocols_do_no_io, "agent/mimir/graph.py", "import trio"),
        (protocols_do_no_io, "agent/mimir/graph.py", "from agent.core import store"),
        (protocols_do_no_io, "agent/eman/shake.py", "from agent.eman import hub"),
        (protocols_do_no_io, "agent/gator/spec.py", "text = path.read_text()"),
        (protocols_do_no_io, "agent/gator/spec.py", "with open(path) as file: ..."),
        (protocols_read_no_clock, "agent/mimir/graph.py", "from time import monotonic"),
        (protocols_read_no_clock, "agent/mimir/graph.py", "import time\nnow = time.time()"),
        (protocols_read_no_clock, "agent/mimir/graph.py", "at = datetime.now(UTC)"),
        (runs_on_trio, "agent/mimir/role.py", "import asyncio"),
    ],
)
def test_a_breach_is_seen(rule: Rule, path: str, source: str) -> None:
    (fault,) = rule(path, ast.parse(source))
    assert fault.startswith(path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("agent/logs/scanner.py", "from agent._native import lib\nfrom agent.core.events import LogMatched"),
        ("agent/logs/role.py", "import trio\nfrom agent.core.bus import Bus\nfrom agent.logs.tail import Tail"),
        ("agent/lab/server.py", "from agent.eman.hub import serve\nfrom agent.mimir.messages import Upsert"),
        ("agent/app.py", "from agent.logs import role"),
        ("agent/cli.py", "import agent.app, agent.lab.server"),
    ],
)
def test_what_the_house_is_built_of_breaks_no_rule(path: str, source: str) -> None:
    report([fault for rule in RULES for fault in rule(path, ast.parse(source))])


def expected_test(path: str) -> str:
    parts = [part for part in Path(path).with_suffix("").parts[1:] if part != "runners"]
    return "test_" + "_".join(parts)


@pytest.mark.parametrize(
    ("path", "test"),
    [
        ("agent/app.py", "test_app"),
        ("agent/core/bus.py", "test_core_bus"),
        ("agent/suites/runners/tap.py", "test_suites_tap"),
        ("agent/coverage/sources/v8.py", "test_coverage_sources_v8"),
    ],
)
def test_the_name_of_a_test_file_follows_from_the_module(path: str, test: str) -> None:
    assert expected_test(path) == test


def test_each_module_has_its_test_file() -> None:
    names = {Path(path).stem for path in TESTS}
    report(
        [
            f"{path}: no tests/{expected_test(path)}.py"
            for path in MODULES
            if Path(path).stem not in NEEDS_NO_TEST_FILE and expected_test(path) not in names
        ]
    )


def test_each_file_that_other_programs_load_is_named_in_a_test() -> None:
    texts = [(ROOT / path).read_text() for path in TESTS if Path(path).name != "test_layout.py"]
    report(
        [
            f"{path}: no test names {Path(path).stem}"
            for path in committed("agent/*")
            if path.startswith(LOADED_ELSEWHERE) and Path(path).name != "__init__.py"
            if not any(Path(path).stem in text for text in texts)
        ]
    )


def test_no_module_is_longer_than_600_lines() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in MODULES}
    report([f"{path}: {length} lines; which two things are in it?" for path, length in lengths.items() if length > 600])
