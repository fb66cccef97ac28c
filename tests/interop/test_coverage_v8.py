"""Coverage of Node with real Nodes: AVA 7 with c8 on the same reports, killed runners, a whole parser's functions."""

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import pytest
import trio

from agent.coverage.catalog import Catalog, Delta
from agent.coverage.javascript import NotFollowed, functions, utf16
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources.v8 import V8, reading

pytestmark = pytest.mark.interop

DATA = Path(__file__).parents[1] / "data/coverage/ava"
AVA = "ava@7.0.0"
C8 = "c8@11.0.0"
LIMIT_S = 120
MOST_FILES = 600

# acorn and acorn-walk come with AVA. A method begins at its name or what stands before it but `static`, as V8 has it.
PARSE = r"""
const acorn = require('acorn'), walk = require('acorn-walk'), fs = require('fs');
for (const file of fs.readFileSync(0, 'utf8').split('\n').filter(Boolean)) {
  const text = fs.readFileSync(file, 'utf8').replace(/^\uFEFF/, '');
  let tree;
  for (const sourceType of ['module', 'script']) {
    try {
      tree = acorn.parse(text, {
        ecmaVersion: 'latest', sourceType, allowHashBang: true, allowReturnOutsideFunction: true,
      });
      break;
    } catch {}
  }
  if (!tree) continue;
  const starts = new Map();
  walk.full(tree, node => {
    if (node.type === 'MethodDefinition') {
      const before = node.static ? text.slice(node.start).match(/^static(\s|\/\*[^]*?\*\/|\/\/.*\n)*/)[0].length : 0;
      starts.set(node.value, node.start + before);
    } else if (node.type === 'Property' && (node.method || node.kind !== 'init')) {
      starts.set(node.value, node.start);
    }
  });
  const found = [];
  walk.full(tree, node => {
    if (/Function/.test(node.type)) found.push([starts.get(node) ?? node.start, node.end]);
  });
  found.sort((a, b) => a[0] - b[0] || b[1] - a[1]);
  console.log(JSON.stringify([file, found]));
}
"""


@pytest.fixture
def ava() -> str:
    return AVA


@pytest.fixture
def project(tmp_path: Path, npm_project: Callable[..., Path], ava: str) -> Path:
    """A copy of the sample with AVA beside it."""
    folder = tmp_path / "project"
    shutil.copytree(DATA, folder)
    (folder / "node_modules").mkdir()
    (folder / "node_modules/ava").symlink_to(npm_project(ava) / "node_modules/ava")
    return folder


class Covered:
    """A source for the project's src, and what it collected: bits by class and test."""

    def __init__(self, project: Path, scratch: Path, *, hook_s: float = 0.1) -> None:
        self.project = project
        self.catalog = Catalog()
        self.source = V8(
            CoverageSettings(include=("src/**",), hook_s=hook_s), self.catalog, scratch / "run", nullcontext, reading()
        )
        self.folder = scratch / "run/v8"
        self.seen: dict[tuple[str, str], int] = {}

    async def start(self) -> None:
        await self.source.prepare([self.project])
        await self.source.start()

    def env(self) -> dict[str, str]:
        return {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ} | self.source.env()

    async def collect(self, *, final: bool = False) -> list[Delta]:
        deltas = await self.source.collect(final=final)
        for delta in deltas:
            key = delta.class_id, delta.test
            self.seen[key] = self.seen.get(key, 0) | delta.probes
        return deltas

    def methods(self, class_id: str, test: str) -> set[str]:
        """Methods that a test file reached any probe of."""
        bits = self.seen.get((class_id, test), 0)
        return {m.name for m in self.catalog.units[class_id].methods if any(bits >> p & 1 for p in m.probes)}

    def lines(self) -> dict[str, dict[int, bool]]:
        """Each file's lines of code: was it run by any test?"""
        found: dict[str, dict[int, bool]] = {}
        for (class_id, _), bits in self.seen.items():
            lines = found.setdefault(class_id, {})
            for probe, line in enumerate(self.catalog.units[class_id].lines):
                lines[line] = lines.get(line, False) or bool(bits >> probe & 1)
        return found


