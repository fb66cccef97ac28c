"""The service: settings to roles. The only file that knows all of them.

    load settings -> open the store -> control listens -> READY, start the other roles -> until a signal
    SIGHUP    read the settings again; all valid or nothing changes; roles whose table changed are restarted
    SIGTERM   no new run; running ones end; outboxes get up to 60 s; a second one: at once

Source: ARCHITECTURE.md, "The house"; protocols/settings.md; protocols/packaging.md 4 and 6.
"""

import logging
import platform
import signal
import socket
import ssl
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio

import agent
from agent.control.board import HEARD, Board
from agent.control.messages import SelftestAsked
from agent.core import bundle, cgroup, clock, config, edited, heartbeat, notify, release
from agent.core.bus import Bus
from agent.core.config import Effective
from agent.core.errors import ActionError
from agent.core.events import AgentStarted, Alert, AlertCleared, Reloaded, RoleChanged
from agent.core.link import Dial
from agent.core.metrics import Metrics
from agent.core.payload import read
from agent.core.process import adopt
from agent.core.start import LED_BY, heed, settle
from agent.core.store import Store, open_store
from agent.core.supervise import Health, Role, Supervisor
from agent.core.tls import TlsSettings, server_context
from agent.core.token import own_token, read_token
from agent.mimir.settings import MimirSettings
from agent.polarize.settings import CibusSettings, PolarizeSettings
from agent.seneschal.settings import SeneschalSettings
from agent.settings import DEFAULT_TOKEN, Given, Settings, Tls, certificates, find, load_settings, state_dir, survey
from agent.suites.requirements import labels_of

if TYPE_CHECKING:
    from agent.coverage.role import Coverage

log = logging.getLogger(__name__)

P = TypeVar("P", PolarizeSettings, CibusSettings)

DELIVER_S = 60.0  # settings.md, "Ends": links and outbox get that long at SIGTERM
START_S = 60.0  # the supervisor's TimeoutStartSec: beside the wait for the clock
STUCK_S = 10.0  # an outbox of which nothing leaves for that long waits on disk instead

# A change of these is taken up at the next start only. A control client that asks for a reload must hear the answer.
NEEDS_RESTART = ("ident", "labels", "profile", "timeout_factor", "clock", "state", "log", "control")
# Which tables a role reads: a change in one of them restarts it.
ROLE_TABLES: dict[str, tuple[str, ...]] = {
    "control": (),
    "mimir": ("mimir", "tls", "labels"),
    "polarize": ("polarize", "cibus", "tls"),
    "logs": ("logs",),
    "files": ("files",),
    "entitlement": ("entitlement",),
    "coverage": ("coverage", "tls"),
    "eman": ("eman", "tls"),
    "monitors": (),  # as the suites
    "gator": (),  # its settings are those of `agent gator`
    "suites": (),  # it reads what holds: a restart would end its runs
    "seneschal": ("seneschal", "tls", "labels"),
}


async def serve(effective: Effective[Settings], given: Given) -> int:
    """The service from start to end, led by signals; the exit code. The settings are those of the options `given`."""
    service = Service(effective, partial(load_settings, given), given)
    with trio.open_signal_receiver(*LED_BY) as signals:
        heed()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_become_ready, service)
            nursery.start_soon(edited.follow, given.config, partial(_edited, service))
            nursery.start_soon(heartbeat.beat, service.supervisor, service.store, service.bus.publish)
            nursery.start_soon(service.run)  # not waited for: a port that is taken must not keep signals from us
            nursery.start_soon(_go_on, service)
            async for received in signals:
                if received != signal.SIGHUP:
                    break
                await _reload(service)
            notify.stopping(DELIVER_S)
            log.info("stopping signal=%s", signal.Signals(received).name)
            async with trio.open_nursery() as ending:

                async def at_the_second_signal() -> None:
                    async for again in signals:
                        if again != signal.SIGHUP:
                            log.warning("stopping at once signal=%s", signal.Signals(again).name)
                            ending.cancel_scope.cancel()

                ending.start_soon(at_the_second_signal)
                await service.end_orderly()
                ending.cancel_scope.cancel()
            nursery.cancel_scope.cancel()
    if service.is_ready:
        release.end_own_trial()
    return 0


