"""The source `python` in real Pythons: against coverage.py on the same run, and however a process ends."""

import json
import os
import subprocess
import textwrap
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Literal

import pytest
import trio

from agent.coverage.catalog import Catalog
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources.python import Python, reading
from tests.interop.conftest import PeerAbsent, find_python

pytestmark = pytest.mark.interop

COVERAGE, PYTEST, XDIST = "coverage==7.17.3", "pytest==9.2.0", "pytest-xdist==3.8.0"

PRODUCT = {
    "shop/__init__.py": '"""A shop."""\n',
    "shop/prices.py": '''\
        """Prices."""
        import functools
        import threading


        def cached(
            size=2,
        ):
            def wrap(function):
                return functools.lru_cache(
                    maxsize=size,
                )(function)
            return wrap


        @cached(
            size=3,
        )
        def price(name, *,
                  tax=0):
            """What it costs."""
            match name:
                case "tea":
                    base = 3
                case (
                    "coffee" | "milk"
                ):
                    base = 4
                case _:
                    raise KeyError(
                        name,
                    )
            return (base +
                    tax)


        class Basket:
            """Holds goods."""
            names = []

            def __init__(self):
                self.goods = [
                    price(each)
                    for each in self.names
                ]

            def add(self, name):
                try:
                    self.goods.append(price(name))
                except KeyError:
                    return False
                else:
                    return True
                finally:
                    self.closed = False

            async def never(self):
                async with self as it:
                    return it

            def total(self): return sum(self.goods)


        def counted(most):
            while most:
                yield most
                most -= 1


        def in_thread():
            found = []
            thread = threading.Thread(target=lambda: found.append(
                price("milk")))
            thread.start()
            thread.join()
            return found


        def in_child(name):
            text = name.upper()
            return len(text)


        if __name__ == "__main__":
            in_child(
                "tea")
        ''',
    "tests/test_basket.py": """\
        from shop.prices import Basket

        def test_add():
            basket = Basket()
            assert basket.add("tea")
            assert (basket.total() ==
                    3)

        def test_unknown():
            assert not Basket().add("gold")
        """,
    "tests/test_more.py": """\
        import multiprocessing
        import os
        import subprocess
        import sys
        import pytest
        from shop import prices

        def test_count():
            assert list(prices.counted(2)) == [2, 1]

        @pytest.mark.parametrize("name", ["tea", "coffee"])
        def test_price(name):
            assert prices.price(name) in (3, 4)

        def test_thread():
            assert prices.in_thread() == [4]

        def test_program():
            subprocess.run([sys.executable, "-m", "shop.prices"], check=True)

        def test_process():
            child = multiprocessing.get_context("fork").Process(target=prices.in_child, args=("milk",))
            child.start()
            child.join()
            assert child.exitcode == 0
        """,
    ".coveragerc": "[run]\nsource = .\nparallel = True\npatch = subprocess, _exit, fork\n",
    "conftest.py": "",
}

Run = Callable[..., subprocess.CompletedProcess[str]]


