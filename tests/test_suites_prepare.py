"""A suite's files: from where a document may take them, and what is said when it may not or cannot."""

import contextlib
import hashlib
import io
import os
import shutil
import tarfile
from functools import partial
from pathlib import Path

import pytest
import trio

from agent.core.errors import DocumentError
from agent.core.tls import server_context
from agent.suites.messages import Source
from agent.suites.prepare import Blocked, below, command, fetch, suite_of, tree_of
from tests.certificates import authority, issue
from tests.suites_house import Log

MARK = f"prepare-{os.getpid()}"  # a process tree is found by it, on the whole machine


def tar(folder: Path, *names: str) -> Path:
    path = folder / "suite.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        for name in names:
            entry = tarfile.TarInfo(name)
            entry.size = 2
            archive.addfile(entry, io.BytesIO(b"x\n"))
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


async def get(
    source: Source | None,
    folder: Path,
    roots: tuple[str, ...] = (),
    base: Path | None = None,
    ca_file: Path | None = None,
) -> Path:
    return await fetch(source, base, folder, roots, mark=MARK, log=Log(), ca_file=ca_file)


async def test_a_dir_below_the_roots_is_used_where_it_is(tmp_path: Path, folder: Path) -> None:
    (tmp_path / "suites/login").mkdir(parents=True)
    roots = (str(tmp_path / "suites"),)
    assert await get(Source(dir=str(tmp_path / "suites/login")), folder, roots) == tmp_path / "suites/login"


@pytest.mark.parametrize("path", ["/etc", "suites/../..", "suites/out"])
async def test_a_dir_elsewhere_is_blocked_also_through_a_link(tmp_path: Path, folder: Path, path: str) -> None:
    (tmp_path / "suites").mkdir()
    (tmp_path / "suites/out").symlink_to("/etc")
    with pytest.raises(Blocked, match=r"is not below suites\.roots"):
        await get(Source(dir=str(tmp_path / path)), folder, (str(tmp_path / "suites"),))


async def test_a_document_without_a_source_is_of_the_folder_it_lies_in(folder: Path) -> None:
    assert await get(None, folder, base=folder) == folder


async def test_an_archive_is_unpacked_once_its_digest_holds(tmp_path: Path, folder: Path) -> None:
    path = tar(tmp_path, "login/test.js", "login/package.json")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    project = await get(Source(archive=str(path), sha256=digest), folder, (str(tmp_path),))
    assert sorted(entry.name for entry in project.iterdir()) == ["package.json", "test.js"]


async def test_an_archive_with_another_digest_or_a_bad_entry_is_blocked(tmp_path: Path, folder: Path) -> None:
    path = tar(tmp_path, "../evil")
    with pytest.raises(Blocked, match=r"source\.sha256: .* has [0-9a-f]{64}"):
        await get(Source(archive=str(path), sha256="0" * 64), folder, (str(tmp_path),))
    with pytest.raises(Blocked, match=r"source\.archive: .*evil"):
        await get(Source(archive=str(path)), folder, (str(tmp_path),))
    assert not (tmp_path / "evil").exists()


async def test_an_archive_of_nothing_but_a_link_is_a_folder_with_that_link(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "suite.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        entry = tarfile.TarInfo("here")
        entry.type, entry.linkname = tarfile.SYMTYPE, "."
        archive.addfile(entry)
    project = await get(Source(archive=str(path)), folder, (str(tmp_path),))
    assert not project.is_symlink()  # to the run's own folder
    assert [entry.name for entry in project.iterdir()] == ["here"]


async def test_no_link_leads_out_of_an_archives_one_folder(tmp_path: Path, folder: Path) -> None:
    path = tmp_path / "suite.tar"
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:
        entry = tarfile.TarInfo("login/out")
        entry.type, entry.linkname = tarfile.SYMTYPE, "../result.json"
        archive.addfile(entry)
    with pytest.raises(Blocked, match=r"source\.archive: .*suite\.tar: 'out' is a link out of login"):
        await get(Source(archive=str(path)), folder, (str(tmp_path),))
    assert not (folder / "source").exists()


async def test_a_resumed_run_goes_on_with_the_copy_and_what_was_left_in_it(tmp_path: Path, folder: Path) -> None:
    path = tar(tmp_path, "login/test.js")
    (folder / "scratch/source/half").mkdir(parents=True)  # of an attempt that the power was cut from
    project = await get(Source(archive=str(path)), folder, (str(tmp_path),))
    assert [entry.name for entry in project.iterdir()] == ["test.js"]
    (project / "rebooted").touch()
    path.unlink()
    assert await get(Source(archive=str(path)), folder, (str(tmp_path),)) == project
    assert (project / "rebooted").exists()


@pytest.mark.parametrize("more", ["", "Content-Type: application/x-tar\r\nContent-Encoding: gzip\r\n"])
async def test_an_archive_comes_over_http(tmp_path: Path, folder: Path, more: str) -> None:
    content = tar(tmp_path, "a", "b").read_bytes()
    digest = hashlib.sha256(content).hexdigest()

    async def answer(stream: trio.SocketStream) -> None:
        await stream.receive_some(65536)
        head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n{more}Connection: close\r\n\r\n"
        await stream.send_all(head.encode() + content)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, answer, 0, host="127.0.0.1"))
        port = listener.socket.getsockname()[1]
        project = await get(Source(archive=f"http://127.0.0.1:{port}/s.tar.gz", sha256=digest), folder)
        nursery.cancel_scope.cancel()
    assert sorted(entry.name for entry in project.iterdir()) == ["a", "b"]