def _warn(effective: Effective[Settings]) -> None:
    for warning in effective.warnings:
        log.warning("settings: %s", warning)
    if effective.profile:
        log.info("hardware profile=%s", effective.profile)


def _check_rules(effective: Effective[Settings]) -> None:
    """Raise ConfigErrors for what is wrong in the rule files that the settings name."""
    from agent.logs.lint import check
    from agent.logs.rules import RuleErrors

    try:
        check(effective.settings.logs, {key: origin.text for key, origin in effective.origins.items()})
    except RuleErrors as err:
        raise config.ConfigErrors(list(err.errors)) from err


async def _go_on(service: "Service") -> None:
    """What comes when every role had its start."""
    await service.up.wait()
    settle()
    if pending := release.own_trial():
        await heartbeat.confirm(service.supervisor, service.store, pending)


async def _become_ready(service: "Service") -> None:
    await service.serving.wait()
    within_s = service.effective.settings.clock.wait_sync_s
    if within_s:
        notify.starting(within_s + START_S)
    if within_s and not await clock.wait_synchronised(within_s):
        log.warning("clock not synchronised waited_s=%g", within_s)
    if (now := time.time()) < bundle.built():
        log.warning("it is %s, before this was built: events bear that date. Set the clock.", time.ctime(now))
    notify.ready(service.summary())
    service.is_ready = True


async def _reload(service: "Service") -> None:
    if service.is_ready:
        notify.reloading()
    try:
        await service.bus.ask("reload", {})
    except ActionError as err:
        log.error("reload refused, nothing changed error=%s", err)  # noqa: TRY400 - the person at the file reads this
    if service.is_ready:
        notify.ready(service.summary())


async def _edited(service: "Service") -> None:
    """A settings file is another. Monitors follow by themselves; all else waits for SIGHUP, or the action `reload`."""
    try:
        new = service.load()
    except config.ConfigErrors as errors:
        log.error("settings cannot be used, nothing changed error=%s", errors)  # noqa: TRY400 - as below
        return
    if new.settings.monitors != service.effective.settings.monitors:
        await _reload(service)


