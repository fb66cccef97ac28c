"""The command line: run, demo, lab, ctl, logs, config, profile, schema.

Standard output is for results, standard error for logs. Exit codes: 0 done, 1 the work itself failed, 2 usage or
configuration, 3 a peer could not be reached in time.

Source: ARCHITECTURE.md, "The commands". Imports stand inside the branches: a command loads what it needs.
"""

import argparse
import os
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from agent.core.errors import AgentError, ConfigError, unwrap

DONE, FAILED, USAGE = 0, 1, 2  # and 3, of PeerUnreachable


def main(argv: list[str]) -> int:
    """Run one command; its exit code."""
    if "--selftest" in argv:
        argv = ["selftest", *(word for word in argv if word != "--selftest")]
    given = _parser().parse_args(argv)
    try:
        code: int = given.run(given)
        print(end="", flush=True)  # here, not at the interpreter's end: the reader may have gone
    except (AgentError, OSError, BaseExceptionGroup, KeyboardInterrupt) as err:
        return failed(unwrap(err))
    return code


def failed(err: BaseException) -> int:
    """What ended a command: an error that was raised on purpose, or the system's, is a sentence; else a traceback.

    Returns its exit code.
    """
    match err:
        case KeyboardInterrupt():
            return FAILED
        case BrokenPipeError():  # the reader of our output went away, as `head` does
            _let_output_go()
            return FAILED
        case OSError() if err.filename is not None and err.strerror:
            print(f"{os.fsdecode(err.filename)}: {err.strerror}", file=sys.stderr)
            return FAILED
        case AgentError():
            print(err, file=sys.stderr)
            return err.exit_code
        case OSError():  # as of standard output, on a disk that is full
            _let_output_go()
            print(err.strerror or err, file=sys.stderr)
            return FAILED
        case _:
            raise err