class Product:
    """A product in a folder, covered by the source."""

    def __init__(
        self, folder: Path, files: Mapping[str, str], python: Path, *, arm: Literal["session", "always"] = "session"
    ) -> None:
        self.root, self.python = folder / "product", python
        for name, text in files.items():
            (self.root / name).parent.mkdir(parents=True, exist_ok=True)
            (self.root / name).write_text(textwrap.dedent(text))
        self.catalog = Catalog()
        self.source = Python(CoverageSettings(arm=arm), self.catalog, folder / "run", nullcontext, reading())
        self.covered: dict[str, dict[str, set[int]]] = {}  # class id to test to lines

    async def start(self) -> None:
        await self.source.prepare([self.root])
        await self.source.start()

    async def run(self, *args: str | Path, covered: bool = True) -> subprocess.CompletedProcess[str]:
        env = {
            name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "COV_", "COVERAGE_"))
        }
        env |= self.source.env() if covered else {}
        return await trio.to_thread.run_sync(
            lambda: subprocess.run(
                [self.python, *args], cwd=self.root, env=env, capture_output=True, text=True, timeout=120
            )
        )

    async def collect(self, *, final: bool = True) -> None:
        for delta in await self.source.collect(final=final):
            unit = self.catalog.units[delta.class_id]
            lines = {unit.lines[probe] for probe in range(unit.probe_count) if delta.probes >> probe & 1}
            self.covered.setdefault(delta.class_id, {}).setdefault(delta.test, set()).update(lines)

    def lines(self, class_id: str, *tests: str) -> list[int]:
        """The lines that these tests reached; all tests, where none is named."""
        of_tests = self.covered.get(class_id, {})
        return sorted(set().union(*(of_tests.get(test, set()) for test in tests or of_tests)))


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13"])
async def test_covered_lines_are_those_of_coverage(
    version: str, python_of: Callable[..., Path], tmp_path: Path
) -> None:
    """From Python 3.12 on of the very same run; before, where there can be one tracer only, of another run."""
    product = Product(tmp_path, PRODUCT, python_of(version, COVERAGE, PYTEST))
    await product.start()
    suite = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error")
    measured = ("-m", "coverage", "run", *suite)
    done = await product.run(*(suite if version == "3.11" else measured))
    assert done.returncode == 0, done.stdout + done.stderr
    await product.collect()
    assert (product.source.told(), product.source.why_empty()) == ([], "")
    await product.source.stop()
    if version == "3.11":
        done = await product.run(*measured, covered=False)
        assert done.returncode == 0, done.stdout + done.stderr
    for what in (("combine",), ("json", "-o", "theirs.json")):
        done = await product.run("-m", "coverage", *what, covered=False)
        assert done.returncode == 0, done.stdout + done.stderr
    theirs = json.loads((product.root / "theirs.json").read_text())["files"]
    ours = {unit.class_id.removeprefix("./"): unit for unit in product.catalog.units.values()}
    with_lines = {name for name, facts in theirs.items() if facts["executed_lines"] or facts["missing_lines"]}
    assert set(ours) == with_lines == {"shop/prices.py", "tests/test_basket.py", "tests/test_more.py"}
    for name, unit in ours.items():
        assert product.lines(unit.class_id) == theirs[name]["executed_lines"], name
        missing = sorted({*unit.lines} - {*product.lines(unit.class_id)})
        assert missing == theirs[name]["missing_lines"], name
    only = [
        ("while most:", "tests/test_more.py"),
        ("self.closed = False", "tests/test_basket.py"),
        ("import threading", ""),
    ]
    for statement, test in only:
        number = next(n for n, line in enumerate(PRODUCT["shop/prices.py"].splitlines(), 1) if statement in line)
        assert [each for each, lines in product.covered["shop/prices.py"].items() if number in lines][:1] == [test]


ENDS = {
    "ends.py": """\
        import os, sys, signal, threading, time, warnings

        def forked():
            with warnings.catch_warnings(record=True) as found:
                warnings.simplefilter("always")
                pid = os.fork()
            if not pid:
                in_child()
                os._exit(0)
            os.waitpid(pid, 0)
            assert not found, found[0].message
            after_fork()

        def in_child():
            return 1

        def after_fork():
            return 1

        def executed():
            os.execv(sys.executable, [sys.executable, __file__, "nothing"])

        def nothing():
            return 1

        def killed():
            for _ in range(3000):
                time.sleep(0.01)
                os.path.exists(sys.argv[2]) and os.kill(os.getpid(), signal.SIGKILL)

        def at_exit():
            import atexit
            atexit.register(nothing)

        def daemon():
            if not os.fork():
                os.setsid()
                os.closerange(0, 1024)
                mine = [os.open(os.devnull, os.O_RDWR) for _ in range(20)]
                nothing()
                deadline = time.monotonic() + 30
                while not os.path.exists(sys.argv[2]) and time.monotonic() < deadline:
                    time.sleep(0.01)
                time.sleep(1.5)
                after_fork()
                assert [os.fstat(each).st_rdev for each in mine] == [os.stat(os.devnull).st_rdev] * 20
                in_child()

        def signals():
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
            timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGUSR1))
            timer.start()
            assert signal.sigwait({signal.SIGUSR1}) == signal.SIGUSR1
            timer.join()

        def interpreter():
            try:
                import _interpreters as interpreters
            except ImportError:
                import _xxsubinterpreters as interpreters
            number = interpreters.create()
            interpreters.run_string(number, "import sys; sys.path.insert(0, ''); import other")
            interpreters.destroy(number)

        def dynamic():
            exec(compile("y = 2", "<nowhere>", "exec"))

        if __name__ == "__main__":
            globals()[sys.argv[1]]()
            print("done", threading.active_count())
        """,
    "other.py": "x = 1\n",
}


