"""Gets a suite's files onto the machine, and runs its setup and teardown commands.

    Blocked     the suite cannot be prepared: the run is blocked with this text

Source: protocols/suites.md, "The suite document" (`source`, `setup`, `teardown`), "Limits and security".
"""

import hashlib
import os
import shutil
import ssl
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import msgspec
import trio

from agent.core.cgroup import Leaves
from agent.core.errors import AgentError, DocumentError
from agent.core.process import ChildFailedToStart, Exit, Limits, Spec, drain, environ, open_child
from agent.core.tls import TlsSettings, TlsUnusable, client_context, find_roots
from agent.suites import document
from agent.suites.messages import Source, Suite
from agent.suites.runners.driver import clip, plain, title
from agent.suites.sources import GIT_ENV, MAX_BYTES, Listing, git_checkout, git_commands, git_list

DOCUMENTS = ("suite.toml", "suite.json")
_BLOCK = 1024 * 1024
_SHOWN = 256  # bytes of a command in what is said of it
_SAID = 768  # bytes of what git said last: a record's name has room for it, and for the address before it


class Blocked(AgentError):
    """The suite cannot be prepared: not fetched, not unpacked, or its setup failed."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What a run needs to know of the machine.

    `leaves` is the delegated cgroup, where there is one. `project` is Polarize's project for suites that name none;
    None: nothing is submitted to Polarize. `ca_file` is what a download trusts in place of the system's certificates.
    """

    ident: str
    labels: Mapping[str, str | bool] = {}
    timeout_factor: float = 1.0
    leaves: Leaves | None = None
    project: str | None = None
    ca_file: Path | None = None


class Log(Protocol):
    """Where the output of the commands goes: suites/capture.py."""

    path: Path

    def write(self, data: bytes) -> None: ...


def below(path: Path, roots: Sequence[str]) -> Path:
    """The real path of `path`, which must lie below one of `roots`. Raises Blocked."""
    if "\0" in str(path):
        raise Blocked(f"{str(path)!r}: no file has a NUL in its name", remedy="Correct the path.")
    real = Path(os.path.realpath(path))
    if any(real.is_relative_to(os.path.realpath(root)) for root in roots):
        return real
    allowed = ", ".join(roots) or "none is set"
    raise Blocked(f"{path}: is not below suites.roots ({allowed})", remedy="Add its folder to suites.roots.")


def folder_below(path: Path, roots: Sequence[str], key: str) -> Path:
    """The same, of a path that `key` names and that must be a folder. For a thread: a mount may hang."""
    real = below(path, roots)
    if not real.is_dir():
        raise Blocked(f"{key}: {path} is not a directory", remedy="Correct the path.")
    return real


def suite_of(path: Path) -> tuple[Suite, Path]:
    """The suite of a document, or of a folder with one or without, and the folder it is in. Raises DocumentError."""
    try:
        if path.is_file():
            return document.load(_read(path), path.name), path.parent
        for name in DOCUMENTS:
            if (path / name).is_file():
                return document.load(_read(path / name), name), path
        if not path.is_dir():
            raise DocumentError(path, 0, "", "there is no such file or folder", remedy="Correct the path.")
        names = [str(found.relative_to(path)) for pattern in ("*", "tests/*") for found in path.glob(pattern)]
        package = path / "package.json"
        return document.detect(path.name, names, _read(package) if package.is_file() else None), path
    except OSError as err:
        raise DocumentError(path, 0, "", f"cannot be read: {err.strerror}", remedy="Correct the path.") from err


def _read(path: Path) -> bytes:
    """A document; of one that is too large enough to say so."""
    with path.open("rb") as file:
        return file.read(document.MAX_DOCUMENT + 1)


def tree_of(path: Path) -> dict[str, Any]:
    """The document of a folder (or of a file in it), as a link carries it: with the folder as its source."""
    suite, base = suite_of(path.resolve())
    source = suite.source or Source(dir=str(base))
    if source.dir is not None:
        source = Source(dir=str(base / source.dir))
    tree: dict[str, Any] = msgspec.to_builtins(msgspec.structs.replace(suite, source=source))
    return tree