def _let_output_go() -> None:
    """Else Python tries to write the rest once more at its end, and where that fails its exit code is 120."""
    if sys.stdout is not None:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="agent", description="Emissary: the service agent of a lab test machine.")
    parser.add_argument("--version", action="store_true", help="version, build and native engine")
    parser.add_argument("--selftest", action="store_true", help="check this machine; with --json, --only GLOB,...")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    def add(name: str, about: str, run: Any, to: Any = commands) -> argparse.ArgumentParser:
        command: argparse.ArgumentParser = to.add_parser(name, help=about, description=about)
        command.set_defaults(run=run)
        return command

    serve = add("run", "the service; what init scripts start", _run)
    _settings_of(serve)
    serve.add_argument("--respawn", action="store_true", help="as a child that is restarted; for OpenRC and SysV")
    serve.add_argument("--user", metavar="NAME", help="with --respawn: whom the child is to be")
    demo = add("demo", "a lab and an agent on this machine alone: one real suite, from order to report", _demo)
    demo.add_argument("--suite", type=Path, metavar="DIR", help="your own project, in place of the sample")
    demo.add_argument("--keep", action="store_true", help="keep the folder with everything the run left")
    demo.add_argument("--json", action="store_true", help="only the result document on standard output")
    lab = add("lab", "the embedded lab server: Seneschal, Mimir, Polarize, Drill", _lab)
    lab.add_argument("--listen", type=_address, metavar="HOST:PORT", help="default: lab.listen of the settings")
    lab.add_argument("--data", type=Path, metavar="DIR", help="default: lab.data of the settings")
    lab.add_argument("--suite", type=Path, metavar="DIR", action="append", default=[], help="a suite to hand out")
    _config_option(lab)
    ctl = add("ctl", "one request to a running agent, or `watch`: its events as JSON lines", _ctl)
    ctl.add_argument("--url", metavar="URL", help="ws(s)://HOST:PORT/; default: control.listen of the settings")
    ctl.add_argument("--token-file", type=Path, metavar="FILE", help="default: the first of control.tokens")
    ctl.add_argument("--kind", metavar="KIND", action="append", default=[], help="watch: events of this kind, as Test*")
    ctl.add_argument("--since", type=int, metavar="SEQ", help="watch: begin behind this number")
    ctl.add_argument("action", metavar="ACTION", help="as status, run_suite, cancel, or watch")
    ctl.add_argument("pairs", metavar="key=value", nargs="*", help="the payload; values are JSON, else text")
    _config_option(ctl)
    monitor = add("logs", "the log monitor as a tool", None)
    logs = monitor.add_subparsers(metavar="scan|templates|learn|evaluate", required=True)
    scan = add("scan", "a JSON line for each line that matches a rule", _logs_scan, logs)
    scan.add_argument("--rules", type=Path, metavar="FILE", action="append", required=True, help="rules, as TOML")
    scan.add_argument("--follow", action="store_true", help="go on as files grow and rotate, until Ctrl-C")
    scan.add_argument("--count", action="store_true", help="instead, for each rule, how many lines match")
    scan.add_argument("--stats", action="store_true", help="at the end, what it took")
    scan.add_argument("-n", dest="numbers", action="store_true", help="with the number of the line")
    scan.add_argument("--model", type=Path, metavar="FILE", help="with templates, and guessed classes, by this model")
    scan.add_argument("paths", metavar="PATH", nargs="+", help="a file, or - for standard input")
    templates = add("templates", "lines that are alike but for their values", _logs_templates, logs)
    templates.add_argument("--assign", action="store_true", help="tell the template of each line instead")
    templates.add_argument("paths", nargs="+", metavar="PATH", help='a log; "-": standard input')
    learn = add("learn", "a model file from logs: classes by labels, chains before failures", _logs_learn, logs)
    learn.add_argument("--model", type=Path, metavar="OUT", required=True, help="the file, written anew")
    evaluate = add("evaluate", "how well classes and forecasts do on logs, in the order of time", _logs_evaluate, logs)
    evaluate.add_argument("--model", type=Path, metavar="FILE", help="begin with what `agent logs learn` wrote")
    for scored in (learn, evaluate):
        scored.add_argument("--labels", metavar="FILE", help='{"line": n, "class": c|null} by line, or first-token')
        scored.add_argument("--failure", metavar="REGEX", action="append", default=[], help="a line that is a failure")
        scored.add_argument("paths", metavar="PATH", nargs="+", help="a file; lines count on from one to the next")
    evaluate.add_argument("--online", action="store_true", help="guess each line, then learn its label")
    evaluate.add_argument(
        "--split", type=_share, default=0, metavar="F", help="learn on this share of the lines, score the rest"
    )
    evaluate.add_argument("--horizon", type=_seconds, metavar="S", help="forecast so far ahead; default: as learned")
    evaluate.add_argument("--threshold", type=_share, metavar="P", help="guess what is more probable than this")
    monitors = add("monitors", "stand-alone monitors", None).add_subparsers(metavar="run", required=True)
    foreground = add(
        "run", "run monitors in the foreground; a JSON line for each step's result", _monitors_run, monitors
    )
    foreground.add_argument("--once", action="store_true", help="each monitor one run at once, then end")
    foreground.add_argument("--all", action="store_true", help="runs, log lines, skipped runs and orphans too")
    foreground.add_argument("file", type=Path, metavar="FILE", help="settings with [monitors]")
    install = add("install", "put this release onto the machine, start it at boot; go back, list, remove", _install)
    install.add_argument("--prefix", type=Path, metavar="DIR", help="default: /opt/agent")
    install.add_argument("--root", type=Path, metavar="DIR", default=Path("/"), help="an image; nothing is started")
    whom = "whom the service runs as; default: as it does, else dynamic"
    install.add_argument("--user", metavar="dynamic|root|NAME", help=whom)
    install.add_argument("--init", choices=("auto", "systemd", "openrc", "sysv", "none"), default="auto")
    install.add_argument("--from", dest="from_file", type=Path, metavar="FILE", help="the single file of a release")
    install.add_argument("--sha256", metavar="HEX", help="its checksum; without it FILE.sig must be good")
    install.add_argument("--now", action="store_true", help="do not wait for running suites")
    install.add_argument("--no-start", action="store_true", help="neither start nor restart the service")
    install.add_argument("--dry-run", action="store_true", help="say each step, do none")
    install.add_argument("--json", action="store_true")
    install.add_argument("--rollback", action="store_true", help="back to the previous release")
    install.add_argument("--list", action="store_true", help="the releases that are there")
    install.add_argument("--uninstall", action="store_true", help="stop it and remove it; settings and state stay")
    install.add_argument("--purge", action="store_true", help="with --uninstall: settings and state too")
    install.add_argument("--boot-check", action="store_true", help="what the service does before each start")
    install.add_argument("--print-service", choices=("systemd", "openrc", "sysv"), help="the service files, as text")
    _config_option(install)
    eman = add("eman", "the event bus", None).add_subparsers(metavar="hub", required=True)
    hub = add("hub", "an Eman hub", _eman_hub, eman)
    hub.add_argument("--listen", type=_address, metavar="HOST:PORT", required=True, help="as 127.0.0.1:9001")
    _config_option(hub)
    _gator_options(add("gator", "run a Gator spec, or one layer below --parent", _gator))
    add("schema", "JSON Schema of every event, action and file format", _schema)
    settings = add("config", "show or check the settings", None).add_subparsers(metavar="show|check", required=True)
    show = add("show", "the effective settings", _config_show, settings)
    show.add_argument("--origin", action="store_true", help="where each value comes from")
    show.add_argument("--json", action="store_true")
    _settings_of(show)
    profile = add("profile", "what this machine is, which hardware profile fits, and why", _profile)
    profile.add_argument("--json", action="store_true")
    _settings_of(profile)
    selftest = add("selftest", "the same as agent --selftest", _selftest)
    selftest.add_argument("--json", action="store_true")
    selftest.add_argument("--only", metavar="GLOB,...", default="", help="these checks alone, as native.*,config")
    _settings_of(selftest)
    check = add(
        "check",
        "validate files of settings, rules, hardware profiles: every error with file, line and key",
        _config_check,
        settings,
    )
    check.add_argument("files", type=Path, nargs="+", metavar="FILE")
    return parser