@pytest.mark.parametrize("version", ["3.12", "3.13"])
async def test_a_process_may_end_in_any_way(version: str, python_of: Callable[..., Path], tmp_path: Path) -> None:
    product = Product(tmp_path, ENDS, python_of(version))
    text = textwrap.dedent(ENDS["ends.py"]).splitlines()
    await product.start()

    async def covered_by(way: str, *args: str) -> set[str]:
        """The functions whose first line ran."""
        product.covered.clear()
        done = await product.run("-W", "error", "-X", "dev", "ends.py", way, *args)
        assert (done.returncode, done.stderr) == (0, ""), (way, done.stderr)
        assert done.stdout.splitlines()[-1] == "done 1", (way, done.stdout)
        await product.collect()
        assert product.source.told() == []
        return functions()

    def functions() -> set[str]:
        lines = product.lines("./ends.py")
        return {text[number - 2][4:-3] for number in lines if text[number - 2].startswith("def ")}

    assert await covered_by("forked") == {"forked", "in_child", "after_fork"}
    assert await covered_by("executed") == {"executed", "nothing"}
    assert await covered_by("at_exit") == {"at_exit", "nothing"}
    assert await covered_by("signals") == {"signals"}
    assert await covered_by("interpreter") == {"interpreter"}
    assert product.lines("./other.py") == [1]
    assert await covered_by("dynamic") == {"dynamic"}
    # These go on until the file is there: what they tell meanwhile comes by itself.
    go = product.root / "go"
    async with trio.open_nursery() as nursery:
        with trio.fail_after(60):
            product.covered.clear()
            nursery.start_soon(product.run, "ends.py", "killed", go)
            while "killed" not in functions():
                await trio.sleep(0.1)
                await product.collect(final=False)
            go.touch()
    go.unlink()
    product.covered.clear()
    done = await product.run("ends.py", "daemon", go)
    assert (done.returncode, done.stderr) == (0, "")
    with trio.fail_after(60):
        go.touch()
        while functions() != {"daemon", "nothing", "after_fork", "in_child"}:
            await trio.sleep(0.1)
            await product.collect(final=False)
    await product.source.stop()