async def fetch(
    source: Source | None,
    base: Path | None,
    folder: Path,
    roots: Sequence[str],
    *,
    mark: str,
    log: Log,
    ca_file: Path | None = None,
) -> Path:
    """The folder with the suite's files: `base` itself, a `dir` below `roots`, or a copy in `folder`.

    `base` is the folder of the document, None where it came over a link: then it has a source. A copy is made once: a
    resumed run goes on with what the former attempt left in it. Raises Blocked.
    """
    if source is None:
        assert base is not None, "refused before it got here"
        return base
    if source.dir is not None:
        look = partial(folder_below, (base or Path("/")) / source.dir, roots, "source.dir")
        return await trio.to_thread.run_sync(look, abandon_on_cancel=True)
    target, scratch = folder / "source", folder / "scratch"
    if target.exists():
        return target
    fetched = scratch / "source"
    await trio.to_thread.run_sync(shutil.rmtree, fetched, True)  # of an attempt that ended in the middle of it
    scratch.mkdir(exist_ok=True)
    if source.archive is not None:
        found = await _fetch_archive(source, scratch / "archive", fetched, roots, ca_file)
    else:
        found = fetched
        await _fetch_git(source, fetched, ca_file, mark=mark, log=log)
    found.rename(target)
    return target


async def command(
    argv: Sequence[str], cwd: Path, env: Mapping[str, str], *, mark: str, log: Log, limits: Limits | None = None
) -> None:
    """Run one command to its end. Raises Blocked when it fails; a cancelled one is ended with all its tree."""
    spec = Spec(argv=tuple(argv), cwd=cwd, env=dict(env), mark=mark, limits=limits or Limits())
    try:
        ended = await _ended(spec, log.write, log.write)
    except ChildFailedToStart as err:
        raise Blocked(f"{shown(argv)}: {err.what}", remedy=err.remedy) from err
    if ended.code != 0:
        raise Blocked(f"{shown(argv)}: ended with {_how(ended)}", remedy=_see(log))


def shown(argv: Sequence[str]) -> str:
    """A command in what is said of it: on one line, and no longer than leaves room for what happened to it."""
    return clip(title(" ".join(argv)), _SHOWN)


async def _ended(spec: Spec, out: Callable[[bytes], object], err: Callable[[bytes], object]) -> Exit:
    async with open_child(spec) as child, trio.open_nursery() as nursery:
        nursery.start_soon(drain, child.streams["stdout"], out)
        nursery.start_soon(drain, child.streams["stderr"], err)
        return await child.finish()


def _how(ended: Exit) -> str:
    return f"exit code {ended.code}" if ended.signal is None else ended.signal


def _see(log: Log) -> str:
    return f"See {log.path.name} in the run's folder."


async def _fetch_git(source: Source, target: Path, ca_file: Path | None, *, mark: str, log: Log) -> None:
    """The files of a git source, in a new folder. Nothing is checked out before it is known to be in bounds."""
    from agent.suites.archive import link_out

    if ca_file is None and "SSL_CERT_FILE" in os.environ:  # for all that goes out, and git does not know it
        ca_file = find_roots()
    env = environ(os.environ, keep=GIT_ENV) | {"GIT_TERMINAL_PROMPT": "0", "GIT_CONFIG_NOSYSTEM": "1"}
    listing = Listing()

    async def git(argv: tuple[str, ...], out: Callable[[bytes], object] = log.write) -> None:
        said = bytearray()

        def err(data: bytes) -> None:
            log.write(data)
            said[:] = (said + data)[-_SAID:]

        spec = Spec(argv=argv, cwd=target.parent, env=env, mark=mark, limits=Limits(file_size=MAX_BYTES))
        try:
            ended = await _ended(spec, out, err)
        except ChildFailedToStart as failed:
            raise Blocked(f"source.git: {failed.what}", remedy=failed.remedy) from failed
        if ended.code != 0:
            why = title(plain(bytes(said))) or f"git ended with {_how(ended)}"
            raise Blocked(f"source.git: {source.git}: {why}", remedy=_see(log))

    for argv in git_commands(source, target, ca_file):
        await git(argv)
    await git(git_list(target), listing.feed)
    if fault := listing.fault():
        raise Blocked(f"source.git: {source.git}: {fault}", remedy="Leave out what can be installed.")
    await git(git_checkout(target))
    if out := await trio.to_thread.run_sync(lambda: link_out(target, _links(target))):
        raise Blocked(f"source.git: {source.git}: {out!r} is a link out of the repository", remedy="Leave it out.")