def _gator_options(command: argparse.ArgumentParser) -> None:
    """Gator's own flags, all of them, and ours behind."""
    command.add_argument(
        "--id", metavar="IDENT", action="append", default=[], help="with --parent: which of its children this is"
    )
    command.add_argument("--hub", metavar="HOST:PORT", help="a Gator hub to tell of a root")
    command.add_argument("--parent", metavar="HOST:PORT", help="the layer above; default: GATOR_PARENT")
    command.add_argument("--interval", type=float, default=5.0, metavar="S", help="between two updates")
    command.add_argument(
        "--tracking", type=Path, metavar="DIR", action="append", default=[], help="default: ./tracking/<time>"
    )
    command.add_argument("--quiet", action="store_true", help="tell no messages upward, and print none")
    command.add_argument("--all-msg", action="store_true", help="tell those of all layers")
    command.add_argument("-v", "--verbose", action="store_true", help="tell DEBUG messages too")
    command.add_argument("--progress", action="store_true", help="print how many jobs are done")
    command.add_argument("--scheduler", choices=("local", "slurm"), default="local")
    command.add_argument("--sched-arg", metavar="KEY=VALUE", action="append", default=[], help="as concurrency=4")
    for name, default in (("warning", None), ("error", 0), ("critical", 0)):
        about = f"so many {name} messages do not fail a job; -1: any number"
        command.add_argument(f"--limit-{name}", type=int, default=default, metavar="N", help=about)
    command.add_argument("--resume-wait", type=float, metavar="S", help="for a parent or child that is away")
    command.add_argument("--isolate", action="store_true", help="each child a process")
    command.add_argument("--events-fd", type=int, metavar="N", help="a JSON line there for each job's start and end")
    command.add_argument("spec", type=Path, nargs="?", metavar="SPEC")
    _config_option(command)