async def test_workers_of_xdist_tell_of_their_own_test_files(python_of: Callable[..., Path], tmp_path: Path) -> None:
    product = Product(tmp_path, PRODUCT, python_of("3.12", COVERAGE, PYTEST, XDIST))
    await product.start()
    done = await product.run("-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "2")
    assert done.returncode == 0, done.stdout + done.stderr
    await product.collect()
    await product.source.stop()
    text = PRODUCT["shop/prices.py"].splitlines()
    numbers = {
        words: next(n for n, line in enumerate(text, 1) if words in line) for words in ("while most", "goods.append")
    }
    of_prices = product.covered["shop/prices.py"]
    assert {test for test, lines in of_prices.items() if numbers["while most"] in lines} == {"tests/test_more.py"}
    assert {test for test, lines in of_prices.items() if numbers["goods.append"] in lines} == {"tests/test_basket.py"}


async def test_what_takes_our_place_is_the_reason(python_of: Callable[..., Path], tmp_path: Path) -> None:
    old = Product(tmp_path / "old", PRODUCT, python_of("3.11", COVERAGE, PYTEST))
    await old.start()
    done = await old.run("-m", "coverage", "run", "-m", "shop.prices")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    await old.collect()
    assert old.source.why_empty() == (
        "Python is not covered: the product measures itself with coverage.py, and on Python < 3.12 only one can."
    )
    await old.source.stop()
    new = Product(tmp_path / "new", PRODUCT, python_of("3.12"))
    await new.start()
    # A sitecustomize of the product's own that comes first, has the tools, and loads ours.
    own = tmp_path / "own"
    own.mkdir()
    (own / "sitecustomize.py").write_text(
        "import sys\nfor tool in (3, 4): sys.monitoring.use_tool_id(tool, 'x')\n"
        f"sys.path.insert(0, {str(new.source.folder)!r})\nimport emissary_coverage\n"
    )
    env = {**os.environ, "PYTHONPATH": str(own)}
    ran = await trio.run_process([new.python, "-m", "shop.prices"], cwd=new.root, env=env, capture_stderr=True)
    assert ran.stderr == b""
    await new.collect()
    assert new.source.why_empty() == "Python is not covered: the tool ids 3 and 4 of sys.monitoring are taken."
    await new.source.stop()


@pytest.mark.parametrize("version", ["2.7", "3.6", "3.7", "3.8", "3.9", "3.10"])
async def test_an_old_python_is_not_disturbed(version: str, tmp_path: Path) -> None:
    try:
        python = find_python(version)
    except PeerAbsent as absent:
        pytest.skip(str(absent))
    product = Product(tmp_path, {"other.py": "x = 1\n", "theirs/sitecustomize.py": "print('shadowed')\n"}, python)
    await product.start()
    env = {**os.environ, "PYTHONPATH": f"{product.source.folder}:theirs"}
    code = "import os, sys, other; sys.stdout.write('ran\\n'); sys.stdout.flush(); os.fork() or os._exit(0)"
    ran = await trio.run_process(
        [python, "-c", code], cwd=product.root, env=env, capture_stdout=True, capture_stderr=True
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, b"shadowed\nran\n", b"")
    await product.collect()
    why = product.source.why_empty()
    is_silent = version in ("2.7", "3.6", "3.7")
    assert why.startswith(
        "No Python process was seen" if is_silent else f"Python is not covered: Python {version} needs"
    )
    await product.source.stop()


LIVES = {
    "lives.py": """\
        import os, sys, time

        def once():
            return 1

        def step():
            time.sleep(0.01)

        once()
        print(flush=True)
        while not os.path.exists(sys.argv[1]):
            step()
        once()
        """,
}


@pytest.mark.parametrize(("version", "arm"), [("3.11", "always"), ("3.12", "session")])
async def test_a_product_that_lives_already_is_covered_while_a_session_is_open(
    version: str, arm: Literal["session", "always"], python_of: Callable[..., Path], tmp_path: Path
) -> None:
    product = Product(tmp_path, LIVES, python_of(version, COVERAGE, PYTEST), arm=arm)
    await product.source.prepare([product.root])
    go = product.root / "go"
    async with trio.open_nursery() as nursery:
        lives = partial(trio.run_process, [product.python, "lives.py", go], cwd=product.root, stdout=subprocess.PIPE)
        process = await nursery.start(partial(lives, env={**os.environ, **product.source.env()}))
        assert await process.stdout.receive_some() == b"\n"  # it is in its loop, and nobody listens
        await product.source.start()
        with trio.fail_after(60):
            while not {7, 12} <= {*product.lines("./lives.py")}:
                await trio.sleep(0.1)
                await product.collect(final=False)
        await product.collect()
        assert product.source.told() == []
        assert {*product.lines("./lives.py")} <= {7, 11, 12}
        await product.source.stop()
        product.covered.clear()
        await product.source.start()
        with trio.fail_after(60):
            while 7 not in product.lines("./lives.py"):
                await trio.sleep(0.1)
                await product.collect(final=False)
        go.touch()
    await product.collect()
    assert {4, 13} <= {*product.lines("./lives.py")}
    await product.source.stop()