def _links(folder: Path) -> Iterator[str]:
    """The links in it, relative to it."""
    for parent, folders, files in os.walk(folder):
        paths = (os.path.join(parent, name) for name in (*folders, *files))
        yield from (os.path.relpath(path, folder) for path in paths if os.path.islink(path))


async def _fetch_archive(
    source: Source, download: Path, target: Path, roots: Sequence[str], ca_file: Path | None
) -> Path:
    from agent.suites.archive import link_out, unpack

    archive = source.archive or ""
    if archive.startswith(("http://", "https://")):
        path = download
        digest = await _download(archive, path, ca_file)
    else:
        path = below(Path(archive), roots)
        digest = await trio.to_thread.run_sync(_sha256, path)
    if source.sha256 is not None and digest != source.sha256.lower():
        raise Blocked(f"source.sha256: {archive} has {digest}", remedy="Give the digest of the archive that is meant.")
    try:
        await trio.to_thread.run_sync(partial(unpack, path, target))
    except (OSError, AgentError) as err:
        raise Blocked(f"source.archive: {archive}: {err}", remedy="Nothing of it is used.") from err
    await trio.to_thread.run_sync(partial(download.unlink, missing_ok=True))
    inside = list(os.scandir(target))
    if len(inside) != 1 or not inside[0].is_dir(follow_symlinks=False):
        return target
    found = Path(inside[0].path)  # a tar of one folder, as most are: it is moved up, and what is beside it is another's
    if out := await trio.to_thread.run_sync(lambda: link_out(found, _links(found))):
        raise Blocked(f"source.archive: {archive}: {out!r} is a link out of {found.name}", remedy="Leave it out.")
    return found


async def _download(url: str, path: Path, ca_file: Path | None) -> str:
    import httpx  # at first use, as tarfile: a service starts without them

    digest, size = hashlib.sha256(), 0
    try:
        # A system without any certificates can still get what comes over plain http.
        trusted = (
            client_context(TlsSettings(ca_file)) if find_roots(ca_file) else ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        )
        async with (
            httpx.AsyncClient(verify=trusted, follow_redirects=True, timeout=30) as client,
            client.stream("GET", url, headers={"accept-encoding": "identity"}) as reply,
            await trio.open_file(path, "wb") as file,
        ):
            reply.raise_for_status()
            async for block in reply.aiter_raw(_BLOCK):  # some servers call a tar.gz a tar, encoded on the way
                digest.update(block)
                size += len(block)
                if size > MAX_BYTES:
                    raise Blocked(f"source.archive: {url} is larger than {MAX_BYTES} bytes", remedy="Make it smaller.")
                await file.write(block)
    except TlsUnusable as err:
        raise Blocked(f"source.archive: {url}: {err.what}", remedy=err.remedy) from err
    except httpx.HTTPError as err:
        raise Blocked(f"source.archive: {url}: {_why(err)}", remedy="See that the machine can reach it.") from err
    return digest.hexdigest()


def _why(err: BaseException) -> str:
    """What is at the bottom of it: httpx says that there was no connection, a cause of its cause that it was TLS."""
    while deeper := err.__cause__ or err.__context__:
        err = deeper
    return str(err) or type(err).__name__


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