def _config_option(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config", type=Path, metavar="FILE", action="append", default=[], help="in place of /etc/agent/agent.toml"
    )


def _settings_of(command: argparse.ArgumentParser) -> None:
    _config_option(command)
    command.add_argument("--profile", metavar="NAME", help="a hardware profile, in place of the one that fits")


def _load(given: argparse.Namespace) -> Any:
    from agent.settings import load_settings

    return load_settings(_given(given))


def _given(given: argparse.Namespace) -> Any:
    from agent.settings import Given

    return Given(tuple(given.config), getattr(given, "profile", None))


def _run(given: argparse.Namespace) -> int:
    if given.respawn:
        return _respawn(given)
    if given.user:
        print("agent run: --user goes with --respawn", file=sys.stderr)
        return USAGE
    import faulthandler

    from agent.core.start import prepare

    prepare()
    effective = _load(given)  # before trio and the roles are imported: broken settings are told at once

    import trio

    from agent import app
    from agent.ownlog import log_to

    log_to(effective.settings.log)
    faulthandler.enable()  # the supervisor's SIGABRT prints every thread's stack
    return trio.run(app.serve, effective, _given(given))


def _respawn(given: argparse.Namespace) -> int:
    import logging

    from agent.core import release
    from agent.core.respawn import Parent

    def boot_check() -> str | None:
        prefix = release.own_prefix()
        return release.boot_check(prefix) if prefix else None

    logging.basicConfig(level="INFO", format="%(asctime)s %(levelname)s %(name)s %(message)s")
    options = [word for path in given.config for word in ("--config", str(path))]
    options += ["--profile", given.profile] if given.profile else []
    return Parent(["run", *options], given.user, boot_check).run()


def _demo(given: argparse.Namespace) -> int:
    import trio

    from agent import demo

    return trio.run(demo.run, given.suite, given.keep, given.json)


def _lab(given: argparse.Namespace) -> int:
    from functools import partial

    from agent.eman.hub import authority
    from agent.lab.server import Lab, serve_lab
    from agent.ownlog import log_to
    from agent.settings import find, state_dir
    from agent.suites.prepare import tree_of

    settings = _load(given).settings
    log_to(settings.log)
    address = given.listen or settings.lab.listen
    data = given.data or Path(settings.lab.data or state_dir(settings) / "lab")
    suites = [tree_of(folder) for folder in given.suite]

    hub, place = settings.eman.hub, partial(find, folder=state_dir(settings))
    eman = authority(hub, address, place) if hub.salt_file or hub.services else None

    def where(lab: Lab) -> str:
        return f"{lab.url} token_file={lab.token_file}"

    return _serve(partial(serve_lab, address, data, suites, eman=eman, hub=hub), where)


def _serve(start: Callable[..., Awaitable[None]], where: Callable[[Any], str]) -> int:
    """A server in the foreground, until it is told to end; what `start` tells when it is up goes through `where`."""
    import signal

    import trio

    async def serve() -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            async with trio.open_nursery() as nursery:
                print(where(await nursery.start(start)), flush=True)
                await anext(signals)
                nursery.cancel_scope.cancel()

    trio.run(serve)
    return DONE


def _ctl(given: argparse.Namespace) -> int:
    import json
    from functools import partial

    import trio

    from agent import ctl

    try:
        payload = ctl.payload_of(given.pairs)
        if given.action == "watch" and payload:
            raise ValueError("watch takes --kind and --since, no key=value")
        if given.action != "watch" and (given.kind or given.since is not None):
            raise ValueError("--kind and --since go with watch")
        dial = ctl.dial_of(_load(given).settings, given.url, given.token_file)
    except ValueError as err:
        print(f"agent ctl: {err}", file=sys.stderr)
        return USAGE
    if given.action == "watch":
        trio.run(partial(ctl.watch, dial, given.kind, given.since))
    else:
        print(json.dumps(trio.run(ctl.ask, dial, given.action, payload), indent=2, ensure_ascii=False))
    return DONE


