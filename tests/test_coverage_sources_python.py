"""agent/coverage/sources/python.py, and agent/coverage/preload in this Python: what is told becomes probes.

In Pythons from 2.7 to the newest, with and without coverage.py: tests/interop/test_python_coverage.py.
"""

import json
import os
import socket
import stat
import subprocess
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from agent.coverage.catalog import Catalog, Delta
from agent.coverage.settings import CoverageSettings
from agent.coverage.sources import Lost, Source, Warned
from agent.coverage.sources.python import Python, reading
from tests import no_json

CALC = "import os\n\ndef add(a, b):\n    return (a +\n            b)\n\ndef sub(a, b):\n    return a - b\n"


class Told:
    """A source with the product in a folder, and a process of it that the test plays."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.root = folder / "product"
        (self.root / "tests").mkdir(parents=True, exist_ok=True)
        (self.root / "calc.py").write_text(CALC)
        (self.root / "empty.py").write_text("# nothing\n")
        self.run_dir = folder / "run"
        self.catalog = Catalog()
        self.asked: list[str] = []
        self.source = Python(
            CoverageSettings(**settings),  # type: ignore[arg-type]
            self.catalog,
            self.run_dir,
            self.asking,
            reading(),
        )

    def asking(self, path: str) -> AbstractContextManager[None]:
        self.asked.append(path)
        return nullcontext()

    async def start(self) -> None:
        await self.source.prepare([self.root])
        await self.source.start()

    def process(self, *lines: object) -> socket.socket:
        connected = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connected.settimeout(10)
        try:
            connected.connect(str(self.run_dir / "python.sock"))
        except FileNotFoundError:
            connected.close()
            raise
        self.tell(connected, {"pid": 7, "python": "3.12.1", "why": ""}, *lines)
        return connected

    def tell(self, process: socket.socket, *lines: object) -> None:
        process.sendall(b"".join(json.dumps(line).encode() + b"\n" for line in lines))

    def lines(self, *numbers: int, file: str = "calc.py", test: str = "") -> dict[str, str]:
        return {"test": test, "file": str(self.root / file), "lines": f"{sum(1 << number for number in numbers):x}"}


@pytest.fixture
def told(tmp_path: Path) -> Told:
    return Told(tmp_path)


async def test_lines_that_were_told_are_probes_of_statements(told: Told) -> None:
    await told.start()
    source: Source = told.source
    assert [(unit.class_id, unit.lines) for unit in told.catalog.units.values()] == [("./calc.py", (1, 3, 7, 4, 8))]
    process = told.process(told.lines(1, 3, 7), told.lines(5, test="tests/test_a.py"))
    assert await source.collect() == [Delta("./calc.py", 0b00111), Delta("./calc.py", 0b01000, "tests/test_a.py")]
    assert await source.collect() == []
    assert source.alive()
    told.tell(process, told.lines(4, 8, test="tests/test_a.py"), told.lines(1))
    process.close()
    assert await source.collect() == [Delta("./calc.py", 0b11000, "tests/test_a.py"), Delta("./calc.py", 0b00001)]
    assert not source.alive()
    assert (source.told(), source.why_empty()) == ([], "")
    await source.stop()


async def test_what_a_process_told_before_it_died_counts(told: Told) -> None:
    await told.start()
    told.process(told.lines(1)).close()
    assert await told.source.collect(final=True) == [Delta("./calc.py", 1)]
    await told.source.stop()


async def test_one_that_tells_without_an_end_is_read_on_at_the_next_look(
    told: Told, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("agent.coverage.sources.python.READ_SIZE", 1)
    monkeypatch.setattr("agent.coverage.sources.python.MOST_READS", 1000)
    await told.start()
    told.process(*(told.lines(number) for number in [1] * 100 + [3])).close()
    assert await told.source.collect() == [Delta("./calc.py", 0b01)]
    later = [delta for _ in range(100) for delta in await told.source.collect()]
    assert later[-1].probes & 0b10
    await told.source.stop()


async def test_the_last_collect_asks_each_process_for_what_it_still_has(told: Told) -> None:
    await told.start()
    processes = [told.process(), told.process()]

    def answer() -> None:
        for number, process in enumerate(processes):
            assert process.recv(100) == b'{"flush":1}\n'
            told.tell(process, told.lines(1 if number else 8), {"flushed": 1})

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, answer)
        assert await told.source.collect(final=True) == [Delta("./calc.py", 0b10001)]
    assert told.source.told() == []
    for process in processes:
        process.close()
    await told.source.stop()


async def test_a_process_that_does_not_answer_is_not_waited_for(told: Told, autojump_clock: MockClock) -> None:
    await told.start()
    with told.process(told.lines(1)):
        assert await told.source.collect(final=True) == [Delta("./calc.py", 1)]
        assert trio.current_time() == pytest.approx(1)
    (warned,) = told.source.told()
    assert warned == Warned("what process 7 ran last may be missing: no answer in 1 s")
    await told.source.stop()


async def test_a_second_session_has_what_runs_told_anew(told: Told) -> None:
    await told.start()
    with told.process(told.lines(1)) as process:
        assert await told.source.collect() == [Delta("./calc.py", 1)]
        told.tell(process, told.lines(3))
        await told.source.start()
        assert process.recv(100) == b'{"restart":1}\n'
        assert await told.source.collect() == [Delta("./calc.py", 2)]
        await told.source.stop()
        assert process.recv(100) == b""


async def test_nobody_is_heard_before_the_start_and_after_the_stop(told: Told) -> None:
    await told.source.prepare([told.root])
    assert await told.source.collect(final=True) == []
    with pytest.raises(FileNotFoundError):
        told.process()
    await told.source.start()
    await told.source.stop()
    with pytest.raises(FileNotFoundError):
        told.process()
    await told.source.start()
    told.process(told.lines(1)).close()
    assert await told.source.collect() == [Delta("./calc.py", 1)]
    await told.source.stop()


async def test_what_cannot_be_read_is_told_once_and_the_rest_counts(told: Told) -> None:
    await told.start()
    with told.process() as process:
        process.sendall(b"nonsense\n\xff\n")
        for _ in range(6):  # more than the kernel keeps
            process.sendall(b"x" * 100_000)
            assert await told.source.collect() == []
        process.sendall(b"\n")
        told.tell(
            process, {"file": 1}, told.lines(1) | {"lines": "xyz"}, told.lines(1) | {"lines": "-1"}, told.lines(8)
        )
        assert await told.source.collect() == [Delta("./calc.py", 0b10000)]
    (lost,) = told.source.told()
    assert isinstance(lost, Lost)
    assert lost.why.startswith("process 7 told what cannot be read: ")
    await told.source.stop()


async def test_lines_of_no_known_file_or_statement_are_none_of_ours(told: Told) -> None:
    await told.start()
    told.process(told.lines(1, file="other.py"), told.lines(2, 6, 999), {"file": "/etc/passwd", "lines": "2"}).close()
    assert await told.source.collect() == []
    assert told.source.told() == []
    assert told.source.why_empty() == f"One Python process ran no line of the 1 Python files below {told.root}."
    await told.source.stop()


async def test_a_file_that_has_changed_is_told_and_does_not_count(told: Told) -> None:
    await told.start()
    (told.root / "calc.py").write_text("x = 1\n" + CALC)
    told.process(told.lines(1), told.lines(3)).close()
    assert await told.source.collect() == []
    assert told.source.told() == [Lost(1, f"{told.root}/calc.py has changed since its lines were read")]
    await told.source.stop()


async def test_a_file_that_was_written_anew_as_it_was_counts(told: Told) -> None:
    await told.start()
    (told.root / "calc.py").unlink()
    (told.root / "calc.py").write_text(CALC)
    told.process(told.lines(1)).close()
    assert len(await told.source.collect()) == 1
    assert told.source.told() == []
    await told.source.stop()


async def test_a_look_that_is_given_up_loses_nothing(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    await told.start()
    told.process(told.lines(1)).close()
    with trio.CancelScope() as scope:
        monkeypatch.setattr(told.source, "_asking", lambda path: scope.cancel() or nullcontext())
        await told.source.collect()
    assert scope.cancelled_caught
    monkeypatch.setattr(told.source, "_asking", told.asking)
    told.process(told.lines(3)).close()
    assert await told.source.collect() == [Delta("./calc.py", 0b11)]
    assert told.asked == [str(told.root)] * 2  # when it was read, and now
    await told.source.stop()


async def test_files_that_cannot_be_covered_are_told(told: Told, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "calc.py").write_text(CALC)
    (other / "huge.py").write_bytes(b"#" * (4 * 2**20 + 1))
    (other / "gone.py").symlink_to("nowhere")
    (other / "new.py").write_text("print 'of another Python'\n")
    await told.source.prepare([told.root, other])
    assert sorted(text.text for text in told.source.told() if isinstance(text, Warned)) == [
        f"{other}/calc.py: not covered, another root has a file of that name",
        f"{other}/gone.py: not covered, No such file or directory",
        f"{other}/huge.py: not covered, more than 524288 bytes",
    ]
    assert sorted(told.catalog.units) == ["./calc.py", "./new.py"]


async def test_a_file_of_a_newer_python_is_told_once_it_runs(told: Told) -> None:
    for name in ("new.py", "template.py"):
        (told.root / name).write_text('"""Of a Python to come."""\nrun $x\n')
    await told.start()
    assert told.source.told() == []
    process = told.process(told.lines(2, file="new.py"))
    assert [delta.class_id for delta in await told.source.collect()] == ["./new.py"]
    (warned,) = told.source.told()
    assert f"{told.root}/new.py: lines without code count too" in str(warned)
    told.tell(process, told.lines(2, file="new.py", test="other"))
    process.close()
    assert len(await told.source.collect()) == 1
    assert told.source.told() == []
    await told.source.stop()


async def test_files_are_chosen_by_the_settings(tmp_path: Path) -> None:
    told = Told(tmp_path, include=("src/**",), exclude=("**/vendor/**",))
    for path in ("src/a.py", "src/vendor/b.py", "c.py"):
        (told.root / path).parent.mkdir(parents=True, exist_ok=True)
        (told.root / path).write_text("x = 1\n")
    await told.source.prepare([told.root])
    assert [*told.catalog.units] == ["src/a.py"]


async def test_the_reason_for_nothing_is_said(told: Told) -> None:
    await told.start()
    assert told.source.why_empty().startswith("No Python process was seen")
    told.process({"pid": 8, "why": "Python 3.11 needs coverage.py"}).close()
    assert await told.source.collect(final=True) == []
    assert told.source.why_empty() == "Python is not covered: Python 3.11 needs coverage.py."
    told.process({"pid": 9, "why": "Python 3.11 needs coverage.py"}).close()
    assert await told.source.collect() == []
    assert told.source.told() == [Warned("a Python process (8) is not covered: Python 3.11 needs coverage.py")]
    told.process(told.lines(1)).close()
    await told.source.collect()
    assert told.source.why_empty() == ""
    await told.source.stop()


async def test_nobody_else_can_reach_the_socket_however_long_its_path_is(tmp_path: Path) -> None:
    told = Told(tmp_path / ("x" * 100))
    await told.start()
    assert stat.S_IMODE((told.run_dir / "python.sock").stat().st_mode) == 0o600
    assert stat.S_IMODE(told.run_dir.stat().st_mode) == 0o700
    done = product(told, "import calc")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert await told.source.collect(final=True) != [] or told.source.why_empty().startswith(
        "Python is not covered: Python 3.11 needs"
    )
    await told.source.stop()


async def test_more_processes_than_can_be_held_are_heard_in_turn(told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("agent.coverage.sources.python.MOST_PROCESSES", 2)
    await told.start()
    processes = [told.process(told.lines(line)) for line in (1, 3, 8)]
    assert await told.source.collect() == [Delta("./calc.py", 0b00011)]
    processes[0].close()
    await told.source.collect()
    assert await told.source.collect() == [Delta("./calc.py", 0b10000)]
    for process in processes:
        process.close()
    await told.source.stop()


@given(
    st.lists(st.binary(max_size=300) | st.sampled_from([b"\n", b'{"pid":1}\n', b'{"lines":"f","file":"a"}\n'])),
    st.just(b"") | no_json.objects("file", "test"),
)
def test_any_bytes_may_be_told(tmp_path_factory: pytest.TempPathFactory, chunks: list[bytes], last: bytes) -> None:
    async def play() -> None:
        told = Told(tmp_path_factory.mktemp("any"))
        await told.source.start()
        with told.process() as process:
            process.sendall(b"".join(chunks) + b"\n" + last + b"\n")
        assert await told.source.collect(final=True) == []
        assert not told.source.alive()
        await told.source.stop()

    trio.run(play)


# ---- the preloaded files, in this Python ----


def product(told: Told, code: str, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a program as the agent would: with PYTHONPATH, in the product's folder."""
    return subprocess.run(
        [sys.executable, *args, "-c", code],
        cwd=told.root,
        env={**{name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}, **told.source.env(), **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


async def test_a_product_is_not_disturbed_without_an_agent(told: Told) -> None:
    await told.source.prepare([told.root])
    code = "import os, calc; print(calc.add(1, 2), os.path.exists('x'), flush=True); os._exit(3)"
    done = product(told, code, "-W", "error", "-X", "dev")
    assert (done.returncode, done.stdout, done.stderr) == (3, "3 False\n", "")


async def test_a_product_is_not_disturbed_by_a_broken_folder(told: Told) -> None:
    await told.source.prepare([told.root])
    (told.source.folder / "where").unlink()
    done = product(told, "print(1)", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")
    (told.source.folder / "emissary_coverage.py").write_text("raise RuntimeError\n")
    done = product(told, "print(1)", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "1\n", "")


@pytest.mark.parametrize(
    ("shadowed", "out", "error"),
    [
        ("print('shadowed', __file__.endswith('theirs/sitecustomize.py'))", "shadowed True\nTrue\n", ""),
        ("import sys; sys.path.append('/own')", "True\n", ""),
        ("import sys; sys.path.insert(0, '/own')", "True\n", ""),
        ("import nowhere", "True\n", "ModuleNotFoundError"),
    ],
)
async def test_the_shadowed_sitecustomize_is_loaded_too(told: Told, shadowed: str, out: str, error: str) -> None:
    await told.source.prepare([told.root])
    theirs = told.root / "theirs"
    theirs.mkdir()
    (theirs / "sitecustomize.py").write_text(shadowed + "\n")
    path = f"{told.source.folder}{os.pathsep}{theirs}"
    code = f"import sys; print({str(told.source.folder)!r} in sys.path)"
    done = product(told, code, PYTHONPATH=path)
    alone = product(told, "print(True)", PYTHONPATH=str(theirs))
    assert (done.returncode, done.stdout) == (alone.returncode, out)
    assert bool(done.stderr) == bool(alone.stderr) == bool(error)
    assert error in done.stderr


async def test_preloaded_files_are_all_there(told: Told) -> None:
    await told.source.prepare([told.root])
    names = {
        path.relative_to(told.source.folder).as_posix() for path in told.source.folder.rglob("*") if path.is_file()
    }
    assert names == {
        *("sitecustomize.py", "emissary_coverage.py", "emissary_coverage_pytest.py", "where"),
        *("emissary_coverage-1.dist-info/METADATA", "emissary_coverage-1.dist-info/entry_points.txt"),
    }


async def test_a_python_without_coverage_says_so(told: Told) -> None:
    await told.start()
    done = product(told, "import calc; print(calc.add(1, 2))", "-W", "error")
    assert (done.returncode, done.stdout, done.stderr) == (0, "3\n", "")
    found = await told.source.collect(final=True)
    if sys.version_info >= (3, 12):
        assert found == [Delta("./calc.py", 0b01111)]
    else:
        version = ".".join(map(str, sys.version_info[:2]))
        assert found == []
        assert told.source.why_empty() == (
            "Python is not covered: "
            f"Python {version} needs coverage.py in the product's environment, where it is not installed."
        )
    await told.source.stop()