def run(*argv: str | Path, cwd: Path, env: Mapping[str, str], stdin: str = "") -> str:
    done = subprocess.run(argv, cwd=cwd, env=env, input=stdin, capture_output=True, text=True, timeout=LIMIT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "profile" not in done.stderr  # where Node complains of coverage
    return done.stdout


def begin(*argv: str | Path, cwd: Path, env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    """A process that leads a group."""
    quiet = subprocess.DEVNULL
    return subprocess.Popen(argv, cwd=cwd, env=env, stdin=quiet, stdout=quiet, stderr=quiet, start_new_session=True)


def c8_lines(c8: Path, node: Path, project: Path, reports: Path, out: Path) -> dict[str, dict[int, bool]]:
    """What c8 makes of the reports in a folder: for each file of src, its lines."""
    options = ("--reporter=lcovonly", f"--temp-directory={reports}", f"--reports-dir={out}", "--include=src/**")
    run(node, c8, "report", *options, cwd=project, env=os.environ)
    found: dict[str, dict[int, bool]] = {}
    for record in (out / "lcov.info").read_text().split("end_of_record\n"):
        told = [line.partition(":")[::2] for line in record.splitlines()]
        counts = [value.split(",") for kind, value in told if kind == "DA"]
        found |= {value: {int(line): int(count) > 0 for line, count in counts} for kind, value in told if kind == "SF"}
    return found


def same_lines(ours: Mapping[str, Mapping[int, bool]], theirs: Mapping[str, Mapping[int, bool]]) -> Iterable[str]:
    """c8 counts all lines, we those that hold code: of these both must say the same."""
    assert set(ours) == set(theirs)
    for file, lines in ours.items():
        for line, covered in lines.items():
            if covered is not theirs[file][line]:
                yield f"{file}:{line}: {'covered' if covered else 'not covered'}, and by c8 the contrary"


@pytest.mark.parametrize(("ava", "interpreter"), [(AVA, "node"), ("ava@8.0.1", "node22")])
async def test_an_ava_suite_is_covered_as_by_c8_and_by_test_file(
    interpreter: str, project: Path, tmp_path: Path, npm_project: Callable[..., Path], request: pytest.FixtureRequest
) -> None:
    """Worker threads run the test files; one of them starts a child process and a thread of its own."""
    node = request.getfixturevalue(interpreter)
    house = Covered(project, tmp_path)
    await house.start()
    (cli,) = (project / "node_modules/ava/entrypoints").glob("cli.*js")
    run(node, cli, cwd=project, env=house.env())
    reports = tmp_path / "reports"
    shutil.copytree(house.folder, reports, ignore=shutil.ignore_patterns("begun-*"))
    # AVA's own process, in which none of the product runs, does not count.
    threads = {path.name.split("-")[2] for path in house.folder.glob("begun-*-0-0")}
    assert threads
    assert "0" not in threads
    await house.collect(final=True)
    assert house.source.told() == []
    assert not house.source.alive()
    c8 = npm_project(C8) / "node_modules/c8/bin/c8.js"
    assert list(same_lines(house.lines(), c8_lines(c8, node, project, reports, tmp_path / "c8"))) == []

    assert {test for _, test in house.seen} == {"t1.test.js", "t2.test.js", "t3.test.js"}
    assert house.methods("src/math.js", "t3.test.js") == {"GLOBAL", "div"}
    assert house.methods("src/math.js", "t1.test.js") == {"GLOBAL", "add", "later", "each"}
    assert house.methods("src/store.cjs", "t1.test.js") == {"GLOBAL", "of", "put", "get size"}
    # The child process and the thread belong to the test that began them.
    assert house.methods("src/child.js", "t2.test.js") == {
        *("GLOBAL", "inChild", "inThread", "<anonymous>", "spoken", "threaded")
    }


async def test_a_killed_runner_loses_one_period_at_most(project: Path, tmp_path: Path, node: Path) -> None:
    house = Covered(project, tmp_path)
    await house.start()
    ava = begin(node, "node_modules/ava/entrypoints/cli.mjs", "--timeout=10m", "hang.js", cwd=project, env=house.env())
    try:
        house.source.has_tests(project / "hang.js")  # as the runner tells: no pattern knows the name
        with trio.fail_after(LIMIT_S):
            while "add" not in house.methods("src/math.js", "hang.js"):
                assert ava.poll() is None, "the runner ended by itself"
                await house.collect()
                await trio.sleep(0.05)
        assert house.source.alive()
    finally:
        os.killpg(ava.pid, signal.SIGKILL)
        ava.wait()
    await house.collect(final=True)
    assert not house.source.alive()
    assert house.methods("src/math.js", "hang.js") == {"GLOBAL", "add"}


async def test_a_product_that_counts_by_itself_is_covered_too(
    project: Path, tmp_path: Path, npm_project: Callable[..., Path], node: Path
) -> None:
    """`c8 node ...`: Node writes into c8's folder, which must get all, and so must we."""
    house = Covered(project, tmp_path)
    await house.start()
    (project / "main.mjs").write_text(
        "import {div, later} from './src/math.js';\n"
        "div(1, 2);\n"
        "await new Promise(resolve => setTimeout(resolve, 350));\n"
        "await later(1);\n"
    )
    c8 = npm_project(C8) / "node_modules/c8/bin/c8.js"
    out = tmp_path / "c8"
    options = ("--reporter=lcovonly", f"--temp-directory={tmp_path / 'temporary'}", f"--reports-dir={out}")
    run(node, c8, *options, "--include=src/**", node, "main.mjs", cwd=project, env=house.env())
    await house.collect(final=True)
    assert house.methods("src/math.js", "") == {"GLOBAL", "div", "later", "each"}
    theirs = c8_lines(c8, node, project, tmp_path / "temporary", tmp_path / "again")
    assert list(same_lines(house.lines(), theirs)) == []


async def test_a_folder_that_is_hidden_for_a_while_costs_nothing(project: Path, tmp_path: Path, node: Path) -> None:
    """As a test does that fakes the disk."""
    house = Covered(project, tmp_path)
    await house.start()
    program = (
        "const fs = require('fs'), folder = process.env.EMISSARY_V8;"
        "fs.renameSync(folder, folder + '.away');"
        "require('./src/store.cjs');"
        "setTimeout(() => fs.renameSync(folder + '.away', folder), 300);"
    )
    assert run(node, "-e", program, cwd=project, env=house.env()) == ""
    await house.collect(final=True)
    assert ("src/store.cjs", "") in house.seen


@pytest.mark.parametrize(
    "program", ["1", "process.exitCode = 3", "throw new Error('own')", "process.kill(process.pid)"]
)
def test_the_hook_changes_nothing_of_how_a_program_ends(program: str, tmp_path: Path, node: Path) -> None:
    """Also without a folder that it could write into; and it keeps no process alive."""
    source = V8(CoverageSettings(hook_s=60), Catalog(), tmp_path, nullcontext, reading())
    env = {"PATH": os.environ["PATH"]}
    (tmp_path / "own").write_text("")
    broken = {"EMISSARY_V8": str(tmp_path / "own/none"), "NODE_V8_COVERAGE": str(tmp_path / "own/none")}

    def ended(env: Mapping[str, str]) -> tuple[int, str, str]:
        done = subprocess.run([node, "-e", program], env=env, capture_output=True, text=True, timeout=LIMIT_S)
        return done.returncode, done.stdout, done.stderr.partition("\n")[0]

    began = time.monotonic()
    without = ended(env)
    assert ended(env | source.env()) == without
    assert ended(env | source.env() | broken)[:2] == without[:2]
    assert time.monotonic() - began < source_period_s(source)


def source_period_s(source: V8) -> float:
    return int(source.env()["EMISSARY_V8_MS"]) / 1000


def test_the_functions_found_are_those_of_a_whole_parser(npm_project: Callable[..., Path], node: Path) -> None:
    modules = npm_project(AVA) / "node_modules"
    files = sorted(path for path in modules.rglob("*.*js") if path.suffix in (".js", ".mjs", ".cjs") and path.is_file())
    told = run(
        node, "-e", PARSE, cwd=modules, env=os.environ, stdin="\n".join(map(str, files[:: len(files) // MOST_FILES]))
    )
    compared = 0
    for line in told.splitlines():
        file, expected = json.loads(line)
        text = utf16(Path(file).read_bytes())
        try:
            found = [[function.start, function.end] for function in functions(text)]
        except NotFollowed as error:
            pytest.fail(f"{file}: not followed: {error}")
        assert found == expected, file
        compared += len(found)
    assert compared > 1000