def _logs_scan(given: argparse.Namespace) -> int:
    from agent import logscan
    from agent.standard import STDIN

    if given.follow and STDIN in given.paths:
        print("agent logs scan: standard input is read to its end; leave --follow out", file=sys.stderr)
        return USAGE
    is_good = logscan.run(
        given.rules,
        given.paths,
        follow=given.follow,
        count=given.count,
        stats=given.stats,
        numbers=given.numbers,
        model=given.model,
    )
    return DONE if is_good else FAILED


def _logs_templates(given: argparse.Namespace) -> int:
    from agent import logtemplates

    return DONE if logtemplates.run(given.paths, assign=given.assign) else FAILED


def _logs_learn(given: argparse.Namespace) -> int:
    import json

    from agent import loglearn

    told = loglearn.learn(given.model, given.paths, given.labels, given.failure)
    print(json.dumps(told, ensure_ascii=False))
    return DONE


def _logs_evaluate(given: argparse.Namespace) -> int:
    import json

    from agent import loglearn

    told = loglearn.evaluate(
        given.paths,
        given.labels,
        given.failure,
        model=given.model,
        online=given.online,
        split=given.split,
        horizon_s=given.horizon,
        threshold=given.threshold,
    )
    print(json.dumps(told, ensure_ascii=False))
    return DONE


def _address(text: str) -> str:
    """Where to listen."""
    from agent.core.listen import split_address

    try:
        split_address(text)
    except ValueError as err:
        raise argparse.ArgumentTypeError(str(err)) from None
    return text


def _share(text: str) -> float:
    """A share or a probability."""
    return _within(text, lambda number: 0 <= number < 1, "from 0 to below 1")


def _seconds(text: str) -> float:
    """A time that a forecast may look ahead."""
    return _within(text, lambda number: 0 < number <= 1e9, "of seconds above 0")


def _within(text: str, fits: Callable[[float], bool], what: str) -> float:
    with suppress(ValueError):  # argparse would name our own function to the person
        if fits(number := float(text)):
            return number
    raise argparse.ArgumentTypeError(f"{text!r} is no number {what}")


def _monitors_run(given: argparse.Namespace) -> int:
    from functools import partial

    import trio

    from agent import foreground
    from agent.core.config import load
    from agent.ownlog import log_to
    from agent.settings import Settings
    from agent.standard import stdout

    settings = load(Settings, [given.file], env=os.environ).settings
    if not settings.monitors.monitor:
        raise ConfigError(
            given.file, 0, "monitors.monitor", "it names no monitor", remedy="Write [[monitors.monitor]]."
        )
    log_to(settings.log)

    run = partial(foreground.run, once=given.once, all_lines=given.all)
    return DONE if trio.run(run, settings.monitors, settings.name, stdout().fileno()) else FAILED


def _install(given: argparse.Namespace) -> int:
    from agent.install.command import Options, run

    return run(
        Options(
            **{name: getattr(given, name) for name in Options.__struct_fields__ if name != "config"},
            config=tuple(given.config),
        )
    )


def _eman_hub(given: argparse.Namespace) -> int:
    from functools import partial

    from agent.core.metrics import Metrics
    from agent.core.tls import server_context
    from agent.eman.hub import authority, serve_hub
    from agent.eman.messages import NAMESPACE
    from agent.ownlog import log_to
    from agent.settings import find, state_dir

    settings = _load(given).settings
    log_to(settings.log)
    hub, place = settings.eman.hub, partial(find, folder=state_dir(settings))
    files = [place(name) if name else None for name in (hub.tls.cert, hub.tls.key, hub.tls.client_ca)]
    tls = server_context(files[0], *files[1:]) if files[0] else None
    is_right = authority(hub, given.listen, place)

    start = partial(serve_hub, given.listen, hub, is_right, metrics=Metrics(), tls=tls)
    return _serve(start, lambda address: f"{'https' if tls else 'http'}://{address}{NAMESPACE}")