class Service:
    """The agent as it runs: its bus, its store, its roles. `load` reads the settings again, at a reload.

    `given` are the options from which both were made.
    """

    def __init__(self, effective: Effective[Settings], load: Callable[[], Effective[Settings]], given: Given) -> None:
        self.effective, self.load, self._given = effective, load, given
        _warn(effective)
        self.metrics = Metrics()
        folder, state = state_dir(effective.settings), effective.settings.state
        self.store: Store = open_store(
            folder, group_commit_s=state.group_commit_ms / 1000, journal_max=state.journal_max, reserve=state.reserve
        )
        self.bus = Bus(self.store)
        self.supervisor = Supervisor(self._role_changed)
        self.board = Board()
        self.serving = trio.Event()  # the control port listens; the other roles are on their way
        self.up = trio.Event()  # every role had its start
        self.is_ready = False  # as the supervisor was told
        self._reloading = trio.Lock()
        self.control_url = ""
        self._covering: Coverage | None = None  # runners that are covered go on while its role is started anew
        self._leaves = cgroup.claim()  # before the first child: the agent itself moves into a leaf

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run every role that the settings say enough for, until cancelled. The store is written to the end."""
        try:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.store.run)
                async with trio.open_nursery() as inner:
                    await inner.start(adopt)
                    inner.start_soon(self._tell_full_disk)
                    await inner.start(self._keep_board)
                    with ExitStack() as answering:
                        answering.enter_context(self.bus.answer("reload", self._reload))
                        answering.enter_context(self.bus.answer("config", self._config))
                        answering.enter_context(self.bus.answer("profile", self._profile))
                        answering.enter_context(self.bus.answer("selftest", self._selftest))
                        await inner.start(self.supervisor.run, [Role("control", self._control)])
                        if not self.serving.is_set():  # the lab is told the server's URL: no work before there is one
                            notify.status(f"not ready: {self.supervisor.status['control'].error}")
                            await self.serving.wait()
                        for name, role in self._roles().items():
                            if name != "control":
                                await self.supervisor.start(role)
                        self.up.set()
                        self.bus.publish(
                            AgentStarted(
                                version=agent.__version__,
                                ident=self.effective.settings.name,
                                instance=self.store.instance,
                            )
                        )
                        task_status.started()
                        await trio.sleep_forever()
        finally:
            if self._covering is not None:
                await self._covering.leave()
            self.store.close()

    def _role_changed(self, event: RoleChanged) -> None:
        self.bus.publish(event)
        if (event.name, event.state) == ("control", "running"):
            self.serving.set()

    def summary(self) -> str:
        """One line for the supervisor: which roles are in which state."""
        states = ", ".join(f"{name} {status.state}" for name, status in self.supervisor.status.items())
        return f"{self.effective.settings.name}: {states}"

    async def end_orderly(self) -> None:
        """No new run, running ones end; then the outboxes get DELIVER_S. What is undelivered waits on disk."""
        if not self.serving.is_set():
            return  # no role but control was started
        with trio.move_on_after(DELIVER_S):
            await self.up.wait()
            try:
                await self.bus.ask("shut_down", {})
            except ActionError as err:
                log.warning("cannot end runs error=%s", err)  # the role is in backoff; its runs are found at the start
            await self.supervisor.stop("monitors")  # while the store still takes what it tells of the runs it ends
            await self.store.commit()
            await self.deliver()

    async def deliver(self) -> None:
        """Wait until nothing is owed any more, or nothing of it has left for STUCK_S."""
        waiting, since = -1, trio.current_time()
        while waiting and trio.current_time() - since < STUCK_S:
            owed = (await self.store.depths()).items()  # to a peer that the settings do not have any more, too
            now = sum(depth.waiting - depth.held for sink, depth in owed if sink in self.effective.settings.sinks)
            if now != waiting:
                waiting, since = now, trio.current_time()
            if waiting:
                await trio.sleep(0.1)
        if waiting:
            log.warning("undelivered, kept on disk waiting=%d", waiting)

    async def _tell_full_disk(self) -> None:
        while True:
            await self.store.wait_full()
            self.bus.publish(
                Alert(
                    code="disk.full",
                    text=f"{self.store.folder}: the disk is full; new runs are refused, results wait in memory",
                    remedy="Make room; nothing else is needed.",
                    since=time.time(),
                )
            )
            await self.store.wait_room()
            self.bus.publish(AlertCleared(code="disk.full"))

    async def _keep_board(self, *, task_status: trio.TaskStatus[None]) -> None:
        with self.bus.subscribe(*HEARD) as events:
            task_status.started()
            async for event in events:
                self.board.feed(event, time.time())

    async def _config(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> each key's value and origin, secrets as "***"."""
        return dict(self.effective.as_dict())

    async def _profile(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{} -> what the machine is, and which hardware profile fits it now."""
        try:
            _, report = await trio.to_thread.run_sync(survey, self._given)
        except config.ConfigErrors as errors:
            raise ActionError("bad_payload", str(errors)) from errors
        answer: dict[str, Any] = msgspec.to_builtins(report)
        return answer

    async def _selftest(self, payload: dict[str, Any]) -> dict[str, Any]:
        """{only?} -> what each check found."""
        from agent import selftest

        try:
            names = selftest.select(read(payload, SelftestAsked).only)
        except ValueError as err:
            raise ActionError("bad_payload", str(err)) from err
        subject = await trio.to_thread.run_sync(selftest.examine, self._given)
        answer: dict[str, Any] = msgspec.to_builtins(await selftest.run(subject, names))
        return answer

    async def _reload(self, payload: dict[str, Any]) -> dict[str, Any]:
        """Read the settings again; roles whose table changed are restarted. Raises ActionError: nothing has changed."""
        async with self._reloading:  # a role that two restart at once would run twice
            try:
                new = self.load()
                await trio.to_thread.run_sync(_check_rules, new)
            except config.ConfigErrors as errors:
                raise ActionError("bad_payload", str(errors)) from errors
            _warn(new)
            changed = config.diff(self.effective, new)
            needs_restart = [key for key in changed if key.split(".")[0] in NEEDS_RESTART]
            if self.serving.is_set():
                await self.up.wait()
            is_up = self.up.is_set()  # else the roles wait for the port, and are given what holds then
            before, self.effective = self._roles() if is_up else {}, new
            after = self._roles() if is_up else {}
            tables = {key.split(".")[0].split("[")[0] for key in changed}
            for name, role in after.items():
                # One that does not run: it is new, or who asked for the last reload went away in the middle of it.
                if not self.supervisor.runs(name) or tables & set(ROLE_TABLES[name]):
                    await self.supervisor.stop(name)
                    await self.supervisor.start(role)
            for name in before.keys() - after.keys():
                await self.supervisor.stop(name)
            self.store.owe_only(new.settings.sinks)
            rules = await self._reload_rules()
            self.bus.publish(Reloaded())
            log.info("reloaded changed=%s needs_restart=%s", ",".join(changed) or "nothing", ",".join(needs_restart))
            return {"changed": changed, "needs_restart": needs_restart, **rules}

    async def _reload_rules(self) -> Mapping[str, Any]:
        try:
            return await self.bus.ask("reload_rules", {})
        except ActionError as err:  # the role is in backoff, and reads them when it starts
            log.warning("rules not read again error=%s", err)
            return {}

    def _roles(self) -> dict[str, Role]:
        """The roles that the settings say enough for, in the order of their start. Each is imported in its own task."""
        settings = self.effective.settings
        roles = {
            "control": (True, self._control),  # first: what waits for the others is seen, and its URL told to the lab
            "mimir": (bool(settings.mimir.url), self._mimir),
            "polarize": (bool(settings.polarize.url or settings.cibus.url), self._polarize),
            "logs": (True, self._logs),
            "files": (True, self._files),  # both before the suites: a resumed run has its files and logs watched
            "entitlement": (settings.entitlement.enabled is not False, self._entitlement),
            # Once there it stays: the last monitor that is removed is led out like any other.
            "monitors": (bool(settings.monitors.monitor) or "monitors" in self.supervisor.health, self._monitors),
            "eman": (bool(settings.eman.url), self._eman),
            "gator": (True, self._gator),
            "coverage": (True, self._coverage),  # before the suites: it gives runners what they are started with
            "suites": (True, self._suites),
            "seneschal": (bool(settings.seneschal.url), self._seneschal),
        }
        return {name: Role(name, start) for name, (runs, start) in roles.items() if runs}

    async def _control(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.control import role

        settings = self.effective.settings
        control = settings.control
        await role.run(
            self.bus,
            self.store,
            control,
            settings.name,
            health,
            tokens=[(self._token(token.file), token.scope) for token in control.tokens],
            tls=self._server_tls(),
            board=self.board,
            supervisor=self.supervisor,
            up=self.up,
            metrics=self.metrics,
            tell_url=self._tell_url,
            task_status=task_status,
        )

    def _tell_url(self, url: str) -> None:
        self.control_url = url

    def _token(self, name: str) -> str:
        """A token of `control.tokens`; the default one is made when there is none yet."""
        path = self.find(name)
        return own_token(path) if name == DEFAULT_TOKEN else read_token(path)

    def _server_tls(self) -> "ssl.SSLContext | None":
        tls = self.effective.settings.control.tls
        if not tls.cert:
            return None
        key, client_ca = (self.find(name) if name else None for name in (tls.key, tls.client_ca))
        return server_context(self.find(tls.cert), key, client_ca)

    async def _mimir(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.mimir import role

        settings = self.effective.settings
        await role.run(
            self.bus,
            self.store,
            settings.name,
            health,
            dial=self._dial(settings.mimir),
            platform=self._platform(),
            metrics=self.metrics,
            task_status=task_status,
        )

    async def _polarize(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.polarize import role

        settings = self.effective.settings
        await role.run(
            self.bus,
            self.store,
            self._with_paths(settings.polarize),
            self._with_paths(settings.cibus),
            settings.name,
            health,
            random=Random(),
            metrics=self.metrics,
            task_status=task_status,
        )

    async def _logs(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.logs import role

        settings = self.effective.settings.logs
        model = state_dir(self.effective.settings) / "logs.model" if settings.model == "auto" else Path(settings.model)
        await role.run(
            self.bus, self.store, settings, health, model=model, metrics=self.metrics, task_status=task_status
        )

    async def _files(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.files import role

        settings = self.effective.settings.files
        await role.run_files(self.bus, self.store, settings, health, metrics=self.metrics, task_status=task_status)

    async def _entitlement(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.files import role

        settings = self.effective.settings.entitlement
        await role.run_entitlement(self.bus, self.store, settings, health, task_status=task_status)

    async def _gator(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.gator import service

        await service.run(self.bus, self.effective.settings.name, task_status=task_status)

    async def _seneschal(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.seneschal import role

        settings, machine = self.effective.settings, self._platform()
        about = role.About(
            server=machine["server"],
            profile={name: machine[name] for name in ("profile", "arch", "os", "hostname")},
            labels=tuple(machine["labels"]),
        )
        await role.run(
            self.bus,
            self.store,
            settings.seneschal,
            settings.name,
            health,
            dial=self._dial(settings.seneschal),
            about=about,
            metrics=self.metrics,
            task_status=task_status,
        )

    async def _suites(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.suites import role
        from agent.suites.prepare import Machine

        def machine() -> Machine:
            settings = self.effective.settings
            return Machine(
                ident=settings.name,
                labels=settings.labels,
                timeout_factor=settings.timeout_factor,
                leaves=self._leaves,
                project=settings.polarize.project if settings.polarize.url else None,
                ca_file=self.find(settings.tls.ca_file) if settings.tls.ca_file else None,
            )

        await role.run(
            self.bus, self.store, lambda: self.effective.settings.suites, machine, health, task_status=task_status
        )

    async def _monitors(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.monitors import role

        await role.run(
            self.bus,
            self.store,
            lambda: self.effective.settings.monitors,
            self.effective.settings.name,
            health,
            metrics=self.metrics,
            leaves=self._leaves,
            task_status=task_status,
        )

    async def _eman(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.eman import role
        from agent.eman.shake import md5_key

        settings = self.effective.settings
        eman = settings.eman
        name = eman.name or f"agent-{settings.name}"
        if eman.key_file:
            key = read_token(self.find(eman.key_file))
        else:
            key = md5_key(name, read_token(self.find(eman.salt_file))) if eman.salt_file else "none"
        await role.run(
            self.bus,
            self.store,
            eman,
            key,
            name,
            health,
            dial=Dial(url=role.dial_url(eman.url, eman.eio), tls=self._tls(settings.tls)),
            metrics=self.metrics,
            task_status=task_status,
        )

    async def _coverage(self, health: Health, *, task_status: trio.TaskStatus[None]) -> None:
        from agent.coverage import role
        from agent.coverage.sources.named import Sources

        settings = self.effective.settings
        coverage = settings.coverage
        dial = None
        if coverage.enabled:
            url = f"{coverage.admin.rstrip('/')}/agent/attach"
            dial = Dial(url=url, tls=self._tls(settings.tls), headers=tuple(coverage.headers.items()))
        if self._covering is None:
            self._covering = role.Coverage(self.bus, self.store, make=Sources().make, metrics=self.metrics)
        await role.run(self._covering, coverage, settings.name, health, dial=dial, task_status=task_status)

    def _platform(self) -> dict[str, Any]:
        """The props of this machine's TestPlatform vertex (protocols/emissary.md, "Mimir")."""
        settings = self.effective.settings
        return {
            "hostname": socket.gethostname(),
            "arch": platform.machine(),
            "os": _os_name(),
            "profile": self.effective.profile or "none",
            "labels": labels_of(settings.labels),
            "version": agent.__version__,
            "server": self.control_url,
        }

    def _dial(self, peer: SeneschalSettings | MimirSettings) -> Dial:
        token_file = self.find(peer.token_file) if peer.token_file else None
        return Dial(url=peer.url, token_file=token_file, tls=self._tls(peer))

    def _tls(self, peer: SeneschalSettings | MimirSettings | PolarizeSettings | CibusSettings | Tls) -> TlsSettings:
        """The peer's own certificate files, else those of `[tls]`."""
        return TlsSettings(*certificates(self.effective.settings, peer, self.store.folder))

    def _with_paths(self, peer: P) -> P:
        """The settings with every file found, and the certificates of `[tls]` where it has none of its own."""
        tls = self._tls(peer)
        paths = {"ca_file": tls.ca_file, "cert_file": tls.cert_file, "key_file": tls.key_file}
        password = self.find(peer.password_file) if peer.password_file else None
        return msgspec.structs.replace(
            peer, password_file=str(password or ""), **{name: str(path or "") for name, path in paths.items()}
        )

    def find(self, name: str) -> Path:
        """A file that the settings name."""
        return find(name, self.store.folder)


def _os_name() -> str:
    try:
        release = platform.freedesktop_os_release()
    except OSError:
        return platform.system()
    return f"{release.get('ID', '')} {release.get('VERSION_ID', '')}".strip()
