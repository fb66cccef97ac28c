"""The command `agent install`: options to a job, its steps to lines or JSON.

Source: protocols/packaging.md 8; ARCHITECTURE.md, "The commands".
"""

import fcntl
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec

import agent
from agent.core import bundle, release
from agent.core.config import ConfigErrors
from agent.core.errors import AgentError
from agent.install import stage, steps
from agent.install.service import CONFIG, STATE, Init, Needs, Service, detect, inside, user_for
from agent.install.stage import InstallFailed
from agent.install.steps import Job, Step
from agent.settings import DEVICES, Given, Settings, load_settings, state_dir

PREFIX = Path("/opt/agent")
KEYS = Path("/etc/agent/release-keys")
DONE, FAILED, USAGE = 0, 1, 2
OTHER_FILE = "Is it whole, a release, and built for this machine?"


class Options(msgspec.Struct, frozen=True, kw_only=True):
    """The flags as they stand on the command line."""

    prefix: Path | None = None
    root: Path = Path("/")
    user: str | None = None
    init: str = "auto"
    from_file: Path | None = None
    sha256: str | None = None
    now: bool = False
    no_start: bool = False
    dry_run: bool = False
    json: bool = False
    rollback: bool = False
    list: bool = False
    uninstall: bool = False
    purge: bool = False
    boot_check: bool = False
    print_service: str | None = None
    config: tuple[Path, ...] = ()


def run(options: Options) -> int:
    """Do what the flags say; the exit code. Raises ConfigErrors: the settings are broken, and InstallFailed."""
    try:
        return _run(options)
    except InstallFailed as err:
        if not options.json:
            raise
        _print_result([], error=err)
        return FAILED


def _run(options: Options) -> int:
    if wrong := _misuse(options):
        print(f"agent install: {wrong}", file=sys.stderr)
        return USAGE
    prefix = _prefix(options)
    if options.boot_check:
        return _boot_check(prefix)
    if options.list:
        return _list(inside(options.root, prefix), as_json=options.json)
    if options.from_file:
        return _hand_over(options, options.from_file, prefix)
    job = _job(options, prefix)
    if options.print_service:
        print("\n".join(f"# {path}\n{text}" for path, (text, _) in job.service.files().items()), end="")
        return DONE
    if options.rollback:
        todo: Iterable[Step] = steps.roll_back(job)
    elif options.uninstall:
        todo = steps.uninstall(job, purge=options.purge)
    else:
        todo = steps.install(job, _source(), agent.__version__)
    return _work(job, todo, options)


def _misuse(options: Options) -> str | None:
    ways = ("rollback", "list", "uninstall", "boot_check", "print_service", "from_file")
    named = [f"--{way.removesuffix('_file').replace('_', '-')}" for way in ways if getattr(options, way)]
    if len(named) > 1:
        return f"{' and '.join(named)} do not go together"
    if options.purge and not options.uninstall:
        return "--purge goes with --uninstall"
    if options.sha256 and not options.from_file:
        return "--sha256 goes with --from"
    if not options.root.is_absolute() or (options.prefix and not options.prefix.is_absolute()):
        return "--root and --prefix are absolute paths"
    if not options.root.is_dir():
        return f"--root {options.root} is no folder"
    # Both stand in service files, where a blank, a quote or a % would mean something else.
    if options.user is not None and not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_-]{0,31}", options.user):
        return f"--user {options.user!r} is no user's name: letters, digits, _ and -"
    if options.prefix and options.init != "none" and not re.fullmatch(r"[A-Za-z0-9._+/-]+", str(options.prefix)):
        return f"--prefix {str(options.prefix)!r} cannot stand in a service file: letters, digits and . _ + - /"
    return None


def _prefix(options: Options) -> Path:
    """As the installed system sees it; that of the release that runs, which may be in the image."""
    own, root = release.own_prefix(), options.root.resolve()
    if own is not None and own.is_relative_to(root):
        own = Path("/") / own.relative_to(root)
    return options.prefix or own or PREFIX


def _boot_check(prefix: Path) -> int:
    """Never in the way of a start: what it cannot do, it says."""
    try:
        if version := release.boot_check(prefix):
            print(f"{prefix / 'current'} -> {version}: the release before it did not prove itself", file=sys.stderr)
    except OSError as err:
        print(f"boot check: {err.filename}: {err.strerror}. The start is not counted.", file=sys.stderr)
    return DONE


def _list(prefix: Path, *, as_json: bool) -> int:
    found = steps.listed(prefix)
    if as_json:
        print(json.dumps([msgspec.to_builtins(item) for item in found], indent=2))
    else:
        for item in found:
            starts = "" if item.starts is None else f", {item.starts} of {release.STARTS} starts"
            print(f"{item.version}  {item.role}{starts}".rstrip())
    return DONE