def _gator(given: argparse.Namespace) -> int:
    import logging

    import msgspec
    import trio

    from agent.core import cgroup
    from agent.core.errors import DocumentError
    from agent.gator import role
    from agent.gator.layer import Limits, Options
    from agent.gator.orphans import guarded

    settings = _load(given).settings.gator
    if given.resume_wait is not None:
        settings = msgspec.structs.replace(settings, resume_wait_s=given.resume_wait)
    logging.basicConfig(level="WARNING", stream=sys.stderr, format="%(levelname)s %(name)s %(message)s")
    most = (given.limit_warning, given.limit_error, given.limit_critical)
    pairs = [text.partition("=") for text in given.sched_arg]
    if not 0 < given.interval <= 86_400 or not all(equals for _, equals, _ in pairs):
        print("agent gator: --interval is more than 0 and at most 86400, --sched-arg is KEY=VALUE", file=sys.stderr)
        return USAGE
    if given.resume_wait is not None and not 0 <= given.resume_wait <= 86_400:
        print("agent gator: --resume-wait is from 0 to 86400", file=sys.stderr)
        return USAGE
    command = role.Command(
        options=Options(
            interval_s=given.interval,
            quiet=given.quiet,
            all_messages=given.all_msg,
            least="DEBUG" if given.verbose else "INFO",
            limits=Limits(*(None if limit is None or limit < 0 else limit for limit in most)),
            isolate=given.isolate,
            scheduler=given.scheduler,
            sched_args=tuple((name, value) for name, _, value in pairs),
            hub=given.hub or "",
            config=tuple(str(file.absolute()) for file in given.config),
        ),
        spec=given.spec,
        idents=tuple(given.id),
        parent=given.parent or (None if given.spec else os.environ.get("GATOR_PARENT")),
        tracking=tuple(given.tracking) or (role.new_tracking(),),
        progress=given.progress,
        events=given.events_fd,
    )
    leaves = cgroup.claim()  # before the guard, which is to be where we are
    try:
        with guarded(None if command.parent else command.tracking[-1]):
            return trio.run(role.run, command, settings, leaves, sys.stdout.fileno() if sys.stdout else None)
    except (BaseExceptionGroup, DocumentError, role.BadOption) as err:
        cause = unwrap(err)
        if not isinstance(cause, DocumentError | role.BadOption):
            raise
        print(cause, file=sys.stderr)
        return USAGE


def _schema(given: argparse.Namespace) -> int:
    from agent.schema import printed

    print(printed())
    return DONE


def _config_show(given: argparse.Namespace) -> int:
    import json

    effective = _load(given)
    if given.json:
        print(json.dumps(effective.as_dict(), indent=2))
    else:
        print("\n".join(effective.show(origin=given.origin)))
    for warning in effective.warnings:
        print(warning, file=sys.stderr)
    return DONE


def _profile(given: argparse.Namespace) -> int:
    import msgspec

    from agent.settings import survey

    _, report = survey(_given(given))
    if given.json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print("\n".join(report.show()))
    return DONE


def _selftest(given: argparse.Namespace) -> int:
    import msgspec
    import trio

    from agent import selftest

    try:
        names = selftest.select([glob for glob in given.only.split(",") if glob])
    except ValueError as err:
        print(f"agent --selftest: {err}", file=sys.stderr)
        return USAGE
    report = trio.run(selftest.run, selftest.examine(_given(given)), names)
    if given.json:
        print(msgspec.json.format(msgspec.json.encode(report)).decode())
    else:
        print("\n".join(selftest.table(report)))
    return DONE if report.ok else FAILED


def _config_check(given: argparse.Namespace) -> int:
    from agent.checks import files

    for warning in files.check(given.files):
        print(warning, file=sys.stderr)
    print(f"{', '.join(map(str, given.files))}: good")
    return DONE