async def test_an_archive_comes_over_tls_from_whom_the_machine_trusts(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = tar(tmp_path, "a").read_bytes()
    ca = authority(tmp_path)
    server = issue(ca, tmp_path, "server")
    context = server_context(server.cert, server.key)

    async def answer(stream: trio.SSLStream[trio.SocketStream]) -> None:
        with contextlib.suppress(trio.BrokenResourceError):  # a client that does not trust us ends the handshake
            await stream.receive_some(65536)
            head = f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
            await stream.send_all(head.encode() + content)

    monkeypatch.delenv("SSL_CERT_FILE", raising=False)
    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_ssl_over_tcp, answer, 0, context, host="127.0.0.1"))
        source = Source(archive=f"https://127.0.0.1:{listener.transport_listener.socket.getsockname()[1]}/s.tar.gz")
        for ca_file in (tmp_path / "other.pem", None):
            with pytest.raises(Blocked, match=r"source\.archive: https://.*(no certificates|verify failed)"):
                await get(source, folder, ca_file=ca_file)
        assert (await get(source, folder, ca_file=ca.cert) / "a").exists()
        assert list((folder / "scratch").iterdir()) == []  # no archive stays beside what was in it
        shutil.rmtree(folder / "source")
        monkeypatch.setenv("SSL_CERT_FILE", str(ca.cert))
        assert (await get(source, folder) / "a").exists()
        nursery.cancel_scope.cancel()


async def test_a_server_that_is_not_there_is_named(folder: Path) -> None:
    with pytest.raises(Blocked, match=r"source\.archive: http://127\.0\.0\.1:1/s\.tar"):
        await get(Source(archive="http://127.0.0.1:1/s.tar"), folder)


async def test_a_failing_command_says_how_it_ended_and_keeps_its_output(tmp_path: Path) -> None:
    log = Log()
    with pytest.raises(Blocked, match="ended with exit code 3"):
        await command(["sh", "-c", "echo said; exit 3"], tmp_path, {"PATH": "/bin:/usr/bin"}, mark=MARK, log=log)
    assert log.text == b"said\n"
    script = f"true {'x' * 5000}\nexit 4"
    with pytest.raises(Blocked, match="ended with exit code 4") as blocked:  # on one line, however long the script is
        await command(["sh", "-c", script], tmp_path, {"PATH": "/bin:/usr/bin"}, mark=MARK, log=log)
    assert len(str(blocked.value)) < 1024
    assert "\n" not in str(blocked.value)


def test_a_folder_is_a_suite_by_its_document_or_by_what_is_in_it(tmp_path: Path) -> None:
    (tmp_path / "test_a.py").write_text("")
    assert suite_of(tmp_path)[0].runner == "pytest"
    (tmp_path / "suite.toml").write_text('id = "s"\nrunner = "command"\ncommand = ["true"]\n')
    suite, base = suite_of(tmp_path)
    assert (suite.runner, base) == ("command", tmp_path)
    assert tree_of(tmp_path)["source"]["dir"] == str(tmp_path)


def test_a_folder_without_either_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match="names ava, and no test_"):
        suite_of(tmp_path)


def test_a_folder_that_is_not_there_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DocumentError, match=r"/nowhere: there is no such file or folder\. Correct the path\."):
        suite_of(tmp_path / "nowhere")


def test_below_names_the_roots(tmp_path: Path) -> None:
    with pytest.raises(Blocked, match=r"suites\.roots \(none is set\)"):
        below(Path("/etc"), ())