def _job(options: Options, prefix: Path) -> Job:
    main = inside(options.root, CONFIG) / "agent.toml"
    config = options.config or ((main,) if options.root != Path("/") and main.exists() else ())
    try:
        settings = load_settings(Given(config)).settings
    except ConfigErrors:
        if not (options.rollback or options.uninstall):  # which write nothing of them
            raise
        settings = Settings()
    wanted = options.print_service or options.init
    init: Init = detect(options.root) if wanted == "auto" else msgspec.convert(wanted, Init)
    user = user_for(init, options.user, options.root)
    is_root = os.geteuid() == 0
    if not is_root and init != "none" and not options.print_service and not options.dry_run:
        raise InstallFailed(
            "only root can install a service",
            remedy="Run it with sudo, or --init none --prefix DIR for a release alone.",
        )
    service = Service(init=init, user=user, prefix=prefix, root=options.root, needs=needs(settings))
    usual = STATE if is_root else state_dir(settings)
    return Job(
        service=service,
        state_dir=Path("/", settings.state.dir) if settings.state.dir else usual,  # the service starts in /
        config=config,
        now=options.now,
        starts=not options.no_start,
        is_root=is_root,
    )


def needs(settings: Settings) -> Needs:
    """What a service with these settings must be given."""
    named = [
        value
        for table in (getattr(settings, name) for name in Settings.__struct_fields__)
        if isinstance(table, msgspec.Struct)
        for field in table.__struct_fields__
        if field.endswith("_file") and isinstance(value := getattr(table, field), str) and value
    ]
    control = settings.control
    named += [token.file for token in control.tokens]
    named += [name for name in (control.tls.cert, control.tls.key, control.tls.client_ca) if name]
    writes = [str(Path("/", settings.state.dir))] if settings.state.dir else []
    writes += [str(Path(settings.log.to).parent)] if settings.log.to != "auto" else []
    opened = [devices for label, devices in DEVICES.items() if settings.labels.get(label)]
    return Needs(
        credentials=tuple(dict.fromkeys(named)),
        secrets=settings.monitors.secrets_dir,
        writes=tuple(writes),
        devices=tuple(kind for devices in opened for kind in devices.kinds),
        groups=tuple(group for devices in opened for group in devices.groups),
    )


def _source() -> Path:
    """The release folder that this process is, or has been unpacked to."""
    folder = bundle.release()
    if folder is None:
        raise InstallFailed("a checkout is no release", remedy="make dist, then dist/agent install.")
    return folder.resolve()


def _hand_over(options: Options, file: Path, prefix: Path) -> int:
    """Let the new file install itself, once it is known to be the one that was meant."""
    here = inside(options.root, prefix)
    try:
        stage.check_place(here)
        stage.make_folder(here)
        with _folder(here) as folder:
            taken = stage.take(file, folder, sha256=options.sha256, keys=inside(options.root, KEYS))
            words = [
                "--prefix",
                str(prefix),
                "--root",
                str(options.root),
                "--init",
                options.init,
            ]
            words += ["--user", options.user] if options.user else []
            flags = {"--now": options.now, "--no-start": options.no_start, "--dry-run": options.dry_run}
            words += [flag for flag, is_set in (flags | {"--json": options.json}).items() if is_set]
            words += [word for path in options.config for word in ("--config", str(path.absolute()))]
            # The single file unpacks itself below TMPDIR: here it may be run, wherever /tmp is.
            environ = stage.environ_for(os.environ) | {"TMPDIR": str(folder)}
            try:
                code = subprocess.run([taken, "install", *words], env=environ).returncode
            except OSError as err:
                raise InstallFailed(f"{file} cannot be run: {err.strerror}", remedy=OTHER_FILE) from err
            if code not in (DONE, FAILED, USAGE):
                raise InstallFailed(f"{file} ended with {code}", remedy=OTHER_FILE)
            return code
    except OSError as err:
        raise InstallFailed(f"{err.filename or file}: {err.strerror}", remedy=stage.remedy(err)) from err


@contextmanager
def _folder(prefix: Path) -> Iterator[Path]:
    """A folder below the prefix for as long as it is needed; those go that a kill has left."""
    for left in prefix.glob(".from-*"):
        with suppress(BlockingIOError), _held(left):
            shutil.rmtree(left)
    made = Path(tempfile.mkdtemp(prefix=".from-", dir=prefix))
    with _held(made):
        try:
            yield made
        finally:
            shutil.rmtree(made)


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Locked, for as long as this process lives. Raises BlockingIOError: by another one."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _work(job: Job, todo: Iterable[Step], options: Options) -> int:
    """Step by step. A person is told of each when it begins: it may take minutes. A machine is told of those done."""
    told: list[str] = []
    error: AgentError | None = None
    try:
        if options.dry_run:
            told = [what for what, _ in todo]
            job.state = ""
        else:
            with steps.alone(job):
                for what, do in todo:
                    if not options.json:
                        print(what, flush=True)
                    do()
                    told.append(what)
    except OSError as err:
        error = InstallFailed(f"{err.filename or job.prefix}: {err.strerror}", remedy=stage.remedy(err))
    except InstallFailed as err:
        error = err
    if options.json:
        _print_result(told, version=job.version, state=job.state, error=error)
    elif options.dry_run and error is None:
        print("\n".join(f"would: {what}" for what in told))
    if error and not options.json:
        print(error, file=sys.stderr)
    return FAILED if error else DONE


def _print_result(steps: Sequence[str], *, version: str = "", state: str = "", error: AgentError | None) -> None:
    result: dict[str, object] = {"ok": error is None, "version": version, "state": state, "steps": steps}
    if error:
        result |= {"error": error.what, "remedy": error.remedy}
    print(json.dumps(result, indent=2))
